"""What every page that is served to this machine alone needs: a port, a guard, a clean stop.

The guard takes the place of a password or token. A page of this kind can be attacked in two ways
only, because it listens on the loopback interface: another web site in the person's browser sends
requests to it, or it gets itself resolved to 127.0.0.1 and reads the answers (DNS rebinding). The
first always carries that site's ``Origin``, the second that site's name as ``Host``; neither can be
forged by a page. Other programs of this machine's users could read a token from the terminal or
the browser as well as the data themselves.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from ..errors import ServerError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_BYTES = 1_000_000
"""Of a request's body; a critique has some thousands."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # No other site may show what is served here, neither in a frame nor as a picture.
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host`` and ``port`` (0: any free one).

    Raises:
        ServerError: the port is taken or not allowed, or the host is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"task.host is {host}, which is no address of this machine ({error}); 127.0.0.1 is "
            "the usual one."
        ) from None
    try:
        # A server that was just stopped leaves its port waiting for a minute.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        listening.close()
        raise ServerError(
            f"Port {port} of {host} cannot be used: {(error.strerror or str(error)).lower()}; stop "
            "what uses it, or set task.port to another one, 0 for any that is free."
        ) from None
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """The address to type into a browser of this machine."""
    port = listening.getsockname()[1]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(app: Asgi, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM, and come back as usual after either."""
    try:
        import uvicorn

        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return  # Being stopped is how a server ends well, before its first request too.
    finally:
        listening.close()


class Guard:
    """ASGI middleware that answers this machine's own pages only, and sets safe headers.

    ``Host`` must be a loopback name, or the one that is listened on; where that is every interface
    (not a loopback address), any bare IP address, which no site can pretend to be. Whatever is not
    GET or HEAD must come from this very origin, as JSON, of a stated and moderate length.

    Args:
        app: what is guarded.
        host: what is listened on.
    """

    def __init__(self, app: Asgi, host: str) -> None:
        self._app = app
        self._names = {*LOOPBACK, host.lower()}
        self._any_ip = not is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(scope["method"], headers)

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(n.lower().encode(), v.encode()) for n, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        if refusal is None:
            await self._app(scope, receive, send_guarded)
            return
        from starlette.responses import JSONResponse

        status, sentence = refusal
        await JSONResponse({"error": sentence}, status)(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the sentence of a request that is not answered."""
        host = headers.get("host", "")
        if not is_own_host(host, self._names, any_ip=self._any_ip):
            return 400, f"The host {host[:80]!r} is not this server's."
        if method in ("GET", "HEAD"):
            return None
        origin = headers.get("origin", "none")
        if origin != f"http://{host}":
            return 403, f"The request comes from {origin[:80]}, not from this server's own page."
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "The request is not JSON; set Content-Type to application/json."
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "The request does not say how long it is."
        if int(length) > MOST_BYTES:
            return 413, f"The request is longer than {MOST_BYTES:,} bytes."
        return None


def is_own_host(host: str, names: Collection[str], *, any_ip: bool) -> bool:
    """Whether a ``Host`` header names this server.

    Args:
        host: the header.
        names: the server's names, lower case.
        any_ip: let every bare IP address pass as well, which no site can pretend to be.
    """
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if not name:
        name, port = host, ""
    if port and not port.isdecimal():
        return False
    name = name.removeprefix("[").removesuffix("]").lower()
    if name in names:
        return True
    if not any_ip:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
