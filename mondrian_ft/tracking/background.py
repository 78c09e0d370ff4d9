"""Calls made one after the other on a thread of their own, so that nobody waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

WAITING = 20_000
"""Calls that may wait; more means that what takes them no longer moves."""


class Background:
    """A thread that makes the calls it is given, in order. Its calls must not raise.

    The thread starts with the first call, and does not keep the process alive: what hangs in it is
    left behind at the end, see `end`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # The plain one costs a caller a fraction of what queue.Queue's locks do.
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether there was a first call."""
        return self._thread is not None

    def put(self, call: Callable[[], None]) -> bool:
        """Has ``call`` made after those before it; False where too many wait already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        if self._queue.qsize() >= WAITING:
            return False
        self._queue.put(call)
        return True

    def end(self, last: Callable[[], None], seconds: float) -> bool:
        """Makes one ``last`` call and ends; False where that is not done within ``seconds``."""
        if self._thread is None:
            return True
        self._queue.put(last)
        self._queue.put(None)
        return self.wait(seconds)

    def wait(self, seconds: float) -> bool:
        """Waits for the thread to end; False where it has not within ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()
