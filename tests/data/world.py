"""A small photographer's world on disk: a job database, photographs, analyses."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mondrian_ft.data.critique import DIMENSIONS

SHARED = Path(__file__).resolve().parents[2].parent / "shared"

SCHEMA = """
CREATE TABLE jobs (id TEXT PRIMARY KEY, filename TEXT, advisor TEXT, status TEXT,
    analysis_file TEXT, analysis_markdown TEXT, completed_at TEXT);
CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE advisors (id TEXT PRIMARY KEY, name TEXT, prompt TEXT);
"""

SYSTEM_PROMPT = "Judge the photograph and answer with one JSON object. " * 4
ANSEL_PROMPT = "You are Ansel Adams."


def critique(score: float = 7, **changes: Any) -> dict[str, Any]:
    """A valid critique as an object; every dimension has ``score``."""
    value: dict[str, Any] = {
        "image_description": "A ridge under evening clouds.",
        "dimensions": [
            {
                "name": name,
                "score": score,
                "comment": f"On {name}: it holds.",
                "recommendation": f"For {name}: wait longer.",
            }
            for name in DIMENSIONS
        ],
        "overall_score": score,
        "key_strengths": ["Light"],
        "priority_improvements": ["Foreground"],
        "technical_notes": "Sharp throughout.",
    }
    return {**value, **changes}


def fenced(value: Any) -> str:
    """An object as the service's analysis files hold it."""
    return f"```json\n{json.dumps(value, indent=2)}\n```"


class World:
    """Builds rows one by one; each method returns what a test may want to change later."""

    def __init__(self, folder: Path, schema: str = SCHEMA) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.analyses = folder / "analysis_md"
        self.output = folder / "out"
        self.db = folder / "mondrian.db"
        self.source.mkdir(parents=True)
        self.analyses.mkdir()
        with closing(sqlite3.connect(self.db)) as connection:
            connection.executescript(schema)
            prompt = SYSTEM_PROMPT.encode()  # bytes, as in some real databases
            connection.execute("INSERT INTO config VALUES ('system_prompt', ?)", (prompt,))
            connection.execute(
                "INSERT INTO advisors (id, name, prompt) VALUES ('ansel', 'Ansel Adams', ?)",
                (ANSEL_PROMPT,),
            )
            connection.commit()

    def row(self, job_id: str | None, db: Path | None = None, **columns: Any) -> None:
        """A row of ``jobs``, finished and by ansel unless told otherwise."""
        values = {"id": job_id, "advisor": "ansel", "status": "done", **columns}
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        with closing(sqlite3.connect(db or self.db)) as connection:
            connection.execute(
                f"INSERT INTO jobs ({names}) VALUES ({marks})", list(values.values())
            )
            connection.commit()

    def photo(self, name: str, key: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
        """A photograph whose pixels depend on ``key`` alone."""
        path = self.source / name
        pixels = np.random.default_rng(key).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def analysis(self, job_id: str, text: str, advisor: str = "ansel") -> Path:
        """The analysis file of a job."""
        path = self.analyses / f"analysis-{advisor}-{job_id}.md"
        path.write_text(text, encoding="utf-8")
        return path

    def good(self, job_id: str, key: int, score: float = 7, **columns: Any) -> None:
        """A row with a photograph ``<key>.jpg`` and an analysis file."""
        advisor = columns.get("advisor", "ansel")
        self.photo(f"{key}.jpg", key)
        self.analysis(job_id, fenced(critique(score)), advisor)
        self.row(job_id, **{"filename": f"{key}.jpg", **columns})
