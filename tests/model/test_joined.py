"""Matrices of one input as one product: the same numbers, of the same memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mondrian_ft.model import joined, lora_layers
from mondrian_ft.model.backend import ON_CPU, mx, nn

SIZES = {"q_proj": 96, "k_proj": 32, "v_proj": 32}


def attention(
    dtype: mx.Dtype, *, bits: int | None = None, bias: bool = False, adapted: Any = tuple(SIZES)
) -> Any:
    """Three matrices of 64 inputs, with adapters of rank 8 that do something."""
    mx.random.seed(0)
    made: Any = nn.Module()
    for name, size in SIZES.items():
        made[name] = nn.Linear(64, size, bias=bias)
    made.set_dtype(dtype)
    if bits is not None:
        nn.quantize(made, 32, bits)
    made.freeze()
    for name in adapted:
        layer = lora_layers.LoRALayer.from_base(made[name], r=8, scale=1.7)
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
        made[name] = layer
    return made


def join(owner: Any) -> None:
    feed_forward: Any = nn.Module()
    feed_forward.gate_proj, feed_forward.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)
    joined.join([SimpleNamespace(self_attn=owner, mlp=feed_forward)])


def both(owner: Any, work: Any, x: mx.array, above: mx.array) -> list[mx.array]:
    """The result of ``work(x)`` and the gradients of x and of each adapter."""
    flat: Any = tree_flatten(owner.trainable_parameters())
    names = [name for name, _ in flat]

    def through(x: mx.array, *values: mx.array) -> mx.array:
        owner.update(tree_unflatten(list(zip(names, values, strict=True))))
        return work(x)

    values = [value for _, value in flat]
    made, back = mx.vjp(through, [x, *values], [above])
    owner.update(tree_unflatten(flat))
    return [made[0], *back]


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_product_is_the_three(dtype: mx.Dtype, bits: int | None) -> None:
    """Result, gradient of the input and of each A and B; bfloat16 rounds at other places."""
    owner = attention(dtype, bits=bits)
    x, above = (
        mx.random.normal(shape, key=mx.random.key(n)).astype(dtype)
        for n, shape in enumerate([(10, 64), (10, 160)])
    )
    layers = [owner[name] for name in SIZES]
    apart = both(owner, lambda x: mx.concatenate(lora_layers.project(layers, x), axis=1), x, above)
    held = [np.array(layer.linear.weight.view(mx.uint8)) for layer in layers]
    join(owner)
    for layer, before in zip(layers, held, strict=True):
        assert np.array_equal(np.array(layer.linear.weight.view(mx.uint8)), before)
    asked = []

    def whole(x: mx.array) -> mx.array:
        made = joined.product(owner, joined.ATTENTION, x)
        assert made is not None
        asked.append(made)
        return made

    together = both(owner, whole, x, above)
    assert asked
    assert len(apart) == len(together) == 8
    for one, other in zip(apart, together, strict=True):
        one, other = one.astype(mx.float32), other.astype(mx.float32)
        assert one.shape == other.shape
        off = float(mx.abs(one - other).max() / mx.abs(one).max())
        # A GPU multiplies float32 with fewer bits (TF32).
        exact = 1e-6 if ON_CPU else 2e-3
        assert off <= (exact if dtype == mx.float32 else 0.01)


def test_joining_takes_no_memory_of_its_own() -> None:
    """Each matrix is a view of the whole; the arrays it was made of are gone."""
    owner = attention(mx.float32)
    mx.eval(owner.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    join(owner)
    # A page or so for what is not a multiple of it.
    assert mx.get_active_memory() <= before + 32_768
    size = sum(SIZES.values()) * 64 * 4
    assert size > 32_768
    whole = joined._joined_of(owner)
    join(owner)
    assert joined._joined_of(owner) is whole


def test_another_weight_put_in_is_what_counts() -> None:
    """A whole that is no longer what the layers hold would train beside another base, silently."""
    owner = attention(mx.float32)
    join(owner)
    x = mx.random.normal((4, 64))
    assert joined.product(owner, joined.ATTENTION, x) is not None
    owner["k_proj"].linear.weight = 2 * owner["k_proj"].linear.weight
    assert joined.product(owner, joined.ATTENTION, x) is None
    join(owner)
    made = joined.product(owner, joined.ATTENTION, x)
    assert made is not None
    apart = mx.concatenate([owner[name](x) for name in SIZES], axis=1)
    assert float(mx.abs(made - apart).max()) < (1e-5 if ON_CPU else 1e-2)


@pytest.mark.parametrize(("bits", "apart"), [(4, True), (8, True), (None, False)])
def test_large_quantised_matrices_stay_apart(
    monkeypatch: pytest.MonkeyPatch, bits: int | None, apart: bool
) -> None:
    """All of a group are expanded at once: joined gate and up took 0.4 GB of a 4-bit base."""
    bytes_expanded = 2 * 64 * 160
    x = mx.zeros((3, 64), mx.bfloat16)
    for most, found in ((bytes_expanded, False), (bytes_expanded - 1, apart)):
        monkeypatch.setattr(joined, "MOST_EXPANDED", most)
        owner = attention(mx.bfloat16, bits=bits)
        join(owner)
        assert (joined.product(owner, tuple(SIZES), x) is None) == found


def test_what_is_not_alike_stays_apart() -> None:
    """Biases; a matrix without an adapter; another rank; another scale; dropout."""
    x = mx.random.normal((4, 64))
    biased = attention(mx.float32, bias=True)
    join(biased)
    assert joined.product(biased, joined.ATTENTION, x) is None
    part = attention(mx.float32, adapted=("q_proj", "v_proj"))
    join(part)
    assert joined.product(part, joined.ATTENTION, x) is None
    for spoil in (
        lambda layer: setattr(layer, "scale", 2.0),
        lambda layer: setattr(layer, "dropout", nn.Dropout(0.5)),
        lambda layer: layer.update(
            {"lora_a": mx.zeros((64, 16)), "lora_b": mx.zeros((16, SIZES["v_proj"]))}
        ),
    ):
        owner = attention(mx.float32)
        join(owner)
        assert joined.product(owner, joined.ATTENTION, x) is not None
        spoil(owner["v_proj"])
        assert joined.product(owner, joined.ATTENTION, x) is None
    mixed = attention(mx.float32)
    mixed["k_proj"].linear = nn.QuantizedLinear.from_linear(mixed["k_proj"].linear, 32, 8)
    join(mixed)
    assert joined.product(mixed, joined.ATTENTION, x) is None
