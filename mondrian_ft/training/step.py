"""One update: loss, gradient, clipping and optimizer as one function, compiled on a GPU.

Whether the numbers are finite and within their limits is decided on the device as well: an update
whose loss or gradient is not leaves weights and optimizer as they were, so nobody has to wait for
the answer before the next step can be queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..model import cuda_train, joined, lanes
from ..model.backend import ON_CPU, mx
from ..model.lora_layers import LoRALayer, of_scale_one, summed, times
from ..model.qwen3_vl import Inputs
from .loss import losses_and_hits

Batch = tuple[Any, mx.array, mx.array]
"""What ``loss.device_batch`` makes: inputs, positions, wanted tokens."""
Parts = Sequence[Batch]
"""A micro-batch, divided into what is computed apart (see ``loss.device_parts``)."""

ELEMENTWISE = ("AdamW", "Adam", "SGD", "Lion", "RMSprop", "Adagrad", "AdaDelta", "Adamax")
"""MLX's optimizers to which it makes no difference which array a number is in."""


@dataclass(frozen=True)
class Stepped:
    """What one update gave, not yet waited for; each a float32 scalar but ``applied``.

    Attributes:
        loss: mean cross-entropy of the trained tokens before the update.
        grad_norm: global norm of the gradient before clipping.
        applied: whether the weights were changed; not when loss or norm is not finite or above its
            limit.
        correct: trained tokens that were the likeliest ones; int32.
    """

    loss: mx.array
    grad_norm: mx.array
    applied: mx.array
    correct: mx.array


class UpdateStep:
    """Updates the trainable parameters of a backbone's model.

    What is trained are hundreds of small arrays, and an optimizer that takes them one by one starts
    thousands of kernels a step. Where the optimizer treats every number alike (:data:`ELEMENTWISE`)
    all of them are one vector here, and the model and ``optimizer.state`` get views of it. Others
    (Muon, which takes matrices, and LoRA+, two optimizers in one) get them one by one.

    Args:
        backbone: the forward.
        optimizer: an MLX optimizer that was initialised with the trainable parameters.
        max_grad_norm: global norm the gradient is clipped to; 0 leaves it as it is.
        checkpoint: recompute layers in the backward pass.
        compiled: None for what is best: yes on a GPU, if the backbone can be; no on a CPU.
        summed: sums loss, right tokens and gradient over the processes that train together.
    """

    def __init__(
        self,
        backbone: Any,
        optimizer: Any,
        *,
        max_grad_norm: float = 1.0,
        checkpoint: bool = False,
        compiled: bool | None = None,
        summed: Callable[[mx.array, mx.array, Any], tuple[mx.array, mx.array, Any]] | None = None,
    ) -> None:
        self.backbone = backbone
        self.summed = summed
        self.model = backbone.model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.checkpoint = checkpoint
        gains = not ON_CPU and getattr(backbone, "compiles", True)
        self.compiled = gains if compiled is None else compiled
        self._shapes: list[tuple[str, tuple[int, ...]]] = []
        self._places: list[tuple[Any, str]] = []
        # What all trained layers multiply by; 1 where there is no such one.
        self._scale = 1.0
        self._given: tuple[Any, Any] = (None, None)
        self._vector: tuple[Any, Any] = (None, None)
        self._as_one = type(optimizer).__name__ in ELEMENTWISE
        if cuda_train.fits(backbone.dtype) and hasattr(backbone, "text"):
            # Only there do layers ask for joined products.
            joined.join(backbone.text.layers)
        self._whole = self._maybe_compiled(self._update_of_one)
        self._gradient = self._maybe_compiled(self._gradient_of_one)
        self._finish = self._maybe_compiled(self._apply)

    def __call__(
        self,
        batches: Sequence[Parts],
        count: int,
        limits: tuple[float, float] = (math.inf, math.inf),
    ) -> Stepped:
        """One update from micro-batches with ``count`` trained tokens among them.

        The gradient is that of the mean over all trained tokens of the update, however they are
        divided into micro-batches. Nothing is waited for but the micro-batches but one. ``limits``
        are the highest loss and gradient norm that are applied.
        """
        # An evaluation leaves layers in its mode, also such as it had taken out of the model.
        trained = [module for module, _ in self._places]
        if not trained or not all(one.training for one in (self.model, *trained)):
            self.model.train()
        before = self.model.trainable_parameters()
        state = self.optimizer.state
        share, most = mx.array(1.0 / count, mx.float32), mx.array(limits, mx.float32)
        try:
            values, moments = self._gathered(before)
            if len(batches) == 1 and self.summed is None:
                parts = [_flat(part) for part in batches[0]]
                done = self._whole(values, moments, share, most, parts)
            else:
                done = self._accumulated(batches, values, moments, share, most)
        except BaseException:
            # Tracing has put placeholders into the model.
            self.model.update(before)
            self.optimizer.state = state
            raise
        values, moments, *told = done
        self._publish(values, moments)
        return Stepped(*told)

    def arrays(self) -> list[Any]:
        """What holds the parameters and the optimizer's state, for ``mx.eval``."""
        return list(self._vector)

    # --- parameters and state as vectors ----------------------------------------------------

    def _gathered(self, parameters: Any) -> tuple[Any, Any]:
        """Parameters and state as vectors; those of the last step if nobody has put in others.

        With an optimizer that has to tell them apart, a list of them and its own state.
        """
        from mlx.utils import tree_flatten

        flat: list[Any] = tree_flatten(parameters)  # pyright: ignore
        if not self._as_one:
            # A restored state lacks the parts of the tree that hold no parameters.
            self.optimizer.init(parameters)
            self._know(flat)
            return [value for _, value in flat], self.optimizer.state
        mine = self._given[0]
        if (
            mine is not None
            and self.optimizer.state is self._given[1]
            and len(flat) == len(mine)
            and all(a is b for (_, a), b in zip(flat, mine, strict=True))
        ):
            return self._vector
        # A restored state lacks the parts of the tree that hold no parameters.
        self.optimizer.init(parameters)
        self._know(flat)
        values = _joined([value for _, value in flat])
        state = self.optimizer.state
        moments = {"step": state["step"]}
        if "learning_rate" in state:
            moments["learning_rate"] = state["learning_rate"]
        own: list[Any] = [_at(state, name) for name, _ in flat]
        moments["vector"] = {key: _joined([one[key] for one in own]) for key in own[0]}
        return values, moments

    def _know(self, flat: Sequence[tuple[str, mx.array]]) -> None:
        """Names, shapes and places of the parameters."""
        self._shapes = [(name, tuple(value.shape)) for name, value in flat]
        found = [name.rpartition(".") for name, _ in flat]
        self._places = [(_at(self.model, where), name) for where, _, name in found]
        scales = {
            float(module.scale) if type(module) is LoRALayer else 0.0 for module, _ in self._places
        }
        self._scale = scales.pop() if self._as_one and len(scales) == 1 else 1.0
        if self._scale <= 0:
            self._scale = 1.0

    def _publish(self, values: Any, moments: Any) -> None:
        """Put views of the vectors into the model and the optimizer."""
        from mlx.utils import tree_unflatten

        parts = self._parts(values) if self._as_one else values
        self._put(parts)
        if not self._as_one:
            self.optimizer.state = moments
            self._vector = (values, moments)
            return
        kinds = {key: self._parts(vector) for key, vector in moments["vector"].items()}
        own = [{key: found[n] for key, found in kinds.items()} for n in range(len(parts))]
        state = {key: value for key, value in moments.items() if key != "vector"}
        state |= tree_unflatten(self._named(own))  # pyright: ignore
        self.optimizer.state = state
        self._given, self._vector = (parts, state), (values, moments)

    def _put(self, parts: Sequence[Any]) -> None:
        """Put tensors into the model, in the order of ``_shapes``."""
        for (module, name), part in zip(self._places, parts, strict=True):
            module[name] = part

    def _parts(self, vector: mx.array) -> list[mx.array]:
        ends, end = [], 0
        for _, shape in self._shapes[:-1]:
            end += math.prod(shape)
            ends.append(end)
        pieces = mx.split(vector, ends)
        return [
            piece.reshape(shape) for piece, (_, shape) in zip(pieces, self._shapes, strict=True)
        ]

    def _named(self, parts: list[Any]) -> list[tuple[str, Any]]:
        return [(name, part) for (name, _), part in zip(self._shapes, parts, strict=True)]

    # --- the work ---------------------------------------------------------------------------

    def _accumulated(
        self,
        batches: Sequence[Parts],
        values: Any,
        moments: Any,
        share: mx.array,
        most: mx.array,
    ) -> Any:
        from mlx.utils import tree_map

        total, correct, gradient = mx.array(0.0), mx.array(0), None
        for batch in batches:
            loss, right, more = self._gradient(values, share, [_flat(part) for part in batch])
            gradient = more if gradient is None else tree_map(mx.add, gradient, more)
            total, correct = total + loss, correct + right
            # Evaluated one by one: accumulation is there to hold one micro-batch at a time.
            mx.eval(total, correct, gradient)
        if self.summed is not None:
            if gradient is None:
                # Fewer rows than processes were left for this update.
                gradient = tree_map(mx.zeros_like, values)
            total, correct, gradient = self.summed(total, correct, gradient)
        return self._finish(values, moments, most, total, correct, gradient)

    def _update_of_one(
        self, values: Any, moments: Any, share: mx.array, most: mx.array, flat: Any
    ) -> Any:
        loss, correct, gradient = self._gradient_of_one(values, share, flat)
        return self._apply(values, moments, most, loss, correct, gradient)

    def _gradient_of_one(self, values: Any, share: mx.array, flat: Any) -> Any:
        dtype = self.backbone.dtype
        # Cast once what is multiplied with activations, which is in their type anyhow. DoRA's
        # magnitudes stay float32: in 16 bits a step of theirs would change nothing.
        scale = self._scale if dtype != mx.float32 else 1.0
        # A's and B's share of it, so that no product has to multiply by it again.
        root = math.sqrt(scale)
        parts = self._parts(times(root, values).astype(dtype)) if self._as_one else values
        if dtype != mx.float32:
            exact = self._parts(values) if self._as_one else values
            cast = [name.endswith((".lora_a", ".lora_b")) for name, _ in self._shapes]
            parts = [
                a.astype(dtype) if fits else b
                for a, b, fits in zip(parts, exact, cast, strict=True)
            ]
        at_a_time = lanes.count(len(flat))
        found: list[Any] = []
        self._put(parts)
        once = [module for module, _ in self._places] if scale != 1 else []
        with summed(self.model), of_scale_one(once):
            for number, part in enumerate(flat):
                given = parts
                if number >= at_a_time:
                    # It waits for the one before it in its lane, or all rows would be held at once.
                    given = mx.depends(parts, found[number - at_a_time])
                with lanes.lane(number, at_a_time):
                    found.append(self._gradient_of_part(given, share, part))
        # In the order of the rows, so that no sum depends on the number of lanes.
        value, right, *gradient = found[0]
        for more, hits, *grads in found[1:]:
            value, right = value + more, right + hits
            gradient = [a + b for a, b in zip(gradient, grads, strict=True)]
        return value, right, times(root, gradient[0]) if self._as_one else gradient

    def _gradient_of_part(self, parts: list[mx.array], share: mx.array, part: Any) -> list[Any]:
        """Loss, hits and the gradient, as a vector or one by one, of what is computed apart."""

        def loss(parts: list[mx.array]) -> tuple[mx.array, mx.array]:
            self._put(parts)
            inputs, where, wanted = _unflat(part)
            losses, hits = losses_and_hits(
                self.backbone, inputs, where, wanted, checkpoint=self.checkpoint
            )
            return losses.sum() * share, hits.sum()

        (value, right), grads = mx.value_and_grad(loss)(parts)
        if not self._as_one:
            return [value, right, *(grad.astype(mx.float32) for grad in grads)]
        return [value, right, _joined(grads).astype(mx.float32)]

    def _apply(
        self,
        values: Any,
        moments: Any,
        most: mx.array,
        loss: mx.array,
        correct: mx.array,
        gradient: Any,
    ) -> Any:
        from mlx.utils import tree_flatten, tree_map, tree_unflatten

        whole = [gradient] if self._as_one else gradient
        squares = [mx.square(part).sum() for part in whole]
        norm = mx.sqrt(sum(squares[1:], squares[0]))
        if self.max_grad_norm:
            factor = mx.minimum(self.max_grad_norm / (norm + 1e-6), 1.0)
            whole = [part * factor for part in whole]
        applied = mx.isfinite(loss) & mx.isfinite(norm) & (loss <= most[0]) & (norm <= most[1])
        self.optimizer.state = tree_map(lambda value: value, moments)

        def choose(fresh: mx.array, before: mx.array) -> mx.array:
            return mx.where(applied, fresh, before)

        if self._as_one:
            given = {"vector": values}
            new = self.optimizer.apply_gradients({"vector": whole[0]}, given)["vector"]
            chosen: Any = choose(new, values)
        else:
            given = tree_unflatten(self._named(values))
            new = self.optimizer.apply_gradients(tree_unflatten(self._named(whole)), given)
            fresh: dict[str, mx.array] = dict(tree_flatten(new))  # pyright: ignore
            chosen = [
                choose(fresh[name], before)
                for (name, _), before in zip(self._shapes, values, strict=True)
            ]
        following = tree_map(choose, self.optimizer.state, moments)
        return chosen, following, loss, norm, applied, correct

    def _maybe_compiled(self, work: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiled:
            return work
        # Dropout draws from the global random state, which a compiled function has to be told of.
        return mx.compile(work, inputs=[mx.random.state], outputs=[mx.random.state])


def _joined(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([array.reshape(-1) for array in arrays])


def _at(tree: Any, name: str) -> Any:
    for part in name.split(".") if name else ():
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _flat(batch: Batch) -> tuple[Any, ...]:
    inputs, where, wanted = batch
    if not isinstance(inputs, Inputs) or inputs.unseen:
        # Nothing that is compiled, see ``Qwen3VL.compiles``.
        return where, wanted, inputs
    pictures = (
        [] if inputs.features is None else [inputs.image_index, inputs.features, *inputs.deepstack]
    )
    return where, wanted, inputs.tokens, inputs.positions, pictures


def _unflat(flat: tuple[Any, ...]) -> Batch:
    if len(flat) == 3:
        return flat[2], flat[0], flat[1]
    where, wanted, tokens, positions, pictures = flat
    inputs = Inputs(tokens, positions)
    if pictures:
        index, features, *deepstack = pictures
        inputs = replace(inputs, image_index=index, features=features, deepstack=tuple(deepstack))
    return inputs, where, wanted
