"""The inspected batches in the terminal: how long, how much of it is trained, where the page is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import wording
from .screen import near, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def spread_table(found: Mapping[str, Any]) -> Table:
    """Smallest, middle and largest row in tokens, and their sum over the epoch."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("tokens of a row", no_wrap=True)
    for name in ("min", "median", "max", "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, words in (
        ("tokens", "whole row"),
        ("image_tokens", "  picture"),
        ("trained_tokens", "  trained"),
        ("padding", "padding beside it"),
    ):
        table.add_row(words, *(f"{found[key][of]:,}" for of in ("min", "median", "max", "sum")))
    return table


def show(console: Console, found: Mapping[str, Any], *, page: Path) -> None:
    """Print the table of a summary, its shares, its longest and shortest row, and the paths."""
    rows = "row" if found["rows"] == 1 else "rows"
    batches = "batch" if found["batches"] == 1 else "batches"
    console.print(
        f"\nThe first epoch: {found['rows']:,} {rows} in {found['batches']:,} {batches}.",
        style="bold",
        markup=False,
    )
    console.print(spread_table(found))
    shares = [plain(wording.percent(found[key])) for key in ("trained_share", "padding_share")]
    console.print(
        f"\n{shares[0]} of the tokens are trained; {shares[1]} of the batches is padding.",
        markup=False,
    )
    for words, key, size in (("longest", "longest", "max"), ("shortest", "shortest", "min")):
        name = found[key].encode("ascii", "replace").decode()
        console.print(
            f"{words:<8} {name}, {found['tokens'][size]:,} tokens",
            markup=False,
            soft_wrap=True,
        )
    for name, path in (("page", page), ("rows", page.with_suffix(".json"))):
        console.print(f"{name:<8} {near(path)}", soft_wrap=True, markup=False)
