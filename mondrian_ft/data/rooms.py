"""Few shapes for batches: a compiled step is compiled anew for every shape it meets.

Each batch is filled up to one of a few lengths, which are chosen from the rows' own, and to as many
rows, trained tokens and image tokens as any batch of that length could have. What is filled up is
never trained and never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .batches import Batch, Example

MULTIPLE = 128
"""Of lengths. On CUDA attention's backward pass is fused only at its multiples."""
SHAPES = 4
"""Lengths at most."""


@dataclass(frozen=True)
class Room:
    """What a batch is filled up to: rows, tokens of a row, and in all rows together the trained
    tokens and the image tokens."""

    rows: int
    length: int
    trained: int
    images: int


class Rooms:
    """The shapes for some rows.

    Args:
        examples: all rows that batches are made of.
        batch_size: rows of a batch at most.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int) -> None:
        lengths = sorted(_up(len(one.tokens)) for one in examples)
        known = sorted(set(lengths))
        if len(known) > SHAPES:
            # Equally many rows each.
            places = [(number + 1) * len(lengths) // SHAPES - 1 for number in range(SHAPES)]
            known = sorted({lengths[place] for place in places})
        self._rooms = []
        for length in known:
            inside = [one for one in examples if len(one.tokens) <= length]
            self._rooms.append(
                Room(
                    batch_size,
                    length,
                    _up(batch_size * max(one.supervised for one in inside)),
                    _up(batch_size * max(one.pixels.tokens for one in inside)),
                )
            )

    def __len__(self) -> int:
        return len(self._rooms)

    def of(self, batch: Batch) -> Room:
        """The smallest room that a batch of these rows fits into."""
        longest = max(len(one.tokens) for one in batch.examples)
        return next(room for room in self._rooms if longest <= room.length)


def _up(count: int) -> int:
    return -(-count // MULTIPLE) * MULTIPLE
