"""Rows to tokens and batches: nothing cut, nothing dropped, and an order that can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import (
    BatchStream,
    Cursor,
    Example,
    TooLong,
    collate,
    encode,
    in_order,
)
from mondrian_ft.data.pixels import Pixels
from mondrian_ft.data.rows import Row
from mondrian_ft.errors import DataError


def example(number: int, prompt: int = 4, answer: int = 3) -> Example:
    row = Row(str(number), "ansel", Path("a.jpg"), "p", "r", "0")
    tokens = np.arange(100 * number, 100 * number + prompt + answer, dtype=np.int32)
    return Example(row, tokens, prompt, 0, Pixels(np.zeros((4, 1)), (1, 2, 2), 2))


def stream(count: int, size: int, **options: Any) -> BatchStream:
    examples = [example(n, answer=2 + n) for n in range(count)]
    return BatchStream(examples, batch_size=size, seed=7, pad_token=-5, **options)


def test_padding_is_on_the_right_and_never_trained() -> None:
    """Left padding is wrong for this model. Targets are the next tokens of the answer alone."""
    batch = collate([example(1, 4, 3), example(2, 3, 1)], [0, 1], -5)
    assert batch.tokens.tolist() == [
        [100, 101, 102, 103, 104, 105, 106],
        [200, 201, 202, 203, -5, -5, -5],
    ]
    assert batch.targets.tolist() == [
        [-1, -1, -1, 104, 105, 106, -1],
        [-1, -1, 203, -1, -1, -1, -1],
    ]
    assert batch.supervised == 4
    assert batch.rows == (0, 1)


@pytest.mark.parametrize(("count", "size"), [(7, 2), (7, 3), (6, 2), (1, 4), (5, 1)])
def test_every_row_once_an_epoch_the_tail_included(count, size) -> None:
    """Also where rows do not divide by the batch, or are fewer than it."""
    batches = stream(count, size)
    orders = []
    for epoch in range(3):
        assert batches.cursor == Cursor(epoch, 0)
        rows = [row for _ in range(batches.per_epoch) for row in batches.next().rows]
        assert sorted(rows) == list(range(count))
        orders.append(rows)
    if count > 4:
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_change_their_members() -> None:
    """Not only their order: elsewhere the same rows are batched together every epoch."""
    batches = stream(8, 2)
    pairs = [{frozenset(batches.next().rows) for _ in range(4)} for _ in range(3)]
    assert pairs[0] != pairs[1] != pairs[2]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 9])
def test_a_cursor_goes_on_with_the_same_order(taken) -> None:
    """As an uninterrupted stream, in the middle of an epoch or at its end."""
    straight = stream(7, 2)
    rows = [straight.next().rows for _ in range(12)]
    first = stream(7, 2)
    for _ in range(taken):
        first.next()
    second = stream(7, 2, cursor=first.cursor)
    assert [second.next().rows for _ in range(12 - taken)] == rows[taken:]


def test_the_seed_fixes_the_order() -> None:
    """Equal seeds, equal orders."""
    assert stream(9, 2).order(0) == stream(9, 2).order(0)
    other = BatchStream([example(n) for n in range(9)], batch_size=2, seed=8, pad_token=0)
    assert other.order(0) != stream(9, 2).order(0)


def test_an_update_never_straddles_epochs() -> None:
    """Seven rows in batches of two, three to an update: 3 and 1, not 3 and 3."""
    batches = stream(7, 2)
    assert [len(batches.update(3)) for _ in range(4)] == [3, 1, 3, 1]
    assert batches.cursor == Cursor(2, 0)


def test_validation_takes_all_rows_in_order() -> None:
    """The tail included, each once."""
    found = list(in_order([example(n) for n in range(5)], 2, -5))
    assert [batch.rows for batch in found] == [(0, 1), (2, 3), (4,)]
    assert list(in_order([], 2, -5)) == []


def test_a_stream_without_rows_is_refused() -> None:
    """One sentence, rather than an error from deep inside the first update."""
    with pytest.raises(DataError, match="no rows to train on"):
        stream(0, 2)


def test_encoding_a_row(lab, base) -> None:
    """Prompt with as many image tokens as the picture has, then the answer and its end."""
    (row,) = lab.rows(1)
    made = encode(row, base, base.image_processor, lab.settings, base.backbone.image_token)
    image = made.tokens == base.backbone.image_token
    assert image.sum() == made.pixels.tokens == 6
    assert made.image_start == int(np.argmax(image))
    assert image[made.image_start : made.image_start + 6].all()
    assert made.tokens[: made.prompt_length].tolist() == base.prompt_tokens(row.prompt, 6)
    assert base.text(made.tokens[made.prompt_length :].tolist()) == row.response
    assert made.tokens[-1] == base.tokenizer.eos_token_id
    assert made.supervised == len(base.answer_tokens(row.response))


def test_a_row_that_is_too_long_is_named_and_never_cut(lab, base) -> None:
    """Half a critique would teach to stop in the middle."""
    (row,) = lab.rows(1)
    whole = encode(row, base, base.image_processor, lab.settings, base.backbone.image_token)
    size = len(whole.tokens)

    def limited(longest: int) -> Example:
        return encode(
            row,
            base,
            base.image_processor,
            lab.settings,
            base.backbone.image_token,
            longest=longest,
        )

    assert np.array_equal(limited(size).tokens, whole.tokens)
    with pytest.raises(TooLong, match=f"row row0 has {size} tokens .6 of them image tokens"):
        limited(size - 1)


def test_a_photograph_with_known_features_is_not_decoded(lab, base, monkeypatch) -> None:
    """A second run starts without reading pixels; what is asked for later is the same picture."""
    from mondrian_ft.data import batches as module

    rows = lab.rows(7)
    options = (base, base.image_processor, lab.settings, base.backbone.image_token)
    plain = [encode(row, *options) for row in rows]
    asked: list[Any] = []

    def known(name: str, grid: Any) -> bool:
        asked.append((name, grid))
        return True

    opened = module.open_photograph
    monkeypatch.setattr(module, "open_photograph", lambda path: pytest.fail(f"decoded {path}"))
    late = [encode(row, *options, known=known) for row in rows]
    assert asked == [(one.row.image_sha256, one.pixels.grid) for one in plain]
    for one, other in zip(plain, late, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert one.pixels.tokens == other.pixels.tokens
        assert np.array_equal(one.pixels.patches, other.pixels.patches)
    # What is not known is decoded, to see that it can be, and let go.
    monkeypatch.setattr(module, "open_photograph", opened)
    unknown = encode(rows[0], *options, known=lambda name, grid: False)
    assert unknown.pixels == late[0].pixels


def test_the_first_batch_holds_the_longest_row() -> None:
    """Whoever runs out of memory learns it in the first update, not after an hour."""
    for count, size, accumulate in ((7, 2, 1), (40, 2, 2), (9, 4, 1), (5, 1, 2), (3, 8, 1)):
        batches = stream(count, size, accumulate=accumulate)
        assert count - 1 in batches.next().rows


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_updates_rows_do_not_depend_on_how_it_is_divided(epoch) -> None:
    """4×1 = 2×2 = 1×4, from the order of the rows on."""
    orders = [
        stream(43, size, accumulate=count).order(epoch) for size, count in ((4, 1), (2, 2), (1, 4))
    ]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == list(range(43))


def test_rows_of_like_length_go_together() -> None:
    """Padding falls to less than a third of what it is in a random order."""
    batches = stream(200, 4)

    def padding(order: list[int]) -> int:
        groups = [order[at : at + 4] for at in range(0, 200, 4)]
        return sum(4 * max(group) - sum(group) for group in groups)

    random = np.random.default_rng(0).permutation(200).tolist()
    assert padding(batches.order(1)) < padding(random) / 3


def test_few_shapes_and_every_batch_fits_one() -> None:
    """A compiled step is compiled anew for each shape."""
    from mondrian_ft.data.rooms import Rooms

    examples = [example(1, prompt=100 + 37 * n, answer=20 + 11 * (n % 7)) for n in range(60)]
    rooms = Rooms(examples, batch_size=3)
    assert 1 <= len(rooms) <= 4
    batches = BatchStream(examples, batch_size=3, seed=0, pad_token=0)
    seen = set()
    for _ in range(batches.per_epoch):
        batch = batches.next()
        room = rooms.of(batch)
        seen.add(room)
        assert batch.tokens.shape[1] <= room.length
        assert batch.supervised <= room.trained
        assert sum(one.pixels.tokens for one in batch.examples) <= room.images
        assert len(batch.rows) <= room.rows
    assert len(seen) > 1


def test_the_grid_from_a_files_head_is_the_pictures(lab, base) -> None:
    """Turned by EXIF as well; a file that is none has no grid, and decoding says why."""
    from PIL import Image

    from mondrian_ft.data.pixels import grid_of, open_photograph, to_pixels

    for turn in (1, 3, 6, 8):
        path = lab.folder / f"turned{turn}.jpg"
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (160, 64)).save(path, exif=exif)
        found = to_pixels(open_photograph(path), base.image_processor, lab.settings).grid
        assert grid_of(path, base.image_processor, lab.settings) == found
        assert (found[1] > found[2]) == (turn in (6, 8))
    path.write_bytes(b"no picture")
    assert grid_of(path, base.image_processor, lab.settings) is None
