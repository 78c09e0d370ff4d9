"""Comparing base and tuned, and writing the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data.rows import Row
from ..errors import DataError
from ..evaluation import comparison
from ..evaluation.comparison import SHUFFLED
from ..evaluation.evaluator import Evaluator
from ..files import atomic_write_bytes, atomic_write_json, is_read_only
from ..model.adapter import WEIGHTS, Adapter
from ..model.backend import describe
from ..model.base import Base
from ..model.features import FeatureStore
from ..report import html, screen, tables, wording
from ..report.card import write_card
from .rows import Parts
from .training import encode_rows, pixel_facts, pixel_settings

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


ANSWERS = Path("outputs/cache/answers")
"""Greedy answers, kept under what they depend on."""


def evaluate(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    adapter: Adapter | None,
    *,
    labels: str | None = None,
) -> dict[str, Any]:
    """Compare the arms, write the reports, and return the comparison.

    ``labels`` is the audit's verdict in a sentence; it goes into the report as
    ``evidence.labels``.
    """

    rows = parts.judged[: config.eval.max_examples]
    if not rows:
        raise DataError(
            "there are no held-out rows to evaluate; give data.val_split or data.test_split a share"
        )
    if adapter is not None:
        _check_unseen(adapter, rows)
    examples = encode_rows(config, run, base, rows)
    if not examples:
        raise DataError("every held-out row is too long for the model; lower data.max_pixels")
    pixels = pixel_facts(base, pixel_settings(config))
    arms = [str(arm) for arm in config.eval.arms if adapter is not None or arm == "base"]
    evaluator = Evaluator(
        base,
        features,
        max_tokens=config.eval.max_tokens,
        batch_size=config.eval.batch_size,
        temperature=config.eval.temperature,
        seed=config.trainer.seed,
        cache=ANSWERS.absolute(),
        identity={
            "base": asdict(base.identity),
            "adapter": adapter.hash if adapter else None,
            "pixels": pixels["fingerprint"],
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
            examples, arms, lambda arm, done: status.update(f"{arm}: {done} of {len(examples)}")
        )
    if evaluator.damaged:
        lines = wording.count(evaluator.damaged, "line")
        run.warn(f"{lines} of the kept answers could not be read; those questions were asked again")
    if evaluator.problem:
        run.warn(f"answers are not kept for the next time: {evaluator.problem}")
    if reused := {arm: n for arm, n in evaluator.reused.items() if n and arm != SHUFFLED}:
        told = wording.listing([f"{n} of {arm}" for arm, n in reused.items()])
        run.console.print(f"Answers given before, with their times of then: {told}.", markup=False)
    report = comparison.build(
        rows=[example.row for example in examples],
        arms=outputs,
        train_rows=parts.train,
        base_model=base.identity.name,
        lora_path=str(adapter.folder) if adapter else None,
        validation_data=parts.source,
        settings={
            "max_tokens": config.eval.max_tokens or evaluator.limit(examples),
            "batch_size": config.eval.batch_size,
            "temperature": config.eval.temperature,
            "answers_reused": evaluator.reused,
            "pixels": pixels,
            "data_lock": parts.lock,
            "base": asdict(base.identity),
        },
        adapter_hash=adapter.hash if adapter else None,
        score_margin=config.eval.margin_score,
        format_margin=config.eval.margin_format,
    )
    if labels is not None:
        report["evidence"]["labels"] = labels
    path = Path(config.eval.report) if config.eval.report else None
    path = path or run.folder / "evaluation" / "comparison_report.json"
    atomic_write_json(path, report)
    facts = json.loads((run.folder / "run.json").read_text())
    log = run.folder / "training_log.jsonl"
    if not log.is_file() and adapter is not None:
        log = adapter.folder / "training_log.jsonl"
    page = html.write(report, log, facts, run.folder / "report.html")
    atomic_write_bytes(path.parent / "report.html", page.read_bytes())
    if adapter is not None:
        _attach_evaluation(adapter, report, page)
    evidence = report["evidence"]
    run.record(evaluation={"report": str(path), "verdict": evidence["verdict"]})
    run.tracker.summary(
        {
            f"{arm}/{key}": facts_of[key]
            for arm, facts_of in evidence["arms"].items()
            for key in ("format_strict", "score_mae")
            if facts_of.get(key) is not None
        }
        | {"verdict": evidence["verdict"]}
    )
    run.tracker.show(lambda: tables.tables(report), page)
    return report


def _attach_evaluation(adapter: Adapter, report: dict[str, Any], page: Path) -> None:
    """Put the evaluation beside the weights it is about; a registered version is left as it is."""
    if is_read_only(adapter.folder / WEIGHTS):
        return
    folder = adapter.folder / "evaluation"
    atomic_write_json(folder / "comparison_report.json", report)
    atomic_write_bytes(folder / "report.html", page.read_bytes())
    write_card(adapter.folder, adapter.manifest, report)


def _check_unseen(adapter: Adapter, rows: Sequence[Row]) -> None:
    """Refuse to judge an adapter on photographs it was trained on."""
    seen = set(adapter.manifest.get("trained_on", []))
    known = [row for row in rows if row.image_sha256 in seen]
    if known:
        raise DataError(
            f"{len(known)} of {len(rows)} photographs to evaluate were trained on by "
            f"{adapter.folder.name}, {known[0].image_path.name} first; evaluate on the split it "
            "was trained with (data.output_dir), or on other photographs"
        )
