"""The sample's files: a job database, its analyses and its photographs, laid out as a user's are.

A seed's folder is made once, in about a second, and found again afterwards. It is built beside
its place and renamed into it, so it is there whole or not at all, whoever else is building it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MondrianError
from ..files import publish_dir

if TYPE_CHECKING:
    from .jobs import Photograph, Plan

TRUTH = "scenes.json"
"""Beside ``mondrian/``: what every photograph shows and what every row is for. Tests and
benchmarks read it; nothing that trains or evaluates does."""

_HERE = Path(__file__).parent
_MADE_BY = ("scenes.py", "critics.py", "prompts.py", "jobs.py", "database.py", "schema.sql")


@dataclass(frozen=True)
class SampleData:
    """Where a seed's database, photographs and analyses lie; all absolute."""

    db_path: Path
    source_dir: Path
    analysis_dir: Path

    @property
    def truth_path(self) -> Path:
        """The attributes of every photograph, as JSON; see :data:`TRUTH`."""
        return self.db_path.parents[1] / TRUTH


def sample_data(seed: int, root: Path) -> SampleData:
    """The sample of a seed, written to ``<root>/seed-<seed>-<version>/`` unless it is there.

    Args:
        seed: 0 or more; another seed, other photographs. Equal seeds give equal bytes.
        root: a folder to keep samples in; made if it is missing. The version changes with the
            code that makes the sample, so what an older program left there is never mistaken.

    Raises:
        DataError: the seed is negative, or ``root`` cannot be written to.
    """
    if seed < 0:
        raise DataError(f"The sample's seed is {seed}; give data.seed a number of 0 or more.")
    folder = Path(root).expanduser().absolute() / f"seed-{seed}-{version()}"
    home = folder / "mondrian"
    data = SampleData(home / "mondrian.db", home / "source", home / "analysis_md")
    if _is_whole(folder):
        return data
    temporary = folder.with_name(f".tmp-{secrets.token_hex(4)}-{folder.name}")
    try:
        _build(seed, temporary)
        try:
            publish_dir(temporary, folder, replace=folder.exists() and not _is_whole(folder))
        except MondrianError:
            # Another process may have been quicker; its folder holds the same.
            if not _is_whole(folder):
                raise
    except OSError as error:
        raise DataError(
            f"The sample photographs cannot be written to {folder.parent}: "
            f"{error.strerror or error}; free some space or run in a folder you may write to."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return data


@cache
def version() -> str:
    """Eight hexadecimal digits that change with the code that makes the sample."""
    digest = hashlib.sha256()
    for name in _MADE_BY:
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:8]


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with its size: someone may have tidied up in between."""
    try:
        sizes = json.loads((folder / TRUTH).read_bytes())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(seed: int, folder: Path) -> None:
    from .jobs import plan

    home = folder / "mondrian"
    source, analyses = home / "source", home / "analysis_md"
    source.mkdir(parents=True)
    analyses.mkdir()
    planned = plan(seed)
    originals = [shown for shown in planned.photographs if not shown.copy_of]
    # NumPy and Pillow let go of the interpreter's lock while they draw, so threads are enough.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        written = [pool.submit(_write_photograph, shown, source) for shown in originals]
        for job in planned.jobs:
            if job.analysis:
                name, text = job.analysis
                (analyses / name).write_text(text, encoding="utf-8", newline="\n")
        _write_database(planned, seed, home / "mondrian.db")
        for result in written:
            result.result()
    for shown in planned.photographs:
        if shown.copy_of:
            shutil.copyfile(source / shown.copy_of, source / shown.name)
    truth = _truth(planned, seed)
    truth["files"] = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(home.rglob("*"))
        if path.is_file()
    }
    (folder / TRUTH).write_text(json.dumps(truth, indent=1), encoding="utf-8", newline="\n")


def _write_photograph(shown: Photograph, source: Path) -> None:
    (source / shown.name).write_bytes(_encode(shown))


def _encode(shown: Photograph) -> bytes:
    """A photograph's file, or what damage left of it."""
    from PIL import Image

    from .scenes import render

    if shown.damage == "text":
        return b"This is the note that should have been a photograph.\n"
    buffer = io.BytesIO()
    if shown.damage == "pixel":
        Image.new("RGBA", (1, 1), (120, 130, 140, 255)).save(buffer, "PNG")
        return buffer.getvalue()
    picture = render(shown.scene)
    if shown.grey:
        picture = picture.convert("L")
    exif = Image.Exif()
    if shown.orientation != 1:
        # Exif 2.32, tag 0x0112: what has to be undone to see the picture upright.
        exif[0x0112] = shown.orientation
        turns = {
            3: Image.Transpose.ROTATE_180,
            6: Image.Transpose.ROTATE_90,
            8: Image.Transpose.ROTATE_270,
        }
        picture = picture.transpose(turns[shown.orientation])
    picture.save(buffer, "JPEG", quality=shown.quality, exif=exif)
    data = buffer.getvalue()
    return data[: len(data) * 3 // 5] if shown.damage == "truncated" else data


def _write_database(planned: Plan, seed: int, path: Path) -> None:
    import numpy as np

    from .jobs import ADVISOR_ROWS, profiles
    from .prompts import SYSTEM_PROMPT

    with closing(sqlite3.connect(path)) as connection:
        # The folder is thrown away if this fails; the file is flushed when it is published.
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
        connection.executescript((_HERE / "schema.sql").read_text(encoding="utf-8"))
        for advisor in ADVISOR_ROWS:
            row = {
                "id": advisor.id,
                "name": advisor.name,
                "bio": f"{advisor.name}, {advisor.category}.",
                "years": advisor.years,
                "prompt": advisor.prompt,
                "focus_areas": json.dumps(advisor.cares_for),
                "category": advisor.category,
            }
            _insert(connection, "advisors", row)
            for order, area in enumerate(advisor.cares_for):
                focus = {"title": area.title(), "description": f"A care for {area}."}
                focus |= {"advisor_id": advisor.id, "sort_order": order}
                _insert(connection, "focus_areas", focus)
            count = sum(job.columns["advisor"] == advisor.id for job in planned.jobs)
            usage = {"advisor_id": advisor.id, "request_count": count, "last_used": _LAST_USED}
            _insert(connection, "advisor_usage", usage)
        # Bytes, as in some real databases.
        _insert(connection, "config", {"key": "system_prompt", "value": SYSTEM_PROMPT.encode()})
        _insert(connection, "config", {"key": "schema_version", "value": "12"})
        options = {"id": "random", "name": "Random", "description": "Any one advisor."}
        _insert(connection, "special_options", options)
        for job in planned.jobs:
            _insert(connection, "jobs", job.columns)
        for row in profiles(planned, np.random.default_rng([seed, 2**20])):
            _insert(connection, "dimensional_profiles", row)
        connection.commit()


_LAST_USED = "2026-01-20 18:00:00"


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    marks = ", ".join("?" * len(row))
    connection.execute(
        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
    )


def _truth(planned: Plan, seed: int) -> dict[str, Any]:
    """What :data:`TRUTH` holds but for the files' sizes."""
    return {
        "seed": seed,
        "version": version(),
        "photographs": {
            shown.name: {
                "scene": asdict(shown.scene),
                "orientation": shown.orientation,
                "damage": shown.damage,
                "copy_of": shown.copy_of,
            }
            for shown in planned.photographs
        },
        "jobs": {
            job.columns["id"]: {
                "advisor": job.columns["advisor"],
                "kind": job.kind,
                "reason": job.reason.value if job.reason else None,
            }
            for job in planned.jobs
        },
    }
