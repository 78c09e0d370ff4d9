"""The adapter's README: what it is, what it was trained on, how it was judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_write_text


def write_card(folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    """Write the card as the adapter directory's ``README.md``."""
    atomic_write_text(folder / "README.md", card(manifest, report))


def card(manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """A model card in Markdown, with the Hub's metadata at its head.

    Args:
        manifest: the adapter's ``manifest.json``.
        report: its ``comparison_report.json``; None if it was not evaluated yet.
    """
    base, lora, training = manifest["base"], manifest["lora"], manifest["training"]
    advisor = manifest.get("advisor") or "all advisors"
    pixels = manifest["pixels"]
    facts = {
        "adapter": f"`{manifest['hash'][:16]}`",
        "base weights": f"`{base['weights']}`, {base['dtype']}",
        "base quantisation": base["quantization"],
        "rank, alpha": f"{lora['rank']}, {lora['alpha']:g}",
        "effective scale": f"{lora['scale']:g} ({lora['method']})",
        "matrices": ", ".join(lora["targets"]),
        "parameters": f"{lora['parameters']:,}",
        "updates": f"{training['updates']}; kept {training['kept_update']}, {training['kept']}",
        "data lock": f"`{manifest['data_lock'][:16]}`",
        "pixels": f"{pixels['min_pixels']:,} to {pixels['max_pixels']:,}",
    }
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
        "tags: [lora, photography, mondrian_ft]",
        "---",
        "",
        f"# Photographic critiques, {advisor}",
        "",
        f"A LoRA adapter for {base['name']}, trained by mondrian_ft on {training['rows']} "
        "critiques.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "## Evaluation",
        "",
    ]
    if report is None:
        lines.append("Not evaluated yet: `python -m mondrian_ft task=evaluate task.adapter=.`")
    else:
        lines += _evaluation(report)
    return "\n".join(lines) + "\n"


def _evaluation(report: Mapping[str, Any]) -> list[str]:
    evidence = report["evidence"]
    rows = [
        f"Verdict on {evidence['n_photographs']} held-out photographs: **{evidence['verdict']}**. "
        f"{evidence.get('reason', '')}".strip(),
        "",
        "| arm | exact format | score error (points of 10) |",
        "|---|---|---|",
    ]
    for name, arm in evidence["arms"].items():
        strict, error = arm.get("format_strict"), arm.get("score_mae")
        rows.append(
            f"| {name} | {'–' if strict is None else f'{strict:.0%}'} | "
            f"{'–' if error is None else f'{error:.2f}'} |"
        )
    return rows
