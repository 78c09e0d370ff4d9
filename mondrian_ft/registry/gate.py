"""Whether a report is reason enough to let a version take a channel's place.

A pure function of a ``comparison_report.json`` and a few facts; whatever it decides, each rule
gives a sentence with its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

REFUSE, ALLOW = "refuse", "allow"
BASE_KEYS = ("weights", "quantization", "dtype")
"""What makes a base another one; its name may be a folder that was moved."""


@dataclass(frozen=True)
class Rules:
    """What passes.

    Attributes:
        inconclusive: ``allow`` or ``refuse`` where the score error cannot be told apart.
        no_worse: the same where it is no worse, within the evaluation's margin, and not better.
        latency: how much longer a token may take, as a share; refused where even the lower end of
            the interval is above it.
    """

    inconclusive: str = REFUSE
    no_worse: str = REFUSE
    latency: float = 0.10


@dataclass(frozen=True)
class Subject:
    """The version that wants in.

    Attributes:
        version, hash: which.
        base: its manifest's.
        data_lock: the rows it has to be judged on; None asks for none.
        lock_from: where that was read, for the sentence.
    """

    version: str
    hash: str
    base: Mapping[str, Any]
    data_lock: str | None
    lock_from: str


@dataclass(frozen=True)
class Occupant:
    """What a channel serves now."""

    version: str
    hash: str


@dataclass(frozen=True)
class Reason:
    """What one rule found."""

    rule: str
    passed: bool
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """Whether all rules passed, and what each of them found.

    ``fits`` says whether the report was about the right things at all: this adapter, these rows,
    this base and this comparison.
    """

    passed: bool
    fits: bool
    reasons: tuple[Reason, ...]

    @classmethod
    def of(cls, reasons: tuple[Reason, ...], *, fits: bool) -> Decision:
        """The decision these reasons make."""
        return cls(fits and all(reason.passed for reason in reasons), fits, reasons)

    @property
    def against(self) -> list[str]:
        """Sentences of the rules that did not pass."""
        return [reason.sentence for reason in self.reasons if not reason.passed]


def decide(
    report: Mapping[str, Any], rules: Rules, *, subject: Subject, occupant: Occupant | None
) -> Decision:
    """Hold a report against the rules.

    Args:
        report: a whole ``comparison_report.json``.
        rules: what passes.
        subject: the version in question.
        occupant: what it would replace; None compares it with its base.
    """
    evidence = report.get("evidence")
    evidence = evidence if isinstance(evidence, Mapping) else {}
    found = [_adapter(evidence, subject), _data(evidence, subject), _base(evidence, subject)]
    block, compared = _comparison(evidence, occupant)
    found.append(compared)
    if block is None or not all(reason.passed for reason in found):
        return Decision.of(tuple(found), fits=False)
    rival = "the base" if occupant is None else occupant.version
    rest: tuple[Callable[[], Reason], ...] = (
        lambda: _format(block, rival),
        lambda: _score(block, rules, rival),
        lambda: _latency(block, rules, rival),
        lambda: _detections(evidence),
    )
    return Decision.of((*found, *(rule() for rule in rest)), fits=True)


def _adapter(evidence: Mapping[str, Any], subject: Subject) -> Reason:
    stated = str(evidence.get("adapter_hash"))
    if stated == subject.hash:
        said = f"The evaluation is of this very adapter, {subject.hash[:12]}."
    else:
        said = (
            f"The evaluation is of the adapter {stated[:12]}, and {subject.version} is "
            f"{subject.hash[:12]}."
        )
    return Reason("adapter", stated == subject.hash, said)


def _data(evidence: Mapping[str, Any], subject: Subject) -> Reason:
    stated = evidence.get("data_lock")
    part = evidence.get("judged_part")
    rows = f"{part['rows']} of {part['of']} rows" if isinstance(part, Mapping) else "rows"
    if not isinstance(stated, str):
        return Reason("data", False, "The evaluation does not say which data lock its rows had.")
    if subject.data_lock is None:
        # Nothing names other rows, so these are the current ones.
        return Reason("data", True, f"It was made on {rows} of the data lock {stated[:12]}.")
    if stated == subject.data_lock:
        said = (
            f"It was made on {rows} of the current data lock, {stated[:12]} ({subject.lock_from})."
        )
        return Reason("data", True, said)
    said = (
        f"It was made on the data lock {stated[:12]}, and the current one is "
        f"{subject.data_lock[:12]} ({subject.lock_from})."
    )
    return Reason("data", False, said)


def _base(evidence: Mapping[str, Any], subject: Subject) -> Reason:
    stated = evidence.get("base")
    if not isinstance(stated, Mapping):
        return Reason("base", False, "The evaluation does not say which base answered.")
    other = [key for key in BASE_KEYS if stated.get(key) != subject.base.get(key)]
    if not other:
        name, weights = stated.get("name"), stated.get("weights")
        return Reason("base", True, f"It was made on the adapter's own base, {name} ({weights}).")
    told = ", ".join(f"{key} {stated.get(key)} and not {subject.base.get(key)}" for key in other)
    return Reason("base", False, f"It was made on another base than the adapter's: {told}.")


def _comparison(
    evidence: Mapping[str, Any], occupant: Occupant | None
) -> tuple[Mapping[str, Any] | None, Reason]:
    """The part of the evidence that compares with the occupant, or with the base."""
    if occupant is None:
        if "change" in evidence:
            said = "The channel is empty, so it is compared with its base."
            return evidence, Reason("against", True, said)
        said = "The evaluation has no base to compare with, as the empty channel asks for."
        return None, Reason("against", False, said)
    arms = evidence.get("arms") or {}
    for arm, block in (evidence.get("against") or {}).items():
        if (arms.get(arm) or {}).get("adapter_hash") == occupant.hash:
            said = f"It is compared with {occupant.version} ({occupant.hash[:12]})."
            return block, Reason("against", True, said)
    said = (
        f"There is no comparison with {occupant.version} ({occupant.hash[:12]}), which the channel "
        "serves now."
    )
    return None, Reason("against", False, said)


def _format(block: Mapping[str, Any], rival: str) -> Reason:
    change = block["change"]["format"]
    mean, state = 100 * (change["mean"] or 0.0), change["state"]
    moved = (
        "stays the same" if mean == 0 else f"{'rises' if mean > 0 else 'falls'} by {abs(mean):.1f}"
    )
    points = "" if mean == 0 else " points"
    said = (
        f"Exact format {moved}{points} against {rival} on {change['n']} photographs; "
        f"{100 * change['margin']:g} points may be lost ({state.replace('_', ' ')})."
    )
    return Reason("format", state in ("better", "no_worse"), said)


def _score(block: Mapping[str, Any], rules: Rules, rival: str) -> Reason:
    change = block["change"]["score"]
    state, said = change["state"], _moved(change, rival)
    if state == "better":
        return Reason("score", True, f"{said}; the interval excludes zero and the tests agree.")
    if state == "worse":
        return Reason("score", False, f"{said}: worse.")
    passed = (rules.inconclusive if state == "inconclusive" else rules.no_worse) == ALLOW
    what = "inconclusive" if state == "inconclusive" else "no worse, but not better"
    does = "allows" if passed else "refuses"
    return Reason("score", passed, f"{said}: {what}, which registry.gate.{state} {does}.")


def _moved(change: Mapping[str, Any], rival: str) -> str:
    if change["mean"] is None:
        return f"No photograph was scored by both it and {rival}"
    mean = change["mean"]
    said = (
        f"Score error {'falls' if mean >= 0 else 'rises'} by {abs(mean):.2f} points against {rival}"
    )
    if change["interval"]:
        ends = change["interval"] if mean >= 0 else [-end for end in reversed(change["interval"])]
        said += f" (95 % interval {ends[0]:.2f} to {ends[1]:.2f})"
    return f"{said} on {change['n']} photographs"


def _latency(block: Mapping[str, Any], rules: Rules, rival: str) -> Reason:
    found = block.get("latency")
    limit = f"{100 * rules.latency:g} %"
    if not isinstance(found, Mapping) or not found.get("interval"):
        n = found.get("n", 0) if isinstance(found, Mapping) else 0
        said = (
            f"Seconds per token were not measured beside {rival}'s on enough photographs ({n}), so "
            f"nothing says that a token takes {limit} more time."
        )
        return Reason("latency", True, said)
    low, high = ((end - 1) * 100 for end in found["interval"])
    more = 100 * (found["ratio"] - 1)
    said = (
        f"A token takes {abs(more):.0f} % {'more' if more >= 0 else 'less'} time than {rival}'s "
        f"(95 % interval {low:+.0f} to {high:+.0f} %) on {found['n']} photographs; refused above "
        f"{limit} at the lower end."
    )
    return Reason("latency", low / 100 <= rules.latency, said)


def _detections(evidence: Mapping[str, Any]) -> Reason:
    fired = [
        found
        for found in evidence.get("detections") or ()
        if found["fired"] and found["disqualifies"]
    ]
    if not fired:
        count = len(evidence.get("detections") or ())
        said = f"None of {count} detectors found a collapse or a copy."
        return Reason("detections", count > 0, said)
    told = " ".join(f"{found['name']}: {found['sentence']}" for found in fired)
    return Reason("detections", False, told)
