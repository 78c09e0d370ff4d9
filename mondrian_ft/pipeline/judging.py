"""Asking the judge of ``eval.judge_url``, and adding what it said to a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MondrianError
from ..evaluation import assessments, judge
from ..evaluation.assessments import ASSESSMENTS_NAME, BLOCKS, Assessments, Pair
from ..files import atomic_write_json
from ..report import screen, wording

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run

JUDGED = Path("outputs/cache/judge")
"""What a judge said, kept under what it was asked."""


def check(config: Config) -> None:
    """Refuse a judge that this machine cannot ask, before hours of work and not after them.

    Raises:
        JudgeError: the package ``openai`` is not installed, or the key cannot be one.
    """
    if config.eval.judge_url is not None:
        _judge(config)


def judged(config: Config, run: Run, report: dict[str, Any]) -> dict[str, Any]:
    """The report with ``evidence.judge`` in it, if the config names a judge.

    A judge that cannot be asked is a warning, and a sentence in the report.
    """
    if config.eval.judge_url is None:
        return report
    if not all(block in report["metrics"] for block in BLOCKS.values()):
        run.warn("the judge was not asked: it compares base and tuned, and both did not answer")
        return report
    # The judge is another machine: whatever becomes of it, what was found until here stays.
    own = run.folder / "evaluation" / "comparison_report.json"
    atomic_write_json(own, report)
    facts: dict[str, Any] = {"model": config.eval.judge_model, "url": config.eval.judge_url}
    place = Path(config.eval.report) if config.eval.report else own
    try:
        facts |= _ask(config, run, assessments.pairs_of(report, own), place)
    except MondrianError as error:
        facts["error"] = str(error)
        run.warn(f"the judge could not be asked: {error}")
    else:
        run.console.print(screen.plain(judge.sentence(facts)), markup=False)
        for note in judge.notes(facts):
            run.console.print(screen.plain(note), markup=False)
    run.record(judge={key: value for key, value in facts.items() if key != "pairs"})
    return {**report, "evidence": {**report["evidence"], "judge": facts}}


def with_agreement(
    facts: Mapping[str, Any] | None, pairs: Sequence[Pair], found: Assessments
) -> dict[str, Any] | None:
    """``evidence.judge`` with its agreement with what people say now; None stays None."""
    if facts is None or "error" in facts:
        return None if facts is None else dict(facts)
    return {**facts, "agreement": judge.agreement(facts, pairs, found)}


def _ask(config: Config, run: Run, pairs: Sequence[Pair], place: Path) -> dict[str, Any]:
    """The judge's counts. ``place`` is the report beside which people's judgements would lie."""
    asked = _judge(config)
    new = asked.new(pairs)
    if new:
        photographs = wording.count(len({pair.photograph for pair in new}), "photograph")
        key = config.eval.judge_key_env
        with_key = f"with the key of {key}" if os.environ.get(key) else "without a key"
        run.console.print(
            f"{photographs} will be sent to {asked.url} ({with_key}), for {asked.model} to judge: "
            f"as JPEG of at most {judge.SIDE} pixels without metadata, each with its reference and "
            "both answers, twice.",
            soft_wrap=True,
            markup=False,
        )
    with run.console.status("asking the judge") as status:
        opinions = asked.ask(pairs, lambda done: status.update(f"judge: {done} of {len(pairs)}"))
    if asked.store.problem:
        run.warn(f"what the judge said is not kept for the next time: {asked.store.problem}")
    facts = judge.summarise(pairs, opinions)
    try:
        found = assessments.read(place.parent / ASSESSMENTS_NAME)
    except MondrianError as error:
        run.warn(f"how far the judge agrees with people is not known: {error}")
        return facts | {"agreement": None}
    return facts | {"agreement": judge.agreement(facts, pairs, found)}


def _judge(config: Config) -> judge.Judge:
    return judge.Judge(
        config.eval.judge_url or "",
        config.eval.judge_model or "",
        key=os.environ.get(config.eval.judge_key_env, ""),
        key_name=config.eval.judge_key_env,
        timeout=config.eval.judge_timeout,
        cache=JUDGED.absolute(),
    )
