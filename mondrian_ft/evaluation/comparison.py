"""From answers to ``comparison_report.json``: the workbook's keys, and the evidence beside them.

How an answer counts that cannot be read: it fails format compliance, it is left out of
``score_mae``, whose ``n_scored`` says how many answers it rests on, and it is charged the largest
possible error in ``score_mae_worst_case``. It never takes the place of a good answer: the verdict
compares scores only on photographs that both arms answered readably, and lost answers count
against an arm through format compliance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import pstdev
from typing import Any

from ..data.dataset import Row
from ..errors import DataError
from . import detectors, evidence, metrics, stats
from .forgetting import Forgetting
from .metrics import Reading
from .outputs import Output

SHUFFLED = "tuned_shuffled"
CONSTRAINED = "_constrained"
"""Ends the name of an arm that answers under the schema; without it the same arm is free."""
AGAINST = ("production",)
"""Arms that the tuned one is compared with as well, beside the base."""
WORKBOOK_NAMES = {"base": "base_model", "tuned": "fine_tuned_model"}
EXCERPT = 500
"""Characters of an answer in ``sample_results[].*.output``; ``full_output`` holds all of it."""


def build(
    *,
    rows: Sequence[Row],
    arms: Mapping[str, Sequence[Output]],
    train_rows: Sequence[Row],
    base_model: str,
    lora_path: str | None,
    validation_data: str,
    settings: Mapping[str, Any],
    adapter_hash: str | None,
    date: str | None = None,
    score_margin: float = stats.SCORE_MARGIN,
    format_margin: float = stats.FORMAT_MARGIN,
    failed: Mapping[str, str] | None = None,
    peak_memory: Mapping[str, float] | None = None,
    hashes: Mapping[str, str | None] | None = None,
    forgetting: Forgetting | None = None,
    pace: Mapping[str, Sequence[float]] | None = None,
    data_lock: str | None = None,
    base: Mapping[str, str] | None = None,
    part: tuple[str, int] | None = None,
    resamples: int = stats.RESAMPLES,
) -> dict[str, Any]:
    """Compare arms on held-out ``rows`` and return the whole report as JSON-able values.

    ``arms`` maps an arm's name (``base``, ``tuned`` or any other) to one output per row. The arm
    ``tuned_shuffled``, answers to row i generated from another row's photograph, becomes
    ``evidence.arms.tuned.score_mae_shuffled``. ``train_rows`` supply the mean-score prediction and
    the dimension names that the strict format check asks for, where they agree on them.
    ``date`` is the ISO time written as ``evaluation_date``, now if None. The margins, in points
    of 0-10 and as a share of answers, are what the tuned arm may lose and count as no worse.
    ``failed`` gives the reason of each arm that could not answer, ``peak_memory`` GB by arm, and
    ``hashes`` the adapter of each arm that has one. ``forgetting`` is what the tuned model's
    adapter costs on general questions, None where that was not measured. ``pace`` are seconds per
    token by arm, of the same photographs in the same order (see ``latency``).

    ``data_lock`` names the rows, ``base`` the base, and ``part`` which part they are of and how
    many that part has: a report is evidence only where it can be seen what it is about.
    ``resamples`` are those of the verdicts' bootstraps; fewer are for simulations.

    The keys are those of the facts on the users' data, "Their training and evaluation files", with
    ``evidence`` added; ``report/schema/comparison_report.schema.json`` describes them all.

    Raises:
        DataError: there are no rows, so nothing can be said.
        ValueError: an arm has not exactly one output per row, or a reserved name.
    """
    if not rows:
        raise DataError(
            f"There are no photographs to evaluate in {validation_data}; give data.val_split or "
            "data.test_split a share, or data.val_data another file."
        )
    if not arms:
        raise ValueError("no arm was given")
    for name, outputs in arms.items():
        if len(outputs) != len(rows):
            raise ValueError(f"the arm {name} has {len(outputs)} outputs for {len(rows)} rows")
    if {evidence.MEAN, evidence.EXAMPLE} & arms.keys() or (
        SHUFFLED in arms and "tuned" not in arms
    ):
        raise ValueError(f"the arms {', '.join(arms)} use a reserved name")

    taught = [metrics.read(row.response) for row in train_rows]
    dimensions = evidence.agreed_dimensions(taught)
    references = [metrics.read(row.response) for row in rows]
    readings = {
        name: [metrics.read(output.text, dimensions) for output in outputs]
        for name, outputs in arms.items()
    }
    shown = [name for name in arms if name != SHUFFLED]
    photographs = [evidence.photograph(row) for row in rows]

    facts: dict[str, Any] = {
        "verdict": "inconclusive",
        "reason": "",
        "n": len(rows),
        "n_photographs": len(set(photographs)),
        "n_references_with_scores": sum(bool(r.scores) for r in references),
        "n_train": len(train_rows),
        "dimensions": list(dimensions) if dimensions else None,
        "arms": {
            name: evidence.arm_evidence(rows, arms[name], readings[name], references)
            for name in shown
        },
    }
    for arm in shown:
        for key, values in (("peak_memory_gb", peak_memory), ("adapter_hash", hashes)):
            if values and arm in values:
                facts["arms"][arm][key] = values[arm]
    facts["arms"] |= evidence.trivial_arms(rows, taught, references, photographs)
    facts["arms_failed"] = dict(failed or {})
    facts["constraint"] = {
        arm: evidence.constraint_effect(
            (arms[arm], arms[arm + CONSTRAINED]),
            (readings[arm], readings[arm + CONSTRAINED]),
            references,
            photographs,
        )
        for arm in shown
        if arm + CONSTRAINED in arms
    }
    if SHUFFLED in arms:
        shuffled = evidence.arm_evidence(rows, arms[SHUFFLED], readings[SHUFFLED], references)
        facts["arms"]["tuned"] |= {
            "score_mae_shuffled": shuffled["score_mae"],
            "n_scored_shuffled": shuffled["n_scored"],
        }
    fired: list[detectors.Detection] = []
    if "tuned" in arms:
        fired = detectors.detect(
            rows=rows,
            outputs=arms["tuned"],
            readings=readings["tuned"],
            references=references,
            photographs=photographs,
            train_rows=train_rows,
            base=arms.get("base", ()),
            shuffled=readings.get(SHUFFLED, ()),
        )
        facts["forgetting"] = forgetting.as_dict() if forgetting else None
        fired.append(
            detectors.forgetting(
                *(forgetting.base_loss, forgetting.tuned_loss) if forgetting else (None, None)
            )
        )
        facts["detections"] = [detection.as_dict() for detection in fired]
    if "base" in arms and "tuned" in arms:
        sides = (readings["base"], readings["tuned"], references, photographs)
        facts |= evidence.verdict(
            *sides,
            score_margin=score_margin,
            format_margin=format_margin,
            detections=fired,
            resamples=resamples,
        )
        facts["per_dimension_change"] = evidence.per_dimension_change(*sides)
    else:
        facts["reason"] = "A verdict needs both a base and a tuned arm."
    facts["against"] = {
        arm: evidence.verdict(
            *(readings[arm], readings["tuned"], references, photographs),
            score_margin=score_margin,
            format_margin=format_margin,
            detections=fired,
            resamples=resamples,
        )
        | {"latency": evidence.latency(pace, arm)}
        for arm in AGAINST
        if arm in arms and "tuned" in arms
    }
    if "change" in facts:
        facts["latency"] = evidence.latency(pace, "base")
    found = metric_block(arms, readings)
    facts["criteria"] = evidence.criteria(facts["arms"], found)
    facts |= {
        "adapter_hash": adapter_hash,
        "data_lock": data_lock,
        "base": dict(base) if base else None,
        "judged_part": {"part": part[0], "rows": len(rows), "of": part[1]} if part else None,
        "settings": dict(settings),
    }
    return {
        "evaluation_date": date or datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": base_model,
        "lora_path": lora_path,
        "validation_data": validation_data,
        "metrics": found,
        "summary": {
            "total_examples": len(rows),
            "verdict": facts["verdict"],
            "text": facts["reason"],
        },
        "sample_results": [
            sample_result(row, references[i], {n: (arms[n][i], readings[n][i]) for n in shown})
            for i, row in enumerate(rows)
        ],
        "evidence": facts,
    }


def metric_block(
    arms: Mapping[str, Sequence[Output]], readings: Mapping[str, Sequence[Reading]]
) -> dict[str, Any]:
    """The workbook's ``metrics``: ``base_model``, ``fine_tuned_model``, ``improvements``.

    ``avg_score`` and ``std_score`` (divided by n) are over the ``overall_score`` of the answers
    that can be read, None without any. They say how generous a model is, not how right:
    ``evidence`` says that. A missing arm has no block, and then there are no improvements.
    """
    found: dict[str, Any] = {}
    for name, block in WORKBOOK_NAMES.items():
        if name not in arms:
            continue
        outputs, read = arms[name], readings[name]
        said = [r.overall for r in read if r.overall is not None]
        valid = sum(r.strict for r in read)
        seconds = sum(output.seconds for output in outputs)
        found[block] = {
            "format_compliance": valid / len(outputs),
            "valid_outputs": valid,
            "total_outputs": len(outputs),
            "avg_score": evidence.mean_of(said),
            "std_score": pstdev(said) if said else None,
            "avg_inference_time": seconds / len(outputs),
            "total_inference_time": seconds,
        }
    if len(found) == len(WORKBOOK_NAMES):
        base, tuned = found["base_model"], found["fine_tuned_model"]
        found["improvements"] = {
            f"{short}_delta": evidence.difference(tuned[key], base[key])
            for short, key in (
                ("format_compliance", "format_compliance"),
                ("score", "avg_score"),
                ("inference_time", "avg_inference_time"),
            )
        }
    return found


def sample_result(
    row: Row, reference: Reading, answers: Mapping[str, tuple[Output, Reading]]
) -> dict[str, Any]:
    """One entry of ``sample_results``: the workbook's keys, and what the report page needs."""
    return {
        "image": Path(row.image_path).name,
        "image_path": str(row.image_path),
        "image_sha256": row.image_sha256,
        "job_id": row.job_id,
        "advisor": row.advisor,
        "reference": {
            "output": row.response[:EXCERPT],
            "full_output": row.response,
            "score": reference.overall,
            "scores": named(reference),
        },
    } | {
        WORKBOOK_NAMES.get(name, name): {
            "output": output.text[:EXCERPT],
            "full_output": output.text,
            "inference_time": output.seconds,
            "format_valid": reading.strict,
            "score": reading.overall,
            "validation_error": reading.strict_error,
            "readable": reading.readable,
            "scores": named(reading),
            "score_error": metrics.score_error(reading.scores, reference.scores),
            "mends": list(reading.mends),
            "tokens": output.tokens,
            "prompt_tokens": output.prompt_tokens,
            "finished": output.finished,
        }
        for name, (output, reading) in answers.items()
    }


def named(reading: Reading) -> dict[str, float]:
    """Scores by the dimension's name as the answer writes it."""
    return {reading.names[key]: score for key, score in reading.scores.items()}
