"""Rows side by side on a CPU.

MLX adds and multiplies with one thread for each of its streams, and of a single stream a second
core has nothing. So each row of a micro-batch is computed on a stream of its own, as many at a time
as there are cores. No number depends on how many that are.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from . import machine
from .backend import ON_CPU, mx

_WIDTH = "2000"
"""Of the graph that MLX walks. It queues a hundred operations ahead; with its own width of 20 all
of one row would be queued before the first of the next."""

_own = threading.local()

if ON_CPU:
    # Read when a first array is evaluated.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", _WIDTH)


def count(rows: int) -> int:
    """How many of some rows are computed at a time."""
    return max(1, min(rows, machine.AT_ONCE, machine.cores())) if ON_CPU else 1


def lane(number: int, lanes: int) -> AbstractContextManager[Any]:
    """Operations made within the block run on the stream of row ``number`` of ``lanes`` at a time;
    with one lane on the usual stream."""
    if lanes == 1:
        return nullcontext()
    # A stream belongs to the thread that made it.
    streams = _own.__dict__.setdefault("streams", [])
    while len(streams) < lanes:
        streams.append(mx.new_stream(mx.Device(mx.DeviceType.cpu)))
    return mx.stream(streams[number % lanes])
