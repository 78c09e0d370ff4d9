"""A folder for what a process writes and nobody keeps; those of killed processes are removed.

A killed process removes nothing. Its folder is known by its lock, which ended with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "mondrian_ft-process-"
_LOCK = "lock"


@contextmanager
def folder() -> Iterator[Path]:
    """A new temporary folder, which goes with the block; others' that nobody holds go first."""
    _clear(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as made:
        # Under its name only once it is held, or another process could take it for one left behind.
        handle = os.open(Path(made) / "new", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            os.rename(Path(made) / "new", Path(made) / _LOCK)
            yield Path(made)
        finally:
            os.close(handle)


def _clear(above: Path) -> None:
    """Remove this user's folders of processes that are gone."""
    for one in above.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if one.is_symlink() or one.stat().st_uid != os.getuid():
                continue
            handle = os.open(one / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(one)
            finally:
                os.close(handle)
