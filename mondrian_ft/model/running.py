"""Rows that are answered together although they began at different times.

`decode.Decoding` answers a batch that begins and ends together. A service's asks come when they
like, so here a row joins with its prompt read alone and leaves when it has ended, between any two
steps. The steps are `decode.Steps`': one cache per layer, into which all rows write one column.

The last columns of all rows are the same: a prompt is laid so that it ends where the others stand.
What is to the left of a row's first column is hidden by the mask. A token's rotary position is its
row's own, so where a row lies changes nothing it says, but for the last bit of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .backend import ON_CPU, mx
from .decode import CPU_BLOCK, GPU_BLOCK, Prefilled, Steps

BLOCK = CPU_BLOCK if ON_CPU else GPU_BLOCK
"""Capacities are multiples of this."""
PATIENCE = 8
"""Steps with half of the places empty before the batch is made smaller: making it costs a copy."""

Arrays = list[mx.array]


class Running:
    """Rows of one model, at different points of their answers.

    Rows have places 0 to ``places`` - 1, a power of two, so that on a GPU few sizes are compiled.

    Args:
        steps: what advances the rows.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.taken: list[bool] = []
        self.keys: Arrays = []
        self.values: Arrays = []
        self.column = 0
        self.left = np.zeros(0, np.int32)
        self.count = np.zeros(0, np.uint32)
        self.seeds = np.zeros(0, np.uint32)
        self.temperatures = np.zeros(0, np.float32)
        self.token = mx.zeros((0,), mx.int32)
        self.position = mx.zeros((0,), mx.int32)
        self.logits = mx.zeros((0, 0))
        self._idle = 0
        self._choose = mx.compile(_choose)
        self._draw = mx.compile(_draw)

    @property
    def places(self) -> int:
        """Rows that a step computes, empty ones among them."""
        return len(self.taken)

    @property
    def rows(self) -> int:
        """Rows that are being answered."""
        return sum(self.taken)

    @property
    def capacity(self) -> int:
        """Columns of the cache."""
        return int(self.keys[0].shape[2]) if self.keys else 0

    def join(self, start: Prefilled, *, seed: int = 0, temperature: float = 0.0) -> int:
        """Add a row, between two steps. Returns its place, which :meth:`settle` may change.

        Args:
            start: its prompt, read alone; it is not changed.
            seed: of its draws, 32 bits.
            temperature: 0 takes the most likely token.
        """
        length = int(start.lengths[0])
        if not self.keys:
            self._begin(start)
        if all(self.taken):
            self._resize([*range(self.places), *[None] * max(1, self.places)])
        place = self.taken.index(False)
        if length > self.column:
            # All rows go to the right until the new one's prompt has room.
            pad = -(-(length - self.column) // BLOCK) * BLOCK
            self.keys = [_wider(one, pad, 0) for one in self.keys]
            self.values = [_wider(one, pad, 0) for one in self.values]
            self.left += pad
            self.column += pad
        before, after = self.column - length, self.capacity - self.column
        at = mx.array([place], mx.int32)
        for cache, prompt in ((self.keys, start.keys), (self.values, start.values)):
            for number, one in enumerate(prompt):
                # The whole row, so that nothing stays of who was there: a hidden value that is no
                # number would still spoil a sum.
                row = _wider(one[:, :, :length], before, after)
                cache[number] = mx.slice_update(cache[number], row, at, axes=(0,))
        self.position = mx.slice_update(self.position, mx.array(start.positions), at, axes=(0,))
        self.logits = mx.slice_update(self.logits, start.logits, at, axes=(0,))
        self.taken[place] = True
        self.left[place] = before
        self.count[place] = 0
        self.seeds[place] = seed
        self.temperatures[place] = temperature
        return place

    def leave(self, place: int) -> None:
        """Give a row's place to whoever joins next."""
        self.taken[place] = False
        self.temperatures[place] = 0.0

    def settle(self) -> dict[int, int]:
        """Make the batch smaller if half of it has been empty for a while.

        Returns:
            The new place of each row whose place is another one now.
        """
        self._idle = self._idle + 1 if 2 * self.rows <= self.places else 0
        if self._idle < PATIENCE or not self.rows:
            return {}
        kept = [place for place, taken in enumerate(self.taken) if taken]
        size = 1 << (len(kept) - 1).bit_length()
        self._resize([*kept, *[None] * (size - len(kept))])
        self._idle = 0
        return {old: new for new, old in enumerate(kept) if old != new}

    def choose(self, allowed: np.ndarray | None = None) -> None:
        """Take ``token`` (places,) from ``logits``; -1 in a row whose logits are not all finite.

        Args:
            allowed: (places, ⌈V/32⌉) int32, bit v % 32 of word v // 32 set where token v may come;
                None for any token.
        """
        bits = None if allowed is None else mx.array(allowed.view(np.uint32))
        if self.temperatures.any():
            self.token = self._draw(
                self.logits,
                bits,
                mx.array(self.seeds),
                mx.array(self.count),
                mx.array(self.temperatures),
            )
        else:
            self.token = self._choose(self.logits, bits)
        self.count += 1
        mx.async_eval(self.token)

    def advance(self) -> None:
        """Queue one step over ``token``: the next ``logits``. Returns without waiting."""
        if self.column == self.capacity:
            self._grow()
        nothing: tuple[Arrays, Arrays] = ([], [])
        zero = mx.zeros((1,), mx.int32)
        self.logits, self.position, _, self.keys, self.values = self.steps.logits_step(
            mx.maximum(self.token, 0),
            self.position,
            # No prompt begins at column 0 for all rows: each row is seen from its first column on.
            (zero, mx.array(self.left)[:, None], zero, mx.array([self.column], mx.int32)),
            zero,
            nothing,
            (self.keys, self.values),
        )
        self.column += 1
        mx.async_eval(self.logits)

    def _begin(self, start: Prefilled) -> None:
        """An empty batch of one place that the prompt fits."""
        self.column = int(start.lengths[0])
        size = -(-(self.column + 1) // BLOCK) * BLOCK
        for cache, prompt in ((self.keys, start.keys), (self.values, start.values)):
            for one in prompt:
                _, heads, _, width = one.shape
                cache.append(mx.zeros((1, heads, size, width), one.dtype))
        self.taken = [False]
        self.left = np.array([self.column], np.int32)
        self.count, self.seeds = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        self.temperatures = np.zeros(1, np.float32)
        self.token = mx.zeros((1,), mx.int32)
        self.position = mx.zeros((1,), mx.int32)
        self.logits = mx.zeros(start.logits.shape, start.logits.dtype)

    def _resize(self, places: Sequence[int | None]) -> None:
        """Another number of places; each is an old one or, where None, empty."""
        old = np.array([0 if place is None else place for place in places], np.int32)
        empty = np.array([place is None for place in places])
        index = mx.array(old)
        for name in ("token", "position", "logits"):
            setattr(self, name, getattr(self, name)[index])
        self.keys = [one[index] for one in self.keys]
        self.values = [one[index] for one in self.values]
        self.taken = [place is not None and self.taken[place] for place in places]
        self.left = np.where(empty, self.column, self.left[old]).astype(np.int32)
        self.count, self.seeds = self.count[old], self.seeds[old]
        self.temperatures = np.where(empty, 0, self.temperatures[old]).astype(np.float32)

    def _grow(self) -> None:
        """Room for more columns; those that no row looks at any more go."""
        live = [int(first) for first, taken in zip(self.left, self.taken, strict=True) if taken]
        drop = min(live, default=self.column) // BLOCK * BLOCK
        more = drop if drop else BLOCK
        self.keys = [_wider(one[:, :, drop:], 0, more) for one in self.keys]
        self.values = [_wider(one[:, :, drop:], 0, more) for one in self.values]
        self.left = np.maximum(self.left - drop, 0).astype(np.int32)
        self.column -= drop


def _wider(one: mx.array, before: int, after: int) -> mx.array:
    """Empty columns before and after those there are."""
    return mx.pad(one, [(0, 0), (0, 0), (before, after), (0, 0)])


def _choose(logits: mx.array, bits: mx.array | None) -> mx.array:
    return _sound(logits, mx.argmax(_masked(logits, bits), axis=-1))


def _draw(
    logits: mx.array,
    bits: mx.array | None,
    seeds: mx.array,
    count: mx.array,
    temperatures: mx.array,
) -> mx.array:
    """Rows of temperature 0 take the most likely token; the others' tokens are drawn.

    A draw depends on its row's seed and on how many tokens the row has, and on nothing else.
    """
    masked = _masked(logits, bits).astype(mx.float32)
    drawn: Any = mx.vmap(lambda one, key: mx.random.categorical(one, key=key))(
        masked / mx.where(temperatures > 0, temperatures, 1.0)[:, None],
        mx.stack([seeds, count], axis=-1),
    )
    return _sound(logits, mx.where(temperatures > 0, drawn, mx.argmax(masked, axis=-1)))


def _masked(logits: mx.array, bits: mx.array | None) -> mx.array:
    if bits is None:
        return logits
    rows, size = logits.shape
    each = (bits[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    each = each.reshape(rows, -1)[:, :size].astype(mx.bool_)
    return mx.where(each, logits, mx.array(-mx.inf, logits.dtype))


def _sound(logits: mx.array, token: mx.array) -> mx.array:
    return mx.where(mx.isfinite(logits).all(axis=-1), token.astype(mx.int32), -1)
