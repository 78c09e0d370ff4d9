"""From rows to token arrays: encoding, order of an epoch, and right-padded batches.

Nothing here imports MLX: arrays are numpy, and the trainer moves them to its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import DataError
from .pixels import (
    Grid,
    ImageProcessor,
    LatePixels,
    Pixels,
    PixelSettings,
    grid_of,
    open_photograph,
    to_pixels,
)
from .rows import Row

if TYPE_CHECKING:
    import numpy as np


STRETCH = 8
"""Updates within which rows are sorted by length: more pads less, fewer mixes better."""


class TooLong(DataError):
    """A row that has more tokens than the model takes. A row is never cut."""


class Encoder(Protocol):
    """What turns texts into token ids; ``model.base.Base`` is one."""

    def prompt_tokens(self, prompt: str, image_tokens: int) -> list[int]: ...
    def answer_tokens(self, answer: str) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """One row, ready for the model.

    Attributes:
        row: where it came from.
        tokens: (L,) int32, prompt with image tokens, then answer and its end token.
        prompt_length: tokens before the answer; exactly the tokens after it are trained.
        image_start: index of the first image token.
        pixels: the photograph as the model sees it.
    """

    row: Row
    tokens: np.ndarray
    prompt_length: int
    image_start: int
    pixels: Pixels | LatePixels

    @property
    def supervised(self) -> int:
        """Tokens that are trained: the answer and its end."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to the longest of them, B rows by L tokens.

    Attributes:
        tokens: (B, L) int32.
        targets: (B, L) int32; the next token where it is trained, -1 elsewhere.
        rows: index of each row in the sequence the batch was drawn from.
    """

    tokens: np.ndarray
    targets: np.ndarray
    rows: tuple[int, ...]
    examples: tuple[Example, ...]

    @property
    def supervised(self) -> int:
        """Trained tokens in the batch."""
        return int((self.targets >= 0).sum())


def encode(
    row: Row,
    encoder: Encoder,
    processor: ImageProcessor,
    settings: PixelSettings,
    image_token: int,
    *,
    longest: int | None = None,
    known: Callable[[str, Grid], bool] | None = None,
) -> Example:
    """Encode one row.

    Prompt and answer are tokenised apart and joined, so that the prompt's tokens are a prefix of
    the whole, the same that the model is given when it answers, and the boundary between what is
    given and what is learnt never falls inside a token.

    Args:
        image_token: id of the token that stands for a piece of the picture.
        longest: most tokens a row may have; None for any.
        known: whether the features of a photograph (its content's hash, its grid) are cached. Then
            the file is not decoded; and of no photograph the patches are kept. None keeps them.

    Raises:
        DataError: the photograph cannot be read.
        TooLong: the row is longer than ``longest``. Half a critique would teach to stop in the
            middle.
    """
    import numpy as np

    pixels = _pixels(row, processor, settings, known)
    prompt = encoder.prompt_tokens(row.prompt, pixels.tokens)
    tokens = np.array([*prompt, *encoder.answer_tokens(row.response)], np.int32)
    if longest is not None and len(tokens) > longest:
        raise TooLong(
            f"row {row.job_id} has {len(tokens)} tokens ({pixels.tokens} of them image tokens), "
            f"more than the {longest} the model takes, so it is left out; lower data.max_pixels to "
            "keep it"
        )
    image_start = int(np.argmax(tokens == image_token))
    return Example(row, tokens, len(prompt), image_start, pixels)


def _pixels(
    row: Row,
    processor: ImageProcessor,
    settings: PixelSettings,
    known: Callable[[str, Grid], bool] | None,
) -> Pixels | LatePixels:
    if known is not None:
        grid = grid_of(row.image_path, processor, settings)
        if grid is not None and known(row.image_sha256, grid):
            return LatePixels(row.image_path, processor, settings, grid, processor.merge_size)
    pixels = to_pixels(open_photograph(row.image_path), processor, settings)
    if known is None:
        return pixels
    return LatePixels(row.image_path, processor, settings, pixels.grid, pixels.merge)


def collate(examples: Sequence[Example], indices: Sequence[int], pad_token: int) -> Batch:
    """Pad chosen examples on the right. Padding is never trained and never attended to."""
    import numpy as np

    chosen = [examples[index] for index in indices]
    length = max(len(example.tokens) for example in chosen)
    tokens = np.full((len(chosen), length), pad_token, np.int32)
    targets = np.full((len(chosen), length), -1, np.int32)
    for number, example in enumerate(chosen):
        size = len(example.tokens)
        tokens[number, :size] = example.tokens
        # Position i predicts token i + 1, so the answer's first token is the target of the last
        # prompt position.
        targets[number, example.prompt_length - 1 : size - 1] = example.tokens[
            example.prompt_length :
        ]
    return Batch(tokens, targets, tuple(indices), tuple(chosen))


@dataclass(frozen=True)
class Cursor:
    """Where an epoch stands: micro-batches already given in ``epoch`` (counted from 0)."""

    epoch: int = 0
    batch: int = 0


class BatchStream:
    """Endless micro-batches: every example once an epoch, in a fresh order, the tail included.

    The order of an epoch depends only on the seed and the epoch's number, so a stream resumed
    from a cursor goes on exactly as the uninterrupted one would.

    Rows of like length go into one update: each epoch the rows are shuffled, sorted by length
    within stretches of some updates, and the updates shuffled. So an update's members change every
    epoch, and how an update is divided into micro-batches changes nothing about its members. The
    first update of all holds the longest row, so that whoever runs out of memory learns it there.

    Args:
        examples: what to train on.
        batch_size: rows of a micro-batch; the last of an epoch may have fewer.
        seed: of the orders.
        pad_token: fills rows on the right.
        cursor: where to begin.
        accumulate: micro-batches of an update.

    Raises:
        DataError: there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        pad_token: int,
        cursor: Cursor = Cursor(),
        accumulate: int = 1,
    ) -> None:
        if not examples:
            raise DataError("there are no rows to train on; see the link report for the reasons")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.pad_token = pad_token
        self.cursor = cursor
        self.accumulate = accumulate
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def per_epoch(self) -> int:
        """Micro-batches of one epoch."""
        return -(-len(self.examples) // self.batch_size)

    def order(self, epoch: int) -> list[int]:
        """Indices of the examples in the order of an epoch."""
        import numpy as np

        if self._order[0] == epoch:
            return self._order[1]
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.examples)).tolist()
        size = self.batch_size * self.accumulate
        if size > 1:
            updates: list[list[int]] = []
            # Few rows sorted as a whole would fall into the same updates every epoch.
            stretch = size * max(1, min(STRETCH, len(shuffled) // size // 4))
            for start in range(0, len(shuffled), stretch):
                part = shuffled[start : start + stretch]
                # Descending: what is left over at the end of the epoch is short.
                part.sort(key=self._length, reverse=True)
                updates += [part[at : at + size] for at in range(0, len(part), size)]
            # An incomplete update stays the last.
            whole = [update for update in updates if len(update) == size]
            mixed = [whole[at] for at in random.permutation(len(whole)).tolist()]
            shuffled = [row for update in mixed + updates[len(whole) :] for row in update]
        if epoch == 0:
            at = max(range(len(shuffled)), key=lambda place: self._length(shuffled[place]))
            first = at // size * size
            if first + size <= len(shuffled):
                chosen = shuffled[first : first + size]
                shuffled = [*chosen, *shuffled[:first], *shuffled[first + size :]]
            else:
                shuffled[0], shuffled[at] = shuffled[at], shuffled[0]
        self._order = (epoch, shuffled)
        return shuffled

    def _length(self, row: int) -> int:
        return len(self.examples[row].tokens)

    def next(self) -> Batch:
        """The next micro-batch; moves the cursor."""
        epoch, number = self.cursor.epoch, self.cursor.batch
        order = self.order(epoch)
        first = number * self.batch_size
        batch = collate(self.examples, order[first : first + self.batch_size], self.pad_token)
        number += 1
        self.cursor = Cursor(epoch + 1, 0) if number == self.per_epoch else Cursor(epoch, number)
        return batch

    def update(self, accumulate: int) -> list[Batch]:
        """The micro-batches of one update: ``accumulate``, or fewer where the epoch ends.

        An update never straddles two epochs, so that a whole epoch is a whole number of updates.
        """
        epoch = self.cursor.epoch
        batches = [self.next()]
        while len(batches) < accumulate and self.cursor.epoch == epoch:
            batches.append(self.next())
        return batches


def in_order(examples: Sequence[Example], batch_size: int, pad_token: int) -> Iterator[Batch]:
    """All examples once, in the given order, the tail included."""
    for first in range(0, len(examples), batch_size):
        indices = range(first, min(first + batch_size, len(examples)))
        yield collate(examples, list(indices), pad_token)
