"""LoRA layers for answering: fewer operations for the same sums.

With one row a step is hundreds of products of a single vector, and on a CPU what an operation costs
before it computes anything is most of it. mlx-vlm's layer adds four to each matrix: x A, times B,
times the scale, plus. Here the scale is in B already, sum and product are one, and layers that are
given the same x (query, key and value; gate and up) share one product with all their A.

That leaves a small model's tuned step a fifth slower than its base's. Where the adapted matrices
are small, they are added up once, and a tuned step is the base's step over other numbers; a large
model would need a second copy of most of its weights for that.

Rows of several adapters in one batch cannot have their own copies. They share the base's product,
and beside it each row has its own adapter's (:func:`mix`).

Sums come out in another order, so the last bits differ. An adapter in either form has to prove
itself like any other, see ``adapter.prove``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .backend import mx, nn

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices of one parent that are given the same input."""


class Rows:
    """Whose adapter each row of a batch has; the layers of :func:`mix` look it up here.

    Args:
        adapters: how many there are. Row by row a number from 0 says which it has, and this very
            number that it has none.

    Attributes:
        arrays: what changes with the rows, for ``decode.Steps``: ``row`` (B,) int32, and for each
            arrangement of A's columns (B, 1, R), true in the columns that are the row's own.
    """

    def __init__(self, adapters: int) -> None:
        self.adapters = adapters
        self.arrays: dict[str, mx.array] = {}
        self._owners: dict[str, np.ndarray] = {}

    def columns(self, counts: Sequence[int]) -> str:
        """The name of an arrangement: so many columns of each adapter, one after another."""
        name = ",".join(map(str, counts))
        self._owners[name] = np.repeat(np.arange(self.adapters), counts)
        return name

    def put(self, which: Sequence[int]) -> None:
        """Say whose each row is; before the model is called, and for its very number of rows."""
        row = np.asarray(which, np.int32)
        self.arrays["row"] = mx.array(row)
        for name, owners in self._owners.items():
            self.arrays[name] = mx.array(row[:, None, None] == owners)


class Projection:
    """x A for several layers that are given the same x one after another.

    Args:
        a: (in, R), their A side by side, of one adapter after another.
        users: how many layers they are.
        rows, columns: of several adapters: whose rows and whose columns they are. Elsewhere than in
            the row's own columns, x A is zero.
    """

    def __init__(
        self, a: mx.array, users: int, rows: Rows | None = None, columns: str = ""
    ) -> None:
        self.a, self.users = a, users
        self._rows, self._columns = rows, columns
        self._x: mx.array | None = None
        self._z: mx.array | None = None
        self._left = 0

    def __call__(self, x: mx.array) -> mx.array:
        if self._z is None or x is not self._x:
            self._x, self._z, self._left = x, self._product(x), self.users
        z = self._z
        self._left -= 1
        if not self._left:
            # Nothing outlives the step it belongs to.
            self._x = self._z = None
        return z

    def _product(self, x: mx.array) -> mx.array:
        z = x @ self.a
        if self._rows is None:
            return z
        # Not a product with 0 and 1: another adapter's number may be too large to be one.
        return mx.where(self._rows.arrays[self._columns], z, mx.array(0, z.dtype))


class JoinedLoRA(nn.Module):
    """A linear layer and its adapter, or each row's: factor · (base(x) + (x A) B) + rest.

    Args:
        linear: the base's own layer.
        projection: gives x A.
        b: (R, out), the scale in it; zero where R is another layer's.
        factor: DoRA's, (out,), or (adapters + 1, out) of which each row takes its own; None
            without DoRA.
        rest: like ``factor``: what the factor would take from the base's bias; None without one.
        rows: whose the rows are, with several adapters.
    """

    def __init__(
        self,
        linear: Any,
        projection: Projection,
        b: mx.array,
        factor: mx.array | None,
        rest: mx.array | None,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = projection.a
        self.lora_b = b
        self._projection = projection
        self._factor, self._rest, self._rows = factor, rest, rows

    def __call__(self, x: mx.array) -> mx.array:
        y, z = self.linear(x), self._projection(x)
        if y.dtype == z.dtype:
            y = mx.addmm(y, z, self.lora_b)
        else:
            y = y + (z @ self.lora_b).astype(y.dtype)
        if self._factor is not None:
            y = self._own(self._factor).astype(y.dtype) * y
        if self._rest is not None:
            y = y + self._own(self._rest).astype(y.dtype)
        return y

    def _own(self, values: mx.array) -> mx.array:
        if self._rows is None:
            return values
        return values[self._rows.arrays["row"]][:, None]


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
    return _joined([layers], None)


def mix(adapters: Sequence[Mapping[str, Any]], rows: Rows) -> dict[str, Any]:
    """LoRA layers of several adapters of one model, for batches in which each row has its own.

    The base's product is one for all rows; beside it go all the A and all the B in one product
    each, and what is another adapter's is zero. A row without an adapter gets the base's numbers.

    Args:
        adapters: each as ``lora.take_out`` gives it; methods, ranks and matrices may differ.
        rows: says at each call whose the rows are.
    """
    return _joined(adapters, rows)


def _joined(adapters: Sequence[Mapping[str, Any]], rows: Rows | None) -> dict[str, Any]:
    union = {name: layer for layers in adapters for name, layer in layers.items()}
    joined: dict[str, Any] = {}
    for names in _groups(union):
        # Every A that is given this input, and its place: adapter by adapter.
        parts = [
            (number, name, layers[name])
            for number, layers in enumerate(adapters)
            for name in names
            if name in layers
        ]
        counts = [
            sum(layer.lora_a.shape[1] for of, _, layer in parts if of == number)
            for number in range(len(adapters))
        ]
        a = mx.concatenate([layer.lora_a for _, _, layer in parts], axis=1)
        columns = "" if rows is None else rows.columns(counts)
        projection = Projection(a, len(names), rows, columns)
        for name in names:
            linear = union[name].linear
            b = mx.concatenate(
                [
                    layer.scale * layer.lora_b
                    if of == name
                    else mx.zeros((layer.lora_a.shape[1], linear.weight.shape[0]), a.dtype)
                    for _, of, layer in parts
                ]
            )
            factor, rest = _factors([layers.get(name) for layers in adapters], linear, rows)
            joined[name] = JoinedLoRA(linear, projection, b, factor, rest, rows)
    for layer in joined.values():
        layer.eval()
        known = [one for one in (layer._factor, layer._rest) if one is not None]
        mx.eval(layer.lora_a, layer.lora_b, *known)
    return {name: joined[name] for name in union}


def _groups(layers: Mapping[str, Any]) -> list[list[str]]:
    """Names of layers that are given the same input."""
    found: dict[tuple[str, int], list[str]] = {}
    alone: list[list[str]] = []
    for name in layers:
        parent, _, last = name.rpartition(".")
        number = next((n for n, group in enumerate(_GROUPS) if last in group), None)
        if number is None:
            alone.append([name])
        else:
            found.setdefault((parent, number), []).append(name)
    return [*found.values(), *alone]


def _factors(
    layers: Sequence[Any | None], linear: Any, rows: Rows | None
) -> tuple[mx.array | None, mx.array | None]:
    """DoRA's factor of one matrix for each adapter, and what it would take from the base's bias.

    The bias is the base's and is not multiplied: f (W x + b) + (1 - f) b.
    """
    if not any(layer is not None and "m" in layer for layer in layers):
        return None, None
    ones = mx.ones((linear.weight.shape[0],), mx.float32)
    each = [_factor(layer) if layer is not None and "m" in layer else ones for layer in layers]
    # The last is for rows without an adapter.
    factor = each[0] if rows is None else mx.stack([*each, ones])
    return factor, (1 - factor) * linear.bias if "bias" in linear else None


def _factor(layer: Any) -> mx.array:
    """DoRA's m / ‖W + scale · A B‖, per output."""
    adapted = layer._dequantized_weight() + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    return layer.m / mx.linalg.norm(adapted, axis=1)
