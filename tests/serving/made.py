"""A service on a fake model, whole but for the network, and one on a socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from mondrian_ft.data.prompt import build_prompt
from mondrian_ft.data.store import JobStore
from mondrian_ft.sample.scenes import Scene, render
from mondrian_ft.serving import local, migration
from mondrian_ft.serving.ab import Mode, Router
from mondrian_ft.serving.advising import Desk, Settings
from mondrian_ft.serving.app import Service, make_app
from mondrian_ft.serving.front import Limits
from mondrian_ft.serving.intake import Folders
from mondrian_ft.serving.jobs import JobTable
from mondrian_ft.serving.patience import server_of
from mondrian_ft.serving.planning import Persona
from tests.data.world import World

from .fake_model import FakeModel

NAMES = {"ansel": "Ansel Adams", "watkins": "Carleton Watkins", "weston": "Edward Weston"}
SECRET = bytes(range(32))
MOST = 2_000_000
"""Bytes of a photograph."""


def photograph(seed: int = 0, kind: str = "JPEG") -> bytes:
    """A rendered landscape as a file's bytes."""
    out = io.BytesIO()
    render(Scene.draw(np.random.default_rng(seed))).save(out, kind)
    return out.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


@dataclass
class Made:
    """A service and what stands behind it; ``lines`` are its log."""

    app: local.Asgi
    service: Service
    model: FakeModel
    world: World
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def desk(self) -> Desk:
        return self.service.desk

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request, without a network."""

        async def go() -> httpx.Response:
            async with self.client() as client:
                found = await client.request(method, path, **options)
            await self.desk.finish()
            return found

        return asyncio.run(go())

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=30)

    def analyze(self, **fields: Any) -> httpx.Response:
        """A photograph as a form."""
        image = fields.pop("image", None) or photograph()
        return self.ask("POST", "/analyze", files={"image": ("a.jpg", image)}, data=fields)

    def rows(self) -> dict[str, dict[str, Any]]:
        """``jobs`` by id, as SQLite has them."""
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(self.world.db)) as connection:
            connection.row_factory = sqlite3.Row
            return {row["id"]: dict(row) for row in connection.execute("SELECT * FROM jobs")}


def make(folder: Path, **changes: Any) -> Made:
    """A service; ``changes`` are those of router, settings, limits and of what is here by name."""
    world = changes.pop("world", None) or World(folder / "mondrian")
    model = changes.pop("model", None) or FakeModel()
    jobs = None
    if changes.pop("database", False):
        migration.migrate(world.db)
        jobs = JobTable(world.db, "mondrian_ft-test", timeout=changes.pop("timeout", 0.2))
    store = JobStore(world.db)
    people = {
        name: Persona(name, shown, *build_prompt(store, name)) for name, shown in NAMES.items()
    }
    router = Router(
        Mode(changes.pop("mode", "base")),
        changes.pop("split", 0.5),
        changes.pop("adapter", "production"),
        changes.pop("adapters", {}),
        changes.pop("secret", SECRET),
    )
    settings = Settings(
        max_queue=changes.pop("max_queue", 64),
        deadline=changes.pop("deadline", 20.0),
        max_tokens=changes.pop("max_tokens", None),
        constrained=True,
        default_advisor="ansel",
    )
    limits = Limits(
        body=MOST * 4 // 3 + 1_000_000,
        seconds=changes.pop("seconds", 10.0),
        requests=changes.pop("requests", 512),
        token=changes.pop("token", None),
    )
    lines: list[dict[str, Any]] = []
    desk = Desk(
        model,
        router,
        people,
        settings,
        catalog=lambda: ["candidate", "production", "v1", "v2"],
        jobs=jobs,
        uploads=changes.pop("uploads", None),
    )
    service = Service(
        desk,
        Folders([world.source, *changes.pop("folders", [])], folder),
        folder / "state",
        limits,
        MOST,
        lambda line: lines.append(json.loads(line)),
    )
    assert not changes, changes
    return Made(make_app(service), service, model, world, lines)


@contextmanager
def listening(made: Made) -> Iterator[str]:
    """The service on a free port of the loopback interface; its address, without a last slash."""
    socket = local.listen("127.0.0.1", 0)
    server = server_of(made.app)
    server.config.timeout_graceful_shutdown = 2
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield local.url_of("127.0.0.1", socket).rstrip("/")
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        socket.close()
        assert not thread.is_alive()


def bomb() -> bytes:
    """A PNG of a few bytes whose head claims 60,000 x 60,000 pixels."""
    out = io.BytesIO()
    Image.new("1", (64, 64)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)
