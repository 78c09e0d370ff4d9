"""The audit in the terminal: the verdict, a table of findings, what to do about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .screen import near, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..data.audit import Audit


def findings_table(found: Audit) -> Table:
    """A line a finding: how many rows, what, and the name that ``data.drop`` knows it by."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("finding")
    table.add_column("name", no_wrap=True)
    table.add_column("for example", style="dim", no_wrap=True, overflow="ellipsis")
    for finding in found.findings:
        example = finding.rows[0].encode("ascii", "replace").decode()
        table.add_row(
            str(len(finding.rows)),
            Text(plain(finding.title), style="bold" if finding.spoils else ""),
            finding.name if finding.droppable else f"({finding.name})",
            Text(plain(example)),
        )
    return table


def dimensions_table(found: Audit) -> Table:
    """Mean, spread and range of every dimension's scores."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scores of", no_wrap=True)
    for heading in ("rows", "mean", "variance", "from", "to"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fact in found.facts["dimensions"]:
        name = fact["name"].encode("ascii", "replace").decode()
        measured = (f"{fact[key]:.2f}" for key in ("mean", "variance"))
        ends = (f"{fact[key]:g}" for key in ("min", "max"))
        table.add_row(name, str(fact["n"]), *measured, *ends)
    return table


def show(
    console: Console, found: Audit, *, page: Path | None = None, next_command: str | None = None
) -> None:
    """Print the whole audit; names in brackets are findings that ``data.drop`` cannot take."""
    facts = found.facts
    console.print()
    if found.findings:
        console.print(findings_table(found))
    else:
        console.print("Nothing was found to object to.", markup=False)
    console.print()
    console.print(dimensions_table(found))
    tokens, letters = facts["image_tokens"], facts["analysis_characters"]
    console.print(
        f"\nA photograph costs the model {_span(tokens)} image tokens; an analysis has "
        f"{_span(letters)} characters.",
        markup=False,
    )
    if counted := facts["tokens"]:
        told = ", ".join(
            f"{_span(counted[part])} for the {name}"
            for part, name in (("prompt", "prompt"), ("answer", "answer"), ("row", "whole row"))
        )
        console.print(f"In tokens, as it will be trained: {told}.", markup=False)
    console.print()
    console.print(plain(found.verdict.sentence), style="bold", markup=False)
    rest = found.verdict.paragraph.removeprefix(found.verdict.sentence).strip()
    console.print(plain(rest), markup=False)
    console.print()
    if page is not None:
        for name, path in (("audit", page), ("rows", page.with_suffix(".json"))):
            console.print(f"{name:<8} {near(path)}", soft_wrap=True, markup=False)
    if next_command is not None:
        console.print("\nNext", style="bold")
        console.print(
            f"  # prepare without the rows that teach nothing\n  {next_command}",
            soft_wrap=True,
            markup=False,
        )


def _span(spread: Mapping[str, int]) -> str:
    least, most = spread["min"], spread["max"]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
