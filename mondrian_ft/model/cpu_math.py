"""What a training step on a CPU spends its time on, as sums and products.

MLX's CPU backend adds and multiplies five billion numbers a second and exponentiates eighty-five
million (benchmarks/LOG.md), so here an exponential is a polynomial of a few sums and products, and
causal attention leaves out the keys that a block of queries does not see. float32 only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .backend import mx

BLOCK = 128
"""Queries that attend together."""
_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453
_MAGIC = 12_582_912.0
"""1.5 · 2²³: added to a number it leaves the nearest integer in the last bits of the sum."""
_HIDDEN = -1e30
_STRETCH = 1024
"""Keys by which a mask grows."""


def exp(x: mx.array) -> mx.array:
    """e to the x, to three units in the last place near 0 and 1e-5 of the value at -87.

    Below -87 it is 1e-38; above 88 it is wrong. What is not finite stays not finite.
    """
    return exp2(x * _LOG2E)


def exp2(x: mx.array) -> mx.array:
    """2 to the x, to 2e-7 of the value; below -126 it is 1e-38, and from 128 on it is wrong."""
    power = mx.maximum(x, -126.0)
    shifted = power + _MAGIC
    rest = power - (shifted - _MAGIC)
    first, *others = _coefficients()
    value = rest * first + others[0]
    for one in others[1:]:
        value = value * rest + one
    # The integer's bits, moved to where a float has its exponent.
    exponent = mx.left_shift(shifted.view(mx.int32), mx.array(23, mx.int32))
    return (value.view(mx.int32) + exponent).view(mx.float32)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e to the -x)."""
    return 1.0 / (1.0 + exp2(mx.minimum(x * -_LOG2E, 120.0)))


@lru_cache(maxsize=1)
def _coefficients() -> tuple[float, ...]:
    """Of 2 to the x for |x| ≤ ½, highest power first: a fit at Chebyshev's points, weighted so that
    the relative error is even, of a polynomial that is 1 at 0."""
    x = np.cos(np.pi * (np.arange(64) + 0.5) / 64) / 2
    powers = x[:, None] ** np.arange(1, 6)
    found = np.linalg.lstsq(powers / 2.0 ** x[:, None], 1 - 2.0**-x, rcond=None)[0]
    return (*(float(c) for c in found[::-1]), 1.0)


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """silu(gate) · up, and the sigmoid, which the backward pass needs again."""
    s = sigmoid(gate)
    return gate * s * up, s


@swiglu.vjp
def _swiglu_back(primals: Any, cotangents: Any, outputs: Any) -> Any:
    gate, up = primals
    cotangent, s = cotangents[0], outputs[1]
    silu = gate * s
    return cotangent * up * (s + silu * (1 - s)), cotangent * silu


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x (..., D), its last axis divided by its root mean square, times ``weight`` (D,)."""
    found: Any = _normed(x, weight, mx.array(eps, mx.float32))
    return found[0]


@mx.custom_function
def _normed(x: mx.array, weight: mx.array, eps: mx.array) -> tuple[mx.array, mx.array]:
    r = _reciprocal_rms(x, eps)
    return x * r * weight, r


@_normed.vjp
def _normed_back(primals: Any, cotangents: Any, outputs: Any) -> Any:
    x, weight, eps = primals
    above, r = cotangents[0], outputs[1]
    slope = above * weight
    axes = tuple(range(x.ndim - 1))
    return _norm_slope(slope, x * r, r), (above * x * r).sum(axis=axes), mx.zeros_like(eps)


def _reciprocal_rms(x: mx.array, eps: mx.array) -> mx.array:
    return mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) * (1.0 / x.shape[-1]) + eps)


def _norm_slope(slope: mx.array, normed: mx.array, r: mx.array) -> mx.array:
    """The gradient of x, of that of x · r = ``normed``."""
    inner = (slope * normed).sum(axis=-1, keepdims=True) * (1.0 / normed.shape[-1])
    return (slope - normed * inner) * r


def normed_and_turned(
    x: mx.array, weight: mx.array, eps: float, cos: mx.array, sin: mx.array
) -> mx.array:
    """Heads x (B, L, heads, D), normalised as by :func:`rms_norm`, at their rotary positions.

    Args:
        cos, sin: (B, L, 1, D), the signs of a rotation in ``sin`` (see ``decoder.rotary``).
    """
    # The weight within the rotation, which all heads share.
    half = weight.shape[-1] // 2
    swapped = mx.concatenate([weight[half:], weight[:half]])
    found: Any = _turned(x, cos * weight, sin * swapped, mx.array(eps, mx.float32))
    return found[0]


@mx.custom_function
def _turned(x: mx.array, cos: mx.array, sin: mx.array, eps: mx.array) -> list[mx.array]:
    r = _reciprocal_rms(x, eps)
    normed = x * r
    return [normed * cos + _swap(normed) * sin, normed, r]


@_turned.vjp
def _turned_back(primals: Any, cotangents: Any, outputs: Any) -> Any:
    _, cos, sin, eps = primals
    above, (_, normed, r) = cotangents[0], outputs
    slope = above * cos + _swap(above * sin)
    of_cos = (above * normed).sum(axis=2, keepdims=True)
    of_sin = (above * _swap(normed)).sum(axis=2, keepdims=True)
    return _norm_slope(slope, normed, r), of_cos, of_sin, mx.zeros_like(eps)


def _swap(x: mx.array) -> mx.array:
    """The two halves of the last axis exchanged."""
    half = x.shape[-1] // 2
    return mx.concatenate([x[..., half:], x[..., :half]], axis=-1)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, first: int = 0) -> mx.array:
    """Causal attention.

    Args:
        q: (B, L - first, heads, head_dim), the queries of the positions from ``first`` on.
        k, v: (B, L, kv_heads, head_dim); ``heads`` is a multiple of ``kv_heads``.
        scale: of the scores.
        first: position of the first query.

    Returns:
        (B, L - first, heads, head_dim).
    """
    batch, count, heads, size = q.shape
    groups = k.shape[2]
    # The heads that share a key are rows of one product.
    q = q.reshape(batch, count, groups, heads // groups, size).transpose(0, 2, 1, 3, 4)
    # In powers of 2, which are what is computed.
    q = (q * (scale * _LOG2E)).reshape(batch, groups, count * (heads // groups), size)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out = _blocks(heads // groups, first)(q, k, v)
    out = out.reshape(batch, groups, count, heads // groups, size).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, count, heads, size)


@lru_cache(maxsize=256)
def _blocks(share: int, first: int) -> Any:
    """Attention of rows (position, head) for ``share`` heads a key, as a custom function."""

    def ranges(rows: int) -> list[tuple[int, int, int]]:
        """Rows from, to, and the keys that the last of them sees."""
        step = BLOCK * share
        return [
            (at, min(at + step, rows), first + min(at + step, rows) // share)
            for at in range(0, rows, step)
        ]

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        outs, kept, shares = [], [], []
        for start, stop, keys in ranges(q.shape[2]):
            scores = q[:, :, start:stop] @ k[:, :, :keys].swapaxes(-1, -2)
            scores = scores + _mask((stop - start) // share, share, keys)
            weights = exp2(scores - scores.max(axis=-1, keepdims=True))
            # Divided by their sum where there are fewer numbers.
            shares.append(1.0 / weights.sum(axis=-1, keepdims=True))
            outs.append((weights @ v[:, :, :keys]) * shares[-1])
            kept.append(weights)
        return [mx.concatenate(outs, axis=2), mx.concatenate(shares, axis=2), *kept]

    @attend.vjp
    def back(primals: Any, cotangents: Any, outputs: Any) -> Any:
        q, k, v = primals
        out, shares, *kept = outputs
        above = cotangents[0]
        inner = (above * out).sum(axis=-1, keepdims=True) * shares * _LN2
        above, v = above * shares, v * _LN2
        dq: list[mx.array] = []
        dk: mx.array | None = None
        dv: mx.array | None = None
        parts = list(zip(ranges(q.shape[2]), kept, strict=True))
        for (start, stop, keys), weights in reversed(parts):
            piece = above[:, :, start:stop]
            slope = piece @ v[:, :, :keys].swapaxes(-1, -2)
            slope = (slope - inner[:, :, start:stop]) * weights
            dq.append(slope @ k[:, :, :keys])
            dk = _onto(dk, slope.swapaxes(-1, -2) @ q[:, :, start:stop])
            dv = _onto(dv, weights.swapaxes(-1, -2) @ piece)
        return mx.concatenate(dq[::-1], axis=2), dk, dv

    attended: Any = attend
    return lambda q, k, v: attended(q, k, v)[0]


def _onto(total: mx.array | None, part: mx.array) -> mx.array:
    """The sum of gradients of all keys and of the first of them."""
    if total is None:
        return part
    count = part.shape[2]
    return mx.concatenate([total[:, :, :count] + part, total[:, :, count:]], axis=2)


def _mask(count: int, share: int, keys: int) -> mx.array:
    """(count · share, keys) to add to the scores of the last ``count`` positions of ``keys``."""
    before = keys - count
    # Keys before the block are seen by all of it: every mask is a piece of one strip.
    strip = _strip(share, max(1, -(-before // _STRETCH)))
    start = strip.shape[1] - BLOCK - before
    return strip[: count * share, start : start + keys]


@lru_cache(maxsize=16)
def _strip(share: int, stretches: int) -> mx.array:
    """(BLOCK · share, stretches · _STRETCH + BLOCK): the keys before a block, and its own."""
    position = np.repeat(np.arange(BLOCK), share)
    key = np.arange(-stretches * _STRETCH, BLOCK)
    return mx.array(np.where(key[None] > position[:, None], _HIDDEN, 0).astype("f4"))
