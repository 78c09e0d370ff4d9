"""A fake of an OpenAI-compatible endpoint on the loopback interface, for tests to ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], str]
"""The judge's answer to the text it was sent."""


def prefers(preferred: str, reason: str = "It sees the lake.") -> str:
    """An answer as it was asked for."""
    return json.dumps({"preferred": preferred, "reason": reason})


def closer(word: str) -> Reply:
    """A judge without a bias: it prefers the critique that holds ``word``."""

    def reply(text: str) -> str:
        return prefers("A" if word in text.partition("<A>")[2].partition("</A>")[0] else "B")

    return reply


@dataclass
class Endpoint:
    """A running endpoint.

    Attributes:
        url: its address, up to ``/v1``.
        reply: the judge.
        failures: (status, body) of the next requests, before any is answered.
        requests: the bodies of the requests that were answered.
        keys: the ``Authorization`` of every request.
    """

    url: str
    reply: Reply
    failures: list[tuple[int, str]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    wait: threading.Event | None = None
    """Requests are answered when it is set; None is at once."""


@contextmanager
def endpoint(reply: Reply) -> Iterator[Endpoint]:
    """Serves until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.keys.append(self.headers["Authorization"])
            if served.wait:
                served.wait.wait(30)
            if self.path != "/v1/chat/completions":
                self._send(404, '{"error": {"message": "no such page"}}')
            elif served.failures:
                self._send(*served.failures.pop(0))
            else:
                served.requests.append(body)
                text = body["messages"][1]["content"][1]["text"]
                self._send(200, json.dumps(completion(served.reply(text))))

        def _send(self, status: int, body: str) -> None:
            self.send_response(status)
            html = body.startswith("<")
            self.send_header("Content-Type", "text/html" if html else "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            # The client repeats what failed, and would wait seconds before it does.
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on standard error."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                # A client that gave up waiting has gone.
                return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", reply)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def completion(content: str) -> dict[str, Any]:
    """What an endpoint sends for one answer."""
    message = {"role": "assistant", "content": content}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 700, "completion_tokens": 20, "total_tokens": 720},
    }
