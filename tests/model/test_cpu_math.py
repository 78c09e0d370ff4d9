"""Sums and products in place of exponentials: as exact as float32 needs them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mondrian_ft.model import cpu_math, decoder
from mondrian_ft.model.backend import mx


def test_exponentials_are_right_and_stay_finite_or_not() -> None:
    """Against float64, over the whole range that a softmax needs."""
    x = np.linspace(-87, 0, 1_000_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    off = np.abs(np.array(cpu_math.exp(mx.array(x))) - exact) / exact
    assert off.max() < 5e-6
    assert off[x > -10].max() < 6e-7
    special = np.array(cpu_math.exp(mx.array([-math.inf, -1e30, 0.0, math.nan, math.inf])))
    assert special[0] < 2e-38
    assert special[1] < 2e-38
    assert special[2] == 1
    assert not np.isfinite(special[3:]).any()


def test_powers_of_two_are_right() -> None:
    """To three units in the last place, and exactly at whole numbers."""
    x = np.linspace(-126, 127, 1_000_001).astype(np.float32)
    exact = 2.0 ** x.astype(np.float64)
    assert (np.abs(np.array(cpu_math.exp2(mx.array(x))) - exact) / exact).max() < 2.5e-7
    whole = np.arange(-126, 128).astype(np.float32)
    assert np.array_equal(np.array(cpu_math.exp2(mx.array(whole))), 2.0**whole)


def test_sigmoids_are_right() -> None:
    """To one unit in the last place of 1."""
    x = np.linspace(-100, 100, 200_001).astype(np.float32)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(np.array(cpu_math.sigmoid(mx.array(x))) - exact).max() < 1.2e-7


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(
    ("length", "first"), [(1, 0), (100, 0), (300, 0), (300, 77), (256, 128), (1300, 900)]
)
def test_attention_by_blocks_is_attention(heads, groups, length, first) -> None:
    """Values and gradients of queries, keys and values; also of the last queries alone."""
    q, k, v = (mx.random.normal((2, length, n, 16)) for n in (heads, groups, groups))
    above = mx.random.normal((2, length - first, heads, 16))

    def reference(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        turned = (one.transpose(0, 2, 1, 3) for one in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(*turned, scale=0.25, mask="causal")
        return out.transpose(0, 2, 1, 3)[:, first:]

    def blocks(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return cpu_math.attention(q[:, first:], k, v, 0.25, first)

    expected = mx.vjp(reference, [q, k, v], [above])
    found = mx.vjp(blocks, [q, k, v], [above])
    for one, other in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        assert np.allclose(np.array(one), np.array(other), atol=2e-5)


def test_norms_are_mlxs() -> None:
    """Values and gradients, the weight's among them."""
    x, above = mx.random.normal((5, 7, 48)), mx.random.normal((5, 7, 48))
    weight = mx.random.normal((48,))
    expected = mx.vjp(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), [x, weight], [above])
    found = mx.vjp(lambda x, w: cpu_math.rms_norm(x, w, 1e-5), [x, weight], [above])
    for one, other in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        assert np.allclose(np.array(one), np.array(other), atol=2e-5, rtol=1e-5)


def test_normed_heads_at_their_positions() -> None:
    """Values and gradients are those of the norm and then the rotation, the weight's among them."""
    x, above = mx.random.normal((2, 9, 3, 16)), mx.random.normal((2, 9, 3, 16))
    weight, angles = mx.random.normal((16,)), mx.random.normal((2, 9, 8))
    angles = mx.concatenate([angles, angles], axis=-1)
    turn = decoder.rotary(mx.cos(angles), mx.sin(angles))

    def reference(x: mx.array, weight: mx.array) -> mx.array:
        y = mx.fast.rms_norm(x, weight, 1e-6)
        rotated = mx.concatenate([-y[..., 8:], y[..., :8]], axis=-1)
        return y * mx.cos(angles)[:, :, None] + rotated * mx.sin(angles)[:, :, None]

    def ours(x: mx.array, weight: mx.array) -> mx.array:
        return cpu_math.normed_and_turned(x, weight, 1e-6, *turn)

    expected = mx.vjp(reference, [x, weight], [above])
    found = mx.vjp(ours, [x, weight], [above])
    for one, other in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        assert np.allclose(np.array(one), np.array(other), atol=2e-5, rtol=1e-5)
