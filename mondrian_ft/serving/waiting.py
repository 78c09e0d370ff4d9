"""Waiting for an answer for as long as the one who asked is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; None, and ``work`` is cancelled, if the client goes away first.

    The request's body must have been read: what is received then is that the client went.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        gone.cancel()
        doing.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events (WHATWG HTML, 9.2) whose source is closed when the client goes away.

    Args:
        first: the first event, made already: what failed before it is an ordinary HTTP error.
        events: the others.
    """

    def __init__(self, first: str, events: AsyncGenerator[str, None]) -> None:
        async def everything() -> AsyncGenerator[str, None]:
            yield first
            async for event in events:
                yield event

        # No proxy may wait until it has more of them.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(everything(), media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with suppress(RuntimeError):  # It is running, and about to be cancelled itself.
                await self._events.aclose()
