"""Which matrices of a model an adapter goes to, by name; no weights needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import AdapterError, nearest

PREFIX = "language_model."
"""What full names of the language model's matrices begin with."""
VISION = "vision_tower."
"""The same of the vision tower's, the mergers among them."""


def layer_number(name: str) -> int:
    """The decoder layer that a matrix or tensor named ``….layers.<number>.…`` belongs to.

    The vision tower's have none; see :func:`in_tower`.
    """
    return int(name.split("layers.", 1)[1].split(".", 1)[0])


def in_tower(name: str) -> bool:
    """Whether a matrix or tensor is the vision tower's or a merger's."""
    return name.startswith(VISION)


def matching(
    names: Sequence[str],
    targets: Iterable[str],
    layers: Sequence[int] | None = None,
    elsewhere: Iterable[str] = (),
) -> list[str]:
    """The names that targets mean.

    Args:
        names: full names of the decoder layers' matrices.
        targets: each a matrix' last name (``q_proj``), or a regular expression for a whole name
            (``.*layers\\.[0-3]\\..*_proj``).
        layers: numbers of the decoder layers, ascending; None for all.
        elsewhere: full names of the other linear layers, which ``lora.vision`` is for.

    Raises:
        AdapterError: a target or a layer matches nothing; the message lists what exists.
    """
    kinds = sorted({last(name) for name in names})
    others = sorted({last(name) for name in elsewhere} - set(kinds))
    chosen: set[str] = set()
    for target in targets:
        found = _matched(names, target)
        if not found:
            near = nearest(target, kinds)
            hint = f"; did you mean {near}?" if near and target != near else ""
            if _matched(list(elsewhere), target):
                hint = f"; {', '.join(others)} are in the vision tower: name them in lora.vision"
            example = "" if _plain(target) else f", in full such as {min(names)}"
            raise AdapterError(
                f"lora.target_modules names {target}, which matches no matrix of the language "
                f"model; it has {', '.join(kinds)}{example}{hint}"
            )
        chosen.update(found)
    depth = 1 + max(layer_number(name) for name in names)
    if layers is not None and layers[-1] >= depth:
        raise AdapterError(
            f"the adapter has layer {layers[-1]}, but the model's last is {depth - 1}; it was "
            "made for another base, or lora.layers goes too far"
        )
    kept = [
        name
        for name in names
        if name in chosen and (layers is None or layer_number(name) in layers)
    ]
    for target in targets:
        if not set(_matched(names, target)) & set(kept):
            raise AdapterError(
                f"lora.target_modules names {target}, which matches nothing in the layers "
                f"{ranges(layers or ())} of lora.layers; leave out one of them"
            )
    return kept


def matching_vision(names: Sequence[str], targets: Iterable[str]) -> list[str]:
    """The vision tower's matrices that targets mean, in the order of ``names``.

    Args:
        names: full names of the tower's matrices, the mergers among them.
        targets: each a matrix' last name (``qkv``), or a regular expression for a whole name
            (``.*merger.*``).

    Raises:
        AdapterError: a target matches nothing; the message lists what exists.
    """
    chosen: set[str] = set()
    for target in targets:
        found = _matched(names, target, "lora.vision")
        if not found:
            kinds = sorted({last(name) for name in names})
            near = nearest(target, kinds)
            hint = f"; did you mean {near}?" if near and target != near else ""
            if target in ("q_proj", "k_proj", "v_proj", "q", "k", "v"):
                hint = "; query, key and value are one matrix there, qkv"
            example = "" if _plain(target) else f", in full such as {min(names)}"
            raise AdapterError(
                f"lora.vision names {target}, which matches no matrix of the vision tower; it has "
                f"{', '.join(kinds)}{example}{hint}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def vision_patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Regular expressions for these matrices of a tower, and for those of the same kind in other
    blocks; for an adapter whose targets nobody wrote down."""
    return tuple(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(one)) for one in names}))


def last(name: str) -> str:
    """A matrix' own name, such as ``q_proj``."""
    return name.rsplit(".", 1)[-1]


def parse_layers(given: Sequence[str]) -> tuple[int, ...]:
    """``["0-3", "30"]`` to numbers, ascending.

    Raises:
        ValueError: an entry is neither a number nor a range that rises.
    """
    found: set[int] = set()
    for entry in given:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", entry)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(entry)
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def ranges(layers: Sequence[int]) -> str:
    """Numbers as ``0-3, 30``; the inverse of :func:`parse_layers`."""
    parts: list[list[int]] = []
    for number in layers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _plain(target: str) -> bool:
    return re.fullmatch(r"\w+", target) is not None


def _matched(names: Sequence[str], target: str, key: str = "lora.target_modules") -> list[str]:
    if _plain(target):
        return [name for name in names if last(name) == target]
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise AdapterError(
            f"{key} has {target}, which is no regular expression ({error})"
        ) from None
    return [name for name in names if pattern.fullmatch(name)]
