"""A user's ``./mondrian`` folder: a few good rows of the sample, which a test then breaks."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mondrian_ft.data.link import link


@dataclass(frozen=True)
class World:
    """A folder to type commands in, with a ``mondrian`` folder at the workbook's place.

    Attributes:
        cwd: the folder.
        jobs: the ids of the good rows.
        photographs: each row's photograph.
        analyses: each row's analysis file.
    """

    cwd: Path
    jobs: list[str]
    photographs: dict[str, Path]
    analyses: dict[str, Path]

    @property
    def db(self) -> Path:
        """The job database."""
        return self.cwd / "mondrian" / "mondrian.db"

    def sql(self, statement: str, *values: Any) -> None:
        """Changes the database."""
        with closing(sqlite3.connect(self.db)) as connection:
            connection.execute(statement, values)
            connection.commit()


def make_world(sample: Path, cwd: Path, *, rows: int) -> World:
    """Copies the first good rows of the sample, each with a photograph of its own.

    Args:
        sample: the sample's ``mondrian`` folder.
        cwd: where ``mondrian/`` is made.
        rows: how many.
    """
    found = link(
        sample / "mondrian.db",
        sample / "source",
        sample / "analysis_md",
        "ansel",
        scratch=cwd / "scratch",
    )
    home = cwd / "mondrian"
    (home / "source").mkdir(parents=True)
    (home / "analysis_md").mkdir()
    shutil.copyfile(sample / "mondrian.db", home / "mondrian.db")
    photographs: dict[str, Path] = {}
    analyses: dict[str, Path] = {}
    seen: set[str] = set()
    for record in found.manifest["by_advisor"]["ansel"]["records"]:
        rules = (record["analysis_rule"], record["photograph_rule"])
        if record["image_sha256"] in seen or record["mends"] or rules != ("job_id", "exact_name"):
            continue
        if len(seen) == rows:
            break
        seen.add(record["image_sha256"])
        job = record["job_id"]
        for kept, source, folder in (
            (photographs, record["image_path"], "source"),
            (analyses, record["analysis_path"], "analysis_md"),
        ):
            kept[job] = home / folder / Path(source).name
            shutil.copyfile(source, kept[job])
    shutil.rmtree(cwd / "scratch", ignore_errors=True)
    world = World(cwd, list(photographs), photographs, analyses)
    marks = ", ".join("?" * len(world.jobs))
    world.sql(f"DELETE FROM jobs WHERE id NOT IN ({marks})", *world.jobs)
    return world
