"""What a person reads in the terminal: what was linked, what came of it, what to type next.

Plain ASCII and words rather than signs, so that a dumb terminal, a log file and a screen reader get
the same as a colour terminal; nothing is told by colour alone. Paths and commands are printed on
one line however long they are, so that they can be copied.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import wording

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

REASONS = {
    "no_job_id": "no job id",
    "other_advisor": "by another advisor",
    "advisor_unclear": "advisor not one known id",
    "not_finished": "job not finished",
    "duplicate_id": "linked from another row",
    "over_limit": "beyond data.limit",
    "no_filename": "names no photograph",
    "unsafe_filename": "photograph outside source_dir",
    "photograph_missing": "photograph missing",
    "photograph_ambiguous": "photograph not certain",
    "photograph_unreadable": "photograph cannot be opened",
    "photograph_too_small": "photograph too small",
    "no_analysis": "no analysis",
    "analysis_missing": "analysis file missing",
    "analysis_unreadable": "analysis cannot be read",
    "analysis_too_long": "analysis too long",
    "analysis_failed": "analysis is an error",
    "needs_mending": "would need mending",
    "incomplete": "analysis incomplete",
    "no_json": "analysis of no known shape",
    "broken_json": "analysis with broken JSON",
    "two_json_blocks": "two different JSON blocks",
    "wrong_shape": "JSON key missing or wrong",
    "empty_text": "a text is blank",
    "score_not_a_number": "a score is no number",
    "score_out_of_range": "a score is outside 0 to 10",
}
"""What each reason of the link report means; one that is not here is shown as it is."""

_PLAIN = str.maketrans({"’": "'", "–": "-", "−": "-", "\u00a0": " ", "\u202f": " ", "…": "..."})


def plain(text: str) -> str:
    """Typographic signs of ours as ASCII; other people's words keep their letters."""
    return text.translate(_PLAIN)


def link_table(report: Mapping[str, Any], *, width: int = 80, encoding: str = "utf-8") -> Table:
    """The reasons of a ``link_report.json`` with their counts, most frequent first.

    The last column shows the first such row, its job id and what was wrong with it, cut to what is
    left of ``width`` characters; where that is little it is left out.
    """
    from rich.table import Table
    from rich.text import Text

    first: dict[str, Mapping[str, Any]] = {}
    for row in report["left_out"]:
        first.setdefault(row["reason"], row)
    counts = Counter(row["reason"] for row in report["left_out"]).most_common()
    words = {reason: REASONS.get(reason, reason.replace("_", " ")) for reason in first}
    room = width - max(map(len, words.values()), default=0) - 12
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("left out because", no_wrap=room >= 16)
    if room >= 16:
        table.add_column("for example", style="dim", no_wrap=True)
    for reason, number in counts:
        row = first[reason]
        example = f"{_short(str(row.get('job_id') or 'no id'))}: {row.get('detail', '')}"
        # Cut by letters, not by words: what matters may be one long path.
        example = example if len(example) <= room else f"{example[: room - 3].rstrip()}..."
        cells = [str(number), words[reason], *([example] if room >= 16 else [])]
        # A name that the terminal cannot show must not end the run that prints it.
        table.add_row(*(Text(c.encode(encoding, "replace").decode(encoding)) for c in cells))
    return table


def show_link(console: Console, report: Mapping[str, Any], manifest: Path | None = None) -> None:
    """Print how many rows were linked, the table of those left out, and the manifest's path."""
    linked, rows = report["linked"], report["rows"]
    mended = len(report.get("mended") or ())
    told = f", {mended} of them mended" if mended else ""
    console.print(plain(f"[bold]Linked {linked} of {wording.count(rows, 'row')}[/bold]{told}."))
    if told := accepted(report):
        console.print(told, markup=False)
    if report["left_out"]:
        console.print(link_table(report, width=console.width, encoding=console.encoding))
    if manifest is not None:
        console.print(f"Manifest: {near(manifest)}", soft_wrap=True, markup=False)


def accepted(report: Mapping[str, Any]) -> str:
    """What ``data.accept`` let pass or kept out, in a sentence; blank if it made no difference."""
    accept = report.get("accept")
    partial = len(report.get("incomplete") or ())
    kept_out = (report.get("reasons") or {}).get("needs_mending", 0)
    if accept == "strict" and kept_out:
        verb = "needs" if kept_out == 1 else "need"
        return f"data.accept=strict left out {wording.count(kept_out, 'row')} that {verb} mending."
    if accept == "all" and partial:
        verb = "lacks" if partial == 1 else "lack"
        return f"data.accept=all linked {wording.count(partial, 'row')} that {verb} a text."
    if accept in ("mended", "all") and report.get("mended"):
        return f"data.accept={accept} keeps mended rows; the manifest says what was mended."
    return ""


def metrics_table(report: Mapping[str, Any]) -> Table:
    """Measures of every arm of a ``comparison_report.json``, a row an arm, trivial arms last.

    Rows rather than columns, so that however many arms there are it fits 80 characters.
    """
    from rich.table import Table

    arms = report["evidence"]["arms"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)

    def column(heading: str, cells: list[str]) -> None:
        table.add_column(heading, justify="right", no_wrap=True)
        columns.append([plain(cell) for cell in cells])

    order = sorted(arms, key=lambda name: not wording.speaks(arms[name]))
    shown = [arms[name] for name in order]
    columns: list[list[str]] = []

    def told(key: str, how: Callable[[Any], str]) -> list[str]:
        return [how(arm.get(key)) for arm in shown]

    column("exact\nformat", told("format_strict", wording.percent))
    if any(arm.get("n_readable", arm["n"]) < arm["n"] for arm in shown):
        column("read-\nable", told("readable", wording.percent))
    column("score\nerror", told("score_mae", wording.points))
    column("95 %\ninterval", told("score_mae_interval", wording.interval))
    column("overall\nerror", told("overall_mae", wording.points))
    column("seconds\neach", told("seconds_mean", wording.seconds))
    for name, *cells in zip(order, *columns, strict=True):
        table.add_row(_heading(name), *cells, style="bold" if name == "tuned" else "")
    return table


def marks_table(report: Mapping[str, Any]) -> Table:
    """What was hoped for of the report's numbers: met or missed, the number, the target."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for mark in report["evidence"].get("criteria", []):
        asked, found, target = map(plain, wording.criterion(mark, short=True))
        style, word = ("green", "met") if mark["met"] else ("yellow", "missed")
        table.add_row(f"[{style}]{word}:[/{style}]", asked, found, target)
    return table


def show_closing(
    console: Console,
    report: Mapping[str, Any],
    *,
    adapter: Path | None = None,
    page: Path | None = None,
    labels: str | None = None,
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Print the verdict, the arms' measures, where adapter and page are, and what to type next.

    ``labels`` says in a sentence what the labels are worth. ``commands`` are (what it does,
    command) pairs, each printed on a line of its own.
    """
    evidence = report["evidence"]
    verdict, sentence = wording.headline(report)
    console.print()
    console.print(plain(verdict), style="bold", markup=False)
    console.print(plain(sentence + wording.format_change(evidence)), markup=False)
    for told in wording.capping(evidence):
        console.print(plain(f"It does not count as better: {told}"), markup=False)
    for told in [*wording.failed(evidence), *wording.other_verdicts(evidence)]:
        console.print(plain(told), markup=False)
    console.print()
    console.print(metrics_table(report))
    n = evidence["n_photographs"]
    console.print(
        f"On {plain(wording.count(n, 'photograph'))}. Score error: mean distance from the "
        "reference's scores, in points of 10.",
        style="dim",
        markup=False,
    )
    for told in wording.constraint(evidence):
        console.print(plain(told), markup=False)
    if evidence.get("criteria"):
        console.print()
        console.print(marks_table(report))
    if labels is not None:
        console.print(plain(labels), markup=False)
    console.print()
    for name, path in (("adapter", adapter), ("report", page)):
        if path is not None:
            console.print(f"{name:<8} {near(path)}", soft_wrap=True, markup=False)
    if commands:
        console.print("\nNext", style="bold")
    for what, command in commands:
        console.print(f"  # {what}\n  {command}", soft_wrap=True, markup=False)


def versions_table(versions: Sequence[Mapping[str, Any]]) -> Table:
    """The registry's versions, oldest first: hash, trained when and on what, measures, channels."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    headings = ("version", "hash", "trained", "on", "verdict", "format", "score\nerror", "channels")
    for heading in headings:
        table.add_column(heading, no_wrap=heading not in ("on", "channels"))
    for version in versions:
        metrics = version.get("metrics") or {}
        table.add_row(
            version["version"],
            version["hash"][:8],
            str(version.get("created") or "")[:16].replace("T", " "),
            plain(_trained_on(version.get("trained") or {})),
            str(metrics.get("verdict") or ""),
            plain(wording.percent(metrics.get("format_strict"))),
            plain(wording.points(metrics.get("score_mae"))),
            ", ".join(version["channels"]),
        )
    return table


def checks_table(checks: Sequence[tuple[str, str, str, bool]]) -> Table:
    """Checks as (name, expected, found, holds), in their order."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("check", "expected", "found", "verdict"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "verdict")
    for name, expected, found, holds in checks:
        verdict = Text("ok") if holds else Text("FAILED", style="bold")
        table.add_row(*(Text(plain(cell)) for cell in (name, expected, found)), verdict)
    return table


def _trained_on(about: Mapping[str, Any]) -> str:
    """Rows, advisor, the lock's first digits and the base, as far as they are known."""
    rows = about.get("rows")
    parts = [
        f"{rows} rows" if rows is not None else "",
        str(about.get("advisor") or ""),
        f"lock {str(about['data_lock'])[:8]}" if about.get("data_lock") else "",
        Path(str(about.get("base") or "")).name,
    ]
    return ", ".join(part for part in parts if part)


@contextmanager
def counting(console: Console, words: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far a long count is, as a bar in a terminal and as nothing in a file or pipe.

    Yields:
        What is told ``(done, total)``; the bar appears with the first call.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True) as bar:
        task = None

        def tell(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(words, total=total)
            bar.update(task, completed=done, total=total)

        yield tell


def near(path: Path | str) -> str:
    """A path as one would type it here: relative if below this folder, quoted if need be."""
    here = Path.cwd()
    path = here / path
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _heading(arm: str) -> str:
    return {"mean_score": "constant guess"}.get(arm, arm.replace("_", " "))


def _short(job: str, length: int = 8) -> str:
    return job if len(job) <= length + 4 else f"{job[:length]}..."
