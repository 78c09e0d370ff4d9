"""LoRA layers for answering: fewer operations for the same sums.

With one row a step is hundreds of products of a single vector, and on a CPU what an operation costs
before it computes anything is most of it. mlx-vlm's layer adds four to each matrix: x A, times B,
times the scale, plus. Here the scale is in B already, sum and product are one, and layers that are
given the same x (query, key and value; gate and up) share one product with all their A.

That leaves a small model's tuned step a fifth slower than its base's. Where the adapted matrices
are small, they are added up once, and a tuned step is the base's step over other numbers; a large
model would need a second copy of most of its weights for that.

Sums come out in another order, so the last bits differ. An adapter in either form has to prove
itself like any other, see ``adapter.prove``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backend import mx, nn

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices of one parent that are given the same input."""


class Projection:
    """x A for several layers that are given the same x one after another.

    Args:
        a: (in, R), their A side by side.
        users: how many layers they are.
    """

    def __init__(self, a: mx.array, users: int) -> None:
        self.a, self.users = a, users
        self._x: mx.array | None = None
        self._z: mx.array | None = None
        self._left = 0

    def __call__(self, x: mx.array) -> mx.array:
        if self._z is None or x is not self._x:
            self._x, self._z, self._left = x, x @ self.a, self.users
        z = self._z
        self._left -= 1
        if not self._left:
            # Nothing outlives the step it belongs to.
            self._x = self._z = None
        return z


class JoinedLoRA(nn.Module):
    """A linear layer and its adapter: factor · (base(x) + (x A) B).

    Args:
        linear: the base's own layer.
        projection: gives x A.
        b: (R, out), the scale in it; zero where R is another layer's.
        factor: (out,) with DoRA, None without.
    """

    def __init__(
        self, linear: Any, projection: Projection, b: mx.array, factor: mx.array | None
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = projection.a
        self.lora_b = b
        self._projection = projection
        self._factor = factor

    def __call__(self, x: mx.array) -> mx.array:
        y, z = self.linear(x), self._projection(x)
        if y.dtype == z.dtype:
            y = mx.addmm(y, z, self.lora_b)
        else:
            y = y + (z @ self.lora_b).astype(y.dtype)
        return y if self._factor is None else self._factor.astype(y.dtype) * y


class MergedLoRA(nn.Module):
    """A linear layer and its adapter, added up.

    Args:
        layer: mlx-vlm's, of a base that is not quantised.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.linear = layer.linear
        # What tells it from a layer of the base; the weight is what answers.
        self.lora_a, self.lora_b = layer.lora_a, layer.lora_b
        self.fused = layer.fuse()

    def __call__(self, x: mx.array) -> mx.array:
        return self.fused(x)


def for_answering(layers: Mapping[str, Any], *, merge_bytes: int) -> dict[str, Any]:
    """LoRA layers, as ``lora.take_out`` gives them, in the faster form that fits.

    Args:
        merge_bytes: most bytes for copies of the adapted matrices; with more, or over a quantised
            base, nothing is copied.
    """
    quantised = any(isinstance(layer.linear, nn.QuantizedLinear) for layer in layers.values())
    size = sum(layer.linear.weight.nbytes for layer in layers.values())
    return join(layers) if quantised or size > merge_bytes else merge(layers)


def merge(layers: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA layers, each added to a copy of its matrix."""
    merged = {name: MergedLoRA(layer) for name, layer in layers.items()}
    for layer in merged.values():
        layer.eval()
        mx.eval(layer.parameters())
    return merged


def join(layers: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA layers that share products, and no copy of any matrix.

    They do not learn: an adapter whose tensors change afterwards has to be joined again.
    """
    joined: dict[str, Any] = {}
    for names in _groups(layers):
        chosen = [layers[name] for name in names]
        if "m" in chosen[0] and "bias" in chosen[0].linear:
            # DoRA's factor is not for the bias, which the base's layer has added by then.
            joined |= zip(names, chosen, strict=True)
            continue
        projection = Projection(
            mx.concatenate([layer.lora_a for layer in chosen], axis=1), len(chosen)
        )
        before = 0
        for name, layer in zip(names, chosen, strict=True):
            rank = layer.lora_a.shape[1]
            after = projection.a.shape[1] - before - rank
            b = mx.pad(layer.scale * layer.lora_b, [(before, after), (0, 0)])
            joined[name] = JoinedLoRA(layer.linear, projection, b, _factor(layer))
            before += rank
    for layer in joined.values():
        layer.eval()
        if isinstance(layer, JoinedLoRA):
            mx.eval(layer.lora_a, layer.lora_b, *([] if layer._factor is None else [layer._factor]))
    return {name: joined[name] for name in layers}


def _groups(layers: Mapping[str, Any]) -> list[list[str]]:
    """Names of layers that are given the same input, in the order they are called."""
    found: dict[tuple[str, int], list[str]] = {}
    alone: list[list[str]] = []
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        number = next((n for n, group in enumerate(_GROUPS) if last in group), None)
        if number is None or "bias" in layer.linear:
            alone.append([name])
        else:
            found.setdefault((parent, number), []).append(name)
    return [*found.values(), *alone]


def _factor(layer: Any) -> mx.array | None:
    """DoRA's m / ‖W + scale · A B‖, per output."""
    if "m" not in layer:
        return None
    adapted = layer._dequantized_weight() + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    return layer.m / mx.linalg.norm(adapted, axis=1)
