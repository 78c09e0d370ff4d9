"""What the answers of an arm show, and what two arms show beside each other.

Each function takes sequences in row order: ``readings`` of one arm's answers, ``references`` of the
advisor's, ``photographs`` naming the photograph of each row. See ``comparison`` for how an answer
counts that cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..data.audit.texts import repeats_advice
from ..data.dataset import Row
from ..data.example import KNOWN_OVERALL, KNOWN_VECTOR, Example, filled_example
from . import metrics, stats
from .detectors import Detection
from .metrics import Reading
from .outputs import Output

MEAN = "mean_score"
EXAMPLE = "prompt_example"


def photograph(row: Row) -> str:
    """What tells a row's photograph from others: its content's hash, else its path."""
    return row.image_sha256 or str(row.image_path)


def agreed_dimensions(taught: Sequence[Reading]) -> list[str] | None:
    """The dimension names of the training answers, if all readable ones have the same; else None.

    Databases mix eras with five to nine dimensions; there the names are not part of the format.
    """
    found = [r.critique.scores().keys() for r in taught if r.critique]
    if not found or any(names != found[0] for names in found):
        return None
    return list(found[0])


def arm_evidence(
    rows: Sequence[Row],
    outputs: Sequence[Output],
    readings: Sequence[Reading],
    references: Sequence[Reading],
) -> dict[str, Any]:
    """Everything measured of one arm; scores in points of 0-10, shares 0-1, times in seconds.

    ``score_mae`` is the mean over photographs of the mean over the reference's dimensions of the
    absolute score error, over the answers that give scores (``n_scored``); its interval is
    ``stats.mean_interval``. ``score_bias`` is the signed mean, positive when too generous.
    ``overall_*`` are the same of the overall score, with its rank correlations (Spearman's is
    ``overall_correlation``) and its spread over the references'; ``overall_gap`` is the mean
    distance, 0-10, of a stated overall from the mean of its own dimensions.
    ``distinct_advice`` is of this arm's answers, ``distinct_advice_reference`` of the references
    to the same rows. Times, seconds and tokens per second, are None where they were not taken.
    """
    photographs = [photograph(row) for row in rows]
    n, strict = len(outputs), sum(r.strict for r in readings)
    distinct = len(set(photographs))
    errors = [
        metrics.score_error(r.scores, ref.scores)
        for r, ref in zip(readings, references, strict=True)
    ]
    charged = [
        error if error is not None else metrics.worst_error(ref.scores)
        for error, ref in zip(errors, references, strict=True)
    ]
    overall = [
        None if r.overall is None or ref.overall is None else (r.overall, ref.overall)
        for r, ref in zip(readings, references, strict=True)
    ]
    signed = [
        fmean(r.scores[key] - ref.scores[key] for key in shared) if shared else None
        for r, ref in zip(readings, references, strict=True)
        for shared in [r.scores.keys() & ref.scores.keys()]
    ]
    wanted = sum(len(ref.scores) for r, ref in zip(readings, references, strict=True) if r.readable)
    given = sum(
        len(r.scores.keys() & ref.scores.keys())
        for r, ref in zip(readings, references, strict=True)
    )
    per_photograph = metrics.by_photograph(errors, photographs)
    ranked = by_photograph_pairs(overall, photographs)
    spoken = [(r.critique, ref.critique) for r, ref in zip(readings, references, strict=True)]
    speeds = [o.tokens / o.seconds if o.seconds > 0 else None for o in outputs]
    return {
        "n": n,
        "n_readable": sum(r.readable for r in readings),
        "n_scored": sum(error is not None for error in errors),
        "format_strict": strict / n,
        # Answers about one photograph are not independent: they count as one.
        "format_strict_interval": listed(
            stats.share_interval(round(strict * distinct / n), distinct)
        ),
        "readable": sum(r.readable for r in readings) / n,
        "score_mae": mean_of(per_photograph.values()),
        "score_mae_interval": listed(stats.mean_interval(list(per_photograph.values()))),
        "score_mae_worst_case": mean_of(metrics.by_photograph(charged, photographs).values()),
        "score_bias": mean_of(metrics.by_photograph(signed, photographs).values()),
        "overall_mae": mean_of(
            metrics.by_photograph(
                [None if pair is None else abs(pair[0] - pair[1]) for pair in overall], photographs
            ).values()
        ),
        "overall_bias": mean_of(
            metrics.by_photograph(
                [None if pair is None else pair[0] - pair[1] for pair in overall], photographs
            ).values()
        ),
        "overall_correlation": metrics.spearman(ranked),
        "overall_kendall": metrics.kendall(ranked),
        "overall_spread_ratio": metrics.spread_ratio(ranked),
        "overall_gap": mean_of(metrics.overall_gap(r.critique) for r in readings if r.critique),
        "per_dimension": per_dimension([r.scores for r in readings], references, photographs),
        "dimension_coverage": given / wanted if wanted else None,
        "distinct_score_vectors": metrics.distinct_score_vectors(readings),
        "repeated_advice": sum(repeats_advice(r.critique) for r in readings if r.critique),
        "distinct_advice": metrics.distinct_advice(mine for mine, _ in spoken if mine),
        "distinct_advice_reference": metrics.distinct_advice(
            theirs for mine, theirs in spoken if mine and theirs
        ),
        "foreign_script": sum(
            metrics.foreign_script(output.text, row.response)
            for output, row in zip(outputs, rows, strict=True)
        ),
        "unfinished": sum(not output.finished for output in outputs),
        "seconds_mean": fmean(output.seconds for output in outputs),
        "seconds_total": sum(output.seconds for output in outputs),
        **{
            f"{key}_p{percent}": metrics.percentile(values, percent)
            for key, values in (
                ("seconds", [output.seconds for output in outputs]),
                ("prefill_seconds", [output.prefill_seconds for output in outputs]),
                ("first_token_seconds", [output.first_token_seconds for output in outputs]),
                ("tokens_per_second", speeds),
            )
            for percent in (50, 95)
        },
        "tokens_mean": fmean(output.tokens for output in outputs),
        "prompt_tokens_mean": fmean(output.prompt_tokens for output in outputs),
    }


def trivial_arms(
    rows: Sequence[Row],
    taught: Sequence[Reading],
    references: Sequence[Reading],
    photographs: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """What can be said without looking at a photograph; a model must beat it to have learnt.

    ``mean_score`` gives every photograph the training rows' mean score in each dimension;
    ``prompt_example`` the scores of the filled example in its prompt, or, where the prompt has
    none, of the service's own (facts: "Prompts"), which two thirds of the users' labels repeat.
    They write no text, so their ``format_strict`` is None. An arm that has no score for any
    reference is left out.
    """
    arms: dict[str, dict[str, Any]] = {}
    mean = metrics.mean_scores(r.scores for r in taught if r.scores)
    said = mean_of(r.overall for r in taught if r.overall is not None)
    if mean:
        constant = [(mean, said)] * len(references)
        arms[MEAN] = _scores_alone(constant, references, photographs)
        arms[MEAN]["n_train"] = sum(bool(r.scores) for r in taught)
    shown = [example_scores(row.prompt, ref) for row, ref in zip(rows, references, strict=True)]
    if any(scores for scores, _ in shown):
        arms[EXAMPLE] = _scores_alone(shown, references, photographs)
        own = sum(filled_example(row.prompt) is not None for row in rows)
        arms[EXAMPLE]["n_prompts_with_example"] = own
    return arms


def example_scores(prompt: str, reference: Reading) -> tuple[dict[str, float], float | None]:
    """A prompt's filled example, else the service's, as scores of the reference's dimensions.

    By name where the example names its dimensions, in order where it has as many scores as the
    reference; no scores where neither fits.
    """
    example = filled_example(prompt) or Example((), KNOWN_VECTOR, KNOWN_OVERALL)
    if example.names:
        named = zip(map(metrics.dimension_key, example.names), example.scores, strict=True)
        scores = {key: score for key, score in named if key in reference.scores}
    elif len(example.scores) == len(reference.scores):
        scores = dict(zip(reference.scores, example.scores, strict=True))
    else:
        scores = {}
    return scores, example.overall


def _scores_alone(
    given: Sequence[tuple[Mapping[str, float], float | None]],
    references: Sequence[Reading],
    photographs: Sequence[str],
) -> dict[str, Any]:
    """Evidence of an arm that gives scores, by dimension and overall, and writes nothing."""
    pairs = list(zip(given, references, strict=True))
    errors = [metrics.score_error(scores, ref.scores) for (scores, _), ref in pairs]
    scored = metrics.by_photograph(errors, photographs)
    overall = [
        None if said is None or ref.overall is None else abs(said - ref.overall)
        for (_, said), ref in pairs
    ]
    return {
        "n": len(references),
        "n_scored": sum(error is not None for error in errors),
        "format_strict": None,
        "score_mae": mean_of(scored.values()),
        "score_mae_interval": listed(stats.mean_interval(list(scored.values()))),
        "overall_mae": mean_of(metrics.by_photograph(overall, photographs).values()),
        "per_dimension": per_dimension([scores for scores, _ in given], references, photographs),
    }


def constraint_effect(
    outputs: tuple[Sequence[Output], Sequence[Output]],
    readings: tuple[Sequence[Reading], Sequence[Reading]],
    references: Sequence[Reading],
    photographs: Sequence[str],
) -> dict[str, Any]:
    """What answering under the schema cost and changed; each pair is (free, constrained).

    ``changed`` of ``n`` answers differ in a letter. ``score_error_change`` is by photograph, of
    those that both gave scores for, positive where the constraint made the error larger.
    ``seconds_ratio`` is of seconds per token, constrained over free, as answers differ in length.
    """
    free, bound = outputs
    changes: list[float | None] = []
    for one, other, ref in zip(*readings, references, strict=True):
        before, after = (metrics.score_error(r.scores, ref.scores) for r in (one, other))
        changes.append(difference(after, before))
    values = list(metrics.by_photograph(changes, photographs).values())
    pace = [
        sum(o.seconds for o in some) / max(sum(o.tokens for o in some), 1) for some in (free, bound)
    ]
    return {
        "n": len(free),
        "changed": sum(a.text != b.text for a, b in zip(free, bound, strict=True)),
        "score_error_change": {
            "n": len(values),
            "mean": mean_of(values),
            "interval": listed(stats.mean_interval(values)),
        },
        "seconds_ratio": pace[1] / pace[0] if pace[0] > 0 else None,
    }


def per_dimension(
    scores: Sequence[Mapping[str, float]], references: Sequence[Reading], photographs: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """``{name as the reference writes it: measures}`` of each dimension the references have.

    ``mae`` and ``bias`` in points (0-10; positive bias is too generous), ``spearman`` and
    ``kendall`` (-1 to 1), ``spread_ratio`` (the answers' standard deviation over the
    references'), each by photograph and None where it has no value; ``n`` photographs.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, name in dimension_names(references).items():
        pairs = by_photograph_pairs(
            [
                (given[key], ref.scores[key]) if key in given and key in ref.scores else None
                for given, ref in zip(scores, references, strict=True)
            ],
            photographs,
        )
        errors = metrics.by_photograph(
            [
                metrics.score_errors(given, ref.scores).get(key)
                for given, ref in zip(scores, references, strict=True)
            ],
            photographs,
        )
        found[name] = {
            "mae": mean_of(errors.values()),
            "bias": mean_of(mine - theirs for mine, theirs in pairs),
            "spearman": metrics.spearman(pairs),
            "kendall": metrics.kendall(pairs),
            "spread_ratio": metrics.spread_ratio(pairs),
            "n": len(errors),
        }
    return found


def dimension_names(references: Sequence[Reading]) -> dict[str, str]:
    """Each dimension's key and its name as the first reference with it writes it."""
    names: dict[str, str] = {}
    for reference in references:
        for key, name in reference.names.items():
            names.setdefault(key, name)
    return names


def by_photograph_pairs(
    pairs: Sequence[tuple[float, float] | None], photographs: Sequence[str]
) -> list[tuple[float, float]]:
    """(answer, reference) of each photograph, the means of its rows; None pairs do not count."""
    sides = (
        metrics.by_photograph([None if p is None else p[side] for p in pairs], photographs)
        for side in (0, 1)
    )
    return list(zip(*(side.values() for side in sides), strict=True))


def verdict(
    base: Sequence[Reading],
    tuned: Sequence[Reading],
    references: Sequence[Reading],
    photographs: Sequence[str],
    *,
    score_margin: float = stats.SCORE_MARGIN,
    format_margin: float = stats.FORMAT_MARGIN,
    detections: Sequence[Detection] = (),
    resamples: int = stats.RESAMPLES,
) -> dict[str, Any]:
    """``verdict``, ``reason``, ``change`` and ``capped_by`` of tuned against base, by photograph.

    ``change.score`` is how far the score error fell, in points; ``change.format`` how far strict
    compliance rose, as a share. Each is judged by ``stats.judge``, with the margins given (points
    of 0-10, and a share of answers for the observed change), and ``stats.combine`` joins them.

    A ``better`` is lowered to ``inconclusive`` where a detector fired that disqualifies it:
    ``capped_by`` names them, and the reason says what they saw. No other verdict is touched.

    Two ways lead to ``better``, the score and the format, and each is a one-sided test at 2.5 %,
    so without a difference it is said in at most 5 %: 1 to 4 % in the simulations of the tests.
    """
    pairs = [
        (metrics.score_error(b.scores, ref.scores), metrics.score_error(t.scores, ref.scores))
        for b, t, ref in zip(base, tuned, references, strict=True)
    ]
    gains = [None if b is None or t is None else b - t for b, t in pairs]
    formats = [float(t.strict) - float(b.strict) for b, t in zip(base, tuned, strict=True)]
    score = stats.judge(
        list(metrics.by_photograph(gains, photographs).values()),
        margin=score_margin,
        resamples=resamples,
    )
    form = stats.judge(
        list(metrics.by_photograph(formats, photographs).values()),
        margin=format_margin,
        observed=True,
        resamples=resamples,
    )
    # Arms that agree in everything that can be compared differ in nothing, readable or not.
    same = all(b.scores == t.scores for b, t in zip(base, tuned, strict=True)) and not any(formats)
    state = "no_worse" if same else stats.combine(score.state, form.state)
    against = [d for d in detections if d.fired and d.disqualifies] if state == "better" else []
    state = "inconclusive" if against else state
    told = "".join(f" But it does not count as better: {d.sentence}" for d in against[:1])
    told += "".join(f" {d.sentence}" for d in against[1:])
    return {
        "verdict": state,
        "reason": reason(state, score, form, any(ref.scores for ref in references)) + told,
        "change": {"score": score.as_dict(), "format": form.as_dict()},
        "capped_by": [detection.name for detection in against],
    }


def latency(pace: Mapping[str, Sequence[float]] | None, arm: str) -> dict[str, Any] | None:
    """How many times another arm's seconds per token the tuned one's are; None if not measured."""
    if not pace or "tuned" not in pace or arm not in pace:
        return None
    return stats.paired_ratio(pace["tuned"], pace[arm]).as_dict()


def per_dimension_change(
    base: Sequence[Reading],
    tuned: Sequence[Reading],
    references: Sequence[Reading],
    photographs: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """How far the score error fell in each dimension, by the name the reference writes.

    ``{name: {n, mean, interval, p_value, p_holm, effect_size}}``, by photograph, in points;
    positive is better for tuned. ``p_value`` is ``stats.sign_flip``'s, ``p_holm`` the same with
    Holm's correction over the dimensions, the one to go by when looking for one that changed.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, name in dimension_names(references).items():
        gains: list[float | None] = []
        for b, t, ref in zip(base, tuned, references, strict=True):
            before, after = (metrics.score_errors(r.scores, ref.scores).get(key) for r in (b, t))
            gains.append(difference(before, after))
        values = list(metrics.by_photograph(gains, photographs).values())
        found[name] = {
            "n": len(values),
            "mean": mean_of(values),
            "interval": listed(stats.mean_interval(values)),
            "p_value": stats.sign_flip(values),
            "effect_size": stats.effect_size(values),
        }
    adjusted = stats.holm([change["p_value"] for change in found.values()])
    for change, p in zip(found.values(), adjusted, strict=True):
        change["p_holm"] = p
    return found


def reason(state: str, score: stats.Change, form: stats.Change, scored: bool = True) -> str:
    """The verdict as one plain sentence; ``scored`` says whether any reference has scores."""
    if not scored:
        scores = "the references hold no scores to compare with"
    elif score.mean is None:
        scores = "no photograph was scored by both models"
    else:
        direction = "fell" if score.mean >= 0 else "rose"
        scores = f"the score error {direction} by {abs(score.mean):.2f} points"
        if score.interval and score.interval[0] != score.interval[1]:
            low, high = score.interval if score.mean >= 0 else [-v for v in score.interval[::-1]]
            scores += f" (95 % interval {low:.2f} to {high:.2f})"
        scores += f" on {score.n} {'photograph' if score.n == 1 else 'photographs'}"
    points = 100 * (form.mean or 0.0)
    if points:
        formats = (
            f"format compliance {'rose' if points > 0 else 'fell'} by {abs(points):.0f} points"
        )
    else:
        formats = "format compliance stayed the same"
    lead = {
        "better": "Better",
        "no_worse": "No worse",
        "worse": "Worse",
        "inconclusive": "Inconclusive",
    }[state]
    return f"{lead}: {scores}, and {formats}."


def criteria(arms: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a good result looks like, as ``[{name, value, target, met}]``; the unknown is absent.

    The first two and the last are the workbook's success criteria, phase 4.2. The three between
    ask whether the scores were learnt: closer than the base, closer than a constant, and looking at
    the picture, since another photograph in its place must cost at least a quarter more error.
    """
    marks: list[dict[str, Any]] = []

    def mark(name: str, value: float | None, target: float | None, met: bool) -> None:
        if value is not None and target is not None:
            marks.append({"name": name, "value": value, "target": target, "met": met})

    base, tuned, mean = arms.get("base"), arms.get("tuned"), arms.get(MEAN)
    if base:
        value = base["format_strict"]
        mark("base_format", value, 0.90, value >= 0.90)
    if tuned:
        value = tuned["format_strict"]
        mark("tuned_format", value, 0.95, value >= 0.95)
        error, shuffled = tuned["score_mae"], tuned.get("score_mae_shuffled")
        for name, other in (("error_below_base", base), ("error_below_mean", mean)):
            target = other["score_mae"] if other else None
            mark(name, error, target, below(error, target))
        if error is not None:
            mark("shuffled_error", shuffled, 1.25 * error, below(1.25 * error, shuffled, True))
    if "improvements" in found:
        before, after = (
            found[block]["avg_inference_time"] for block in ("base_model", "fine_tuned_model")
        )
        mark("time", after, 1.1 * before, after <= 1.1 * before)
    return marks


def below(value: float | None, limit: float | None, equal: bool = False) -> bool:
    """Whether ``value`` is below ``limit``; unknown values are not."""
    if value is None or limit is None:
        return False
    return value <= limit if equal else value < limit


def mean_of(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    found = list(values)
    return fmean(found) if found else None


def difference(left: float | None, right: float | None) -> float | None:
    """``left - right``, None where either is unknown."""
    return None if left is None or right is None else left - right


def listed(interval: tuple[float, float] | None) -> list[float] | None:
    """An interval as JSON has it."""
    return None if interval is None else list(interval)
