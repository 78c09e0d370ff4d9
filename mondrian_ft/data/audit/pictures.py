"""Findings about the photographs: copies, how many rows each has, what each costs the model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from .entries import Entry
from .findings import Finding, finding, some

TOKEN_SIDE = 32
"""Pixels of the square that one image token of Qwen3-VL covers (patches of 16, merged 2 by 2)."""


def exact_duplicates(entries: Sequence[Entry]) -> list[Finding]:
    """Further rows of one advisor on a photograph with the very same bytes."""
    groups = _by(entries, lambda e: (e.advisor, e.photograph))
    found = [group for group in groups if len(group) > 1]
    return finding(
        "exact_duplicates",
        "same photograph again",
        surplus(found),
        f"By one advisor there are several rows for {some(len(found), 'photograph')}, "
        f"{some(len(surplus(found)), 'row')} more than one each. They share a part of the split, "
        "but they are not new evidence.",
        action="keep them if their critiques differ and are worth learning",
        groups=found,
    )


def near_duplicates(entries: Sequence[Entry], alike: Sequence[set[str]]) -> list[Finding]:
    """Rows on recompressed, resized or cropped copies of another row's photograph.

    Args:
        alike: groups of photographs (their hashes) that show one picture.
    """
    found = [[entry for entry in entries if entry.photograph in group] for group in alike]
    # The photograph that is met first stays; its own further rows are exact duplicates.
    rows = [
        entry
        for group in found
        for entry in _ordered(group)
        if entry.photograph != _ordered(group)[0].photograph
    ]
    return finding(
        "near_duplicates",
        "a copy of another photograph",
        rows,
        f"In {some(len(rows), 'row')} the photograph is a recompressed, resized or cropped copy "
        f"of another ({some(len(found), 'group')}). In a random split the copy gives away the "
        "answer.",
        groups=found,
    )


def independent(entries: Iterable[Entry], alike: Sequence[set[str]]) -> int:
    """How many pictures the entries show, every copy of one counted once."""
    first = {photograph: min(group) for group in alike for photograph in group}
    return len({first.get(entry.photograph, entry.photograph) for entry in entries})


def damaged_photographs(
    entries: Sequence[Entry], unreadable: Mapping[str, DataError]
) -> list[Finding]:
    """Rows whose photograph cannot be decoded, which linking, that decodes no JPEG, let pass.

    Args:
        unreadable: what is wrong with photographs, by their hashes.
    """
    found = [entry for entry in entries if entry.photograph in unreadable]
    first = next(iter(unreadable.values()), "")
    return finding(
        "damaged_photographs",
        "the photograph is damaged",
        found,
        f"In {some(len(found), 'row')} the photograph ({some(len(unreadable), 'file')}) cannot be "
        f"decoded: {first}.",
        action="replace the file and run task=link again",
    )


def photographs_of(entries: Iterable[Entry]) -> dict[str, Path]:
    """One file of each photograph, by its hash."""
    paths: dict[str, Path] = {}
    for entry in entries:
        paths.setdefault(entry.photograph, entry.image)
    return paths


def image_tokens(width: int, height: int, min_pixels: int, max_pixels: int) -> int:
    """Image tokens a photograph of that size costs, without decoding it.

    Qwen's ``smart_resize``: sides become multiples of 32 pixels, within the bounds on the area.
    """
    high, wide = (max(1, round(side / TOKEN_SIDE)) for side in (height, width))
    area, most, least = width * height, max_pixels / TOKEN_SIDE**2, min_pixels / TOKEN_SIDE**2
    if high * wide > most:
        shrink = math.sqrt(area / max_pixels)
        high, wide = (max(1, math.floor(side / shrink / TOKEN_SIDE)) for side in (height, width))
    elif high * wide < least:
        grow = math.sqrt(min_pixels / area)
        high, wide = (math.ceil(side * grow / TOKEN_SIDE) for side in (height, width))
    return high * wide


def picture_facts(entries: Sequence[Entry], min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """Rows per photograph and advisor, and image tokens: smallest, middle, largest, uncapped."""
    first = {entry.photograph: entry for entry in reversed(entries)}
    sizes = {key: size for key, e in first.items() if (size := e.size or measure(e.image))}
    tokens = sorted(image_tokens(*size, min_pixels, max_pixels) for size in sizes.values())
    uncapped = [image_tokens(*size, min_pixels, 10**12) for size in sizes.values()]
    per = Counter(Counter(entry.photograph for entry in entries).values())
    return {
        "rows_per_photograph": {str(rows): n for rows, n in sorted(per.items())},
        "rows_per_advisor": dict(Counter(entry.advisor for entry in entries).most_common()),
        "image_tokens": spread(tokens) | {"max_uncapped": max(uncapped, default=0)},
    }


def spread(values: Sequence[int]) -> dict[str, Any]:
    """Smallest, middle and largest of some counts."""
    ordered = sorted(values)
    if not ordered:
        return {"min": 0, "median": 0, "max": 0}
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}


def surplus(groups: Iterable[Sequence[Entry]]) -> list[Entry]:
    """All but the first of each group, whatever the order of the rows."""
    return [entry for group in groups for entry in _ordered(group)[1:]]


def _ordered(group: Sequence[Entry]) -> list[Entry]:
    return sorted(group, key=lambda entry: entry.job_id)


def _by(entries: Sequence[Entry], key: Callable[[Entry], Any]) -> list[list[Entry]]:
    groups: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return list(groups.values())


def measure(path: Path) -> tuple[int, int] | None:
    """Width and height from the file's header. Sideways or upright, the tokens are as many."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
