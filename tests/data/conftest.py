"""Fixtures for the data room's tests."""

from pathlib import Path

import pytest

from .world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty job database with folders for photographs and analyses."""
    return World(tmp_path / "mondrian")
