"""The page of an experiment: best run first, what differs, what forbids ranking, words kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from mondrian_ft.report.experiment import (
    ASIDE,
    ASIDE_KEYS,
    BEGIN,
    END,
    GatheredRun,
    cautions,
    differing,
    page,
    record,
    results,
)
from mondrian_ft.schema import GROUPS


def gathered(name: str, tuned: float | None, lock: str = "l" * 64, **config: Any) -> GatheredRun:
    facts = {
        "status": "done" if tuned is not None else "failed",
        "data_lock": lock,
        "base": {"name": "b", "weights": "w"},
        "adapter": {"hash": name * 32},
        "registered": {"version": "v1"},
        "provenance": {
            "argv": ["/somewhere/mondrian_ft/__main__.py", "-m", f"lora.rank={config['rank']}"],
            "git": {"commit": "c" * 40, "dirty": False},
        },
        "config": {
            "lora": config,
            "data": {"db_path": f"/there/{name}.db", "seed": 0},
            "task": {"name": name},
        },
    }
    arms = {"base": {"score_mae": 2.0}, "tuned": {"score_mae": tuned, "format_strict": 1.0}}
    comparison = {"evidence": {"verdict": "better", "n_photographs": 18, "arms": arms}}
    return GatheredRun(name, facts, comparison if tuned is not None else None)


def test_the_best_run_comes_first_with_what_set_it_apart() -> None:
    """Only keys that differ are columns; paths and the task's own keys are none of them."""
    runs = [
        gathered("aa", 0.9, rank=4),
        gathered("bb", None, rank=8),
        gathered("cc", 0.5, rank=16),
    ]
    assert differing(runs) == ["lora.rank"]
    text = results(runs)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[0].startswith("| run | lora.rank | photographs |")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| cc", "| aa", "| bb"]
    assert "| failed |" in table[4]
    assert "$ python -m mondrian_ft -m lora.rank=16" in text
    # What is committed names no folder of this machine.
    assert "/somewhere" not in text
    assert "/there" not in text


def test_a_training_that_was_not_evaluated_has_no_verdict() -> None:
    """Its verdict once read "done"."""
    runs = [gathered("aa", None, rank=4), gathered("bb", None, rank=8)]
    for run in runs:
        facts: Any = run.facts
        facts["status"] = "done"
    assert "verdict" not in results(runs)


def test_what_forbids_ranking_is_said() -> None:
    same = [record(gathered("aa", 0.9, rank=4)), record(gathered("bb", 0.8, rank=8))]
    assert not any("locks differ" in said for said in cautions(same))
    other = [*same, record(gathered("cc", 0.5, lock="m" * 64, rank=16))]
    told = " ".join(cautions(other))
    assert "their data locks differ" in told
    assert "The best of 3 runs looks better than it is" in told


def test_a_persons_words_are_kept() -> None:
    """Gathering again replaces the results and not a word more, also in a page without marks."""
    block = results([gathered("aa", 0.9, rank=4)])
    fresh = page("ranks", block, None)
    written = fresh.replace("_What we want to know, in a sentence._", "Does rank matter?")
    newer = results([gathered("bb", 0.4, rank=4)])
    again = page("ranks", newer, written)
    assert again == written.replace(block, newer)
    assert again.count(BEGIN) == again.count(END) == 1
    bare = page("ranks", newer, "# ranks\n\nMine.\n")
    assert bare.startswith("# ranks\n\nMine.\n")
    assert newer in bare


def test_keys_that_are_aside_are_no_difference() -> None:
    """They are listed in the report's room, and marked in the schema's, which is above it."""
    marked = {
        f"{group}.{item.name}"
        for group, schema in GROUPS.items()
        for item in dataclasses.fields(schema)
        if item.metadata.get("aside") and group not in ASIDE
    }
    assert marked == ASIDE_KEYS
