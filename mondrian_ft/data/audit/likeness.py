"""Which photographs show the same picture: recompressed, resized or cropped copies.

A perceptual hash (ImageHash's ``phash``: 64 bits of a 32 × 32 cosine transform) proposes pairs:
the whole of one photograph against the whole of another, and against crops of it. Every proposal
is then checked on the pixels, for skylines alone make landscapes' hashes alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIDE = 128
"""Pixels of the square grey thumbnail on which all comparing is done."""
BITS = 12
"""Pairs of hashes that differ in at most this many of 64 bits are looked at."""
ALIKE = 0.85
"""Correlation of fine detail from which two photographs are one picture."""
SAME_TONES = 0.98
"""Correlation of light and dark, too: a like outline in another light is another picture."""
SURE, HOPELESS = 0.95, 0.35
"""Correlations at which the search for the best alignment ends early, with yes or with no."""
KEPT = (0.9, 0.8, 0.7, 0.6)
"""Shares of a side that a crop may keep."""

Window = tuple[float, float, float, float]
"""A part of a picture: left, top, right, bottom, as shares of its sides."""


def near_duplicates(
    paths: Sequence[Path], *, progress: Callable[[int], Any] = lambda done: None
) -> list[set[int]]:
    """Groups of indices of photographs that show the same picture.

    Args:
        paths: photographs, each content once.
        progress: told how many of them have been looked at.

    Returns:
        Groups of two or more. A photograph that cannot be opened is in none.
    """
    import numpy as np

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looks = []
        for done, look in enumerate(pool.map(_look, paths), 1):
            looks.append(look)
            progress(done)
    seen = [index for index, look in enumerate(looks) if look is not None]
    if len(seen) < 2:
        return []
    thumbs = {index: looks[index][0] for index in seen}
    whole = np.array([looks[index][1][0] for index in seen], np.uint64)
    parts = np.concatenate([looks[index][1] for index in seen])
    per = len(windows())
    groups = {index: {index} for index in seen}
    for row, index in enumerate(seen):
        apart = np.bitwise_count(parts ^ whole[row])
        # The nearest part of each other photograph is the one to check.
        best = apart.reshape(len(seen), per)
        nearest = best.argmin(axis=1)
        for column in np.flatnonzero(best.min(axis=1) <= BITS):
            other = seen[int(column)]
            if groups[other] is groups[index]:
                continue
            window = windows()[int(nearest[column])]
            if same_picture(thumbs[index], thumbs[other], window):
                joined = groups[index] | groups[other]
                for member in joined:
                    groups[member] = joined
    unique = {id(group): group for group in groups.values() if len(group) > 1}
    return sorted(unique.values(), key=min)


def thumbnail(path: Path) -> Image | None:
    """A photograph, upright, grey and squeezed to a square; None if it cannot be opened."""
    import struct
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                # JPEG is decoded at a fraction of its size: seconds less for 12 megapixels.
                file.draft("L", (2 * SIDE, 2 * SIDE))
                grey = ImageOps.exif_transpose(file).convert("L")
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return None
    return grey.resize((SIDE, SIDE), Image.Resampling.BOX)


@cache
def windows() -> tuple[Window, ...]:
    """The whole picture first, then crops that keep the aspect or cut one side only."""
    found = [(0.0, 0.0, 1.0, 1.0)]
    for kept in KEPT:
        starts = [step / 10 for step in range(round((1 - kept) * 10) + 1)]
        found += [(x, y, x + kept, y + kept) for x in starts for y in starts]
        found += [(x, 0.0, x + kept, 1.0) for x in starts]
        found += [(0.0, y, 1.0, y + kept) for y in starts]
    return tuple(found)


def same_picture(one: Image, other: Image, window: Window) -> bool:
    """Whether ``one`` is the part ``window`` of ``other``, give or take a twentieth.

    The window is moved and scaled, step by step to where the two agree best.
    """
    mine = _detail(one)
    best, at, step = _correlation(mine, other, window), window, 0.05
    while step >= 0.005 and best < SURE:
        tried = [(_correlation(mine, other, near), near) for near in _neighbours(at, step)]
        if (found := max(tried))[0] > best:
            best, at = found
        else:
            step /= 2
        if best < HOPELESS:
            return False
    return best >= ALIKE and _tones(one, other, at) >= SAME_TONES


def _neighbours(window: Window, step: float) -> list[Window]:
    steps = (-step, 0.0, step)
    moves = [(dx, dy, dx, dy) for dx in steps for dy in steps if dx or dy]
    moves += [(s, s, -s, -s) for s in (-step, step)]
    # One edge at a time, for crops that change the aspect.
    moves += [(*[0.0] * edge, s, *[0.0] * (3 - edge)) for edge in range(4) for s in (-step, step)]
    found = []
    for move in moves:
        edges = [min(1.0, max(0.0, e + m)) for e, m in zip(window, move, strict=True)]
        if edges[2] - edges[0] > 0.4 and edges[3] - edges[1] > 0.4:
            found.append((edges[0], edges[1], edges[2], edges[3]))
    return found


def _correlation(mine: np.ndarray, other: Image, window: Window) -> float:
    left, top, right, bottom = (SIDE * share for share in window)
    return float((mine * _detail(other, (left, top, right, bottom))).mean())


def _tones(one: Image, other: Image, window: Window) -> float:
    import numpy as np

    left, top, right, bottom = (SIDE * share for share in window)
    mine = np.asarray(one.resize((24, 24)), np.float32)
    theirs = np.asarray(other.resize((24, 24), box=(left, top, right, bottom)), np.float32)
    mine, theirs = mine - mine.mean(), theirs - theirs.mean()
    return float((mine * theirs).sum() / (np.sqrt((mine**2).sum() * (theirs**2).sum()) + 1e-6))


def _detail(image: Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Fine detail at 48 × 48, mean 0 and deviation 1: light and large shapes are taken out.

    A patch without any detail gives zeros, which agree with nothing.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    small = image.resize((48, 48), Image.Resampling.BILINEAR, box=box)
    shapes = small.filter(ImageFilter.BoxBlur(4))
    detail = np.asarray(small, np.float32) - np.asarray(shapes, np.float32)
    detail -= detail.mean()
    spread = float((detail * detail).mean()) ** 0.5
    return detail / spread if spread > 0.5 else np.zeros_like(detail)


def _look(path: Path) -> tuple[Image, np.ndarray] | None:
    """Thumbnail and the hashes of its `windows`, (W,) uint64."""
    import imagehash
    import numpy as np

    thumb = thumbnail(path)
    if thumb is None:
        return None
    parts = np.stack(
        [
            np.asarray(thumb.resize((32, 32), box=(SIDE * x, SIDE * y, SIDE * r, SIDE * b)))
            for x, y, r, b in windows()[1:]
        ]
    )
    whole = np.packbits(imagehash.phash(thumb).hash.reshape(1, -1), axis=1).view(np.uint64)
    return thumb, np.concatenate([whole[:, 0], hashes(parts)])


def hashes(parts: np.ndarray) -> np.ndarray:
    """ImageHash's ``phash`` of (N, 32, 32) grey pictures at once, (N,) uint64.

    Its own loop over the crops would take a hundred times as long.
    """
    import numpy as np

    frequency = np.arange(8)[:, None] * (2 * np.arange(32)[None, :] + 1)
    basis = np.cos(np.pi * frequency / 64)
    low = (basis @ parts.astype(np.float64) @ basis.T).reshape(len(parts), 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]
