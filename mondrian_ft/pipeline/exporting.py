"""``task=export``: writing for other programs, reading it back, and putting it in place."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, ConfigError, ModelError, MondrianError
from ..evaluation.probing import pixels_of, probe_inputs
from ..files import atomic_write_text, building
from ..model import adapter as adapters
from ..model import agreement, fuse, lora, proof
from ..model import export as exports
from ..model.adapter import Adapter
from ..model.agreement import Logits
from ..model.backend import mx
from ..report import card, screen
from .training import load_base_of
from .versioning import find_adapter

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

NOISE = 1e-4
"""Largest difference, as a share of the largest logit, between two ways to the same float32 sums;
1e-6 was measured (the tiny model of the tests and the sample)."""
_LOADED_BY = {
    "peft": "`PeftModel.from_pretrained` of PEFT loads it onto transformers' model as it is.",
    "mlx": "`mlx_vlm.generate --adapter-path` loads it.",
    "fused": "transformers and mlx-vlm load it as any model.",
    "fused_4bit": "`mlx_vlm.load` loads it. transformers does not: it knows neither this layout "
    "nor this quantisation.",
    "hf_base": "transformers and mlx-vlm load it as any model.",
}


def export(task: tasks.Export, config: Config, run: Run) -> None:
    """Write, read back, compare, put in place, and upload if asked.

    Raises:
        AdapterError: no adapter was given or it does not fit; the error that fusing introduces is
            above ``task.max_error``, and nothing is written; or what was written is not what it
            should be, and it stays under a name that says so.
        MondrianError: the folder holds something already, the disk is full, or the hub refused.
    """
    alone = task.format == "hf_base"
    if alone and task.adapter is not None:
        raise ConfigError(
            "task.format=hf_base writes the base alone, but task.adapter is set; leave one out, or "
            "use task.format=fused."
        )
    if not alone and task.adapter is None:
        raise AdapterError("task.adapter is not set; give the adapter directory to export")
    folder = Path(task.output_dir) if task.output_dir else run.folder / "export"
    source = None if task.adapter is None else find_adapter(task.adapter, config)
    if source is not None:
        adapters.read(source)  # a wrong path is told before the base is loaded
    with building(folder) as made:
        facts = _write_and_verify(task, config, run, source, made)
        if facts["failed"]:
            kept = folder.with_name(f"{folder.name}.failed-{secrets.token_hex(4)}")
            shutil.move(made, kept)
            raise AdapterError(
                f"{facts['failed']}; it is not in {folder}, and is kept in {kept} to be looked at"
            )
    run.record(exported={"format": str(task.format), "folder": str(folder), **facts})
    run.console.print(f"exported {screen.near(folder)}", soft_wrap=True, markup=False)
    run.console.print(f"         {_LOADED_BY[task.format]}", soft_wrap=True, markup=False)
    if task.push_to_hub is not None:
        push(run, folder, task.push_to_hub, private=task.private)


def _write_and_verify(
    task: tasks.Export, config: Config, run: Run, source: Path | None, folder: Path
) -> dict[str, Any]:
    """Fill the folder; the facts for run.json, with a sentence under ``failed`` or None."""
    base, _ = load_base_of(config, run)
    if base.plain and task.format != "mlx":
        raise ModelError(
            f"task.format={task.format} knows the names and layouts of Qwen3-VL alone, and "
            f"{base.identity.name} is a {base.backbone.model_type}; use task.format=mlx"
        )
    untouched = agreement.probe_logits(base)
    adapter, tuned = None, untouched
    if source is not None:
        settings = pixels_of(adapters.read(source))
        adapter = adapters.load(source, base, probe=probe_inputs(base, settings))
        tuned = agreement.probe_logits(base)
        lora.detach(base.model)
    errors: dict[str, dict[str, float]] = {}
    # What reading back must give; of a quantised model the numbers it had before it was written.
    expected = tuned
    with run.console.status("writing"):
        if task.format == "mlx":
            assert adapter is not None
            exports.export_mlx(adapter, folder)
        elif task.format == "peft":
            assert adapter is not None
            exports.export_peft(adapter, folder)
        elif task.format == "fused_4bit":
            assert adapter is not None
            errors = fuse.quantize_merged(base, adapter.spec, adapter.tensors)
            expected = agreement.probe_logits(base)
            _check_error(task, run, untouched, tuned, expected, errors)
            fuse.write_quantized(folder, base)
        else:
            spec, tensors = (adapter.spec, adapter.tensors) if adapter else (None, None)
            fuse.write_published(folder, base, spec=spec, tensors=tensors)
    precision = proof.other_precision(adapter.manifest, base) if adapter else ""
    identity, dtype = asdict(base.identity), base.identity.dtype
    stated = card.license_of(base.folder)
    with run.console.status("reading it back"):
        if task.format == "mlx":
            found = exports.logits_of_mlx(folder, base)
        elif task.format == "peft":
            found = exports.logits_of_peft(folder, base)
        else:
            # A large model does not fit twice.
            del base
            mx.clear_cache()
            found = exports.logits_of_model(folder, dtype)
    facts: dict[str, Any] = {
        "base": identity,
        "hash": adapter.hash if adapter else None,
        "distance": {name: asdict(d) for name, d in agreement.distances(tuned, found).items()},
    }
    if errors:
        facts["quantisation"] = errors
    facts["failed"] = _verdict(task, run, untouched, tuned, expected, found, folder)
    distances = _told(facts["distance"])
    for line in distances:
        run.console.print(line, markup=False)
    notes = [f"Of the adapter: {precision}."] if precision else []
    _write_card(task, folder, identity, stated, adapter, [*distances, *notes])
    return facts


def _check_error(
    task: tasks.Export,
    run: Run,
    untouched: Logits,
    tuned: Logits,
    fused: Logits,
    errors: Mapping[str, Mapping[str, float]],
) -> None:
    """Tell what quantising takes away, and refuse too much of it before anything is written."""
    _show_errors(run, errors)
    share = agreement.effect_share(untouched, tuned, fused)
    run.console.print(
        f"Quantising moves the logits by {share:.2f} of what the adapter changes (limit "
        f"{task.max_error:g}).",
        markup=False,
    )
    if share > task.max_error:
        sentence = (
            f"merged and quantised, the model is {share:.2f} of the adapter's effect away from "
            f"base + adapter, over task.max_error={task.max_error:g}"
        )
        if not task.force:
            raise AdapterError(
                f"{sentence}; nothing was written: keep the adapter apart (task.format=mlx), fuse "
                "without quantising (task.format=fused), or accept it with task.force=true"
            )
        run.warn(f"{sentence}; written because of task.force=true")


def _show_errors(run: Run, errors: Mapping[str, Mapping[str, float]]) -> None:
    """The relative error of the merged weights, layer by layer."""
    from rich.table import Table

    layers: dict[int, list[Mapping[str, float]]] = {}
    for name, values in errors.items():
        layers.setdefault(lora.layer_number(name), []).append(values)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("layer", "matrices", "error of the weights", "in units of the update"):
        table.add_column(heading, justify="right")
    for layer, found in sorted(layers.items()):
        largest = {key: max(values[key] for values in found) for key in ("weight", "update")}
        table.add_row(
            str(layer), str(len(found)), f"{largest['weight']:.1%}", f"{largest['update']:.2f}"
        )
    run.console.print(table)


def _verdict(
    task: tasks.Export,
    run: Run,
    untouched: Logits,
    tuned: Logits,
    expected: Logits,
    found: Logits,
    folder: Path,
) -> str | None:
    """What is wrong with what was read back, as the beginning of a sentence; None for nothing."""
    worst = max(d.relative for d in agreement.distances(expected, found).values())
    if task.format != "fused" or _computes_in_float32(folder, task):
        if worst <= NOISE:
            return None
        return (
            f"what was written as {task.format} is not what it should be: read back, its logits "
            f"differ by up to {worst:.2g} of the largest (limit {NOISE:g})"
        )
    # Merged weights are rounded to the type they are stored in, which moves every logit a little.
    share = agreement.effect_share(untouched, tuned, found)
    run.console.print(
        f"Rounding moves the logits by {share:.2f} of what the adapter changes (limit "
        f"{task.max_error:g}).",
        markup=False,
    )
    if share <= task.max_error:
        return None
    sentence = (
        f"the fused model is {share:.2f} of the adapter's effect away from base + adapter, over "
        f"task.max_error={task.max_error:g}; the adapter is lost in the rounding of the weights"
    )
    if task.force:
        run.warn(f"{sentence}; written because of task.force=true")
        return None
    return sentence


def _computes_in_float32(folder: Path, task: tasks.Export) -> bool:
    """Whether every weight of a model folder is float32, so that nothing was rounded."""
    from ..model.shards import read_entries

    if task.format in ("mlx", "peft"):
        return True
    return {entry.dtype for entry in read_entries(folder)} == {"F32"}


def _told(distances: Mapping[str, Mapping[str, float]]) -> list[str]:
    """How far what was written is from base + adapter, a line for each input."""
    return [
        f"Read back, on {what}: largest difference of a logit {distance['largest']:.2g} "
        f"({distance['relative']:.1g} of the largest logit), same next token for "
        f"{distance['same_choice']:.0%} of the tokens."
        for what, distance in (("a text", distances["text"]), ("a picture", distances["image"]))
    ]


def _write_card(
    task: tasks.Export,
    folder: Path,
    identity: Mapping[str, Any],
    stated: str | None,
    adapter: Adapter | None,
    distances: list[str],
) -> None:
    notes = [_LOADED_BY[task.format], *distances]
    if adapter is None:
        text = card.base_card(identity, license=stated, notes=notes)
    else:
        if task.format in ("fused", "fused_4bit"):
            notes.append("The evaluation below is of base and adapter before they were merged.")
        report = adapter.folder / "evaluation" / "comparison_report.json"
        evaluated = json.loads(report.read_text()) if report.is_file() else None
        kind = {"peft": "adapter"}.get(task.format, str(task.format))
        text = card.card(adapter.manifest, evaluated, kind=kind, license=stated, notes=notes)
    atomic_write_text(folder / "README.md", text)


def push(run: Run, folder: Path, repository: str, *, private: bool) -> None:
    """Upload a folder to the Hugging Face hub; whoever is logged in there does.

    Raises:
        MondrianError: the hub cannot be reached or refuses.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # its errors and those of its HTTP client have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MondrianError(
            f"{folder} was exported but not uploaded to {repository} ({lines[0][:300]}); log in "
            "with hf auth login, check the name, and upload the folder with hf upload"
        ) from error
    run.record(pushed={"repository": repository, "private": private})
    run.console.print(f"uploaded to https://huggingface.co/{repository}", markup=False)
