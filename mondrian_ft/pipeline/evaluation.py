"""Comparing base and tuned, and writing the reports."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data.batches import Example
from ..data.rows import Row
from ..errors import DataError, EvaluationError, MondrianError
from ..evaluation import comparison, forgetting, latency
from ..evaluation.comparison import SHUFFLED
from ..evaluation.evaluator import Evaluator
from ..evaluation.forgetting import Forgetting
from ..evaluation.outputs import Output
from ..evaluation.probing import probe_inputs
from ..files import atomic_write_bytes, atomic_write_json, is_read_only
from ..model.adapter import WEIGHTS, Adapter
from ..model.backend import describe
from ..model.base import Base
from ..model.features import FeatureStore
from ..report import html, screen, tables, wording
from ..report.card import write_card
from . import arms as arms_of
from . import assessing, inputs, judging
from .rows import Parts
from .training import encode_rows, pixel_facts, pixel_settings

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


ANSWERS = Path("outputs/cache/answers")
"""Greedy answers, kept under what they depend on."""


@dataclass(frozen=True)
class Asked:
    """What every arm answered, and what there is to say of the asking.

    Attributes:
        examples: what was asked about, in row order.
        outputs: by arm, one answer per example.
        failed: the reason of each arm that could not answer.
        hashes: the adapter of each arm that has one.
        peak_memory: GB, by arm that was asked anything.
        settings: all that the answers depend on, for the report.
        part: which part the rows are of, and how many rows that part has.
        base: which base answered.
        forgetting: what the adapter costs on general questions; None if not measured.
        pace: seconds per token by arm, of the same photographs.
    """

    examples: list[Example]
    outputs: dict[str, list[Output]]
    failed: dict[str, str]
    hashes: dict[str, str]
    peak_memory: dict[str, float]
    settings: dict[str, Any]
    part: tuple[str, int]
    base: dict[str, str]
    forgetting: Forgetting | None = None
    pace: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The rows asked about."""
        return [example.row for example in self.examples]


@dataclass
class Evaluated:
    """A comparison that was written.

    Attributes:
        report: the whole ``comparison_report.json``.
        problems: what was not as it should be though everything else is there; see `check`.
    """

    report: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Fail, now that all that could be had is written and shown.

        Raises:
            EvaluationError: an arm could not answer, or a report could not be put in its place.
        """
        if self.problems:
            raise EvaluationError("; ".join(self.problems))


def evaluate(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    adapter: Adapter | None,
    *,
    labels: str | None = None,
    failed: dict[str, str] | None = None,
) -> Evaluated:
    """Compare the arms, write the reports, and return the comparison.

    ``labels`` is the audit's verdict in a sentence; it goes into the report as
    ``evidence.labels``. ``failed`` gives the reason of an arm that could not even be loaded.
    """
    started = time.perf_counter()
    inputs.tell(config, run, parts)
    asked = ask(config, run, base, features, parts, adapter, failed=failed)
    report = build(config, parts, base, asked, adapter)
    if labels is not None:
        report["evidence"]["labels"] = labels
    done = write(config, run, judging.judged(config, run, report), adapter)
    run.record(evaluation_seconds=round(time.perf_counter() - started, 2))
    return done


def ask(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    adapter: Adapter | None,
    *,
    failed: dict[str, str] | None = None,
    alone: bool = False,
) -> Asked:
    """Put the held-out rows to every arm of the config.

    ``alone`` is for one training of several, which no gate will ask about: it is neither timed nor
    compared with what the registry holds.

    Raises:
        DataError: there are no held-out rows, or the adapter was trained on some of them.
        ModelError: no arm could answer.
    """
    rows = parts.judged[: config.eval.max_examples]
    if not rows:
        raise DataError(
            "there are no held-out rows to evaluate; give data.val_split or data.test_split a share"
        )
    if adapter is not None:
        arms_of.check_unseen(adapter, rows)
        if adapter.manifest.get("trained_on") is None:
            run.warn(
                f"{adapter.folder.name} does not say which photographs it was trained on, so some "
                "of these may be among them; figures of an imported adapter hold only for "
                "photographs that you know it never saw"
            )
        if told := arms_of.untrained_prompts(adapter, rows):
            run.warn(told)
    examples = encode_rows(config, run, base, rows)
    if not examples:
        raise DataError("every held-out row is too long for the model; lower data.max_pixels")
    pixels = pixel_facts(base, pixel_settings(config))
    arms = arms_of.find(
        config,
        base,
        adapter=adapter,
        rows=rows,
        train=parts.train,
        probe=probe_inputs(base, pixel_settings(config)),
        failed=failed or {},
        alone=alone,
    )
    for note in arms.notes:
        run.warn(note)
    if not arms.names:
        raise EvaluationError("; ".join(_unanswered(arms.failed)) or "eval.arms names no arm")
    evaluator = Evaluator(
        base,
        features,
        max_tokens=config.eval.max_tokens,
        batch_size=config.eval.batch_size,
        temperature=config.eval.temperature,
        seed=config.trainer.seed,
        constraint=arms.constraint,
        voices=arms.voices,
        cache=ANSWERS.absolute(),
        identity={
            "base": asdict(base.identity),
            "adapter": adapter.hash if adapter else None,
            "pixels": pixels["fingerprint"],
            # Tokenizer and chat template; the base's own identity is that of its weights.
            "texts": base.encoder.fingerprint,
            "backend": describe(),
            # mlx-vlm is pinned by this package's version.
            "versions": {"mondrian_ft": __version__, "mlx": version("mlx")},
        },
    )
    shown = wording.count(len({example.row.image_sha256 for example in examples}), "photograph")
    rows_told = wording.count(len(examples), "held-out row")
    run.console.print(screen.plain(f"Evaluating {rows_told} on {shown}."), markup=False)
    with run.console.status("answering") as status:
        outputs = evaluator.run(
            examples,
            arms.names,
            lambda arm, done: status.update(f"{arm}: {done} of {len(examples)}"),
        )
        lost = None
        if "tuned" in outputs:
            status.update("general questions")
            lost = forgetting.measure(base, features, examples, batch_size=config.eval.batch_size)
        pace: dict[str, list[float]] = {}
        if {"base", "tuned"} <= outputs.keys() and not alone:
            status.update("timing")
            pace = _timed(config, run, base, features, examples, arms, outputs)
    _tell(run, evaluator)
    return Asked(
        examples,
        outputs,
        failed=arms.failed | evaluator.failed,
        hashes={
            arm: found
            for arm in outputs
            if (found := evaluator.voice(arm).adapter) is not None and arm != SHUFFLED
        },
        peak_memory=evaluator.peak_memory,
        settings={
            "max_tokens": config.eval.max_tokens or evaluator.limit(examples),
            "batch_size": config.eval.batch_size,
            "temperature": config.eval.temperature,
            "examples": config.eval.examples if arms_of.EXAMPLES in arms.voices else None,
            "answers_reused": evaluator.reused,
            "pixels": pixels,
            "data_lock": parts.lock,
            "base": asdict(base.identity),
        },
        part=("test" if parts.test else "val", len(parts.judged)),
        base=asdict(base.identity),
        forgetting=lost,
        pace=pace,
    )


def _timed(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    examples: list[Example],
    arms: arms_of.Arms,
    outputs: dict[str, list[Output]],
) -> dict[str, list[float]]:
    """Seconds per token of base, tuned and production; none, with a warning, if that fails."""
    name = arms_of.PRODUCTION
    others = {name: arms.voices[name]} if name in outputs and name in arms.voices else {}
    try:
        return latency.measure(base, features, examples, others, photographs=config.eval.latency)
    except MondrianError as error:
        run.warn(f"tokens could not be timed: {error}")
        return {}


def build(
    config: Config, parts: Parts, base: Base, asked: Asked, adapter: Adapter | None
) -> dict[str, Any]:
    """The comparison report of what was asked."""
    return comparison.build(
        rows=asked.rows,
        arms=asked.outputs,
        train_rows=parts.train,
        base_model=base.identity.name,
        lora_path=str(adapter.folder) if adapter else None,
        validation_data=parts.source,
        settings=asked.settings,
        adapter_hash=adapter.hash if adapter else None,
        score_margin=config.eval.margin_score,
        format_margin=config.eval.margin_format,
        failed=asked.failed,
        peak_memory=asked.peak_memory,
        hashes=asked.hashes,
        forgetting=asked.forgetting,
        pace=asked.pace,
        data_lock=parts.lock,
        base=asked.base,
        part=asked.part,
    )


def write(config: Config, run: Run, report: dict[str, Any], adapter: Adapter | None) -> Evaluated:
    """Write the reports where the config wants them, and beside the adapter.

    They are always in the run folder, so that another place that cannot be written loses nothing.
    """
    done = Evaluated(report)
    own = run.folder / "evaluation" / "comparison_report.json"
    atomic_write_json(own, report)
    facts = json.loads((run.folder / "run.json").read_text())
    log = run.folder / "training_log.jsonl"
    if not log.is_file() and adapter is not None:
        log = adapter.folder / "training_log.jsonl"
    page = html.write(report, log, facts, run.folder / "report.html")
    atomic_write_bytes(own.parent / "report.html", page.read_bytes())
    place = own
    if config.eval.report:
        wanted = Path(config.eval.report)
        try:
            atomic_write_json(wanted, report)
            atomic_write_bytes(wanted.parent / "report.html", page.read_bytes())
            place = wanted
        except MondrianError as error:
            done.problems.append(f"eval.report: {error}; the report is in {screen.near(own)}")
    if adapter is not None:
        _attach_evaluation(adapter, report, page)
    if place != own:
        assessing.recount(run, place)
    evidence = report["evidence"]
    if evidence["arms_failed"]:
        told = "; ".join(_unanswered(evidence["arms_failed"]))
        done.problems.append(f"{told}; what the others answered is in {screen.near(place)}")
    run.record(
        evaluation={
            "report": str(place),
            "verdict": evidence["verdict"],
            "score_mae": evidence["arms"].get("tuned", {}).get("score_mae"),
        }
    )
    run.tracker.summary(figures(evidence))
    run.tracker.show(lambda: tables.tables(report), page)
    return done


def figures(evidence: dict[str, Any]) -> dict[str, Any]:
    """The closing figures of an evaluation, ``<arm>/<figure>``, with the ends of its intervals."""
    found: dict[str, Any] = {}
    for arm, facts in evidence["arms"].items():
        for key in ("format_strict", "score_mae"):
            if facts.get(key) is None:
                continue
            found[f"{arm}/{key}"] = facts[key]
            for end, value in zip(
                ("low", "high"), facts.get(f"{key}_interval") or (), strict=False
            ):
                found[f"{arm}/{key}_{end}"] = value
    return found | {"verdict": evidence["verdict"]}


def _tell(run: Run, evaluator: Evaluator) -> None:
    """What a person should know of the asking."""
    for arm, reason in evaluator.failed.items():
        run.warn(f"{arm} could not answer: {reason}")
    if evaluator.damaged:
        lines = wording.count(evaluator.damaged, "line")
        run.warn(f"{lines} of the kept answers could not be read; those questions were asked again")
    if evaluator.problem:
        run.warn(f"answers are not kept for the next time: {evaluator.problem}")
    if reused := {arm: n for arm, n in evaluator.reused.items() if n and arm != SHUFFLED}:
        told = wording.listing([f"{n} of {arm}" for arm, n in reused.items()])
        run.console.print(f"Answers given before, with their times of then: {told}.", markup=False)


def _unanswered(failed: dict[str, str]) -> list[str]:
    """The reasons, each once, with the arms they are the reason of."""
    by_reason: dict[str, list[str]] = {}
    for arm, reason in failed.items():
        by_reason.setdefault(reason, []).append(arm)
    return [
        f"{wording.listing(arms)} could not be evaluated: {reason.rstrip('.')}"
        for reason, arms in by_reason.items()
    ]


def _attach_evaluation(adapter: Adapter, report: dict[str, Any], page: Path) -> None:
    """Put the evaluation beside the weights it is about; a registered version is left as it is."""
    if is_read_only(adapter.folder / WEIGHTS):
        return
    folder = adapter.folder / "evaluation"
    atomic_write_json(folder / "comparison_report.json", report)
    atomic_write_bytes(folder / "report.html", page.read_bytes())
    write_card(adapter.folder, adapter.manifest, report)
