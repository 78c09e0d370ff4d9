"""Whoever keeps a copy of the registry hears of every version made and every channel moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mondrian_ft import registry
from mondrian_ft.pipeline import versioning
from mondrian_ft.run import Run
from mondrian_ft.schema import Config, TrackingMode
from mondrian_ft.tasks import Promote, Rollback

from . import made


class Heard:
    """A tracker that remembers what is published."""

    def __init__(self) -> None:
        self.versions: list[tuple[str, str, bool, tuple[str, ...]]] = []

    def publish(self, name: str, version: registry.Version) -> None:
        self.versions.append((name, version.version, version.fresh, version.channels))

    def close(self, ok: bool = True) -> None: ...


def test_registering_promoting_and_going_back(tmp_path: Path, monkeypatch: Any) -> None:
    """Each once, with the channels as they are then; one that is registered again is not fresh, but
    may be new to the tracker, as after a run without one."""
    config = Config(task=Promote(version="v1"))
    config.tracking.mode = TrackingMode.disabled
    config.registry.root, config.registry.name = str(tmp_path / "registry"), "tiny"
    with Run.open(config, tmp_path / "run") as run:
        heard = Heard()
        monkeypatch.setattr(run, "tracker", heard)
        first = made.adapter(tmp_path / "a", 0)
        versioning.register(config, run, first)
        versioning.register(config, run, first)
        versioning.promote(Promote(version="v1"), config, run)
        versioning.register(config, run, made.adapter(tmp_path / "b", 1, against=0))
        versioning.promote(Promote(version="v2"), config, run)
        versioning.rollback(Rollback(), config, run)
    assert heard.versions == [
        ("tiny", "v1", True, ("candidate",)),
        ("tiny", "v1", False, ("candidate",)),
        ("tiny", "v1", False, ("candidate", "production")),
        ("tiny", "v2", True, ("candidate",)),
        ("tiny", "v2", False, ("candidate", "production")),
        ("tiny", "v1", False, ("production",)),
    ]
