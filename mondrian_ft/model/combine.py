"""Adapters compared and averaged by what they add to the weights, not by their factors.

The update of a matrix is scale · A B, (in, out); it is never formed. Two adapters of ranks r and s
have a difference of rank r + s at most, so everything is computed in matrices of that size, in
float64 after QR factorisations: a difference of two nearly equal updates keeps its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import AdapterError
from . import lora
from .adapter import Adapter
from .lora import LoraSpec
from .targets import in_tower, vision_patterns

VISION_KEY = "vision"
"""What stands for the whole tower where layers have numbers."""


@dataclass(frozen=True)
class Difference:
    """How two updates of one matrix differ; Frobenius norms.

    Attributes:
        name: the matrix.
        norm, other_norm: of each adapter's update; 0 where it does not adapt the matrix.
        difference: of their difference.
        cosine: of the angle between them, -1 to 1; None where one is zero.
        magnitude: of DoRA's magnitudes, the norm of the difference over the first's norm; None
            unless both have them.
    """

    name: str
    norm: float
    other_norm: float
    difference: float
    cosine: float | None
    magnitude: float | None

    @property
    def relative(self) -> float | None:
        """The difference over the first's norm; None where that is zero."""
        return self.difference / self.norm if self.norm else None


def differences(first: Adapter, second: Adapter) -> list[Difference]:
    """Every matrix that either adapts, in layer order, the vision tower's last."""
    names = {name.rsplit(".", 1)[0] for name in (*first.tensors, *second.tensors)}
    decoder = sorted(
        (name for name in names if not in_tower(name)),
        key=lambda name: (lora.layer_number(name), name),
    )
    ordered = [*decoder, *sorted(name for name in names if in_tower(name))]
    return [_difference(name, first, second) for name in ordered]


def by_layer(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """The same over all matrices of each layer, of the tower (``layer`` "vision"), and over all
    of them (``layer`` None) last."""
    layers: dict[int | str | None, list[Difference]] = {}
    for item in found:
        key = VISION_KEY if in_tower(item.name) else lora.layer_number(item.name)
        layers.setdefault(key, []).append(item)
    layers[None] = list(found)
    return [{"layer": layer, **_total(items)} for layer, items in layers.items()]


def _total(items: Sequence[Difference]) -> dict[str, Any]:
    norm, other, difference = (
        float(np.sqrt(sum(getattr(item, key) ** 2 for item in items)))
        for key in ("norm", "other_norm", "difference")
    )
    inner = sum((item.cosine or 0.0) * item.norm * item.other_norm for item in items)
    return {
        "norm": norm,
        "other_norm": other,
        "difference": difference,
        "relative": difference / norm if norm else None,
        "cosine": inner / (norm * other) if norm and other else None,
    }


def _difference(name: str, first: Adapter, second: Adapter) -> Difference:
    pairs = [_pair(name, adapter) for adapter in (first, second)]
    inputs, outputs = next((a.shape[0], b.shape[1]) for a, b in filter(None, pairs))
    (a, b), (c, d) = (pair or (np.zeros((inputs, 0)), np.zeros((0, outputs))) for pair in pairs)
    if (a.shape[0], b.shape[1]) != (c.shape[0], d.shape[1]):
        raise AdapterError(
            f"{name} is {a.shape[0]} × {b.shape[1]} in one adapter and {c.shape[0]} × {d.shape[1]} "
            "in the other; they were made for different bases and cannot be compared"
        )
    left, right = _core(np.hstack([a, c]), np.vstack([b, d]))
    rank = a.shape[1]
    mine, other = left[:, :rank] @ right[:rank], left[:, rank:] @ right[rank:]
    norms = float(np.linalg.norm(mine)), float(np.linalg.norm(other))
    inner = float((mine * other).sum())
    magnitudes = [adapter.tensors.get(f"{name}.m") for adapter in (first, second)]
    magnitude = None
    if magnitudes[0] is not None and magnitudes[1] is not None:
        m, n = (np.array(value, np.float64) for value in magnitudes)
        magnitude = float(np.linalg.norm(m - n) / np.linalg.norm(m))
    return Difference(
        name,
        *norms,
        difference=float(np.linalg.norm(mine - other)),
        cosine=inner / (norms[0] * norms[1]) if norms[0] and norms[1] else None,
        magnitude=magnitude,
    )


def _pair(name: str, adapter: Adapter) -> tuple[np.ndarray, np.ndarray] | None:
    """A (in, rank) and scale · B (rank, out) of a matrix, float64; None if it is not adapted."""
    a, b = (adapter.tensors.get(f"{name}.{part}") for part in ("lora_a", "lora_b"))
    if a is None or b is None:
        return None
    return np.array(a, np.float64), adapter.spec.scale * np.array(b, np.float64)


def _core(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small factors L, R with the norms and angles of the products of a's columns and b's rows.

    a = Q L and b = R P with orthonormal Q and P, so a[:, i] b[i] has the norm of L[:, i] R[i].
    """
    return np.linalg.qr(a)[1], np.linalg.qr(b.T)[1].T


def average(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None
) -> tuple[LoraSpec, dict[str, np.ndarray], float]:
    """The weighted sum of what adapters add to the weights.

    Exact with the ranks added up: the factors stand side by side. (The average of the factors
    would be something else: A₁B₁ + A₂B₂ is not (A₁ + A₂)(B₁ + B₂).) With ``rank`` it is cut to the
    nearest update of that rank, by a singular value decomposition of each matrix.

    Args:
        adapters: two or more, of one base, none of them DoRA.
        weights: one each.
        rank: of the result; None for the sum of the ranks.

    Returns:
        The specification (its scale is 1), the tensors, and the truncation error: Frobenius norm
        of what was cut off over that of the whole update, 0 without ``rank``.

    Raises:
        AdapterError: one of them is DoRA, or their matrices have different shapes.
    """
    for adapter in adapters:
        if adapter.spec.method == "dora":
            raise AdapterError(
                f"{adapter.folder} is a DoRA adapter; its updates are rescaled by magnitudes, so "
                "an average of two is no DoRA adapter of either, and it cannot be averaged here"
            )
    full = sum(adapter.spec.rank for adapter in adapters)
    if rank is not None and rank > full:
        raise AdapterError(
            f"task.rank={rank} is more than the adapters' ranks together, {full}; use {full} or "
            "less, or null to cut nothing off"
        )
    kept = full if rank is None else rank
    names = sorted({name.rsplit(".", 1)[0] for adapter in adapters for name in adapter.tensors})
    tensors: dict[str, np.ndarray] = {}
    lost = whole = 0.0
    for name in names:
        a, b = _stacked(name, adapters, weights, full)
        if rank is not None:
            a, b, cut, total = _truncated(a, b, rank)
            lost, whole = lost + cut, whole + total
        tensors[f"{name}.lora_a"] = a.astype(np.float32)
        tensors[f"{name}.lora_b"] = b.astype(np.float32)
    decoder = [name for name in names if not in_tower(name)]
    layers = {lora.layer_number(name) for name in decoder}
    spec = LoraSpec(
        rank=kept,
        alpha=float(kept),
        dropout=0.0,
        targets=tuple(sorted({name.rsplit(".", 1)[-1] for name in decoder})),
        layers=tuple(sorted(layers)) or None,
        vision=vision_patterns(name for name in names if in_tower(name)),
    )
    return spec, tensors, float(np.sqrt(lost / whole)) if whole else 0.0


def _stacked(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Factors side by side, (in, rank) and (rank, out); zeros where one does not adapt it."""
    pairs = [_pair(name, adapter) for adapter in adapters]
    shapes = {(pair[0].shape[0], pair[1].shape[1]) for pair in pairs if pair is not None}
    if len(shapes) > 1:
        raise AdapterError(f"{name} has several shapes in these adapters: {sorted(shapes)}")
    ((inputs, outputs),) = shapes
    a, b = np.zeros((inputs, rank)), np.zeros((rank, outputs))
    start = 0
    for adapter, pair, weight in zip(adapters, pairs, weights, strict=True):
        end = start + adapter.spec.rank
        if pair is not None:
            a[:, start:end], b[start:end] = pair[0], weight * pair[1]
        start = end
    return a, b


def _truncated(
    a: np.ndarray, b: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The nearest product of this rank, and the squared norms of what was cut off and of all."""
    q, left = np.linalg.qr(a)
    p, right = np.linalg.qr(b.T)
    u, values, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    root = np.sqrt(values[:rank])
    # A matrix with fewer inputs or outputs than the rank: the rest stays zero.
    short = rank - len(root)
    a = np.pad((q @ u[:, :rank]) * root, ((0, 0), (0, short)))
    b = np.pad(root[:, None] * (vt[:rank] @ p.T), ((0, short), (0, 0)))
    return a, b, float((values[rank:] ** 2).sum()), float((values**2).sum())
