"""One photograph behind two files: copies are recognised, other photographs are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.similar import copies, photographs, scenes
from mondrian_ft.data import similar
from mondrian_ft.data.similar import Look, look_at, looks_at, near_groups, near_pairs
from mondrian_ft.errors import DataError


def look(picture: Image.Image, path: Path) -> Look:
    picture.save(path)
    return look_at(path)


def missed(picture: Image.Image, folder: Path, seed: int) -> list[str]:
    """What was done to the copies that are not recognised."""
    original = look(picture, folder / "original.png")
    found = []
    for what, data in copies(picture, np.random.default_rng(seed)):
        (folder / "copy.jpg").write_bytes(data)
        if not near_pairs([original, look_at(folder / "copy.jpg")]):
            found.append(what)
    return found


def test_copies_of_scenes_are_recognised(tmp_path: Path) -> None:
    """Saved again, resized, grey, in another light, turned, and cropped down to 60 % of a side."""
    lost = [
        m for seed, p in zip(range(8), scenes(0), strict=False) for m in missed(p, tmp_path, seed)
    ]
    # Made lighter until the sky is blown out, a blurred landscape may have lost what it was.
    assert lost in ([], ["brightness"])


@pytest.mark.slow
def test_copies_of_other_peoples_photographs_are_recognised(tmp_path: Path) -> None:
    """Of scikit-image's and scikit-learn's photographs, all but repeating textures."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    textures = {"brick.png", "coins.png", "grass.png", "gravel.png", "microaneurysms.png"}
    for seed, (name, picture) in enumerate(photographs().items()):
        if name not in textures:
            assert missed(picture, tmp_path, seed) == [], name


def test_different_photographs_are_told_apart(tmp_path: Path) -> None:
    """A sample's landscapes share skylines and skies, and are still different photographs."""
    some = list(scenes(1))[:100]
    looks = [look(picture, tmp_path / "a.png") for picture in some]
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    looks += [look(picture, tmp_path / "a.png") for picture in photographs().values()]
    different = list({one.grey: one for one in looks}.values())
    assert near_pairs(different) == []


def test_hashes_of_windows_are_imagehash(tmp_path: Path) -> None:
    """The hashes of windows, made many at a time, are ImageHash's own."""
    import imagehash

    picture = (
        next(scenes(2)).convert("L").resize((similar.SIDE, similar.SIDE), Image.Resampling.BOX)
    )
    pixels = np.asarray(picture, np.float32)
    windows = [(0, 200), (50, 200), (25, 175)]
    made = similar._hashed(similar._coefficients(pixels, windows, windows, 8).reshape(-1, 64))
    for number, value in enumerate(made):
        down, across = (windows[n] for n in divmod(number, 3))
        edges = (across[0], down[0], across[1], down[1])
        box = tuple(similar.SIDE * step / similar.STEPS for step in edges)
        part = picture.resize((32, 32), Image.Resampling.BOX, box=box)  # type: ignore[arg-type]
        own = np.packbits(imagehash.phash(part).hash).view(">u8")[0]
        # The part is rounded to whole grey levels, which turns a coefficient at the median.
        assert np.bitwise_count(np.uint64(own) ^ value) <= 4


def test_groups_join_by_others_between_and_leave_out_the_unreadable(tmp_path: Path) -> None:
    """Two crops of one photograph that share little are one group by the whole between them."""
    picture = next(scenes(3))
    width, height = picture.size
    third = width * 3 // 10
    parts = {
        "a": picture.crop((0, 0, width - third, height)),
        "b": picture.crop((third, 0, width, height)),
        "c": picture,
    }
    paths = {}
    for key, part in parts.items():
        paths[key] = tmp_path / f"{key}.jpg"
        part.save(paths[key], quality=70)
    paths["d"], paths["e"] = tmp_path / "none.jpg", tmp_path / "text.jpg"
    paths["e"].write_bytes(b"no picture")
    groups = near_groups(paths)
    assert groups.leader == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}
    assert groups.several() == [{"a", "b", "c"}]
    assert set(groups.unreadable) == {"d", "e"}
    assert "text.jpg is not a picture" in str(groups.unreadable["e"])


def test_looks_are_kept_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By path, size and time of change; a damaged cache is made anew; a bad file stays bad."""
    seen: list[str] = []

    def counted(path: Path) -> Look:
        seen.append(path.name)
        return look_at(path)

    monkeypatch.setattr(similar, "look_at", counted)
    cache, paths = tmp_path / "cache" / "looks.npz", [tmp_path / f"{n}.png" for n in range(3)]
    for path, picture in zip(paths, scenes(4), strict=False):
        picture.save(path)
    paths[2].write_bytes(b"no picture")
    first = looks_at(paths, cache=cache)
    again = looks_at(paths, cache=cache)
    assert seen == ["0.png", "1.png", "2.png", "2.png"]
    assert [again[path] for path in paths[:2]] == [first[path] for path in paths[:2]]
    assert isinstance(again[paths[2]], DataError)
    Image.new("L", (64, 64), 9).save(paths[1])
    assert looks_at(paths[:2], cache=cache)[paths[1]] != first[paths[1]]
    assert seen[4:] == ["1.png"]
    for damage in (b"", b"[]", cache.read_bytes()[:-200]):
        cache.write_bytes(damage)
        assert looks_at(paths[:1], cache=cache)[paths[0]] == first[paths[0]]
    assert seen[5:] == ["0.png"] * 3


def test_pairs_are_kept_for_a_set_of_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit and preparing compare the same photographs; the second finds what the first did."""
    cache, paths = tmp_path / "looks.npz", {}
    picture = next(scenes(5))
    for key, quality in (("a", 90), ("b", 40)):
        paths[key] = tmp_path / f"{key}.jpg"
        picture.save(paths[key], quality=quality)
    assert near_groups(paths, cache=cache).leader == {"a": "a", "b": "a"}
    monkeypatch.setattr(similar, "near_pairs", lambda looks: [])
    assert near_groups(paths, cache=cache).leader == {"a": "a", "b": "a"}
    Image.new("L", (64, 64), 9).save(paths["b"])
    assert near_groups(paths, cache=cache).leader == {"a": "a", "b": "b"}
