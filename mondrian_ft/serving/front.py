"""What stands before every route: ids, who may ask, how much and how slowly, and one log line.

Pure ASGI, so that a stream stays a stream and a client that goes away is noticed.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .local import HEADERS, LOOPBACK, Asgi, Receive, Scope, Send, is_loopback, is_own_host
from .pages import Refused

OPEN = ("/", "/health")
"""Routes that need no token: the page itself, which asks for it, and the balancer's question."""
OURS = {"Referrer-Policy": "same-origin"}
"""Without a referrer, browsers send forms from the page itself with ``Origin: null``."""
WATCHED = ("/health", "/metrics", "/model-status")
"""Routes that answer however many others are under way: a service at its limit is no dead one."""
MOST_IN_MEMORY = 512_000_000
"""Bytes of all bodies under way together."""
RESERVED = 64_000
"""Counted for a body that does not say how long it is, until it has sent more."""
UNREAD_SECONDS = 30.0
"""In which a client must take in what it is sent; one that does not would keep its place."""
DRAINED, DRAIN_SECONDS = 4_000_000, 1.0
"""Of a refused request's body: bytes, and time. A connection that is closed on a client that still
sends is reset, and the client never reads why it was refused."""


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        body: bytes of a body.
        seconds: until a body must have been sent.
        requests: under way at once.
        host: what is listened on.
        hosts: more names that clients reach it by.
        token: what ``Authorization: Bearer`` must hold; None asks for none.
    """

    body: int
    seconds: float
    requests: int = 512
    host: str = "127.0.0.1"
    hosts: Collection[str] = ()
    token: str | None = field(default=None, repr=False)


class Front:
    """ASGI middleware around the whole application.

    Args:
        app: what is guarded.
        limits: see there.
        log: takes one line of JSON a request. No photograph, prompt, token or query is in it.
        on_done: told (route, method, status, seconds) of each request.
    """

    def __init__(
        self,
        app: Asgi,
        *,
        limits: Limits,
        log: Callable[[str], Any],
        on_done: Callable[[str, str, int, float], Any] = lambda *_: None,
    ) -> None:
        self._app, self._limits, self._log, self._on_done = app, limits, log, on_done
        self._names = {*LOOPBACK, limits.host.lower(), *(name.lower() for name in limits.hosts)}
        self._any_ip = not is_loopback(limits.host)
        self._held = 0
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in scope["headers"]}
        request_id = _id_of(headers)
        noted: dict[str, Any] = {}
        scope["request_id"], scope["noted"] = request_id, noted
        started = time.perf_counter()
        self._under_way += 1
        body = _Body(self, receive, _length(headers))
        status = 0

        async def send_noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = {**HEADERS, **OURS, "X-Request-Id": request_id}
                plain = [(n.lower().encode(), v.encode()) for n, v in added.items()]
                message = {**message, "headers": [*message.get("headers", []), *plain]}
            try:
                async with asyncio.timeout(UNREAD_SECONDS):
                    await send(message)
            except TimeoutError:
                raise _Unread from None

        try:
            try:
                self._admit(scope, headers)
                body.count()
                await self._app(scope, body.receive, send_noted)
            except Refused as gone:
                noted["refused"] = str(gone)
                if not status:
                    await body.drain()
                    await _answer(gone.status, str(gone), request_id, send_noted, gone.headers)
        except asyncio.CancelledError:
            noted["refused"] = "cancelled"
            raise
        except _Unread:
            noted["refused"] = f"the client took in nothing for {UNREAD_SECONDS:g} seconds"
        except Exception:
            # For whoever runs the service, never for whoever asked.
            noted["error"] = traceback.format_exc()
            print(noted["error"], file=sys.stderr, flush=True)
            if not status:
                sentence = (
                    "The service failed on this request, which is a fault of its own; its log says "
                    f"more under the request id {request_id}."
                )
                with suppress(OSError, RuntimeError):
                    await _answer(500, sentence, request_id, send_noted, {})
        finally:
            body.release()
            self._under_way -= 1
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", None) or "none"
            self._on_done(route, scope["method"], status, seconds)
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
                **noted,
            }
            with suppress(OSError):
                # On a full disk the answer counts, which has gone out.
                self._log(json.dumps(line, ensure_ascii=False))

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises `Refused` if the request is not to be answered at all."""
        host = headers.get("host", "")
        limits = self._limits
        if not is_own_host(host, self._names, any_ip=self._any_ip):
            raise Refused(
                400, f"The host {host[:80]!r} is not this service's; serve.hosts lists more names."
            )
        origin = headers.get("origin")
        if (
            scope["method"] not in ("GET", "HEAD")
            and origin is not None
            and origin not in (f"http://{host}", f"https://{host}")
        ):
            raise Refused(
                403, f"The request comes from {origin[:80]}, not from this service's page."
            )
        if limits.token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            wanted = limits.token.encode()
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), wanted)
            if scheme.lower() != "bearer" or not right:
                raise Refused(
                    401,
                    "This service asks for a token; send it as Authorization: Bearer <token>.",
                    WWW_Authenticate="Bearer",
                )
        if self._under_way > limits.requests and scope["path"] not in WATCHED:
            raise Refused(
                503,
                f"More than {limits.requests} requests are under way; ask again later.",
                Retry_After="1",
            )
        if _length(headers) > limits.body:
            raise _too_long(limits.body)
        self._check_memory(_length(headers))

    def _check_memory(self, more: int) -> None:
        if self._held + more > MOST_IN_MEMORY:
            raise Refused(
                503,
                "Too many photographs are on their way; send it again.",
                Retry_After="1",
                Connection="close",
            )


class _Unread(Exception):
    """The client takes in nothing of its answer."""


class _Body:
    """A request's body as it comes in: counted, and given up when it is too long or too slow."""

    def __init__(self, front: Front, receive: Receive, announced: int) -> None:
        self._front, self._receive, self._announced = front, receive, announced
        self._held = 0
        self._got = 0
        self._whole = False
        self._until = time.monotonic() + front._limits.seconds

    def count(self) -> None:
        """Keep room for what an admitted request's head says will come."""
        self._hold(self._announced)

    def _hold(self, more: int) -> None:
        self._front._held += more
        self._held += more

    async def receive(self) -> MutableMapping[str, Any]:
        if self._whole:
            # What comes now is the client's going away, for which an answer may be long awaited.
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            seconds = self._front._limits.seconds
            raise Refused(
                408,
                f"The request was not sent within {seconds:g} seconds.",
                Connection="close",
            ) from None
        if message["type"] == "http.request":
            self._got += len(message.get("body", b""))
            if self._got > self._front._limits.body:
                raise _too_long(self._front._limits.body)
            if (more := self._got - self._held) > 0:
                self._front._check_memory(more)
                self._hold(more)
            self._whole = not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Take in what is still being sent and throw it away, if it is not much."""
        if self._whole or self._announced > DRAINED:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                more = True
                while more and self._got < DRAINED:
                    message = await self._receive()
                    self._got += len(message.get("body", b""))
                    more = message.get("more_body", False)

    def release(self) -> None:
        self._front._held -= self._held
        self._held = 0


def _too_long(most: int) -> Refused:
    return Refused(
        413,
        f"The request is longer than {most:,} bytes (serve.max_upload_mb); send a smaller "
        "photograph.",
        Connection="close",
    )


def _length(headers: dict[str, str]) -> int:
    if headers.get("transfer-encoding"):
        return RESERVED
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 16 else 0


_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _id_of(headers: dict[str, str]) -> str:
    """The client's own request id where it has a plain form, else a drawn one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(8)


async def _answer(
    status: int, sentence: str, request_id: str, send: Send, headers: dict[str, str]
) -> None:
    content = json.dumps({"error": sentence, "request_id": request_id}).encode()
    named = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    plain = [(n.lower().encode(), v.encode()) for n, v in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": content})
