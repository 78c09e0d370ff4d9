"""What an evaluation says of an adapter before it asks it anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mondrian_ft.data.prompt import fingerprint
from mondrian_ft.data.rows import Row
from mondrian_ft.pipeline import arms


def adapter(prompts: list[str], rows: int) -> Any:
    manifest = {"prompts": [fingerprint(one) for one in prompts], "training": {"rows": rows}}
    return SimpleNamespace(folder=Path("/x/adapter"), manifest=manifest)


def rows(*prompts: str) -> list[Row]:
    return [
        Row(f"row{n}", "ansel", Path("x.png"), prompt, "{}", f"row{n}")
        for n, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("trained", "count", "asked", "warned"),
    [
        (["Judge it."], 20, ["Judge it.", "Judge it."], False),
        (["Judge it."], 20, ["Judge it.", "Else."], False),
        (["Judge it."], 20, ["Else.", "Else."], True),
        (["A", "B"], 20, ["C"], True),
        (["A", "B", "C"], 3, ["D"], False),  # a prompt for every row: a new one is no mismatch
        ([], 3, ["D"], False),
    ],
)
def test_a_database_whose_prompt_was_changed_is_told(trained, count, asked, warned) -> None:
    """The service's advisors were trained with one prompt and served with another."""
    told = arms.untrained_prompts(adapter(trained, count), rows(*asked))
    assert (told is not None) == warned
    if told:
        assert f"none of the {len(asked)} held-out rows" in told
