"""Messages between the HTTP process and the model's process: pickled, with their length before.

Both ends are processes of this program and of one user, on a socket that nobody else has.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any

from .protocol import Ask, Status

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True)
class Setup:
    """What the model's process is started with; plain values.

    Attributes:
        model, name, dtype, quantize_bits, other_precision: see ``model.base.load_base``.
        min_pixels, max_pixels: bounds on a photograph's pixels.
        arms: what has to be loaded and proved before anything is answered. Adapter directories
            are answered with only if they are among these; channels and versions always.
        registry_root, registry_name: where channels and versions are looked up; None for nowhere.
        max_rows: asks that are decoded together.
        max_tokens: most tokens of any answer.
        max_adapters: adapters kept in memory; the one used longest ago goes first.
        merge_bytes: most memory that an adapter may take so that its steps cost what the base's do;
            one that would need more is applied to the base's one copy of the weights.
        dimensions: names that a constrained answer must have; None leaves them to the model.
        features_dir: folder in which vision features outlive the process; None keeps none.
        features_bytes: bound on the vision features in memory.
    """

    model: str
    name: str
    min_pixels: int
    max_pixels: int
    dtype: str = "auto"
    quantize_bits: int | None = None
    other_precision: bool = False
    arms: tuple[str, ...] = ()
    registry_root: str | None = None
    registry_name: str | None = None
    max_rows: int = 16
    max_tokens: int = 2048
    max_adapters: int = 8
    merge_bytes: int = 64 << 20
    dimensions: tuple[str, ...] | None = None
    features_dir: str | None = None
    features_bytes: int = 256 << 20


@dataclass(frozen=True)
class Take:
    """Answer this; ``sent`` is when its caller asked, of the system's monotonic clock."""

    ask: Ask
    sent: float


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this answer any more."""

    id: str


@dataclass(frozen=True)
class Stop:
    """End when what is under way has been answered."""


@dataclass(frozen=True)
class Beat:
    """The process is alive; ``turned`` says how many seconds ago its loop was."""

    status: Status
    turned: float


def pack(message: Any) -> bytes:
    """A message as it goes over the socket."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def receive(connection: socket.socket) -> Any:
    """The next message; waits.

    Raises:
        EOFError: the other end is gone.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return pickle.loads(_exactly(connection, length))


async def receive_async(reader: asyncio.StreamReader) -> Any:
    """The next message.

    Raises:
        EOFError: the other end is gone.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = connection.recv(min(size - len(parts), 1 << 20))
        except ConnectionError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
