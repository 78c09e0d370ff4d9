"""A predicted peak in the terminal: what it is made of, whether it fits, what would lower it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .screen import near

if TYPE_CHECKING:
    from rich.console import Console

PARTS = {
    "weights": "weights of the base",
    "adapter": "adapter, its gradients and the optimizer",
    "features": "pictures' features, kept",
    "activations": "kept of every layer for the backward pass",
    "work": "for a moment: logits, a layer's gradients",
}


def gigabytes(size: int) -> str:
    """10^9 bytes, with two decimals."""
    return f"{size / 1e9:.2f} GB"


def sentence(plan: Mapping[str, Any]) -> str:
    """Whether it fits, and with what change it would, in one sentence."""
    total, limit = plan["bytes"]["total"], plan["limit"]
    start = f"training is predicted to take {gigabytes(total)} at its peak"
    if limit is None:
        return f"{start}; the device does not say how much memory it has"
    there = f"{gigabytes(limit['bytes'])} ({limit['what']})"
    if plan["fits"]:
        return f"{start}, of {there}"
    if plan["advice"] is None:
        if not plan["changes"]:
            return f"{start}, more than {there}; use a smaller model"
        least = plan["changes"][-1]["together"]
        keys = " ".join(key for change in plan["changes"] for key in change["overrides"])
        return (
            f"{start}, more than {there}, and still {gigabytes(least)} with {keys}; use a smaller "
            "model or a larger machine"
        )
    keys = " ".join(plan["advice"]["overrides"])
    return f"{start}, more than {there}; {keys} takes {gigabytes(plan['advice']['bytes'])}"


def show(console: Console, plan: Mapping[str, Any], *, page: Path) -> None:
    """Print the parts of the peak, the changes that would lower it, and the verdict."""
    from rich.table import Table

    tokens, batch = plan["tokens"], plan["batch"]
    console.print(
        f"\n{plan['rows']:,} rows of {tokens['min']:,} to {tokens['max']:,} tokens, "
        f"{tokens['median']:,} in the middle; pictures of up to {tokens['image_max']:,}.",
        markup=False,
    )
    console.print(
        f"The largest batch there can be: {batch['rows']} of {batch['tokens']:,} tokens.",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("peak, predicted", no_wrap=True)
    table.add_column("GB", justify="right")
    for name, words in PARTS.items():
        table.add_row(words, f"{plan['bytes'][name] / 1e9:.2f}")
    table.add_row("in all", f"{plan['bytes']['total'] / 1e9:.2f}", style="bold")
    console.print(table)
    if plan["changes"]:
        lower = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        lower.add_column("what would lower it")
        lower.add_column("alone", justify="right", no_wrap=True)
        lower.add_column("with those above", justify="right")
        lower.add_column("costs")
        for change in plan["changes"]:
            lower.add_row(
                " ".join(change["overrides"]),
                gigabytes(change["alone"]),
                gigabytes(change["together"]),
                change["costs"],
            )
        console.print(lower)
    if not plan["measured_backend"]:
        console.print(
            f"Nothing was measured on {plan['backend']}: take these figures as a guess.",
            markup=False,
        )
    text = sentence(plan)
    console.print(f"\n{text[0].upper()}{text[1:]}.", style="bold", soft_wrap=True, markup=False)
    console.print(f"numbers  {near(page)}", soft_wrap=True, markup=False)
