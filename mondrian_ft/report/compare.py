"""``compare.html``: runs side by side, as one self-contained page.

What differs between them, what each gave with its interval, their curves over one another, and, for
a sweep, what its settings did. It wears the report's clothes: no network, no script, light and
dark, phone and paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from . import compare_plots, experiment, page, plots, wording
from .compare_plots import Axis, Curve
from .experiment import GatheredRun

COLOURED = 8
"""Runs that have a colour of their own, the best ones; the others are grey."""
AXES = 6
"""Settings that are drawn side by side; of more, those that matter most."""
ENOUGH = 4
"""Runs with a result from which a sweep's settings are weighed."""


@dataclass(frozen=True)
class Entry:
    """A run as the page shows it.

    Attributes:
        number: its place, from 1; the runs without a result come last.
        facts: its figures, `experiment.record`.
        config: the keys that may change a number, dotted.
        result: what it is ranked by; None without one.
        log: the lines of its training_log.jsonl.
    """

    number: int
    name: str
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    result: float | None
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def css(self) -> str:
        """The class of its colour."""
        return f"r{self.number}" if self.number <= COLOURED and self.result is not None else "rx"


@dataclass(frozen=True)
class Measure:
    """What the runs are ranked by; lower is better."""

    key: str
    name: str
    unit: str


YARDSTICKS = {"score_mae_base": "the base model’s", "score_mae_mean": "a constant guess’s"}
"""Errors that a run's own stands beside; a sentence where they are the same in all runs."""
ERROR = Measure("score_mae_tuned", "score error", "points of 10")
LOSS = Measure("val_loss", "held-out loss", "nats a token")


def write(
    name: str, runs: Sequence[GatheredRun], out: Path, *, left_out: Sequence[str] = ()
) -> Path:
    """Write the page of ``runs`` to ``out`` and return its path.

    Args:
        name: the experiment's.
        left_out: a sentence each about runs that are not in it.

    Raises:
        DataError: a training log holds a line that is not a JSON object.
        MondrianError: ``out`` cannot be written.
    """
    atomic_write_text(out, render(name, runs, left_out=left_out))
    return out


def render(name: str, runs: Sequence[GatheredRun], *, left_out: Sequence[str] = ()) -> str:
    """The page as text. All that a run's files say is escaped."""
    from markupsafe import Markup

    environment = page.environment()
    environment.filters |= {"points": wording.points, "duration": wording.duration}
    measure = measured(runs)
    entries = ranked(runs, measure)
    swept = experiment.differing(runs)
    weights = importance(entries, swept)

    def drawn(draw: Any, *args: Any) -> list[tuple[str, Markup]]:
        sizes = (("wide", 1040, 320), ("narrow", 343, 250))
        made = [(css, draw(*args, width=w, height=h)) for css, w, h in sizes]
        return [(css, Markup(svg)) for css, svg in made if svg]

    held, train = curves(entries, "eval", "val_loss"), curves(entries, "step", "loss")
    return environment.get_template("compare.html.j2").render(
        style=page.source(environment, "report.css", "compare.css"),
        name=name,
        date=date.today().isoformat(),
        title=title(entries),
        sentence=sentence(entries, swept, measure),
        cautions=[plain(s) for s in experiment.cautions([entry.facts for entry in entries])],
        table=table(entries, swept),
        errors=error_rows(entries, swept),
        photographs=photographs(entries),
        yardsticks=yardsticks(entries),
        held=drawn(compare_plots.curves, held, "held-out loss, nats a token"),
        train=drawn(compare_plots.curves, train, "training loss, smoothed"),
        parallel=drawn(
            lambda **size: compare_plots.parallel(
                *axes(entries, swept, weights, measure, most=3 if size["width"] < 500 else AXES),
                **size,
            )
        )
        if swept and len([e for e in entries if e.result is not None]) > 1
        else [],
        measure=measure,
        weights=[(key, share, f"{100 * share:.0f} %") for key, share in weights.items()],
        unfinished=[(entry, state(entry)) for entry in entries if entry.result is None],
        left_out=left_out,
        commands=list(dict.fromkeys(entry.facts["command"] for entry in entries)),
        coloured=COLOURED,
        none_sign=wording.NONE,
    )


def measured(runs: Sequence[GatheredRun]) -> Measure:
    """The score error where any run was evaluated, else the held-out loss."""
    facts = [experiment.record(run) for run in runs]
    return ERROR if any(one[ERROR.key] is not None for one in facts) else LOSS


def ranked(runs: Sequence[GatheredRun], measure: Measure) -> list[Entry]:
    """The runs from best to worst, then those without a result, in the order given."""
    told = [(experiment.record(run), run) for run in runs]
    told.sort(key=lambda one: (one[0][measure.key] is None, *experiment.rank(one[0])))
    return [
        Entry(number, run.name, facts, run.config, facts[measure.key], run.log)
        for number, (facts, run) in enumerate(told, start=1)
    ]


def title(entries: Sequence[Entry]) -> str:
    """How many runs there are, and how many of them gave a result."""
    known = sum(entry.result is not None for entry in entries)
    said = f"{wording.count(len(entries), 'run')} compared"
    return said if known == len(entries) else f"{said}, {known or 'none'} with a result"


def sentence(entries: Sequence[Entry], swept: Sequence[str], measure: Measure) -> str:
    """The best run, and whether the next one can be told from it."""
    known = [entry for entry in entries if entry.result is not None]
    if not known:
        return "No run has a result yet: none was evaluated, and none has a held-out loss."
    best = known[0]
    said = f"{called(best, swept)} has the lowest {measure.name}: {figure(best, measure)}"
    verdict = best.facts["verdict"]
    # The lowest error of all is no reason to serve an adapter that its own evaluation refused.
    note = (
        f" Run {best.number}’s own verdict against the base is “{verdict.replace('_', ' ')}”; its "
        "report says why."
        if verdict not in (None, "better")
        else ""
    )
    if len(known) == 1:
        return f"{said}. It is the only one with a result.{note}"
    second = known[1]
    said += f"; next is {called(second, swept)} with {figure(second, measure)}."
    if measure is LOSS:
        return said + note
    ends = [entry.facts["score_mae_tuned_interval"] for entry in (best, second)]
    if None in ends:
        return said + note
    if ends[0][1] >= ends[1][0]:
        return (
            f"{said} Their intervals overlap, so these figures alone do not tell them apart.{note}"
        )
    return f"{said} Their intervals do not overlap.{note}"


def figure(entry: Entry, measure: Measure) -> str:
    """A run's result with its interval."""
    if measure is LOSS or entry.result is None:
        return "–" if entry.result is None else f"{entry.result:.3f}"
    ends = wording.interval(entry.facts["score_mae_tuned_interval"])
    return wording.points(entry.result) + (f" (95{wording.GLUE}% {ends})" if ends else "")


def called(entry: Entry, swept: Sequence[str]) -> str:
    """What sets a run apart, by the keys that differ; else its name."""
    told = [f"{key}={experiment.value(entry.config.get(key))}" for key in swept[:3]]
    return f"Run {entry.number} ({', '.join(told) or entry.name})"


def labelled(entry: Entry, swept: Sequence[str]) -> str:
    """A run beside its bar: what sets it apart, in short.

    Not its name: a sweep's jobs have one that differs in its last character.
    """
    short = [key.rpartition(".")[2] for key in swept]
    told = [
        f"{key if short.count(last) > 1 else last} {experiment.value(entry.config.get(key))}"
        for key, last in zip(swept[:3], short, strict=False)
    ]
    return ", ".join(told) or entry.name


def state(entry: Entry) -> str:
    """Why a run has no result, as a sentence."""
    facts = entry.facts
    updates = [line["step"] for line in entry.log if line.get("kind") == "step"]
    reached = f" Its log ends at update {updates[-1]}." if updates else ""
    error = str(facts.get("error") or "").strip()
    if facts["status"] == "failed":
        return f"Failed: {error or 'no reason was kept'}{_stop(error)}{reached}"
    if facts["status"] == "interrupted":
        return f"Interrupted: {error or 'Ctrl-C or SIGTERM'}{_stop(error)}{reached}"
    if facts["status"] == "running":
        return (
            f"Not finished: it is still running, or was killed; run.json says since when.{reached}"
        )
    if facts["task"] in ("experiment", "train", "evaluate"):
        return f"Done, with neither an evaluation nor held-out rows.{reached}"
    return f"Done; task={facts['task']} gives nothing to compare."


def _stop(text: str) -> str:
    return "" if text.endswith((".", "!", "?")) else "."


def table(entries: Sequence[Entry], swept: Sequence[str]) -> dict[str, Any]:
    """Heads and rows of the runs' table; a column that would be empty everywhere is left out."""
    columns: list[tuple[str, Any]] = [
        *((key, lambda e, key=key: (experiment.value(e.config.get(key)), "")) for key in swept),
        (
            "Score error",
            lambda e: (
                wording.points(e.facts["score_mae_tuned"]),
                wording.interval(e.facts["score_mae_tuned_interval"]),
            ),
        ),
        *(
            (
                f"{name.partition(' ')[2].capitalize()} error",
                lambda e, key=key: (wording.points(e.facts[key]), ""),
            )
            for key, name in YARDSTICKS.items()
            if shared(entries, key) is None
        ),
        ("Exact format", lambda e: (wording.percent(e.facts["format_strict_tuned"]), "")),
        (
            "Held-out loss",
            lambda e: (
                wording.NONE if e.facts["val_loss"] is None else f"{e.facts['val_loss']:.3f}",
                "",
            ),
        ),
        ("Verdict", lambda e: ((e.facts["verdict"] or wording.NONE).replace("_", " "), "")),
        ("Took", lambda e: (wording.duration(e.facts["seconds"]) or wording.NONE, "")),
        ("Version", lambda e: (e.facts["version"] or wording.NONE, "")),
    ]
    cells = [(head, [cell(entry) for entry in entries]) for head, cell in columns]
    kept = [
        (head, found)
        for head, found in cells
        if head in swept or any(value != wording.NONE for value, _ in found)
    ]
    return {
        "heads": [head for head, _ in kept],
        "keys": len(swept),
        "rows": [
            (entry, [(head, *found[index]) for head, found in kept])
            for index, entry in enumerate(entries)
        ],
    }


def photographs(entries: Sequence[Entry]) -> str:
    """Over how many photographs the errors are, in words; no number where the runs differ."""
    told = {e.facts["photographs"] for e in entries if e.facts["score_mae_tuned"] is not None}
    number = told.pop() if len(told) == 1 else None
    return wording.count(number, "photograph") if number else "photographs"


def shared(entries: Sequence[Entry], key: str) -> float | None:
    """A figure that is the same in all runs that were evaluated; None where it is not."""
    told = {e.facts[key] for e in entries if e.facts[ERROR.key] is not None}
    return told.pop() if len(told) == 1 else None


def yardsticks(entries: Sequence[Entry]) -> str:
    """The errors of `YARDSTICKS` that are the same in all runs, as a sentence; empty without."""
    told = [
        f"{name} is {wording.points(value)}"
        for key, name in YARDSTICKS.items()
        if (value := shared(entries, key)) is not None
    ]
    return f"On the same photographs {wording.listing(told)}." if told else ""


def error_rows(entries: Sequence[Entry], swept: Sequence[str]) -> dict[str, Any] | None:
    """Each run's score error and interval, in percent of the axis; None with fewer than two."""
    known = [entry for entry in entries if entry.facts["score_mae_tuned"] is not None]
    if len(known) < 2:
        return None
    ends = [entry.facts["score_mae_tuned_interval"] or (0, 0) for entry in known]
    # Where every run has the same base and the same rows, its error is one line through all.
    base = shared(entries, "score_mae_base")
    top = max([entry.facts["score_mae_tuned"] for entry in known] + [end[1] for end in ends])
    marks = plots.ticks(0, 1.02 * max(top, base or 0.0), about=5)
    high = marks[-1] or 1.0

    def across(value: float) -> float:
        return round(100 * value / high, 2)

    return {
        "ticks": [(across(mark), plots.number(mark)) for mark in marks],
        "base": None if base is None else (across(base), wording.points(base)),
        "rows": [
            {
                "entry": entry,
                "label": labelled(entry, swept),
                "at": across(entry.facts["score_mae_tuned"]),
                "span": (across(end[0]), across(end[1] - end[0])) if end[1] else None,
                "value": wording.points(entry.facts["score_mae_tuned"]),
            }
            for entry, end in zip(known, ends, strict=True)
        ],
    }


def curves(entries: Sequence[Entry], kind: str, key: str) -> list[Curve]:
    """One quantity of every run that has it, the best run last and so on top."""
    found = []
    for entry in reversed(entries):
        points = plots.series(entry.log, kind, key)
        if points:
            shown = points if kind == "eval" else plots.smooth(points)
            found.append(Curve(str(entry.number), entry.css, entry.name, shown))
    return found


def importance(entries: Sequence[Entry], swept: Sequence[str]) -> dict[str, float]:
    """The share of the results' variance that each setting alone explains, largest first.

    Between groups of equal values; where no value comes twice, along the rank of its numbers.
    Adjusted for the number of groups, since many of them explain anything. A setting that cannot
    be weighed is left out, and so is every one with fewer than `ENOUGH` results.
    """
    known = [entry for entry in entries if entry.result is not None]
    results = [entry.result for entry in known if entry.result is not None]
    if len(known) < ENOUGH:
        return {}
    mean = sum(results) / len(results)
    total = sum((result - mean) ** 2 for result in results)
    if total <= 0:
        return {}
    found: dict[str, float] = {}
    for key in swept:
        groups: dict[str, list[float]] = {}
        for entry, result in zip(known, results, strict=True):
            groups.setdefault(experiment.value(entry.config.get(key)), []).append(result)
        if len(groups) < 2:
            continue
        free = len(groups)
        if free < len(known):
            between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups.values())
            share = between / total
        else:
            values = [entry.config.get(key) for entry in known]
            if not all(isinstance(value, int | float) for value in values):
                continue
            from scipy.stats import spearmanr

            share, free = float(spearmanr(values, results)[0]) ** 2, 2  # pyright: ignore
        found[key] = max(0.0, 1 - (1 - share) * (len(known) - 1) / (len(known) - free))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def axes(
    entries: Sequence[Entry],
    swept: Sequence[str],
    weights: Mapping[str, float],
    measure: Measure,
    *,
    most: int,
) -> tuple[list[Axis], list[Curve]]:
    """The settings' axes and the result's, and each run's way through them, from 0 to 1 on each."""
    known = [entry for entry in entries if entry.result is not None]
    keys = [*weights, *(key for key in swept if key not in weights)]
    keys = [key for key in swept if key in keys[:most]]
    made = [Axis.of(key, [entry.config.get(key) for entry in known]) for key in keys]
    made.append(Axis.of(measure.name, [entry.result for entry in known], exact=True))
    lines = []
    for entry in reversed(known):
        values = [*(entry.config.get(key) for key in keys), entry.result]
        points = [
            (float(i), axis.at(value))
            for i, (axis, value) in enumerate(zip(made, values, strict=True))
        ]
        lines.append(Curve(str(entry.number), entry.css, entry.name, points))
    return made, lines


def plain(markdown: str) -> str:
    """A sentence of the README without its marks."""
    return markdown.replace("**", "")
