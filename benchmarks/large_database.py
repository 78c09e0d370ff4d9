"""A job database of 10,000 rows over 2,000 twelve-megapixel JPEGs, for measuring speed and memory.

The photographs are the sample's rendered scenes, enlarged to a phone's 4032 × 3024 and given the
grain of a sensor, so that their files are as large as real ones (2 to 4 MB) and no two are equal.
One in twenty is another one saved again, and every fifth lies on its side (EXIF orientation 6), as
phones store them. Making them took twenty minutes on two busy cores; they fill 6 GB. They are kept
in the folder that the environment variable ``MONDRIAN_FT_LARGE`` names, if it does.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from PIL import Image, ImageChops

import mondrian_ft.sample as sample
from mondrian_ft.sample.critics import ANSEL
from mondrian_ft.sample.jobs import fenced
from mondrian_ft.sample.prompts import ADVISORS, CLOSING, SYSTEM_PROMPT
from mondrian_ft.sample.scenes import Scene, render

from . import measure
from .training_step import ROOT

KEPT = "MONDRIAN_FT_LARGE"
PHOTOGRAPHS, ROWS = 2000, 10_000
SIZE = (4032, 3024)
COPIES = 20
"""One photograph in so many is an earlier one, cropped or compressed harder."""
GRAIN = 7.0
"""Standard deviation of the sensor's noise, in 8-bit steps; it makes files of 2 to 4 MB."""
QUALITY = 88
MADE = "made.json"


STEPS = (
    ("link, cold", "task=link", True),
    ("link, nothing changed", "task=link", False),
    ("audit, cold", "task=audit", True),
    ("audit, nothing changed", "task=audit", False),
    ("prepare, after the audit", "task=prepare", False),
    ("prepare, cold", "task=prepare", True),
)
"""What is run, in this order, and whether it finds no caches of photographs.

The audit and preparing find the manifest of the linking before.
"""


def run(repeats: int) -> dict[str, Any]:
    """Wall time and peak memory of linking, auditing and preparing; the least of ``repeats``."""
    folder = Path(os.environ[KEPT]) if KEPT in os.environ else Path(tempfile.mkdtemp())
    try:
        copies = make(folder)
        home = folder / "mondrian"
        settings = [
            "data=mondrian",
            "tracking=none",
            "hydra.run.dir=run",
            "data.output_dir=data",
            f"data.db_path={home / 'mondrian.db'}",
            f"data.source_dir={home / 'source'}",
            f"data.analysis_dir={home / 'analysis_md'}",
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        results: dict[str, Any] = {}
        for _ in range(repeats):
            work = Path(tempfile.mkdtemp(dir=folder))
            for name, task, cold in STEPS:
                if cold:
                    shutil.rmtree(work / "outputs" / "cache", ignore_errors=True)
                argv = [sys.executable, "-m", "mondrian_ft", *settings, task]
                done = measure.process(argv, cwd=work, env=env)
                best = results.setdefault(name, {"seconds": 1e9, "peak_mb": 0})
                best["seconds"] = min(best["seconds"], round(done.seconds, 1))
                best["peak_mb"] = max(best["peak_mb"], round(done.memory * 1000))
                print(f"{name:<26} {done.seconds:6.1f} s  {done.memory * 1000:5.0f} MB", flush=True)
            results["groups"] = _judged(work / "data", copies)
            shutil.rmtree(work)
    finally:
        if KEPT not in os.environ:
            shutil.rmtree(folder)
    print(results["groups"])
    return {"settings": {"rows": ROWS, "photographs": PHOTOGRAPHS, "size": SIZE}, **results}


def _judged(data: Path, copies: dict[str, str]) -> dict[str, int]:
    """Copies that the audit missed, and groups in which there are different photographs."""
    manifest = json.loads((data / "training_data_manifest.json").read_text(encoding="utf-8"))
    names = {
        record["image_sha256"]: Path(record["image_path"]).name
        for record in manifest["by_advisor"]["ansel"]["records"]
    }
    facts = json.loads((data / "audit.json").read_text(encoding="utf-8"))["facts"]
    groups = [{names[key] for key in group} for group in facts["similar_photographs"]]
    found = sum(any({copy, of} <= group for group in groups) for copy, of in copies.items())
    shown = [{copies.get(name, name) for name in group} for group in groups]
    return {
        "copies": len(copies),
        "missed": len(copies) - found,
        "wrong_groups": sum(len(group) > 1 for group in shown),
    }


def make(folder: Path, photographs: int = PHOTOGRAPHS, rows: int = ROWS) -> dict[str, str]:
    """Write ``mondrian/`` into ``folder`` unless it is there with as many of both.

    Returns:
        The name of every photograph that is a copy, and of the one it was made from.
    """
    wanted = {"photographs": photographs, "rows": rows}
    if (folder / MADE).is_file():
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        if {key: made[key] for key in wanted} == wanted:
            return made["copies"]
    home = folder / "mondrian"
    for name in ("source", "analysis_md"):
        (home / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [(home / "source", number) for number in range(photographs)]
        list(pool.map(_write_photograph, jobs, chunksize=8))
    write_rows(home, photographs, rows)
    copies = {
        name_of(number): name_of(original)
        for number in range(photographs)
        if (original := original_of(number)) != number
    }
    (folder / MADE).write_text(json.dumps({**wanted, "copies": copies}), encoding="utf-8")
    return copies


def name_of(number: int) -> str:
    return f"IMG_{number:05d}.jpg"


def original_of(number: int) -> int:
    return number - COPIES // 2 if number % COPIES == COPIES - 1 else number


def _write_photograph(job: tuple[Path, int]) -> None:
    source, number = job
    path = source / name_of(number)
    if path.is_file():
        return
    original = original_of(number)
    picture = render(scene(original))
    rng = np.random.default_rng([7, number])
    wide = picture.width >= picture.height
    if original != number:
        share = 0.65 + 0.3 * rng.random()
        (w, h), x, y = picture.size, *rng.random(2) * (1 - share)
        box = tuple(round(v) for v in (x * w, y * h, (x + share) * w, (y + share) * h))
        picture = picture.crop(box)  # type: ignore[arg-type]
    size = SIZE if wide else (SIZE[1], SIZE[0])
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    # Grain of one tile, laid differently each time: drawing 12 million numbers takes a second.
    tile = rng.standard_normal((512, 512)) * GRAIN + 128
    patch = Image.fromarray(tile.clip(0, 255).astype(np.uint8))
    grain = Image.new("L", picture.size)
    for top in range(0, picture.height, 512):
        for left in range(0, picture.width, 512):
            grain.paste(patch.transpose(Image.Transpose(int(rng.integers(7)))), (left, top))
    picture = ImageChops.add(picture, Image.merge("RGB", [grain] * 3), 1, -128)
    exif = Image.Exif()
    if number % 5 == 0:
        # Exif 2.32, tag 0x0112: 6 is stored turned, to be turned clockwise for looking at it.
        exif[0x0112] = 6
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, "JPEG", quality=QUALITY, exif=exif)
    temporary.replace(path)


def scene(number: int) -> Scene:
    return Scene.draw(np.random.default_rng([11, number]))


def write_rows(home: Path, photographs: int, rows: int) -> None:
    database = home / "mondrian.db"
    database.unlink(missing_ok=True)
    schema = Path(sample.__file__).parent / "schema.sql"
    rng = np.random.default_rng(13)
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
        connection.executescript(schema.read_text(encoding="utf-8"))
        _insert(connection, "config", {"key": "system_prompt", "value": SYSTEM_PROMPT.encode()})
        ansel = next(advisor for advisor in ADVISORS if advisor.id == "ansel")
        row = {"id": "ansel", "name": ansel.name, "prompt": ansel.prompt}
        _insert(connection, "advisors", row)
        prompt = f"{SYSTEM_PROMPT}\n\n{ansel.prompt}\n\n{CLOSING}"
        for number in range(rows):
            job = str(UUID(bytes=rng.bytes(16), version=4))
            photograph = number % photographs
            said = ANSEL.critique(scene(original_of(photograph)), rng)
            row = _job(job, photograph, prompt if number % 3 else None)
            # Where real rows have it: mostly in a file, else in the row, raw or as it was shown.
            if number % 20 < 12:
                path = home / "analysis_md" / f"analysis-ansel-{job}.md"
                path.write_text(fenced(said), encoding="utf-8")
            elif number % 20 < 16:
                row["analysis_markdown"] = fenced(said)
            else:
                raw = {"prompt": prompt, "response": json.dumps(said), "model": "qwen3-vl-4b"}
                row["llm_outputs"] = json.dumps(raw)
            _insert(connection, "jobs", row)
        connection.commit()


def _job(job: str, photograph: int, prompt: str | None) -> dict[str, Any]:
    return {
        "id": job,
        "filename": name_of(photograph),
        "advisor": "ansel",
        "status": "done",
        "analysis_file": f"/Users/studio/mondrian/analysis/analysis-IMG-{job[:6]}.html",
        "created_at": "2026-01-12 10:00:00",
        "type": "image",
        "prompt": prompt,
        "mode": "baseline",
        "model": "Qwen/Qwen3-VL-4B-Instruct",
    }


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    marks = ", ".join("?" * len(row))
    connection.execute(
        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
    )
