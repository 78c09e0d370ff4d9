"""Adapters are compared and averaged by what they add to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import AdapterError
from mondrian_ft.model import combine
from mondrian_ft.model.adapter import Adapter
from mondrian_ft.model.backend import mx
from mondrian_ft.model.lora import LoraSpec

NAMES = [
    f"language_model.model.layers.{n}.mlp.{m}" for n in (0, 1) for m in ("down_proj", "up_proj")
]
INPUTS, OUTPUTS = 24, 40


def adapter(
    seed: int, *, rank: int = 3, alpha: float = 6.0, names: Any = NAMES, **more: Any
) -> Adapter:
    noise = np.random.default_rng(seed)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_a"] = mx.array(noise.normal(size=(INPUTS, rank)).astype(np.float32))
        tensors[f"{name}.lora_b"] = mx.array(noise.normal(size=(rank, OUTPUTS)).astype(np.float32))
        if more.get("method") == "dora":
            tensors[f"{name}.m"] = mx.array(noise.uniform(1, 2, OUTPUTS).astype(np.float32))
    targets = tuple(sorted({name.rsplit(".", 1)[1] for name in names}))
    spec = LoraSpec(rank, alpha, 0.0, targets, **more)
    return Adapter(Path(f"adapter{seed}"), f"{seed:064}", spec, tensors, {})


def update(item: Adapter, name: str) -> np.ndarray:
    """What an adapter adds to a matrix, formed after all."""
    if f"{name}.lora_a" not in item.tensors:
        return np.zeros((INPUTS, OUTPUTS))
    a, b = (np.array(item.tensors[f"{name}.{p}"], np.float64) for p in ("lora_a", "lora_b"))
    return item.spec.scale * a @ b


def test_norms_and_angles_are_those_of_the_whole_matrices() -> None:
    """Of different ranks and strengths; the updates themselves are never formed."""
    first, second = adapter(1), adapter(2, rank=5, alpha=7.5, method="rslora")
    for found in combine.differences(first, second):
        a, b = update(first, found.name), update(second, found.name)
        assert np.isclose(found.norm, np.linalg.norm(a))
        assert np.isclose(found.other_norm, np.linalg.norm(b))
        assert np.isclose(found.difference, np.linalg.norm(a - b))
        assert found.cosine is not None
        assert np.isclose(found.cosine, (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        assert found.magnitude is None
    assert [found.name for found in combine.differences(first, second)] == NAMES


def test_layers_add_up_in_squares() -> None:
    """A layer's update is all its matrices side by side; the last line is the whole adapter."""
    first, second = adapter(1), adapter(2)
    layers = combine.by_layer(combine.differences(first, second))
    assert [layer["layer"] for layer in layers] == [0, 1, None]
    whole = [np.hstack([update(item, name) for name in NAMES]) for item in (first, second)]
    assert np.isclose(layers[-1]["norm"], np.linalg.norm(whole[0]))
    assert np.isclose(layers[-1]["difference"], np.linalg.norm(whole[0] - whole[1]))
    assert np.isclose(
        layers[-1]["cosine"], (whole[0] * whole[1]).sum() / np.prod([*map(np.linalg.norm, whole)])
    )


def test_one_update_in_other_factors_is_no_difference() -> None:
    """A and B may be turned against each other; what they do together is compared, not they."""
    first = adapter(1)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0].astype(np.float32)
    turned = {
        name: mx.array(np.array(value) @ turn if name.endswith("a") else turn.T @ np.array(value))
        for name, value in first.tensors.items()
    }
    second = Adapter(Path("turned"), "t" * 64, first.spec, turned, {})
    total = combine.by_layer(combine.differences(first, second))[-1]
    assert total["relative"] < 1e-6
    assert np.isclose(total["cosine"], 1)
    naive = np.abs(np.array(first.tensors[f"{NAMES[0]}.lora_a"]) - turned[f"{NAMES[0]}.lora_a"])
    assert float(naive.max()) > 0.1


def test_nearly_equal_updates_keep_their_digits() -> None:
    """Subtracting two large norms would lose a difference of one part in a million."""
    first = adapter(1)
    moved = {
        name: value * (1 + 2.0**-20) if name.endswith("b") else value
        for name, value in first.tensors.items()
    }
    second = Adapter(Path("moved"), "m" * 64, first.spec, moved, {})
    for found in combine.differences(first, second):
        assert found.relative is not None
        assert np.isclose(found.relative, 2.0**-20, rtol=0.05)


def test_a_matrix_that_only_one_adapts() -> None:
    """The other adds nothing there: a difference of its whole norm, and no angle."""
    first, second = adapter(1), adapter(2, names=NAMES[:1])
    found = {item.name: item for item in combine.differences(first, second)}
    alone = found[NAMES[1]]
    assert (alone.other_norm, alone.cosine) == (0.0, None)
    assert np.isclose(alone.difference, alone.norm)
    back = {item.name: item for item in combine.differences(second, first)}[NAMES[1]]
    assert (back.norm, back.relative) == (0.0, None)


def test_other_shapes_are_refused() -> None:
    """They belong to different bases."""
    other = adapter(2)
    other.tensors[f"{NAMES[0]}.lora_a"] = mx.zeros((INPUTS + 1, 3))
    with pytest.raises(AdapterError, match="24 × 40 in one adapter and 25 × 40 in the other"):
        combine.differences(adapter(1), other)


def test_doras_magnitudes_are_compared_by_themselves() -> None:
    """What it adds depends on the base, which is not there."""
    first, second = adapter(1, method="dora"), adapter(2, method="dora")
    (found, *_) = combine.differences(first, second)
    m, n = (np.array(item.tensors[f"{NAMES[0]}.m"]) for item in (first, second))
    assert found.magnitude is not None
    assert np.isclose(found.magnitude, np.linalg.norm(m - n) / np.linalg.norm(m))


def test_an_average_is_of_the_updates_and_exact() -> None:
    """Not of the factors, whose average is another adapter altogether."""
    first, second = adapter(1), adapter(2, rank=5, names=NAMES[:3])
    spec, tensors, lost = combine.average([first, second], [0.3, 0.7])
    assert (spec.rank, spec.scale, lost) == (8, 1.0, 0.0)
    for name in NAMES:
        whole = tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        expected = 0.3 * update(first, name) + 0.7 * update(second, name)
        assert np.abs(whole - expected).max() < 1e-5
    factors, also = (
        np.mean([np.array(adapter(n).tensors[f"{NAMES[0]}.{part}"]) for n in (1, 2)], axis=0)
        for part in ("lora_a", "lora_b")
    )
    right = 0.5 * (update(adapter(1), NAMES[0]) + update(adapter(2), NAMES[0]))
    assert np.abs(2 * factors @ also - right).max() > 1


def test_a_smaller_rank_is_the_nearest_and_tells_what_it_lost() -> None:
    """By singular values: no other update of that rank is nearer."""
    items = [adapter(1), adapter(2)]
    spec, tensors, lost = combine.average(items, [0.5, 0.5], rank=2)
    assert spec.rank == 2
    squared = whole = 0.0
    for name in NAMES:
        expected = 0.5 * (update(items[0], name) + update(items[1], name))
        cut = np.linalg.norm(expected - tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"])
        values = np.linalg.svd(expected, compute_uv=False)
        assert np.isclose(cut, np.linalg.norm(values[2:]), rtol=1e-4)
        squared, whole = squared + cut**2, whole + np.linalg.norm(expected) ** 2
    assert np.isclose(lost, np.sqrt(squared / whole), rtol=1e-4)
    _, _, nothing = combine.average(items, [0.5, 0.5], rank=6)
    assert nothing < 1e-7


def test_what_cannot_be_averaged() -> None:
    """DoRA has magnitudes, and a rank above the sum would be padding."""
    with pytest.raises(AdapterError, match="is a DoRA adapter"):
        combine.average([adapter(1), adapter(2, method="dora")], [0.5, 0.5])
    with pytest.raises(
        AdapterError, match=r"task\.rank=7 is more than the adapters' ranks together"
    ):
        combine.average([adapter(1), adapter(2)], [0.5, 0.5], rank=7)
