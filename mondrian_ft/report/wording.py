"""Numbers and names as people read them, the same on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.stats import SMALLEST_SAMPLE

NONE = "–"
GLUE = "\u00a0"
"""A space that never breaks a line."""
LABELS = {
    "base": "Base",
    "tuned": "Tuned",
    "mean_score": "Constant guess",
    "prompt_example": "Prompt’s example",
    "base_examples": "Few-shot base",
}
GUESSES = {
    "mean_score": "the training answers’ mean scores",
    "prompt_example": "the scores of the example in the prompt",
}
"""What the trivial arms say of every photograph."""
OWN_EXAMPLE = "the scores of the service’s own example"
"""Where the prompts hold no filled example."""
CONSTRAINED = "_constrained"
BLOCKS = {"base_model": "base", "fine_tuned_model": "tuned"}
"""The workbook's names in ``sample_results``; any other arm stands under its own name."""

CRITERIA = {
    "base_format": "Base answers in the exact format",
    "tuned_format": "Tuned answers in the exact format",
    "error_below_base": "Score error below the base’s",
    "error_below_mean": "Score error below a constant guess’s",
    "shuffled_error": "Score error with another photograph",
    "time": "Seconds per photograph",
}


def label(arm: str) -> str:
    """An arm's name with a capital: ``tuned_v3`` is ``Tuned v3``."""
    if arm.endswith(CONSTRAINED):
        return f"Constrained {label(arm.removesuffix(CONSTRAINED)).lower()}"
    return LABELS.get(arm) or arm.replace("_", " ").capitalize()


def guess(name: str, arm: Mapping[str, Any]) -> str:
    """What a trivial arm says of every photograph; of any other arm nothing."""
    if name == "prompt_example" and arm.get("n_prompts_with_example") == 0:
        return OWN_EXAMPLE
    return GUESSES.get(name, "")


def speaks(arm: Mapping[str, Any]) -> bool:
    """Whether an entry of ``evidence.arms`` is a model's; trivial arms give scores and no text."""
    return "n_readable" in arm


def possessive(name: str) -> str:
    """``Ansel`` is ``Ansel’s``, ``the advisors`` is ``the advisors’``."""
    return f"{name}’" if name.endswith("s") else f"{name}’s"


def points(value: float | None, *, signed: bool = False) -> str:
    """A score or a score error with two decimals, with a true minus sign."""
    if value is None:
        return NONE
    value = round(value, 2) + 0.0  # Adding zero makes -0.0 plain 0.
    return f"{value:{'+' if signed and value else ''}.2f}".replace("-", "−")


def score(value: float | None) -> str:
    """A score with a decimal where it has one: ``8``, ``7.4``."""
    return NONE if value is None else f"{round(value, 1):g}"


def gap(value: float | None, reference: float | None) -> str:
    """How far a score is from the reference's: ``+2``, ``−0.5``, ``0``, or nothing to say."""
    if value is None or reference is None:
        return ""
    off = round(value - reference, 1)
    return f"{off:+g}".replace("-", "−") if off else "0"


def percent(value: float | None) -> str:
    """A share of 0-1 as a whole percentage, never rounded up to 100 nor down to 0."""
    if value is None:
        return NONE
    whole = round(100 * value)
    if whole == 100 and value < 1:
        whole = 99
    if whole == 0 and value > 0:
        whole = 1
    return f"{whole}{GLUE}%"


def interval(values: Sequence[float] | None, *, share: bool = False) -> str:
    """``0.52 to 0.90``, ``82 to 100 %``; nothing for an interval that is not known."""
    if not values:
        return ""
    low, high = values
    if share:
        return f"{100 * low:.0f} to {100 * high:.0f}{GLUE}%"
    return f"{points(low)} to {points(high)}"


def seconds(value: float | None) -> str:
    """Seconds with the digits that matter: ``0.084``, ``2.1``, ``41``."""
    if value is None:
        return NONE
    if value >= 0.095:
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return f"{value:.2g}"


def duration(value: float | None) -> str:
    """A run's length: ``38 s``, ``2 min 21 s``, ``6 h 05 min``."""
    if value is None:
        return NONE
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 photograph``, ``18 photographs``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}".replace(",", "\u202f")


def advisor_name(report: Mapping[str, Any]) -> str:
    """Whose judgement the references are: ``Ansel``, or ``the advisors`` where they are several."""
    names = {sample.get("advisor") for sample in report["sample_results"]} - {None, ""}
    return str(names.pop()).capitalize() if len(names) == 1 else "the advisors"


def headline(report: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict in a few words, and the sentence with its numbers: n, interval, effect size.

    Says only what both arms' readable answers show; ``lede`` has the format and the guesses.
    """
    evidence = report["evidence"]
    arms, advisor = evidence["arms"], advisor_name(report)
    base, tuned = arms.get("base"), arms.get("tuned")
    n = count(evidence["n_photographs"], "photograph")
    if not (base and tuned):
        spoken = {name: arm["score_mae"] for name, arm in arms.items() if speaks(arm)}
        known = [
            f"{label(name).lower()} by {points(error)}"
            for name, error in spoken.items()
            if error is not None
        ]
        only = next(iter(spoken))
        short = f"{label(only)}, measured alone."
        if len(spoken) > 1:
            missing = [label(name).lower() for name in ("base", "tuned") if name not in arms]
            short = f"No verdict without {listing(missing)}."
        if not known:
            said = f"None of its scores on {n} could be compared with {possessive(advisor)}."
        elif len(spoken) == 1:
            said = (
                f"On {n} its scores miss {possessive(advisor)} by {points(spoken[only])} points "
                "on average."
            )
        else:
            named = possessive(advisor)
            said = f"On {n}, the scores miss {named} on average: {listing(known)} points."
        return short, said
    short = {
        "better": "Fine-tuning helped.",
        "no_worse": "Fine-tuning did no harm, and no proven good.",
        "worse": "Fine-tuning made it worse.",
        "inconclusive": "Not enough to tell.",
    }[evidence["verdict"]]
    if capping(evidence):
        short = "Not better, whatever the scores say."
    elif (
        evidence["verdict"] == "no_worse"
        and evidence["n_references_with_scores"]
        and base["score_mae"] is tuned["score_mae"] is None
    ):
        # Two arms whose answers are all unreadable differ in nothing, which proves nothing.
        short = "Nothing to compare."
    if tuned["score_mae"] is not None and base["score_mae"] is not None:
        said = (
            f"On {n} it was not trained on, the tuned model’s scores miss {possessive(advisor)} by "
            f"{points(tuned['score_mae'])} points on average and the base model’s by "
            f"{points(base['score_mae'])}"
        )
        said += f": {told}." if (told := difference(evidence)) else "."
    elif not evidence["n_references_with_scores"]:
        said = (
            f"The references on {n} hold no scores, so only the format of the answers can be "
            "compared."
        )
    else:
        which = [
            word for word, arm in (("tuned", tuned), ("base", base)) if arm["score_mae"] is None
        ]
        said = f"On {n}, the {' and the '.join(which)} model gave no scores that could be read."
    return short, said


def format_change(evidence: Mapping[str, Any]) -> str:
    """A sentence where the format, and not the scores, is what keeps the verdict down."""
    change = evidence.get("change") or {}
    form, score = change.get("format") or {}, change.get("score") or {}
    mean = form.get("mean")
    if not mean or mean > 0 or form.get("state") not in ("inconclusive", "worse"):
        return ""
    if score.get("state") not in ("better", "no_worse"):
        return ""
    lost = f"{100 * -mean:.1f}".removesuffix(".0")
    allowed = f"{100 * form['margin']:.1f}".removesuffix(".0")
    return (
        f" But the share of answers in the exact format fell by {lost} points, and no more than "
        f"{allowed} may be lost (eval.margin_format)."
    )


def difference(evidence: Mapping[str, Any]) -> str:
    """``1.28 less (95 % interval …)``: the paired change of the score error; blank if unknown."""
    change = (evidence.get("change") or {}).get("score") or {}
    mean, ends = change.get("mean"), change.get("interval")
    if mean is None:
        return ""
    said = f"{points(abs(mean))} {'more' if mean < 0 else 'less'}"
    if change["n"] != evidence["n_photographs"]:
        said += f", on the {change['n']} that both scored"
    told = []
    if ends and ends[0] != ends[1]:
        span = f"95{GLUE}% interval "
        if ends[0] * ends[1] < 0:
            low, high = points(ends[0], signed=True), points(ends[1], signed=True)
            told.append(f"{span}of the gain {low} to {high}, which includes none")
        else:
            low, high = sorted(abs(end) for end in ends)
            told.append(f"{span}{points(low)} to {points(high)}")
    size, effect = change.get("effect_size"), change.get("minimum_detectable_effect")
    if size is not None:
        told.append(f"effect size {f'{size:.1f}'.replace('-', '−')}")
    if change.get("p_value") is not None:
        # The verdict asks both tests, so the larger p is the one to read.
        p = max(change["p_value"], change.get("studentized_p") or 0.0)
        told.append(f"p{GLUE}<{GLUE}0.001" if p < 0.001 else f"p{GLUE}={GLUE}{p:.2g}")
    if effect is not None:
        told.append(f"minimum detectable effect {points(effect)}")
    return f"{said} ({'; '.join(told)})" if told else said


def detectable(evidence: Mapping[str, Any]) -> str:
    """What difference of the score error would be found; blank where it cannot be told."""
    found = (evidence.get("change") or {}).get("score") or {}
    effect = found.get("minimum_detectable_effect")
    if effect is None:
        return ""
    return (
        f"With {count(found['n'], 'photograph')} and this much scatter, a true "
        f"difference of {points(effect)} points in the score error is found in four evaluations "
        "of five; a smaller one may well be missed."
    )


def other_verdicts(evidence: Mapping[str, Any]) -> list[str]:
    """How the tuned model stands to other arms than the base, a sentence each."""
    said = []
    for arm, found in (evidence.get("against") or {}).items():
        told = found["reason"]
        said.append(f"Against {label(arm).lower()}: {told[:1].lower()}{told[1:]}")
    return said


def failed(evidence: Mapping[str, Any]) -> list[str]:
    """The arms that could not answer, each with its reason, as sentences."""
    return [
        f"{label(arm)} could not be evaluated: {reason.rstrip('.')}."
        for arm, reason in (evidence.get("arms_failed") or {}).items()
    ]


def constraint(evidence: Mapping[str, Any]) -> list[str]:
    """What answering under the schema changed and cost, a sentence for each arm that did."""
    said = []
    for arm, found in (evidence.get("constraint") or {}).items():
        change, ratio = found["score_error_change"], found["seconds_ratio"]
        told = [f"{found['changed']} of {found['n']} answers differ"]
        if change["mean"] is not None:
            ends = " to ".join(points(end, signed=True) for end in change["interval"] or ())
            moved = f"the score error changes by {points(change['mean'], signed=True)}"
            told.append(f"{moved} ({ends})" if ends else moved)
        if ratio is not None:
            told.append(f"a token takes {percent(ratio)} of the time")
        said.append(f"{label(arm.removesuffix(CONSTRAINED))}, held to the schema: {listing(told)}.")
    return said


def unsettled(change: Mapping[str, Any], *, scored: bool = True) -> str:
    """Why a comparison is inconclusive, from ``evidence.change``.

    ``scored`` says whether any reference has scores.
    """
    score_change, form = change["score"], change["format"]
    if not scored:
        return "The format alone can show that a model got worse, but not that it judges better."
    if score_change["n"] < SMALLEST_SAMPLE:
        both = count(score_change["n"], "photograph")
        return (
            f"Both models gave scores for {both}; fewer than {SMALLEST_SAMPLE} cannot settle it, "
            "however large the difference."
        )
    if score_change["state"] == "inconclusive":
        return "The scores vary too much from photograph to photograph to settle it."
    lost = f"{abs(100 * (form['mean'] or 0)):.0f}"
    return (
        f"The scores alone would settle it, but the exact format is kept {lost} points less often."
    )


def capping(evidence: Mapping[str, Any]) -> list[str]:
    """Sentences of the detections that lowered a ``better``; none where nothing did."""
    names = evidence.get("capped_by") or ()
    return [d["sentence"] for d in evidence.get("detections", ()) if d["name"] in names]


def lede(report: Mapping[str, Any]) -> list[str]:
    """The sentences under the headline: what limits it, the guesses, and the format."""
    evidence = report["evidence"]
    arms, said = evidence["arms"], []
    change = evidence.get("change")
    against = capping(evidence)
    if against:
        said += ["The numbers alone would say better, but it does not count as that:", *against]
    elif change and evidence["verdict"] == "inconclusive":
        said.append(unsettled(change, scored=bool(evidence["n_references_with_scores"])))
    guesses = [
        (guess(name, arms[name]), points(arms[name]["score_mae"]))
        for name in GUESSES
        if name in arms and arms[name]["score_mae"] is not None
    ]
    if guesses:
        (first, miss), *others = guesses
        rest = "".join(f", {words} by {miss}" for words, miss in others)
        said.append(f"Giving every photograph {first} would miss by {miss}{rest}.")
    # Of many arms the two that the verdict is about; the table has them all.
    pair = {name: arms[name] for name in ("base", "tuned") if name in arms} or arms
    spoken = [(label(name).lower(), arm) for name, arm in pair.items() if speaks(arm)]
    if any(0 < arm["n_scored"] < arm["n"] for _, arm in spoken):
        rest = [f"{arm['n_scored']} of {arm['n']} {name} answers" for name, arm in spoken[::-1]]
        said.append(f"Scores could be compared in {listing(rest)}.")
    formats = [
        f"{round(arm['format_strict'] * arm['n'])} of {arm['n']} {label(name).lower()} answers"
        for name, arm in pair.items()
        if arm["format_strict"] is not None
    ]
    said.append(f"The exact format is kept by {listing(formats[::-1])}.")
    return said


def listing(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def criterion(mark: Mapping[str, Any], *, short: bool = False) -> tuple[str, str, str]:
    """A closing mark in words: what is asked, what was found, what it should be.

    ``short`` leaves out how the target came about.
    """
    name, value, target = str(mark["name"]), mark["value"], mark["target"]
    asked = CRITERIA.get(name, name)
    if name.endswith("format"):
        return asked, percent(value), f"{percent(target)} or more"
    if name == "time":
        most = f"at most {seconds(target)}"
        why = f"on average {most}, the base’s and 10{GLUE}%"
        return asked, seconds(value), most if short else why
    if name == "shuffled_error":
        why = "" if short else ", a quarter above its own"
        return asked, points(value), f"{points(target)} or more{why}"
    return asked, points(value), f"below {points(target)}"
