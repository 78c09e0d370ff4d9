"""Recognising one photograph behind two files: saved again, resized, made grey, or cropped.

Three steps, each on what the one before let pass. A perceptual hash (ImageHash's ``phash``, 64
bits of a cosine transform; Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010) of each whole photograph is held against those of windows of every other; the
coefficients behind the bits are compared; and what is left is registered: the window is moved and
scaled to where the two agree best, and there they have to agree in shape and in contrast. Skylines
alone make hashes of landscapes alike, so no pair is believed for its hash.

A crop is taken to keep its proportions: a picture that was squeezed as well is not recognised.

Measured by ``python -m benchmarks similar`` (November 2026): of copies of 60 rendered scenes 1 of
2,340 is missed (a blurred one, made lighter until it is blown out), of copies of 24 photographs of
others 12 of 936, most of them of repeating textures; of 1,041,846 pairs of different pictures 3
are taken for one. By kind of copy, scenes and photographs:

======================================  ==========  ==========
saved again, quality 25, 50, 75 or 95   0 of 240    0 of 96
resized to 0.2 to 0.75                  0 of 240    1 of 96
grey, another contrast, turned by EXIF  0 of 360    0 of 144
another brightness                      1 of 120    0 of 48
crop, both sides 60 to 100 %            0 of 960    4 of 384
crop, one side 60 or 75 %               0 of 240    1 of 96
crop, halved, grey, quality 50          0 of 180    6 of 72
======================================  ==========  ==========
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MondrianError
from ..files import atomic_write_json, replacing
from .pixels import open_photograph

if TYPE_CHECKING:
    import numpy as np

SIDE = 128
"""Side of the grey thumbnail that stands for a photograph, squeezed to a square."""
BITS = 16
"""Pairs whose hashes differ in at most this many of 64 bits are looked at more closely."""
COARSE = 0.7
"""Least likeness of 8 × 8 weighted coefficients of a pair that is registered."""
SHAPE = 0.955
"""Correlation of 16 × 16 or of 32 × 32 weighted coefficients from which two are one photograph."""
FAINT, NOISE = 0.92, 2.0
"""The correlation that is enough if what differs is fainter than so many of 255 grey levels.

A picture without detail leaves little to correlate but the noise of its compression.
"""
CONTRAST = (0.7, 1.43)
"""Bounds on the ratio of the two contrasts; other landscapes of a like outline rarely keep them."""
STRETCH = 0.03
"""How far, as a logarithm, a crop's proportions may be off: small pictures are cut at pixels."""
CACHE_VERSION = 1
STEPS = 200
"""Windows begin and end at multiples of a 200th of a side."""
LEAST = 0.6
"""Share of a side that a crop keeps, at least."""

Interval = tuple[int, int]
"""Where a window begins and ends along one side, in `STEPS`."""


def _no_progress(done: int, total: int) -> None:
    """What is told of progress where nobody listens."""


@dataclass(frozen=True)
class Look:
    """What is kept of a photograph.

    Attributes:
        grey: 128 × 128 grey values, row by row.
        stretch: logarithm of height / width of the upright photograph.
        phash: ImageHash's ``phash`` of it, 64 bits.
    """

    grey: bytes
    stretch: float
    phash: int

    @property
    def pixels(self) -> np.ndarray:
        """(128, 128) float32, 0 to 255."""
        import numpy as np

        return np.frombuffer(self.grey, np.uint8).reshape(SIDE, SIDE).astype(np.float32)


def look_at(path: Path) -> Look:
    """Look at one photograph, upright and with its transparency on white.

    Raises:
        DataError: as `pixels.open_photograph`.
    """
    import imagehash
    import numpy as np
    from PIL import Image

    picture = open_photograph(path, shortest=2 * SIDE)
    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    bits = imagehash.phash(grey.resize((32, 32), Image.Resampling.BOX)).hash
    stretch = float(np.log(picture.height / picture.width))
    return Look(grey.tobytes(), stretch, int(np.packbits(bits).view(">u8")[0]))


def looks_at(
    paths: Iterable[Path],
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = _no_progress,
) -> dict[Path, Look | DataError]:
    """`look_at` each path, on every core; what cannot be read has its error in place of a look.

    Args:
        cache: an ``.npz`` file that keeps looks by path, size and time of change; None keeps
            nothing. One that cannot be read is made anew.
        progress: told how many photographs are done, and of how many.
    """
    kept = _load(cache) if cache else {}
    states = {path: _state(path) for path in dict.fromkeys(paths)}
    found: dict[Path, Look | DataError] = {}
    for path, state in states.items():
        if state and (entry := kept.get(str(path))) and entry[0] == state:
            found[path] = entry[1]
    progress(len(found), len(states))
    new = [path for path in states if path not in found]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, look in zip(new, pool.map(_try, new), strict=True):
            found[path] = look
            progress(len(found), len(states))
            if isinstance(look, Look) and (state := states[path]):
                kept[str(path)] = (state, look)
    if cache and new:
        _save(cache, kept)
    return {path: found[path] for path in states}


@dataclass(frozen=True)
class Groups:
    """Which photographs are one, by keys of theirs such as the hash of their bytes.

    Attributes:
        leader: each key's group, named after the smallest key in it.
        unreadable: what is wrong with each photograph that cannot be decoded; it is in a group of
            its own.
    """

    leader: dict[str, str]
    unreadable: dict[str, DataError]

    def several(self) -> list[set[str]]:
        """Groups of two or more, by their leaders."""
        members: dict[str, set[str]] = {}
        for key, leader in sorted(self.leader.items()):
            members.setdefault(leader, set()).add(key)
        return [group for group in members.values() if len(group) > 1]


def near_groups(
    photographs: Mapping[str, Path],
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], Any] = _no_progress,
) -> Groups:
    """Decode photographs and group those that show the same one, directly or by others between.

    Args:
        photographs: files by key.
        cache, progress: as of `looks_at`.
    """
    looks = looks_at(photographs.values(), cache=cache, progress=progress)
    seen: dict[str, Look] = {}
    unreadable: dict[str, DataError] = {}
    for key in sorted(photographs):
        look = looks[photographs[key]]
        if isinstance(look, Look):
            seen[key] = look
        else:
            unreadable[key] = look
    keys = list(seen)
    leader = {key: key for key in photographs}

    def find(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    for i, j in _pairs(list(seen.values()), cache):
        first, second = sorted((find(keys[i]), find(keys[j])))
        leader[second] = first
    return Groups({key: find(key) for key in photographs}, unreadable)


def near_pairs(looks: Sequence[Look]) -> list[tuple[int, int]]:
    """Pairs i < j that show one photograph.

    Pairs that follow from others (i and j, j and k) may be left out: they are not looked at.
    """
    if len(looks) < 2:
        return []
    ways: dict[tuple[int, int], list[_Way]] = {}
    for way in _candidates(looks):
        pair = (min(way.of, way.crop), max(way.of, way.crop))
        ways.setdefault(pair, []).append(way)
    group = list(range(len(looks)))
    found = []
    # The likeliest first: they join the groups within which nothing needs to be registered.
    for (i, j), some in sorted(ways.items(), key=lambda item: -max(w.likeness for w in item[1])):
        if group[i] == group[j]:
            continue
        some.sort(key=lambda way: -way.likeness)
        if any(_registered(looks[way.of], looks[way.crop], way) for way in some):
            found.append((i, j))
            group = [group[i] if member == group[j] else member for member in group]
    return sorted(found)


# -- candidates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """One photograph as a window of another: indices, likeness, and the windows to start from."""

    of: int
    crop: int
    likeness: float
    starts: list[tuple[Interval, Interval]]


def _candidates(looks: Sequence[Look]) -> Iterator[_Way]:
    import numpy as np

    wholes = np.stack([_coefficients(look.pixels, [_WHOLE], [_WHOLE], 8)[0, 0] for look in looks])
    shape, power = _normalised(wholes)
    hashes = np.array([look.phash for look in looks], np.uint64)
    stretch = np.array([look.stretch for look in looks])
    grid = _grid()
    low, high = np.log(CONTRAST) + np.array([-0.2, 0.2])
    for i, look in enumerate(looks):
        windows = _coefficients(look.pixels, grid.intervals, grid.intervals, 8)[grid.v, grid.u]
        bits = _hashed(windows)
        shapes, powers = _normalised(windows)
        for apart, rows in grid.by_stretch:
            # Windows as long or as wide as the other photograph is, in pixels of this one.
            like = np.flatnonzero(np.abs(stretch - look.stretch - apart) < 0.1)
            like = like[like != i]
            differ = np.bitwise_count(bits[rows, None] ^ hashes[like])
            near = like[(differ <= BITS).any(0)]
            if not len(near):
                continue
            likeness = shapes[rows] @ shape[near].T
            ratio = power[near] - powers[rows, None]
            likeness[(ratio < low) | (ratio > high)] = -1
            for column in np.flatnonzero(likeness.max(0) >= COARSE):
                best = likeness[:, column]
                starts = _apart(best, [grid.window(row) for row in rows])
                yield _Way(i, int(near[column]), float(best.max()), starts)


def _apart(
    likeness: np.ndarray, windows: Sequence[tuple[Interval, Interval]]
) -> list[tuple[Interval, Interval]]:
    """The best windows, up to three, none beside a better one."""
    found: list[tuple[Interval, Interval]] = []
    for row in (-likeness).argsort()[:40].tolist():
        if likeness[row] < COARSE - 0.1 or len(found) == 3:
            break
        ends = [end for interval in windows[row] for end in interval]
        others = [[end for interval in other for end in interval] for other in found]
        if all(max(abs(a - b) for a, b in zip(ends, o, strict=True)) > 20 for o in others):
            found.append(windows[row])
    return found


_WHOLE = (0, STEPS)


@dataclass(frozen=True)
class _Grid:
    """Windows (v down, u across, both by number) that a whole photograph is compared with."""

    intervals: list[Interval]
    v: np.ndarray
    u: np.ndarray
    by_stretch: list[tuple[float, np.ndarray]]

    def window(self, row: int) -> tuple[Interval, Interval]:
        return self.intervals[self.v[row]], self.intervals[self.u[row]]


@once
def _grid() -> _Grid:
    """Sides kept in steps of a tenth, places in steps of a twentieth."""
    import numpy as np

    intervals = [
        (start, start + length)
        for length in range(STEPS, round(LEAST * STEPS) - 1, -STEPS // 10)
        for start in range(0, STEPS - length + 1, STEPS // 20)
    ]
    v, u = (ends.ravel() for ends in np.indices((len(intervals),) * 2))
    span = np.array([end - start for start, end in intervals])
    # The stretch of a window is that of its photograph and this.
    apart = np.log(span[v] / span[u]).round(6)
    by_stretch = [(float(a), np.flatnonzero(apart == a)) for a in np.unique(apart)]
    return _Grid(intervals, v, u, by_stretch)


# -- registration --------------------------------------------------------------------------------


def _registered(of: Look, crop: Look, way: _Way) -> bool:
    """Whether ``crop`` is a window of ``of`` near one that ``way`` starts from."""
    picture, other = of.pixels, crop.pixels
    apart = crop.stretch - of.stretch
    for start in way.starts:
        likeness, window = _best_window(picture, other, start, apart)
        if likeness >= _ROUNDS[-1][2] and _agree(picture, other, window):
            return True
    return False


_ROUNDS = ((8, 8, 0.7), (4, 16, 0.7), (2, 16, 0.85), (1, 16, 0.9))
"""Steps by which windows are moved, waves that are compared, and the correlation below which that
is given up. Fine waves agree only near the right place, so the first round does without them."""


def _best_window(
    picture: np.ndarray, other: np.ndarray, start: tuple[Interval, Interval], apart: float
) -> tuple[float, tuple[Interval, Interval]]:
    """The window of ``picture`` most like ``other`` around ``start``, by steepest ascent."""
    import numpy as np

    best, at = -1.0, start
    for step, size, hopeless in _ROUNDS:
        wanted = _weighted(_coefficients(other, [_WHOLE], [_WHOLE], size)[0, 0], size)
        wanted /= np.linalg.norm(wanted) + 1e-3
        best = -1.0
        for _ in range(4):
            down, across = _around(at[0], step), _around(at[1], step)
            spans = [np.array([e - s for s, e in some], float) for some in (down, across)]
            off = np.abs(np.log(spans[0][:, None] / spans[1]) - apart)
            # Windows of whole steps can hardly be nearer than half of one.
            fits = off < STRETCH + step / STEPS * 2
            if not fits.any():
                break
            tried = _weighted(_coefficients(picture, down, across, size), size)
            likeness = tried @ wanted / (np.linalg.norm(tried, axis=2) + 1e-3)
            likeness[~fits] = -1
            v, u = divmod(int(likeness.argmax()), len(across))
            if likeness[v, u] <= best + 1e-4:
                break
            best, at = float(likeness[v, u]), (down[v], across[u])
        if best < hopeless:
            break
    return best, at


def _around(interval: Interval, step: int) -> list[Interval]:
    start, end = interval
    moved = {
        (max(0, start + move - grow), min(STEPS, end + move + grow))
        for move in (-step, 0, step)
        for grow in (-step, 0, step)
    }
    return sorted((a, b) for a, b in moved if b - a >= (LEAST - 0.08) * STEPS)


def _agree(picture: np.ndarray, other: np.ndarray, window: tuple[Interval, Interval]) -> bool:
    """Whether a window and a photograph agree in shape and in contrast."""
    import numpy as np

    waves = _waves(32, 48)
    a = waves @ _resampled(picture, *window) @ waves.T
    b = waves @ _resampled(other, _WHOLE, _WHOLE) @ waves.T
    likeness, fine = (
        _cosine(_weighted(a[:size, :size].ravel(), size), _weighted(b[:size, :size].ravel(), size))
        for size in (16, 32)
    )
    # Without the mean, the waves have the contrast of the picture, in grey levels.
    a, b = a.ravel()[1:], b.ravel()[1:]
    spread = float(np.linalg.norm(b))
    if not CONTRAST[0] < spread / (float(np.linalg.norm(a)) + 1e-3) < CONTRAST[1]:
        return False
    left = spread * np.sqrt(max(0.0, 1 - _cosine(a, b) ** 2))
    return max(likeness, fine) >= SHAPE or (likeness >= FAINT and left <= NOISE)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    import numpy as np

    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-3))


# -- cosine transforms ---------------------------------------------------------------------------


@once
def _waves(size: int, samples: int) -> np.ndarray:
    """(size, samples): the first waves of a cosine transform; coefficients are in grey levels."""
    import numpy as np

    at = np.arange(samples)
    waves = np.cos(np.pi * (2 * at + 1) * np.arange(size)[:, None] / (2 * samples)) / samples
    waves[1:] *= np.sqrt(2)
    return waves


def _shares(interval: Interval, samples: int) -> np.ndarray:
    """(samples, 128): resampling of an interval by area."""
    import numpy as np

    pixel = np.arange(SIDE)
    start, end = (SIDE * step / STEPS for step in interval)
    edges = np.linspace(start, end, samples + 1)
    share = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    share = np.clip(share, 0, None)
    return share / share.sum(1, keepdims=True)


def _resampled(pixels: np.ndarray, down: Interval, across: Interval) -> np.ndarray:
    """(48, 48): a window of a picture."""
    return _shares(down, 48) @ pixels @ _shares(across, 48).T


@once
def _transform(interval: Interval, size: int) -> np.ndarray:
    """(size, 128): the first ``size`` waves of an interval.

    It is resampled to 32 values as ``phash`` does, or to 48 for more waves.
    """
    import numpy as np

    samples = 32 if size == 8 else 48
    return (_waves(size, samples) @ _shares(interval, samples)).astype(np.float32)


def _coefficients(
    pixels: np.ndarray, down: Sequence[Interval], across: Sequence[Interval], size: int
) -> np.ndarray:
    """(K, L, size²): coefficients of the windows of K intervals down and L across."""
    import numpy as np

    # Many small products: of one large one OpenBLAS makes several threads that wait for each other.
    left = np.stack([_transform(interval, size) for interval in down]) @ pixels
    right = np.stack([_transform(interval, size).T for interval in across])
    both = left[:, None] @ right
    return both.reshape(len(down), len(across), size * size)


def _weighted(coefficients: np.ndarray, size: int) -> np.ndarray:
    """Photographs have little power in fine detail, which is what tells them apart."""
    import numpy as np

    order = np.arange(size)
    return coefficients * np.hypot(order[:, None], order).astype(np.float32).ravel()


def _normalised(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 64) weighted and of length 1, and (N,) logarithms of the contrast in grey levels."""
    import numpy as np

    weighted = _weighted(coefficients, 8)
    length = np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-3)
    return weighted / length, np.log(np.linalg.norm(coefficients[:, 1:], axis=1) + 1e-3)


def _hashed(coefficients: np.ndarray) -> np.ndarray:
    """ImageHash's ``phash`` of (N, 64) coefficients, (N,) uint64.

    Its own loop over the windows would take a hundred times as long.
    """
    import numpy as np

    # Its transform is the plain one, whose waves are not of one length.
    plain = coefficients.reshape(-1, 8, 8).copy()
    plain[:, 0] *= np.sqrt(2)
    plain[:, :, 0] *= np.sqrt(2)
    plain = plain.reshape(-1, 64)
    bits = plain > np.median(plain, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


# -- files ---------------------------------------------------------------------------------------


def _try(path: Path) -> Look | DataError:
    try:
        return look_at(path)
    except DataError as error:
        return error


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None of what is not there."""
    with suppress(OSError):
        facts = path.stat()
        return facts.st_size, facts.st_mtime_ns
    return None


def _load(cache: Path) -> dict[str, tuple[tuple[int, int], Look]]:
    """What a cache holds; nothing if it is missing, damaged or of another version."""
    import numpy as np

    try:
        # Opened here: NumPy leaves a damaged file open.
        with cache.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if int(file["version"]) != CACHE_VERSION:
                return {}
            grey = file["grey"]
            if grey.shape[1:] != (SIDE, SIDE) or grey.dtype != np.uint8:
                return {}
            rows = zip(
                json.loads(file["paths"].tobytes()),
                file["states"].tolist(),
                grey,
                file["stretch"].tolist(),
                file["phash"].tolist(),
                strict=True,
            )
            return {
                path: ((size, time), Look(pixels.tobytes(), stretch, phash))
                for path, (size, time), pixels, stretch, phash in rows
            }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return {}


_SETS_KEPT = 8


def _pairs(looks: Sequence[Look], cache: Path | None) -> list[tuple[int, int]]:
    """`near_pairs`, kept beside the looks for the last few sets of photographs."""
    if cache is None:
        return near_pairs(looks)
    digest = hashlib.sha256()
    for look in looks:
        digest.update(look.grey + struct.pack("<dQ", look.stretch, look.phash))
    key, path = digest.hexdigest(), cache.with_suffix(".pairs.json")
    kept: dict[str, Any] = {}
    try:
        content = json.loads(path.read_bytes())
        if content["version"] == CACHE_VERSION:
            kept = dict(content["pairs"])
        if key in kept:
            return [(int(i), int(j)) for i, j in kept[key]]
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    kept[key] = near_pairs(looks)
    kept = dict(list(kept.items())[-_SETS_KEPT:])
    with suppress(MondrianError):
        atomic_write_json(path, {"version": CACHE_VERSION, "pairs": kept}, indent=None)
    return kept[key]


def _save(cache: Path, kept: Mapping[str, tuple[tuple[int, int], Look]]) -> None:
    import numpy as np

    # Looks of files that are gone would stay for good.
    kept = {path: entry for path, entry in kept.items() if Path(path).is_file()}
    looks = [look for _, look in kept.values()]
    grey = np.frombuffer(b"".join(look.grey for look in looks), np.uint8)
    # A cache only saves time: one that cannot be written costs some, and nothing else.
    with suppress(MondrianError), replacing(cache) as temporary:
        np.savez(
            temporary,
            version=np.array(CACHE_VERSION),
            paths=np.frombuffer(json.dumps(list(kept)).encode(), np.uint8),
            states=np.array([state for state, _ in kept.values()], np.int64).reshape(-1, 2),
            grey=grey.reshape(-1, SIDE, SIDE),
            stretch=np.array([look.stretch for look in looks], np.float64),
            phash=np.array([look.phash for look in looks], np.uint64),
        )
