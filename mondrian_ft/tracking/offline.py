"""Reading the file that W&B keeps of a run on disk, ``run-<id>.wandb``.

It is LevelDB's log format after a header of 7 bytes: blocks of 32 KiB, in them pieces of records,
each with a checksum (4 bytes), a length (2) and a kind (1). The records are W&B's protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

EMPTY = 7
"""Bytes of a file without a record."""
_BLOCK, _HEADER = 32_768, 7
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The whole records of a ``.wandb`` file, in order; a last one that was cut is left out.

    Raises:
        OSError: the file cannot be read.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    for data in _raw(path.read_bytes(), EMPTY):
        yield Record.FromString(data)


def closed(path: Path) -> bool:
    """Whether W&B wrote ``path`` to its end, which it does not on a full disk, and says nothing.

    Only the file's end is read. A file that cannot be read was not.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    try:
        size = path.stat().st_size
        # The last record is a small one: it lies in the last two blocks.
        start = max(0, (size - 1) // _BLOCK - 1) * _BLOCK
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        found = list(_raw(data, EMPTY if start == 0 else 0))
        return bool(found) and Record.FromString(found[-1]).HasField("exit")
    except (OSError, DecodeError):
        return False


def _raw(data: bytes, at: int) -> Iterator[bytes]:
    """The records in ``data``, which begins with a block; of the first one a piece may lack."""
    record, whole = b"", False
    while at + _HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + _HEADER : at + _HEADER + length]
        if len(piece) < length:
            return
        at += _HEADER + length
        if kind in (_FULL, 2):
            record, whole = b"", True
        record += piece
        if kind in (_FULL, _LAST):
            if whole:
                yield record
            record, whole = b"", False
