"""Uvicorn as the service needs it: with an end to its patience, and a quiet stop.

Uvicorn closes a connection that stays silent between two requests, and waits without end for the
first. What comes after the head is `front`'s affair.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .local import Asgi

HEAD_SECONDS = 10.0
"""In which a request's line and headers must have come."""


class Patient(H11Protocol):
    """Closes a connection on which no whole head came for `HEAD_SECONDS`."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._cancel_head()
        elif self._head_timer is None and (before is None or before.response_complete):
            self._expect_head()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _cancel_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        transport: Any = self.transport
        if not transport.is_closing():
            transport.close()


GRACE_SECONDS = 30
"""In which the answers under way may end once the service is asked to stop."""


class _Quiet(uvicorn.Server):
    """Stops on Ctrl-C and SIGTERM, and does not raise the signal again afterwards.

    Raised again it would cancel what still has to be done in good order: ending the model's
    process. A second Ctrl-C does not wait for answers under way.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def server_of(app: Asgi, *, backlog: int = 512) -> uvicorn.Server:
    """The server of an application, not yet running; ``backlog`` may wait to be accepted."""
    return _Quiet(
        uvicorn.Config(
            app,
            http=Patient,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            backlog=max(128, backlog),
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


async def run_until_stopped(app: Asgi, listening: socket.socket, *, backlog: int = 512) -> None:
    """Answer requests until Ctrl-C or SIGTERM; whatever then is under way may end."""
    await server_of(app, backlog=backlog).serve(sockets=[listening])
