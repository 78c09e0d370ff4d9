"""The adapter's README: what it is, what it was trained on, how it was judged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write_text


def write_card(folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    """Write the card as the adapter directory's ``README.md``."""
    atomic_write_text(folder / "README.md", card(manifest, report))


def card(
    manifest: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    *,
    kind: str = "adapter",
    license: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A model card in Markdown, with the Hub's metadata at its head.

    Args:
        manifest: the adapter's ``manifest.json``.
        report: its ``comparison_report.json``; None if it was not evaluated yet.
        kind: a key of :data:`KINDS`: what the folder holds.
        license: the base's, as its own card gives it; None where that is not known.
        notes: sentences on this folder, such as what loads it.
    """
    base = manifest["base"]
    name = shown_name(base["name"])
    head, sentence = KINDS[kind]
    advisor = manifest.get("advisor") or "all advisors"
    training = manifest.get("training")
    came = _origin(manifest)
    rows = f", trained by mondrian_ft on {training['rows']} critiques" if training else came
    lines = [
        *_metadata(base["name"], head, license),
        "",
        f"# Photographic critiques, {advisor}",
        "",
        f"{sentence.format(base=name, method=_METHODS[manifest['lora']['method']])}{rows}.",
        "",
        *(line for note in notes for line in (note, "")),
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(manifest).items()),
        "",
        "## Evaluation",
        "",
    ]
    if report is None:
        lines.append("Not evaluated yet: `python -m mondrian_ft task=evaluate task.adapter=.`")
    else:
        lines += _evaluation(report)
    return "\n".join(lines) + "\n"


def base_card(identity: Mapping[str, Any], *, license: str | None, notes: Sequence[str]) -> str:
    """The card of a base model that was written in the published layout, without an adapter."""
    name = shown_name(identity["name"])
    lines = [
        *_metadata(identity["name"], {"library_name": "transformers", "tags": "[]"}, license),
        "",
        f"# {name}",
        "",
        f"The weights of {name} in the published layout, written by mondrian_ft; no adapter is "
        "merged in.",
        "",
        *(line for note in notes for line in (note, "")),
        "| | |",
        "|---|---|",
        f"| base weights | `{identity['weights']}`, {identity['dtype']} |",
        f"| base quantisation | {identity['quantization']} |",
    ]
    return "\n".join(lines) + "\n"


KINDS: dict[str, tuple[dict[str, str], str]] = {
    "adapter": (
        {"library_name": "peft", "tags": "[lora, photography, mondrian_ft]"},
        "A {method} adapter for {base}",
    ),
    "mlx": (
        {"library_name": "mlx", "tags": "[lora, mlx, photography, mondrian_ft]"},
        "A {method} adapter for {base} in mlx-vlm's layout",
    ),
    "fused": (
        {
            "base_model_relation": "finetune",
            "library_name": "transformers",
            "tags": "[lora, photography, mondrian_ft]",
        },
        "{base} with a {method} adapter merged into its weights",
    ),
    "fused_4bit": (
        {
            "base_model_relation": "quantized",
            "library_name": "mlx",
            "tags": "[lora, mlx, 4-bit, photography, mondrian_ft]",
        },
        "{base} with a {method} adapter merged into its weights, quantised",
    ),
}
"""The Hub's metadata of each kind of folder, and what a card calls it."""


_METHODS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}


def shown_name(name: str) -> str:
    """A base's name without the folders it lay in: a path says nothing on another machine."""
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a name is ``organisation/model`` rather than a path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def license_of(folder: Path) -> str | None:
    """The licence that a model folder's own card states in its head; None if it states none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.S)
    stated = re.search(r"^license:\s*([\w.+-]+)\s*$", found[1], re.M) if found else None
    return stated[1] if stated else None


def _metadata(base: str, head: Mapping[str, str], license: str | None) -> list[str]:
    """The front matter. The Hub wants ids there, so a base from a folder is named in words only."""
    return [
        "---",
        *([f"base_model: {base}"] if is_hub_id(base) else []),
        *(
            f"{key}: {value}"
            for key, value in head.items()
            if is_hub_id(base) or key != "base_model_relation"
        ),
        "pipeline_tag: image-text-to-text",
        *([f"license: {license}"] if license else []),
        "---",
    ]


def _origin(manifest: Mapping[str, Any]) -> str:
    """What an adapter that was not trained here came from, as the end of a sentence."""
    if imported := manifest.get("imported"):
        return f", imported from {imported['layout']}'s layout"
    if averaged := manifest.get("averaged"):
        parts = [f"{part['weight']:g} × `{part['hash'][:12]}`" for part in averaged["adapters"]]
        return f", the average {' + '.join(parts)}"
    return ""


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    base, lora, pixels = manifest["base"], manifest["lora"], manifest["pixels"]
    training = manifest.get("training")
    lock = manifest["data_lock"]
    facts = {
        "adapter": f"`{manifest['hash'][:16]}`",
        "base weights": f"`{base['weights']}`, {base['dtype']}",
        "base quantisation": base["quantization"],
        "rank, alpha": f"{lora['rank']}, {lora['alpha']:g}",
        "effective scale": f"{lora['scale']:g} ({lora['method']})",
        "matrices": ", ".join(lora["targets"]) or "none of the language model",
        **(
            {"matrices of the vision tower": ", ".join(f"`{one}`" for one in lora["vision"])}
            if lora.get("vision")
            else {}
        ),
        "parameters": f"{lora['parameters']:,}",
    }
    if training:
        kept = f"kept {training['kept_update']}, {training['kept']}"
        facts["updates"] = f"{training['updates']}; {kept}"
    facts["data lock"] = f"`{lock[:16]}`" if re.fullmatch("[0-9a-f]{16,}", lock) else lock
    facts["pixels"] = f"{pixels['min_pixels']:,} to {pixels['max_pixels']:,}"
    return facts


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
