"""The real service in processes of its own, for tests to ask and to hurt."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import environment, typed

PATIENCE = 120.0
"""Seconds that a condition is waited for: far more than any takes, for a busy machine."""


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def until(holds: Callable[[], Any], what: str) -> Any:
    """Wait for a condition; what it came to."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


@dataclass
class Serving:
    """A running service: its address, its process, and where its output goes."""

    url: str
    child: subprocess.Popen[bytes]
    out: Path
    err: Path

    def worker(self) -> int:
        """The process id of the one that has the model."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.child.pid), "-f", "mondrian_ft.serving.worker"],
            capture_output=True,
            text=True,
            check=False,
        )
        return int(found.stdout.split()[0]) if found.stdout.strip() else 0

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait for the exit code."""
        self.child.send_signal(how)
        return self.child.wait(PATIENCE)


@contextmanager
def serving(cwd: Path, *argv: str) -> Iterator[Serving]:
    """``task=serve`` with these words, once it listens; killed in the end if it still runs."""
    out, err = cwd / "service.out", cwd / "service.err"
    # Into files: a pipe that nobody reads would fill, and the service would stand still.
    with out.open("wb") as told, err.open("wb") as complained:
        child = subprocess.Popen(
            typed("task=serve", "task.port=0", "tracking=none", *argv),
            cwd=cwd,
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=told,
            stderr=complained,
        )
    try:
        until(
            lambda: "Ctrl-C stops it" in out.read_text() or child.poll() is not None,
            "the service to listen",
        )
        found = re.search(r"http://127\.0\.0\.1:\d+", out.read_text())
        assert found is not None, out.read_text() + err.read_text()
        yield Serving(found[0], child, out, err)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
