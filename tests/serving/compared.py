"""A small report to assess: real pictures, a comparison of two arms, and its page."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mondrian_ft.data.critique import DIMENSIONS
from mondrian_ft.data.rows import Row
from mondrian_ft.evaluation import comparison
from mondrian_ft.evaluation.outputs import Output
from mondrian_ft.files import atomic_write_json
from mondrian_ft.report import html
from mondrian_ft.sample.scenes import Scene, render

BROKEN = 2
"""The pair whose base answer is no JSON."""
SCRIPT = "<script>document.title='owned'</script>"


def answer(score: float, words: str, *, indent: int | None = None) -> str:
    """A whole critique; ``words`` are in its description and comments."""
    return json.dumps(
        {
            "image_description": f"{words} A shore in the evening light, with a ridge behind it.",
            "dimensions": [
                {
                    "name": name,
                    "score": (score + place) % 8 + 1,
                    "comment": f"{words} The {name.lower()} holds together, and the far ridge is "
                    "as sharp as the rocks in front.",
                    "recommendation": f"Wait for better {name.lower()}.",
                }
                for place, name in enumerate(DIMENSIONS)
            ],
            "overall_score": score,
            "key_strengths": ["light", "depth"],
            "priority_improvements": ["edges"],
            "technical_notes": "Sharp throughout.",
        },
        indent=indent,
    )


def make_report(folder: Path, n: int = 8) -> Path:
    """Writes photographs, ``comparison_report.json`` and ``report.html``; returns the report.

    Base answers are fenced and indented, which must not show; one is no JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, base, tuned = [], [], []
    for index in range(n):
        path = folder / f"photo-{index}.jpg"
        render(Scene.draw(np.random.default_rng(index))).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        said = answer(5, f"Reference {index}.")
        rows.append(Row(f"job-{index}", "ansel", path, "Analyze.", said, digest))
        base.append(f"```json\n{answer(6, f'Plain {index}.', indent=2)}\n```")
        tuned.append(answer(4, f"Fine {index}. {SCRIPT if index == 1 else ''}"))
    base[BROKEN] = 'I would say {"dimensions": [{"name": "Composition", "score": 7'
    report = comparison.build(
        rows=rows,
        arms={
            name: [Output(text, 40, 100, 1.5, finished=True) for text in texts]
            for name, texts in (("base", base), ("tuned", tuned))
        },
        train_rows=rows,
        base_model="sample",
        lora_path=None,
        validation_data="training_data_ansel_test.json",
        settings={},
        adapter_hash="abc123",
    )
    path = folder / "comparison_report.json"
    atomic_write_json(path, report)
    html.write(report, None, {}, folder / "report.html")
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
