"""LoRA layers that multiply in the activations' type, with a backward pass of their own.

mlx-vlm's layers multiply 16-bit activations by float32 adapters: every input is copied to float32
for it, and the copy is kept for the backward pass. Here the adapters are cast instead. What is
trained, its gradient and the optimizer's state stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        z = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return self.linear(x) + z @ (self.scale * self.lora_b).astype(x.dtype)


def project(layers: Sequence[Any], x: mx.array, onto: mx.array | None = None) -> list[mx.array]:
    """What each of some matrices makes of the same input (T, in), for training.

    ``onto`` (T, out) is added to what the first makes, within its product.

    LoRA layers without dropout have one backward pass together: their gradients of x are added up
    as they are multiplied, and it goes on only when the adapters' own gradients are there. MLX
    evaluates a graph from its ends, where adapters' gradients are wanted last, and would hold what
    they are made of until then.
    """
    if not all(_plain(layer) for layer in layers):
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
            weight = matrix(layer.linear, x).T
            y = mx.addmm(sum_of[0], x, weight) if sum_of and number == 0 else x @ weight
            if "bias" in layer.linear:
                y = y + layer.linear.bias
            made.append(mx.addmm(y, z, b, alpha=scales[number]))
            inner.append(z)
        return [*made, *inner]

    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, adapters = primals[0], primals[1 : 2 * count + 1]
        below: Any = None
        own: list[mx.array] = []
        for number, layer in enumerate(layers):
            a, b = adapters[2 * number : 2 * number + 2]
            above, z, scale = cotangents[number], outputs[count + number], scales[number]
            weight = matrix(layer.linear, above)
            below = above @ weight if below is None else mx.addmm(below, above, weight)
            inner = above @ b.T
            below = mx.addmm(below, inner, a.T, alpha=scale)
            own += [scale * (x.T @ inner), scale * (z.T @ above)]
        (below,) = mx.depends([below], own)
        return (below, *own, *(cotangents[:1] if onto is not None else ()))

    product: Any = mx.custom_function(forward)
    product.vjp(backward)
    adapters = [one.astype(x.dtype) for layer in layers for one in (layer.lora_a, layer.lora_b)]
    return product(x, *adapters, *(() if onto is None else (onto,)))[:count]


@contextmanager
def summed(model: Any) -> Iterator[None]:
    """Within the block :func:`project` multiplies by base and adapter added up, once for all rows,
    where that pays: on a CPU, whose small products are slow, and where the sums take little memory.

    Gradients are those of the adapters all the same. They have to stay as they are meanwhile.
    """
    layers = [one for _, one in model.named_modules() if _plain(one)] if ON_CPU else []
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


def _plain(layer: Any) -> bool:
    # Dropout draws a mask for each matrix; then each has an input of its own.
    return type(layer) is LoRALayer and not (layer.training and layer.dropout._p_1 < 1)
