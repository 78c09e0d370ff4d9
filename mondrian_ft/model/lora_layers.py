"""LoRA layers that multiply in the activations' type, with a backward pass of their own.

mlx-vlm's layers multiply 16-bit activations by float32 adapters: every input is copied to float32
for it, and the copy is kept for the backward pass. Here the adapters are cast instead. What is
trained, its gradient and the optimizer's state stay float32.

In 16 bits the adapter's part is there before the base's product, which adds it to its float32 sums.
The other way round, as it is usually written, the base's result is rounded first, and whatever is
smaller than half of its last bit is lost when it is added: all of a young adapter (the first update
of a Qwen3-VL-4B lowered the loss by 0.05, and by 0.21 in this order; benchmarks/LOG.md). It is also
the faster one, since a product that adds to something costs no pass over memory of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# mlx-vlm imports MLX, and OpenBLAS has to come before it.
from .backend import ON_CPU, mx, nn  # isort: skip
from . import light_transformers  # isort: skip  # noqa: F401

from mlx_vlm.trainer.peft.lora_layers import LoRALinear

from . import machine


class LoRALayer(LoRALinear):
    """mlx-vlm's ``LoRALinear`` with its products in the type of what comes in."""

    @staticmethod
    def from_base(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> Any:
        """A fresh layer around a dense or quantised matrix."""
        inner = linear.weight.shape[1]
        if isinstance(linear, nn.QuantizedLinear):
            inner = inner * 32 // linear.bits
        layer = LoRALayer(inner, linear.weight.shape[0], r=r, dropout=dropout, scale=scale)
        layer.linear = linear
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        """The adapted product, shape (..., out), of x (..., in)."""
        z = dropped(self.dropout, x) @ self.lora_a.astype(x.dtype)
        added = z @ (self.scale * self.lora_b).astype(x.dtype)
        if x.dtype == mx.float32 or isinstance(self.linear, nn.QuantizedLinear):
            return self.linear(x) + added
        if "bias" in self.linear:
            added = added + self.linear.bias
        return mx.addmm(added, x, self.linear.weight.T)


_drawn = threading.local()


@contextmanager
def drawing_from(key: mx.array | None) -> Iterator[None]:
    """For the length of the block dropout's masks come from this key (2,), call after call, so that
    a forward that runs twice draws the same; None leaves them to the global random state."""
    before = getattr(_drawn, "key", None)
    _drawn.key = key
    try:
        yield
    finally:
        _drawn.key = before


def dropped(dropout: Any, x: mx.array) -> mx.array:
    """``dropout(x)``, with a mask as :func:`drawing_from` says."""
    key, kept = getattr(_drawn, "key", None), dropout._p_1
    if key is None or kept == 1 or not dropout.training:
        return dropout(x)
    _drawn.key, own = mx.random.split(key)
    return (mx.random.bernoulli(kept, x.shape, key=own) * x) * (1 / kept)


def project(layers: Sequence[Any], x: mx.array, onto: mx.array | None = None) -> list[mx.array]:
    """What each of some matrices makes of the same input (T, in), for training.

    ``onto`` (T, out) is added to what the first makes, within its product.

    LoRA layers without dropout have one backward pass together: their gradients of x are added up
    as they are multiplied, and it goes on only when the adapters' own gradients are there. MLX
    evaluates a graph from its ends, where adapters' gradients are wanted last, and would hold what
    they are made of until then.
    """
    if not all(is_plain(layer) for layer in layers):
        made = [layer(x) for layer in layers]
        return made if onto is None else [onto + made[0], *made[1:]]
    if all("_sum" in layer for layer in layers):
        return _project_summed(layers, x, onto)
    scales = [float(layer.scale) for layer in layers]
    count = len(layers)

    def forward(x: mx.array, *rest: mx.array) -> list[mx.array]:
        made, inner = [], []
        adapters, sum_of = rest[: 2 * count], rest[2 * count :]
        for number, layer in enumerate(layers):
            a, b = adapters[2 * number : 2 * number + 2]
            z = x @ a
            before = sum_of[0] if sum_of and number == 0 else None
            made.append(_adapted(layer.linear, x, z, b, scales[number], before))
            inner.append(z)
        return [*made, *inner]

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, adapters = primals[0], primals[1 : 2 * count + 1]
        small = _Small(x, adapters[::2], adapters[1::2], scales, outputs[count:], cotangents)
        below, own = (small.in_turn if x.dtype == mx.float32 else small.side_by_side)(layers)
        (below,) = mx.depends([below], own)
        return (below, *own, *(cotangents[:1] if onto is not None else ()))

    product: Any = mx.custom_function(forward)
    product.vjp(backward)
    adapters = [one.astype(x.dtype) for layer in layers for one in (layer.lora_a, layer.lora_b)]
    return product(x, *adapters, *(() if onto is None else (onto,)))[:count]


def _adapted(
    linear: Any, x: mx.array, z: mx.array, b: mx.array, scale: float, before: mx.array | None
) -> mx.array:
    """``before`` + x Wᵀ + scale · z B."""
    weight = matrix(linear, x).T
    if x.dtype == mx.float32:
        y = x @ weight if before is None else mx.addmm(before, x, weight)
        if "bias" in linear:
            y = y + linear.bias
        return mx.addmm(y, z, b, alpha=scale)
    # See the module's text for the order.
    y = z @ times(scale, b) if before is None else mx.addmm(before, z, b, alpha=scale)
    if "bias" in linear:
        y = y + linear.bias
    return mx.addmm(y, x, weight)


class _Small:
    """The backward pass of :func:`project`: gradients of x (T, in), of each A and each B.

    Args:
        x: (T, in).
        a, b: the adapters' matrices, in the type of x.
        scales: of the adapters.
        z: x A of each.
        above: gradients (T, out) of what each made.
    """

    def __init__(self, x: Any, a: Any, b: Any, scales: Any, z: Any, above: Any) -> None:
        self.x, self.a, self.b, self.scales, self.z, self.above = x, a, b, scales, z, above

    def in_turn(self, layers: Sequence[Any]) -> tuple[mx.array, list[mx.array]]:
        """One matrix after the other."""
        below: Any = None
        own: list[mx.array] = []
        for layer, a, b, scale, z, above in zip(
            layers, self.a, self.b, self.scales, self.z, self.above, strict=False
        ):
            weight = matrix(layer.linear, above)
            below = above @ weight if below is None else mx.addmm(below, above, weight)
            inner = above @ b.T
            below = mx.addmm(below, inner, a.T, alpha=scale)
            own += [scale * (self.x.T @ inner), scale * (z.T @ above)]
        return below, own

    def side_by_side(self, layers: Sequence[Any]) -> tuple[mx.array, list[mx.array]]:
        """The adapters' products together, so that x and its gradient are gone over once."""
        count = len(layers)
        above, z = self.above[:count], self.z[:count]
        inner = [
            one @ times(scale, b).T
            for one, b, scale in zip(above, self.b, self.scales, strict=True)
        ]
        joined = inner[0] if count == 1 else mx.concatenate(inner, axis=1)
        firsts = self.a[0] if count == 1 else mx.concatenate(self.a, axis=1)
        below = joined @ firsts.T
        for layer, one in zip(layers, above, strict=True):
            below = mx.addmm(below, one, matrix(layer.linear, one))
        ranks = [int(a.shape[1]) for a in self.a]
        ends = [sum(ranks[: n + 1]) for n in range(count - 1)]
        own: list[mx.array] = []
        for first, scale, inside, one in zip(
            mx.split(self.x.T @ joined, ends, axis=1), self.scales, z, above, strict=True
        ):
            own += [first, times(scale, inside.T @ one)]
        return below, own


def times(scale: float, x: mx.array) -> mx.array:
    """scale · x; x itself where that is the same, which saves a kernel."""
    return x if scale == 1 else scale * x


@contextmanager
def of_scale_one(layers: Iterable[Any]) -> Iterator[None]:
    """LoRA layers that do not multiply by their scale, for the length of the block: what is put
    into them has been multiplied by it."""
    before = [(layer, layer.scale) for layer in layers]
    try:
        for layer, _ in before:
            layer.scale = 1.0
        yield
    finally:
        for layer, scale in before:
            layer.scale = scale


@contextmanager
def summed(model: Any) -> Iterator[None]:
    """Within the block :func:`project` multiplies by base and adapter added up, once for all rows,
    where that pays: on a CPU, whose small products are slow, and where the sums take little memory.

    Gradients are those of the adapters all the same. They have to stay as they are meanwhile.
    """
    layers = [one for _, one in model.named_modules() if is_plain(one)] if ON_CPU else []
    layers = [
        one
        for one in layers
        if isinstance(one.linear, nn.Linear) and one.linear.weight.dtype == mx.float32
    ]
    if sum(one.linear.weight.nbytes for one in layers) > machine.SUMMED_BYTES:
        layers = []
    for one in layers:
        a, b = one.lora_a, one.lora_b
        # A name that begins with _ holds no parameter.
        one["_sum"] = mx.addmm(one.linear.weight, b.T, a.T, alpha=float(one.scale))
    try:
        yield
    finally:
        for one in layers:
            del one["_sum"]


def _project_summed(layers: Sequence[Any], x: mx.array, onto: mx.array | None) -> list[mx.array]:
    """:func:`project` within :func:`summed`."""
    scales = [float(layer.scale) for layer in layers]
    sums = [layer["_sum"] for layer in layers]
    biases = [layer.linear.bias if "bias" in layer.linear else None for layer in layers]
    count, rank = len(layers), [int(layer.lora_a.shape[1]) for layer in layers]
    ends = [sum(rank[: number + 1]) for number in range(count - 1)]

    def forward(x: mx.array, *rest: mx.array) -> list[mx.array]:
        made = []
        for number, (weight, bias) in enumerate(zip(sums, biases, strict=True)):
            first = rest[2 * count :] if number == 0 else ()
            y = mx.addmm(first[0], x, weight.T) if first else x @ weight.T
            made.append(y if bias is None else y + bias)
        # Thin products side by side: most of one's time is x being laid out for it.
        return [*made, x @ mx.concatenate(list(rest[: 2 * count : 2]), axis=1)]

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, adapters, z = primals[0], primals[1 : 2 * count + 1], outputs[count]
        below: Any = None
        inner: list[mx.array] = []
        for number, weight in enumerate(sums):
            above = cotangents[number]
            below = above @ weight if below is None else mx.addmm(below, above, weight)
            inner.append(above @ (scales[number] * adapters[2 * number + 1]).T)
        of_a = mx.split(x.T @ mx.concatenate(inner, axis=1), ends, axis=1)
        of_b = [
            scale * (part.T @ above)
            for scale, part, above in zip(
                scales, mx.split(z, ends, axis=1), cotangents[:count], strict=True
            )
        ]
        own = [one for pair in zip(of_a, of_b, strict=True) for one in pair]
        (below,) = mx.depends([below], own)
        return (below, *own, *(cotangents[:1] if onto is not None else ()))

    product: Any = mx.custom_function(forward)
    product.vjp(backward)
    adapters = [one for layer in layers for one in (layer.lora_a, layer.lora_b)]
    return product(x, *adapters, *(() if onto is None else (onto,)))[:count]


def matrix(linear: Any, x: mx.array) -> mx.array:
    """The weight (out, in) of a dense or quantised layer, in the type of x."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    # Bound to x: a compiler that sees one expansion in the forward and the backward pass makes it
    # once, and holds the whole expanded model in between.
    (packed,) = mx.depends([linear.weight], [x])
    return mx.dequantize(
        packed,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    ).astype(x.dtype)


def is_plain(layer: Any) -> bool:
    """Whether a layer is a LoRA layer that :func:`project` takes."""
    # Dropout draws a mask for each matrix; then each has an input of its own.
    return type(layer) is LoRALayer and not (layer.training and layer.dropout._p_1 < 1)
