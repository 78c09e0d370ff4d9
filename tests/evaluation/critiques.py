"""Small rows and answers, written by hand so that every expected number can be checked by eye."""

from __future__ import annotations

import json
from pathlib import Path

from mondrian_ft.data.dataset import Row
from mondrian_ft.evaluation.outputs import Output

NAMES = ("Composition", "Lighting")


def answer(*scores: float, names: tuple[str, ...] = NAMES, overall: float | None = None) -> str:
    """A critique in the exact format with these scores."""
    return json.dumps(
        {
            "image_description": "A lake under hills.",
            "dimensions": [
                {"name": n, "score": s, "comment": f"{n} seen.", "recommendation": f"Mind {n}."}
                for n, s in zip(names, scores, strict=True)
            ],
            "overall_score": sum(scores) / len(scores) if overall is None else overall,
            "key_strengths": ["light"],
            "priority_improvements": ["edges"],
            "technical_notes": "None.",
        }
    )


def make_row(name: str, response: str, sha: str | None = None) -> Row:
    """A row whose photograph need not exist: nothing here opens it."""
    return Row(
        job_id=f"job-{name}",
        advisor="ansel",
        image_path=Path(f"/photographs/{name}.jpg"),
        prompt="Analyze the provided image.",
        response=response,
        image_sha256=sha or f"{name:0>64}",
    )


def make_output(text: str, seconds: float = 1.0, finished: bool = True) -> Output:
    """An answer of 100 tokens."""
    return Output(text, prompt_tokens=40, tokens=100, seconds=seconds, finished=finished)
