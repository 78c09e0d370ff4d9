"""Whether this process is one of several that train together, as its launcher's environment says.

Nothing here imports MLX: the entry point has to know before anything is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_HOSTS = "MLX_HOSTFILE"
_LISTS = (_HOSTS, "MLX_IBV_DEVICES")


@dataclass(frozen=True)
class Launched:
    """One of ``size`` processes, the one numbered ``rank`` from 0; 0 of 1 is a process alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


ONLY = Launched()
"""A process alone."""


def launched(environ: Mapping[str, str] | None = None) -> Launched:
    """What ``mlx.launch`` (ring, jaccl, nccl) or ``mpirun`` set; a process alone without them.

    Args:
        environ: the environment; None for this process's.
    """
    environ = os.environ if environ is None else environ
    size = next((int(environ[name]) for name in _SIZES if environ.get(name, "").isdigit()), 0)
    for name in _LISTS:
        with suppress(OSError, ValueError, KeyError, TypeError):
            size = size or len(json.loads(Path(environ[name]).read_text()))
    rank = next((int(environ[name]) for name in _RANKS if environ.get(name, "").isdigit()), 0)
    return Launched(rank, size) if size > 1 else ONLY


def address(rank: int, environ: Mapping[str, str] | None = None) -> str:
    """Where a process of a ring listens, ``host:port``; "an unknown address" if nothing says."""
    environ = os.environ if environ is None else environ
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads(Path(environ[_HOSTS]).read_text())[rank][0])
    return "an unknown address"
