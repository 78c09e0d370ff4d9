"""The page of several runs: ranked, what differs, what cannot be told apart, what has no result."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mondrian_ft.report import compare
from mondrian_ft.report.compare_plots import Axis, Curve, curves, parallel, thinned
from mondrian_ft.report.experiment import GatheredRun, differing, record


def gathered(
    name: str,
    error: float | None,
    *,
    width: float = 0.1,
    status: str = "done",
    task: str = "experiment",
    val_loss: float | None = None,
    updates: int = 3,
    why: str | None = None,
    **keys: Any,
) -> GatheredRun:
    facts = {
        "status": status,
        "task": task,
        "error": why,
        "data_lock": "l" * 64,
        "base": {"name": "b", "weights": "w"},
        "seconds": 61.0,
        "provenance": {"argv": ["x", f"lora.rank={keys.get('rank')}"], "git": {"commit": "c" * 40}},
        "config": {"lora": keys, "task": {"name": task}},
        "training": {"val_loss": val_loss},
    }
    tuned = {"score_mae": error, "format_strict": 1.0}
    if error is not None:
        tuned["score_mae_interval"] = [error - width, error + width]
    arms = {"base": {"score_mae": 2.0}, "tuned": tuned}
    comparison = {"evidence": {"verdict": "better", "n_photographs": 9, "arms": arms}}
    log = [{"kind": "step", "step": n, "loss": 1 / n} for n in range(1, updates + 1)]
    log += [{"kind": "eval", "step": updates, "val_loss": 0.5}] if updates else []
    return GatheredRun(name, facts, comparison if error is not None else None, log)


SWEEP = [
    gathered(f"{rank}-{alpha}", 0.5 + rank / 40 + alpha / 1000, rank=rank, alpha=alpha, dropout=0.0)
    for rank in (4, 8, 16)
    for alpha in (8, 16)
]


def text(page: str) -> str:
    """What a reader sees of the page, in one line."""
    body = page.partition("<body")[2]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_best_run_is_told_and_whether_the_next_can_be_told_from_it() -> None:
    runs = [gathered("a", 0.9, rank=4), gathered("b", 0.5, rank=8)]
    shown = text(compare.render("ranks", runs))
    assert "2 runs compared" in shown
    assert "Run 1 (lora.rank=8) has the lowest score error: 0.50 (95 % 0.40 to 0.60)" in shown
    assert "next is Run 2 (lora.rank=4) with 0.90" in shown
    assert "Their intervals do not overlap." in shown
    close = [gathered("a", 0.55, rank=4), gathered("b", 0.5, rank=8)]
    assert "these figures alone do not tell them apart" in text(compare.render("ranks", close))


def test_the_best_run_is_not_praised_against_its_own_verdict() -> None:
    """A run of the lowest score error had lost the exact format, and its evaluation said so; the
    page named it the best and no more."""
    runs = [gathered("a", 0.9, rank=4), gathered("b", 0.5, rank=8)]
    assert "own verdict" not in text(compare.render("ranks", runs))
    evidence: Any = runs[1].comparison
    evidence["evidence"]["verdict"] = "no_worse"
    shown = text(compare.render("ranks", runs))
    assert "Run 1’s own verdict against the base is “no worse”; its report says why." in shown


def test_a_bar_is_labelled_by_what_sets_its_run_apart() -> None:
    """A sweep's runs have names that differ in the last character, which was cut off."""
    runs = [gathered("2026-11-29/0", 0.9, rank=4), gathered("2026-11-29/1", 0.5, rank=8)]
    labels = re.findall(r"<b><span>(\d)</span><small>([^<]*)</small>", compare.render("r", runs))
    assert labels == [("1", "rank 8"), ("2", "rank 4")]
    entry = compare.ranked(runs, compare.ERROR)[0]
    assert compare.labelled(entry, []) == "2026-11-29/1"
    assert compare.labelled(entry, ["lora.rank", "other.rank"]) == "lora.rank 8, other.rank null"


def test_over_how_many_photographs_is_told_where_it_is_one_number() -> None:
    runs = [gathered("a", 0.9, rank=4), gathered("b", 0.5, rank=8)]
    assert "with a 95 % interval over 9 photographs;" in text(compare.render("ranks", runs))
    evidence: Any = runs[1].comparison
    evidence["evidence"]["n_photographs"] = 8
    assert "with a 95 % interval over photographs;" in text(compare.render("ranks", runs))


def test_only_keys_that_differ_are_columns_and_no_column_is_empty() -> None:
    page = compare.render("ranks", SWEEP)
    heads = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', page)
    assert [head.replace("\u200b", "") for head in heads] == [
        "Run",
        "lora.rank",
        "lora.alpha",
        "Score error",
        "Exact format",
        "Verdict",
        "Took",
    ]


def test_that_a_job_was_resumed_is_no_difference() -> None:
    """In a sweep that was killed and started again trainer.resume stood as a column, and was
    weighed as if it had a part in the loss."""
    runs = [gathered("a", 0.9, rank=4), gathered("b", 0.5, rank=8)]
    for run, resume in zip(runs, ("never", "auto"), strict=True):
        facts: Any = run.facts
        facts["config"] |= {"trainer": {"resume": resume, "seed": 0}, "serve": {"token": resume}}
    assert differing(runs) == ["lora.rank"]


def test_an_error_that_all_runs_share_is_a_sentence_and_else_a_column() -> None:
    """The base's error stood in every row; with two keys the table was wider than the page."""
    runs = [gathered("a", 0.9, rank=4), gathered("b", 0.5, rank=8)]
    shown = text(compare.render("ranks", runs))
    assert "On the same photographs the base model’s is 2.00." in shown
    evidence: Any = runs[1].comparison
    evidence["evidence"]["arms"]["base"]["score_mae"] = 1.5
    page = compare.render("ranks", runs)
    assert "On the same photographs" not in page
    assert re.findall(r'data-head="Base model’s error">([^<]*)<', page) == ["1.50", "2.00"]


def test_runs_without_a_result_say_why() -> None:
    """A failed run, a stopped one, one that was killed, and one of a task that only links."""
    runs = [
        gathered("good", 0.5, rank=4),
        gathered("bad", None, status="failed", why="the loss <b>is</b> nan", rank=8),
        gathered("stopped", None, status="interrupted", why="stopped after 2", rank=8, updates=2),
        gathered("killed", None, status="running", rank=8, updates=0),
        gathered("links", None, task="link", rank=8, updates=0),
        gathered("trained", None, task="train", rank=8),
    ]
    page = compare.render("mixed", runs, left_out=["2 runs of task=versions were left out."])
    shown = text(page)
    assert "6 runs compared, 1 with a result" in shown
    assert "It is the only one with a result." in shown
    assert "<b>is</b>" not in page
    assert "Failed: the loss &lt;b&gt;is&lt;/b&gt; nan. Its log ends at update 3." in shown
    assert "Interrupted: stopped after 2. Its log ends at update 2." in shown
    assert "it is still running, or was killed" in shown
    assert "task=link gives nothing to compare" in shown
    assert "neither an evaluation nor held-out rows" in shown
    assert "2 runs of task=versions were left out." in shown


def test_nothing_to_rank_is_said() -> None:
    shown = text(compare.render("none", [gathered("a", None, status="failed", rank=4)]))
    assert "1 run compared, none with a result" in shown
    assert "No run has a result yet" in shown


def test_trainings_without_an_evaluation_are_ranked_by_their_loss() -> None:
    runs = [
        gathered("a", None, task="train", val_loss=0.4, rank=4),
        gathered("b", None, task="train", val_loss=0.3, rank=8),
    ]
    shown = text(compare.render("losses", runs))
    assert "Run 1 (lora.rank=8) has the lowest held-out loss: 0.300" in shown


def test_importance_finds_the_key_that_matters() -> None:
    """And gives nothing to one that does not, nor where there are too few runs to tell."""
    entries = compare.ranked(SWEEP, compare.ERROR)
    found = compare.importance(entries, ["lora.rank", "lora.alpha", "lora.dropout"])
    assert list(found) == ["lora.rank", "lora.alpha"]
    assert found["lora.rank"] > 0.95
    assert found["lora.alpha"] == 0
    assert compare.importance(entries[:3], ["lora.rank"]) == {}
    # Of a random search no value comes twice: the rank of the numbers is what there is to go by.
    drawn = [gathered(str(n), 0.1 * n, rank=n, alpha=(n * 5) % 7) for n in range(1, 7)]
    found = compare.importance(compare.ranked(drawn, compare.ERROR), ["lora.rank", "lora.alpha"])
    assert found["lora.rank"] == pytest.approx(1)
    assert found["lora.alpha"] < 0.5


def test_a_sweep_is_drawn_and_a_single_run_is_not() -> None:
    page = compare.render("ranks", SWEEP)
    assert "6 runs by lora.rank, lora.alpha, and the score error of each." in page
    assert page.count('class="way"') > 6
    one = compare.render("one", SWEEP[:1])
    assert "What the settings did" not in one
    assert "Score error of each run" not in one


def test_the_page_asks_for_nothing_from_outside() -> None:
    page = compare.render("ranks", SWEEP)
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("values", "scale", "places"),
    [
        ([16, 4, 8, 4], "names", [("4", 0.0), ("8", 0.5), ("16", 1.0)]),
        (["lora", "dora"], "names", [("dora", 0.0), ("lora", 1.0)]),
        ([None, 3], "names", [("3", 0.0), ("null", 1.0)]),
        ([True, False], "names", [("false", 0.0), ("true", 1.0)]),
        ([5, 5], "names", [("5", 0.5)]),
    ],
)
def test_few_values_stand_one_by_one(values: list[Any], scale: str, places: Any) -> None:
    axis = Axis.of("k", values)
    assert (axis.scale, axis.places) == (scale, places)
    assert all(0 <= axis.at(value) <= 1 for value in values)


def test_many_numbers_stand_along_a_scale() -> None:
    log = Axis.of("rate", [10**-n for n in range(1, 9)])
    assert (log.scale, log.at(1e-8), log.at(1e-1)) == ("log", 0.0, 1.0)
    even = Axis.of("rank", list(range(1, 11)))
    assert even.scale == "linear"
    assert even.places[0][0] == "0"
    assert even.at(5) == pytest.approx(0.5)
    assert Axis.of("error", [0.5, 0.7], exact=True).scale == "linear"


def test_lines_of_one_point_and_of_no_run() -> None:
    assert curves([], "loss", width=300, height=200) is None
    drawn = curves([Curve("1", "r1", "<a>", [(4.0, 0.5)])], "loss", width=300, height=200)
    assert drawn is not None
    assert "<circle" in drawn
    assert "&lt;a&gt;" in drawn
    assert parallel([Axis.of("k", [1])], [], width=300, height=200) is None


def test_a_long_curve_is_thinned_and_keeps_its_peaks() -> None:
    points = [(float(n), 0.5 + 0.001 * (n % 7)) for n in range(20_000)]
    points[777] = (777.0, 9.0)
    kept = thinned(points, 1000)
    assert len(kept) <= 1001
    assert (777.0, 9.0) in kept
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)
    assert thinned(points[:10], 1000) == points[:10]


def test_numbers_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    lines = [Curve(str(n), f"r{n}", "x", [(0.0, 1.0), (9.0, 0.01 * n)]) for n in range(1, 8)]
    drawn = curves(lines, "loss", width=300, height=200)
    assert drawn is not None
    places = [float(y) for y in re.findall(r'class="label r\d" x="[\d.]+" y="([\d.]+)"', drawn)]
    assert len(places) == 7
    assert all(abs(a - b) >= 12.9 for i, a in enumerate(places) for b in places[:i])
    assert max(places) < 200


def test_a_record_names_task_and_error() -> None:
    found = record(gathered("bad", None, status="failed", why="no", rank=8))
    assert (found["task"], found["status"], found["error"]) == ("experiment", "failed", "no")
