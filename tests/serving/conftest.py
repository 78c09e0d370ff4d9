"""Rows to review: rendered photographs, one label of each kind, in a linked manifest."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mondrian_ft.data.example import KNOWN_VECTOR
from mondrian_ft.data.link import MANIFEST_NAME, link_into
from mondrian_ft.sample.scenes import Scene, render
from tests.data.world import World, critique, fenced

SCRIPT = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
"""What a critique must not be able to do to the page."""
ROWS = 8


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """What `world` copies; rendering and linking take a second."""
    world = World(tmp_path_factory.mktemp("template") / "mondrian")
    for index in range(ROWS):
        job = f"job-{index}"
        value = critique(3 + index % 5)
        for place, dimension in enumerate(value["dimensions"]):
            dimension["score"] = float((place * (index + 2) + index) % 8 + 1)
            if index == 0:
                dimension["score"] = float(KNOWN_VECTOR[place])
        value["image_description"] = f"Photograph {index}, a shore in the evening light."
        value["overall_score"] = 7.43
        if index == 1:
            value["image_description"] = SCRIPT
        world.row(job, filename=f"{index}.jpg")
        world.analysis(job, fenced(value))
        rng = np.random.default_rng(index)
        render(Scene.draw(rng)).save(world.source / f"{index}.jpg")
    link_into(world.output, world.db, world.source, world.analyses, "ansel")
    assert len(json.loads(manifest_of(world).read_text())["by_advisor"]["ansel"]["records"]) == ROWS
    return world


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    """Eight linked rows: the first with template scores, the second with a script for a text."""
    world = copy.copy(template)
    folder = tmp_path / "mondrian"
    shutil.copytree(template.folder, folder)
    for name in ("source", "analyses", "output", "db"):
        setattr(world, name, folder / getattr(template, name).relative_to(template.folder))
    world.folder = folder
    text = manifest_of(world).read_text(encoding="utf-8")
    manifest_of(world).write_text(text.replace(str(template.folder), str(folder)), encoding="utf-8")
    return world


def manifest_of(world: World) -> Path:
    """The linked manifest."""
    return world.output / MANIFEST_NAME
