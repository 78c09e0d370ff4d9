"""A W&B server on the loopback: one that refuses, and one that takes runs and remembers them."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """What a server on the loopback was asked.

    Attributes:
        address: where it listens.
        asked: the names of its questions with their variables, in order.
        rows: the history's rows it was sent, by run id.
        exits: exit codes by run id.
    """

    address: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    _made: Any = None

    def stop(self) -> None:
        """Answer no more."""
        if self._made is not None:
            made, self._made = self._made, None
            made.shutdown()
            made.server_close()


class Handler(BaseHTTPRequestHandler):
    """Reads a request whole, and answers in JSON."""

    server_: Server

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def _serving(handler: type[Handler]) -> Iterator[Server]:
    server = Server()
    handler.server_ = server
    server._made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server._made.server_address[1]}"
    threading.Thread(target=server._made.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def refusing(status: int, message: str) -> Iterator[Server]:
    """Answers every question in the same way."""

    class Refusing(Handler):
        def do_POST(self) -> None:
            self.body()
            self.answer({"data": None, "errors": [{"message": message}]}, status)

        do_GET = do_POST

    with _serving(Refusing) as server:
        yield server


@contextmanager
def taking() -> Iterator[Server]:
    """Takes runs, as much of the protocol as W&B 0.31 asks for without artifacts."""

    class Taking(Handler):
        def do_POST(self) -> None:
            data = self.body()
            if stream := re.fullmatch(r"/files/\w+/\w+/(\w+)/file_stream", self.path):
                return self.stream(stream[1], json.loads(data))
            if not self.path.endswith("/graphql"):
                return self.answer({})
            question = json.loads(data)
            found = re.search(r"(?:query|mutation)\s+(\w+)", question["query"])
            name, given = found[1] if found else "", question.get("variables") or {}
            self.server_.asked.append((name, given))
            self.answer({"data": self.found(name, given)})

        def found(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
            owner = {"id": "e", "name": "nobody"}
            project = {"id": "p", "name": "mondrian_ft", "entity": owner}
            if name == "RunResumeStatus":
                return {"model": {**project, "bucket": None}}
            if name == "UpsertBucket":
                bucket = {"id": "r", "name": given["name"], "displayName": "", "config": "{}"}
                bucket |= {"sweepName": None, "project": project, "historyLineCount": 0}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            if name == "CreateRunFiles":
                files = [
                    {"name": file, "uploadUrl": f"{self.server_.address}/upload"}
                    for file in given["files"]
                ]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            return {}

        def stream(self, run: str, sent: dict[str, Any]) -> None:
            lines = ((sent.get("files") or {}).get("wandb-history.jsonl") or {}).get("content", [])
            self.server_.rows.setdefault(run, []).extend(map(json.loads, lines))
            if sent.get("complete"):
                self.server_.exits[run] = sent.get("exitcode", 0)
            self.answer({})

        def do_PUT(self) -> None:
            self.body()
            self.answer({})

        def do_GET(self) -> None:
            if self.path == "/quit":
                # From another thread, since this one is to be waited for.
                threading.Thread(target=self.server_.stop).start()
                return self.answer({})
            self.answer({}, 404)

    with _serving(Taking) as server:
        yield server
