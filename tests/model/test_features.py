"""The cache of vision features: encode once, never mistake one for another, mend itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.model.backend import mx
from mondrian_ft.model.features import FeatureCache, FeatureStore, tower_hash


class Picture:
    """Patches of noise."""

    def __init__(self, seed: int, grid: tuple[int, int, int] = (1, 4, 6)) -> None:
        self.grid = grid
        noise = np.random.default_rng(seed)
        self.patches = noise.normal(size=(grid[1] * grid[2], 1536)).astype(np.float32)


PICTURES = [(f"{number:064x}", Picture(number)) for number in range(4)]


@pytest.fixture
def encoded(base, monkeypatch) -> list[Any]:
    """The grid of each picture that goes through the tower."""
    calls: list[Any] = []
    plain = base.backbone.tower_forward

    def counted(patches: Any, grid: Any) -> Any:
        calls.extend([grid] * patches.shape[0])
        return plain(patches, grid)

    monkeypatch.setattr(base.backbone, "tower_forward", counted)
    return calls


def store(base: Any, folder: Path, pixels: str = "p", **options: Any) -> FeatureStore:
    """A store that remembers nothing but what the folder does."""
    return FeatureStore(
        base.backbone, disk=FeatureCache(folder, base.backbone, pixels=pixels, **options)
    )


def same(some: list[Any], others: list[Any]) -> bool:
    """Whether features are equal to the bit, and of one type."""
    return all(
        a.dtype == b.dtype and bool(mx.array_equal(a, b).item())
        for one, other in zip(some, others, strict=True)
        for a, b in zip(
            [one.features, *one.deepstack], [other.features, *other.deepstack], strict=True
        )
    )


def test_a_second_run_encodes_nothing(base, encoded, tmp_path) -> None:
    """Each photograph once, and what comes from the disk is what was computed, to the bit."""
    first = store(base, tmp_path).get([*PICTURES, PICTURES[0]])
    assert len(encoded) == 4
    again = store(base, tmp_path).get([*PICTURES, PICTURES[0]])
    assert len(encoded) == 4
    assert same(first, again)
    assert len(first[0].deepstack) == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


def test_neighbours_change_no_bit(base, tmp_path) -> None:
    """What is in the cache does not depend on which photographs were encoded with it."""
    together = FeatureStore(base.backbone).get(PICTURES)
    alone = [FeatureStore(base.backbone).get([one])[0] for one in PICTURES]
    assert same(together, alone)


@pytest.mark.parametrize("damage", ["value", "checksum", "header", "cut", "empty"])
def test_a_damaged_file_is_computed_again(base, encoded, tmp_path, damage) -> None:
    """A flipped byte anywhere, or a lost end: a notice, the right numbers, and a whole file."""
    first = store(base, tmp_path).get(PICTURES)
    cache = FeatureCache(tmp_path, base.backbone, pixels="p")
    path = cache.path(PICTURES[2][0], PICTURES[2][1].grid)
    data = bytearray(path.read_bytes())
    at = {
        "value": len(data) - 5,
        "checksum": data.index(b'"sha256":"') + 12,
        "header": 3,
    }.get(damage)
    if at is not None:
        data[at] ^= 1
    path.write_bytes(data if at is not None else data[: len(data) // 2 * (damage == "cut")])
    notices: list[str] = []
    again = store(base, tmp_path, notice=notices.append).get(PICTURES)
    assert same(first, again)
    assert len(encoded) == 5
    (notice,) = notices
    assert str(path) in notice
    assert "damaged" in notice
    store(base, tmp_path, notice=notices.append).get(PICTURES)
    assert len(encoded) == 5
    assert len(notices) == 1


def test_other_pixels_weights_or_types_are_other_files(lab, base, tmp_path) -> None:
    """Nothing that changes the numbers leaves the name of the file as it was."""
    name, picture = PICTURES[0]
    half = lab.load(dtype="bfloat16")
    other = lab.load()
    bias = other.backbone.tower.blocks[0].mlp.linear_fc1.bias
    other.backbone.tower.blocks[0].mlp.linear_fc1.bias = bias.at[0].add(1e-6)
    paths = {
        FeatureCache(tmp_path, one.backbone, pixels=pixels).path(key, grid)
        for one, pixels, key, grid in [
            (base, "p", name, picture.grid),
            (base, "q", name, picture.grid),
            (base, "p", PICTURES[1][0], picture.grid),
            (base, "p", name, (1, 6, 4)),
            (half, "p", name, picture.grid),
            (other, "p", name, picture.grid),
        ]
    }
    assert len(paths) == 6
    assert tower_hash(lab.load().backbone) == tower_hash(base.backbone)
    # An adapter in the language model is no other tower.
    lab.attach(base)
    assert FeatureCache(tmp_path, base.backbone, pixels="p").path(name, picture.grid) in paths
    # And 16 bits come back as they were.
    first = store(half, tmp_path).get(PICTURES[:1])
    assert first[0].features.dtype == mx.bfloat16
    assert same(first, store(half, tmp_path).get(PICTURES[:1]))


def test_the_folder_stays_within_its_bound(base, encoded, tmp_path) -> None:
    """The files used longest ago go first; one that was read lately stays."""
    store(base, tmp_path).get(PICTURES)
    cache = FeatureCache(tmp_path, base.backbone, pixels="p")
    paths = [cache.path(name, picture.grid) for name, picture in PICTURES]
    size = paths[0].stat().st_size
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1e9 - age, 1e9 - age))
    bounded = store(base, tmp_path, max_bytes=5 * size)
    bounded.get(PICTURES[:1])  # the oldest by its time, but now read
    more = [(f"{number:064x}", Picture(number)) for number in range(10, 13)]
    for number in range(3):
        bounded.get(more[number : number + 1])
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5 * size
    assert paths[0].exists()
    assert not paths[1].exists()
    encoded.clear()
    store(base, tmp_path).get(more[-1:])
    assert not encoded


def test_a_folder_that_cannot_be_written_to_is_no_failure(base, encoded, tmp_path) -> None:
    """A notice, once, and the features."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    notices: list[str] = []
    found = store(base, blocked, notice=notices.append).get(PICTURES)
    assert len(found) == len(encoded) == 4
    assert len(notices) == 1
    assert "not kept" in notices[0]


def test_memory_comes_first(base, encoded, tmp_path) -> None:
    """What the store still holds is not read again; what it let go is, from the disk."""
    whole = store(base, tmp_path)
    first = whole.get(PICTURES)
    for path in tmp_path.iterdir():
        path.unlink()
    assert same(whole.get(PICTURES), first)
    assert len(encoded) == 4
    small = FeatureStore(
        base.backbone, max_bytes=1, disk=FeatureCache(tmp_path, base.backbone, pixels="p")
    )
    small.get(PICTURES)
    assert len(encoded) == 8
    assert same(small.get(PICTURES), first)
    assert len(encoded) == 8


def test_a_tower_that_rests_is_read_again_when_it_is_asked(lab) -> None:
    """Its memory is free in between, and it says the same afterwards, bit for bit."""
    base = lab.load()
    example = lab.examples(1)[0]
    pixels = (example.pixels.patches[None], example.pixels.grid)
    (before,) = base.backbone.encode(*pixels)
    mx.eval(before.features, before.deepstack)
    assert base.rest_tower() == 0, "too small to be worth it"
    held = mx.get_active_memory()
    size = base.rest_tower(least=0)
    assert size == base.tower_bytes > 0
    assert held - mx.get_active_memory() >= 0.9 * size
    (after,) = base.backbone.encode(*pixels)
    for one, other in zip(
        (before.features, *before.deepstack), (after.features, *after.deepstack), strict=True
    ):
        assert mx.array_equal(one, other)
    assert mx.get_active_memory() > held - size


def test_a_tower_that_is_trained_does_not_rest(lab) -> None:
    base = lab.load()
    base.backbone.tower.unfreeze()
    assert base.rest_tower(least=0) == 0


def test_what_is_missing_is_computed_before_it_is_asked_for(lab, monkeypatch) -> None:
    base = lab.load()
    store = FeatureStore(base.backbone)
    pictures = [(one.row.image_sha256, one.pixels) for one in lab.examples(3)]
    store.prepare(pictures)
    monkeypatch.setattr(base.backbone, "encode", None)
    assert len(store.get(pictures)) == 3
    store.prepare(pictures)
