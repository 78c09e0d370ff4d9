"""Servers under test in processes of their own, and Locust's clients that ask them.

Ours is ``python -m mondrian_ft task=serve``; the other is ``python -m mlx_vlm.server`` with the
OpenBLAS that ours loads by itself (see `training_step`). Both get the same bodies, but for how an
adapter is named.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import training_step

ROUTE = "/v1/chat/completions"
PATIENCE = 300.0
"""Seconds that a server may take until it answers."""


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, its process, and seconds from its start to ready."""

    url: str
    pid: int
    seconds: float

    def get(self, path: str) -> dict[str, Any]:
        """A JSON answer."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def memory(self) -> dict[str, float]:
        """Resident GB of the HTTP process, and of the model's as it says itself."""
        found = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True
        )
        model = self.get("/model-status")["memory_gb"]
        return {"http": round(int(found.stdout) * 1024 / 1e9, 3), "model": round(model, 3)}


@contextmanager
def ours(cwd: Path, *words: str) -> Iterator[Server]:
    """``task=serve`` with these words, once it is ready."""
    port = _free_port()
    argv = [sys.executable, "-m", "mondrian_ft", "task=serve", f"task.port={port}", "tracking=none"]
    env = {**training_step.environment(), "PYTHONPATH": str(training_step.ROOT)}
    env |= {"XDG_CACHE_HOME": str(cwd)}
    with _running([*argv, *words], cwd, env, port) as one:
        yield one


@contextmanager
def theirs(cwd: Path, model: Path) -> Iterator[Server]:
    """``mlx_vlm.server`` with this model, once it is ready."""
    port = _free_port()
    argv = [sys.executable, "-m", "mlx_vlm.server", "--model", str(model)]
    env = {**training_step.environment(), **training_step.preload()}
    with _running([*argv, "--host", "127.0.0.1", "--port", str(port)], cwd, env, port) as one:
        yield one


@contextmanager
def _running(argv: list[str], cwd: Path, env: dict[str, str], port: int) -> Iterator[Server]:
    log = cwd / "server.log"
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    with log.open("wb") as said:
        child = subprocess.Popen(argv, cwd=cwd, env=env, stdout=said, stderr=said)
    try:
        while not _answers(url + "/health"):
            if child.poll() is not None or time.perf_counter() - started > PATIENCE:
                raise RuntimeError(f"{' '.join(argv)} is not ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)
        yield Server(url, child.pid, time.perf_counter() - started)
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:  # nobody listens, or it is loading
        return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclass(frozen=True)
class Reply:
    """What came back; seconds on the client's clock. ``sent`` is of the system's clock."""

    number: int
    sent: float
    seconds: float
    status: int
    text: str
    tokens: int = 0
    who: str | None = None


@dataclass(frozen=True)
class Round:
    """Replies in their requests' order, and seconds from the first request to the last reply."""

    replies: list[Reply]
    seconds: float

    @property
    def errors(self) -> int:
        """Requests without an answer."""
        return sum(reply.status != 200 for reply in self.replies)

    @property
    def per_second(self) -> float:
        """Requests answered a second."""
        return (len(self.replies) - self.errors) / self.seconds

    @property
    def p50(self) -> float:
        """Median seconds of a request."""
        return statistics.median(reply.seconds for reply in self.replies)

    @property
    def p95(self) -> float:
        """Seconds within which 95 of 100 requests were answered."""
        taken = sorted(reply.seconds for reply in self.replies)
        return taken[math.ceil(0.95 * len(taken)) - 1]


class Load:
    """Requests that Locust puts: ``with Load(…) as load: …`` lets them run beside other work.

    Args:
        server: whom they are put to.
        requests: fields beside the messages, and ``picture``, a path.
        prompt: what is asked.
        clients: how many ask at once.
        folder: for the plan and the replies.
    """

    def __init__(
        self,
        server: Server,
        requests: Sequence[dict[str, Any]],
        prompt: str,
        clients: int,
        folder: Path,
    ) -> None:
        self._count = len(requests)
        self._out, plan = folder / "replies.jsonl", folder / "plan.json"
        self._out.unlink(missing_ok=True)
        content = {"path": ROUTE, "requests": list(requests), "prompt": prompt}
        plan.write_text(json.dumps({**content, "out": str(self._out)}))
        script = Path(__file__).parent / "locustfile.py"
        argv = [sys.executable, "-m", "locust", "-f", str(script), "--headless", "-H", server.url]
        argv += ["-u", str(clients), "-r", str(clients), "--only-summary"]
        argv += ["--exit-code-on-error", "0"]
        env = {**os.environ, "PLAN": str(plan)}
        self._child = subprocess.Popen(
            argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def wait_for(self, count: int) -> None:
        """Until so many have been answered."""
        while self._child.poll() is None and len(self._lines()) < count:
            time.sleep(0.02)

    def finish(self, limit: float | None = None) -> Round:
        """Until all have been answered, or after ``limit`` seconds: the others failed then."""
        try:
            said, _ = self._child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            return self._cut(limit or 0.0)
        replies = [Reply(**json.loads(line)) for line in self._lines()]
        if self._child.returncode != 0 or len(replies) != self._count:
            raise RuntimeError(
                f"Locust ended with {self._child.returncode} after {len(replies)} of "
                f"{self._count} requests:\n{said[-3000:]}"
            )
        return Round(sorted(replies, key=lambda reply: reply.number), _span(replies))

    def _cut(self, limit: float) -> Round:
        # The seconds end with the last answer: what it hung for afterwards is not held against it.
        found = {one.number: one for one in (Reply(**json.loads(line)) for line in self._lines())}
        replies = [
            found.get(number, Reply(number, 0.0, limit, 0, "no answer"))
            for number in range(self._count)
        ]
        answered = [one for one in found.values() if one.status == 200]
        return Round(replies, _span(answered) if answered else limit)

    def _lines(self) -> list[str]:
        return self._out.read_text().splitlines() if self._out.exists() else []


def _span(replies: Sequence[Reply]) -> float:
    first = min(reply.sent for reply in replies)
    return max(reply.sent + reply.seconds for reply in replies) - first


def put(
    server: Server,
    requests: Sequence[dict[str, Any]],
    prompt: str,
    clients: int,
    folder: Path,
    limit: float | None = None,
) -> Round:
    """All these requests, by so many clients; see :class:`Load`."""
    with Load(server, requests, prompt, clients, folder) as load:
        return load.finish(limit)
