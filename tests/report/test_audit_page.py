"""The audit's page and its terminal: complete, self-contained, and safe with what rows hold."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mondrian_ft.data.audit import Audit, Entry, audit, entries_of_rows
from mondrian_ft.data.critique import DIMENSIONS
from mondrian_ft.data.example import KNOWN_VECTOR
from mondrian_ft.data.rows import Row
from mondrian_ft.report import audit_page, audit_screen
from mondrian_ft.sample.scenes import Scene, render

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    """Six rows with the template's scores, two of them on copies of one picture."""
    rows = []
    for index in range(6):
        picture = render(Scene.draw(np.random.default_rng(index)))
        if index == 5:
            picture = Image.open(rows[0].image_path).convert("RGB").resize((160, 120))
        path = tmp_path / f"photo-{index}.png"
        picture.save(path)
        label = {
            "image_description": f"A lake under hills, the {index}th.",
            "dimensions": [
                {
                    "name": name,
                    "score": score,
                    "comment": f"The {name} is calm.",
                    "recommendation": f"Wait for {name}.",
                }
                for name, score in zip(DIMENSIONS, KNOWN_VECTOR, strict=True)
            ],
            "overall_score": 7.4,
            "key_strengths": ["light"],
            "priority_improvements": ["edges"],
            "technical_notes": "Sharp.",
        }
        name = EVIL if index == 1 else f"job-{index}"
        rows.append(Row(name, "ansel", path, "Analyze.", json.dumps(label), f"{index:064x}"))
    return entries_of_rows(rows)


@pytest.fixture
def found(entries: list[Entry]) -> Audit:
    """Their audit."""
    return audit(entries, min_pixels=3136, max_pixels=1_310_720)


def test_page(found: Audit, entries: list[Entry], tmp_path: Path) -> None:
    """Verdict first, every finding with its rows, pictures of copies, nothing from outside."""
    page = audit_page.write(
        found, entries, tmp_path / "audit.html", advisor="ansel", settings={"data": {"seed": 3}}
    )
    text = page.read_text(encoding="utf-8")
    assert "Training on these labels cannot teach scoring" in text
    for finding in found.findings:
        assert finding.name in text
    assert "template_scores" in text
    assert "near_duplicates" in text
    assert text.count("data:image/jpeg;base64,") == 2
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"url\(|@import|<script", text)


def test_terminal(found: Audit) -> None:
    """The table names every finding; the verdict's sentence closes it, in plain ASCII."""
    console = Console(file=io.StringIO(), width=100)
    audit_screen.show(console, found, next_command="mondrian-ft task=prepare")
    file = console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert text.isascii()
    for finding in found.findings:
        assert finding.name in text
    assert "cannot teach scoring" in " ".join(text.split())
    assert "mondrian-ft task=prepare" in text


def test_an_audit_without_findings(entries: list[Entry], tmp_path: Path) -> None:
    """Nothing found is said, and the page still stands."""
    found = audit(entries[2:3], min_pixels=3136, max_pixels=1_310_720)
    clean = Audit([], found.facts, found.verdict)
    text = audit_page.render(clean, entries, advisor=None, settings={})
    assert "Nothing to object to." in text
    console = Console(file=io.StringIO(), width=60)
    audit_screen.show(console, clean)
