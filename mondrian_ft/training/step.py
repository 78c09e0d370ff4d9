"""One update: loss, gradient, clipping and optimizer as one function, compiled on a GPU.

Whether the numbers are finite is decided on the device as well: an update whose loss or gradient
is not leaves weights and optimizer as they were, so nobody has to wait for the answer before the
next step can be queued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..model.backend import ON_CPU, mx
from ..model.qwen3_vl import Inputs
from .loss import token_losses

Batch = tuple[Inputs, mx.array, mx.array]
"""What ``loss.device_batch`` makes: inputs, positions, wanted tokens."""


@dataclass(frozen=True)
class Stepped:
    """What one update gave, not yet waited for; each a float32 scalar but ``applied``.

    Attributes:
        loss: mean cross-entropy of the trained tokens before the update.
        grad_norm: global norm of the gradient before clipping.
        applied: whether the weights were changed; not when loss or norm is not finite.
    """

    loss: mx.array
    grad_norm: mx.array
    applied: mx.array


class UpdateStep:
    """Updates the trainable parameters of a backbone's model.

    Args:
        backbone: the forward.
        optimizer: an MLX optimizer that was initialised with the trainable parameters.
        max_grad_norm: global norm the gradient is clipped to; 0 leaves it as it is.
        checkpoint: recompute layers in the backward pass.
        compiled: None for what the device gains from: yes on a GPU, no on a CPU.
        ordered: bound what the backward pass holds (see `decoder.kept`); None as ``compiled``.
    """

    def __init__(
        self,
        backbone: Any,
        optimizer: Any,
        *,
        max_grad_norm: float = 1.0,
        checkpoint: bool = False,
        compiled: bool | None = None,
        ordered: bool | None = None,
    ) -> None:
        self.backbone = backbone
        self.model = backbone.model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.checkpoint = checkpoint
        self.compiled = not ON_CPU if compiled is None else compiled
        self.ordered = self.compiled if ordered is None else ordered
        self._state: Any = None
        self._whole = self._maybe_compiled(self._update_of_one)
        self._gradient = self._maybe_compiled(self._gradient_of_one)
        self._finish = self._maybe_compiled(self._apply)

    def __call__(self, batches: Sequence[Batch], count: int) -> Stepped:
        """One update from micro-batches with ``count`` trained tokens among them.

        The gradient is that of the mean over all trained tokens of the update, however they are
        divided into micro-batches.
        """
        self.model.train()
        parameters = self.model.trainable_parameters()
        if self.optimizer.state is not self._state:
            # A restored state lacks the parts of the tree that hold no parameters.
            self.optimizer.init(parameters)
        state = self.optimizer.state
        share = mx.array(1.0 / count, mx.float32)
        try:
            if len(batches) == 1:
                done = self._whole(parameters, state, share, *_flat(batches[0]))
            else:
                done = self._accumulated(batches, parameters, state, share)
        except BaseException:
            # Tracing has put placeholders into the model.
            self.model.update(parameters)
            self.optimizer.state = state
            raise
        new, state, loss, norm, applied = done
        self.model.update(new)
        self.optimizer.state = self._state = state
        return Stepped(loss, norm, applied)

    def _accumulated(
        self, batches: Sequence[Batch], parameters: Any, state: Any, share: mx.array
    ) -> Any:
        from mlx.utils import tree_map

        total, grads = mx.array(0.0), None
        for batch in batches:
            loss, grad = self._gradient(parameters, share, *_flat(batch))
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            total = total + loss
            # Evaluated one by one: accumulation is there to hold one micro-batch at a time.
            mx.eval(total, grads)
        return self._finish(parameters, state, total, grads)

    def _update_of_one(self, parameters: Any, state: Any, share: mx.array, *flat: Any) -> Any:
        loss, grads = self._gradient_of_one(parameters, share, *flat)
        return self._apply(parameters, state, loss, grads)

    def _gradient_of_one(self, parameters: Any, share: mx.array, *flat: Any) -> Any:
        inputs, where, wanted = _unflat(flat)

        def loss(parameters: Any) -> mx.array:
            self.model.update(parameters)
            losses = token_losses(
                self.backbone,
                inputs,
                where,
                wanted,
                checkpoint=self.checkpoint,
                ordered=self.ordered,
            )
            return losses.sum() * share

        return mx.value_and_grad(loss)(parameters)

    def _apply(self, parameters: Any, state: Any, loss: mx.array, grads: Any) -> Any:
        from mlx.optimizers import clip_grad_norm
        from mlx.utils import tree_map

        # A bound no norm reaches leaves the gradient alone and still measures it.
        clipped, norm = clip_grad_norm(grads, self.max_grad_norm or math.inf)
        if self.max_grad_norm == 0:
            clipped = grads
        applied = mx.isfinite(loss) & mx.isfinite(norm)
        self.optimizer.state = tree_map(lambda value: value, state)
        new = self.optimizer.apply_gradients(clipped, parameters)

        def choose(fresh: mx.array, before: mx.array) -> mx.array:
            return mx.where(applied, fresh, before)

        new = tree_map(choose, new, parameters)
        following = tree_map(choose, self.optimizer.state, state)
        return new, following, loss, norm, applied

    def _maybe_compiled(self, work: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiled:
            return work
        # Dropout draws from the global random state, which a compiled function has to be told of.
        return mx.compile(work, inputs=[mx.random.state], outputs=[mx.random.state])


def _flat(batch: Batch) -> tuple[Any, ...]:
    inputs, where, wanted = batch
    pictures = (
        [] if inputs.features is None else [inputs.image_index, inputs.features, *inputs.deepstack]
    )
    return where, wanted, inputs.tokens, inputs.positions, pictures


def _unflat(flat: tuple[Any, ...]) -> Batch:
    where, wanted, tokens, positions, pictures = flat
    inputs = Inputs(tokens, positions)
    if pictures:
        index, features, *deepstack = pictures
        inputs = replace(inputs, image_index=index, features=features, deepstack=tuple(deepstack))
    return inputs, where, wanted
