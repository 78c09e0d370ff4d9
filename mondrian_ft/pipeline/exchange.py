"""``import_adapter``, ``diff`` and ``average``: adapters from elsewhere, compared, combined."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError
from ..evaluation.probing import pixels_of, probe_inputs
from ..files import atomic_write_json, building
from ..model import adapter as adapters
from ..model import combine, imports, lora, proof
from ..model.adapter import Adapter
from ..model.backend import mx
from ..model.foreign import attach as put_in
from ..model.foreign import other_bits
from ..report import card, screen
from .training import load_base_of, pixel_facts, pixel_settings
from .versioning import find_adapter
from .words import command

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

UNKNOWN = "unknown"
"""The data lock of an adapter that does not say what it was trained on."""


def import_adapter(task: tasks.ImportAdapter, config: Config, run: Run) -> None:
    """An adapter of another program, on the configured base, as an adapter directory.

    Raises:
        AdapterError: it cannot be read exactly, does not fit the base, or changes nothing; nothing
            is written.
    """
    if task.source is None:
        raise AdapterError(
            "task.source is not set; give the folder of the adapter to import, or its weights file"
        )
    source = Path(task.source)
    rule = None if task.scale_rule is None else str(task.scale_rule)
    foreign = imports.read_foreign(source, rule)
    folder = Path(task.output_dir) if task.output_dir else run.folder / "adapter"
    with building(folder) as made:
        base, _ = load_base_of(config, run)
        spec = put_in(base, foreign)
        assumed = [
            f"the base is {base.identity.name}; only the shapes were compared",
            "pixels are prepared as configured now",
            *foreign.assumed,
        ]
        if other_bits(base, foreign):
            told = (
                f"it was trained on a base quantised to {foreign.base_bits} bits, here it is "
                f"{base.identity.quantization} (model.allow_other_precision=true)"
            )
            run.warn(told)
            assumed.append(told)
        if (source / adapters.MANIFEST).is_file():
            assumed.append(
                f"the source has a {adapters.MANIFEST} of its own, which was not taken over: data "
                "lock, prompts and training are unknown from here on"
            )
        adapter = adapters.save(
            made,
            base,
            spec,
            pixels=pixel_facts(base, pixel_settings(config)),
            prompts=[],
            data_lock=UNKNOWN,
            probe=probe_inputs(base, pixel_settings(config)),
            facts={
                "advisor": config.data.advisor,
                "imported": {
                    "layout": foreign.layout,
                    "file": foreign.file,
                    "sha256": foreign.sha256,
                    "assumed": [_without_path(line, base.identity.name) for line in assumed],
                },
            },
        )
        card.write_card(made, adapter.manifest, None)
    layers = "all" if spec.layers is None else ", ".join(map(str, spec.layers))
    lines = {
        "layout": f"{foreign.layout} ({foreign.file})",
        "method": f"{lora.NAMES[spec.method]}, rank {spec.rank}, scale {spec.scale:g}",
        **({"matrices": ", ".join(spec.targets), "layers": layers} if spec.targets else {}),
        **({"vision": ", ".join(spec.vision)} if spec.vision else {}),
        "tensors": str(len(foreign.tensors)),
    }
    for name, value in lines.items():
        run.console.print(f"{name:<9} {value}", soft_wrap=True, markup=False)
    for sentence in assumed:
        run.console.print(f"assumed   {sentence}", soft_wrap=True, markup=False)
    _tell_written(run, folder, adapter, "imported")


def average(task: tasks.Average, config: Config, run: Run) -> None:
    """Adapters of one base to one that adds the average of what they add.

    Raises:
        AdapterError: fewer than two, DoRA, different bases or pixels, or the average is zero;
            nothing is written.
    """
    if len(task.adapters) < 2:
        raise AdapterError(
            f"task.adapters names {len(task.adapters)}; give two or more, as in "
            "task.adapters=[v1,v2]"
        )
    found = [adapters.read(find_adapter(name, config)) for name in task.adapters]
    _check_alike(found)
    weights = task.weights or [1 / len(found)] * len(found)
    spec, tensors, lost = combine.average(found, weights, task.rank)
    folder = Path(task.output_dir) if task.output_dir else run.folder / "adapter"
    with building(folder) as made:
        base, _ = load_base_of(config, run)
        proof.require(found[0].folder, proof.of_base(found[0].manifest, base))
        told = proof.other_precision(found[0].manifest, base)
        if told:
            run.warn(f"{found[0].folder}: {told}")
        adapter = _save_average(made, config, base, found, weights, spec, tensors, lost, told)
        card.write_card(made, adapter.manifest, None)
    run.console.print(
        f"averaged {len(found)} adapters: rank {spec.rank}, "
        + (f"{lost:.2%} of the update cut off" if task.rank else "exact"),
        markup=False,
    )
    _tell_written(run, folder, adapter, "averaged")


def _save_average(
    folder: Path,
    config: Config,
    base: Any,
    found: list[Adapter],
    weights: list[float],
    spec: lora.LoraSpec,
    tensors: Mapping[str, Any],
    lost: float,
    precision: str,
) -> Adapter:
    lora.attach(base.model, spec, seed=0)
    values = {name: mx.zeros(value.shape) for name, value in lora.tensors(base.model).items()}
    values |= {name: mx.array(value) for name, value in tensors.items()}
    lora.set_tensors(base.model, values)
    base.model.eval()
    locks = {adapter.manifest["data_lock"] for adapter in found}
    facts: dict[str, Any] = {
        "advisor": config.data.advisor,
        "averaged": {
            "adapters": [
                {
                    "hash": adapter.hash,
                    "weight": weight,
                    "rank": adapter.spec.rank,
                    "data_lock": adapter.manifest["data_lock"],
                }
                for adapter, weight in zip(found, weights, strict=True)
            ],
            "truncation_error": lost,
            **({"other_precision": precision} if precision else {}),
        },
    }
    seen = [adapter.manifest.get("trained_on") for adapter in found]
    if all(hashes is not None for hashes in seen):
        facts["trained_on"] = sorted({value for hashes in seen for value in hashes or ()})
    return adapters.save(
        folder,
        base,
        spec,
        pixels=found[0].manifest["pixels"],
        prompts=sorted({p for adapter in found for p in adapter.manifest["prompts"]}),
        data_lock=locks.pop() if len(locks) == 1 else UNKNOWN,
        probe=probe_inputs(base, pixels_of(found[0])),
        facts=facts,
    )


def _check_alike(found: list[Adapter]) -> None:
    """One base, one quantisation, one way to pixels."""
    first = found[0]
    for other in found[1:]:
        for section, key in (
            ("base", "weights"),
            ("base", "quantization"),
            ("pixels", "fingerprint"),
        ):
            mine, its = (adapter.manifest[section].get(key) for adapter in (first, other))
            if mine != its:
                raise AdapterError(
                    f"{first.folder} has {section} {key} {mine}, {other.folder} has {its}; only "
                    "adapters of one base, trained on pixels prepared in one way, can be averaged"
                )


def diff(task: tasks.Diff, config: Config, run: Run) -> None:
    """Two adapters compared, as tables and as ``diff.json``; no base model is loaded.

    Raises:
        AdapterError: one is missing or damaged, or they adapt matrices of different shapes.
    """
    for name in ("adapter", "other"):
        if getattr(task, name) is None:
            raise AdapterError(f"task.{name} is not set; give the two adapters to compare")
    first, second = (
        adapters.read(find_adapter(str(name), config)) for name in (task.adapter, task.other)
    )
    found = combine.differences(first, second)
    layers = combine.by_layer(found)
    dora = "dora" in (first.spec.method, second.spec.method)
    report = {
        "adapters": [
            {"hash": adapter.hash, "method": adapter.spec.method, "scale": adapter.spec.scale}
            for adapter in (first, second)
        ],
        "same": first.hash == second.hash,
        "same_base": first.manifest["base"] == second.manifest["base"],
        "same_data_lock": _same_lock(first, second),
        "compared": _COMPARED_DORA if dora else _COMPARED,
        "settings": _settings(first, second),
        "metrics": [_metrics(adapter) for adapter in (first, second)],
        "layers": layers,
        "matrices": [{**vars(item), "relative": item.relative} for item in found],
    }
    atomic_write_json(run.folder / "diff.json", report, levels=2)
    _show(run, report)


_COMPARED = "scale · A B, what each adapter adds to a matrix"
_COMPARED_DORA = (
    "scale · A B before DoRA's magnitudes rescale the rows, and the magnitudes by themselves; what "
    "DoRA adds to a matrix depends on the base's weights, which are not loaded here"
)


def _same_lock(first: Adapter, second: Adapter) -> bool | None:
    """None where one does not say what it was trained on."""
    locks = [adapter.manifest["data_lock"] for adapter in (first, second)]
    return None if UNKNOWN in locks else locks[0] == locks[1]


def _settings(first: Adapter, second: Adapter) -> list[dict[str, Any]]:
    """Every recorded setting that differs, by dotted name; null where one does not say."""
    sides = [dict(_recorded(adapter)) for adapter in (first, second)]
    names = sorted(sides[0].keys() | sides[1].keys())
    if not all(any(name.startswith("config.") for name in side) for side in sides):
        # Against an adapter without a config every key of the other's would differ.
        names = [name for name in names if not name.startswith("config.")]
    return [
        {"key": name, "values": [side.get(name) for side in sides]}
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]


_CONFIG_GROUPS = ("data", "model", "lora", "optimizer", "trainer")
"""What can change an adapter."""


def _recorded(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    kept = ("base", "lora", "pixels", "prompts", "data_lock", "training", "versions", "advisor")
    yield from _flat("", {key: adapter.manifest.get(key) for key in kept})
    args = adapter.folder / "training_args.json"
    if args.is_file():
        config = json.loads(args.read_text())
        yield from _flat("config.", {key: config.get(key) for key in _CONFIG_GROUPS})


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _metrics(adapter: Adapter) -> dict[str, Any] | None:
    """What its evaluation says of these very weights; None without one."""
    path = adapter.folder / "evaluation" / "comparison_report.json"
    if not path.is_file():
        return None
    evidence = json.loads(path.read_text())["evidence"]
    if evidence.get("adapter_hash") not in (None, adapter.hash):
        return None
    arm = evidence["arms"].get("tuned", {})
    return {
        "verdict": evidence["verdict"],
        "photographs": evidence.get("n_photographs"),
        **{key: arm.get(key) for key in ("n", "format_strict", "score_mae", "score_mae_shuffled")},
    }


def _show(run: Run, report: Mapping[str, Any]) -> None:
    from rich.table import Table

    def table(*headings: str) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for number, heading in enumerate(headings):
            made.add_column(heading, justify="right" if number else "left")
        return made

    hashes = [item["hash"][:12] for item in report["adapters"]]
    told = {True: "the same", False: "different", None: "not known of both"}
    run.console.print(f"{hashes[0]} and {hashes[1]}", style="bold")
    for name in ("same_base", "same_data_lock"):
        run.console.print(
            f"{name.removeprefix('same_').replace('_', ' '):<10} {told[report[name]]}", markup=False
        )
    if report["settings"]:
        settings = table("setting", *hashes)
        for item in report["settings"]:
            settings.add_row(screen.plain(item["key"]), *(_cell(v) for v in item["values"]))
        run.console.print(settings)
    if any(report["metrics"]):
        metrics = table("metric", *hashes)
        sides = [side or {} for side in report["metrics"]]
        for key in next(side for side in sides if side):
            metrics.add_row(key, *(_cell(side.get(key)) for side in sides))
        run.console.print(metrics)
    run.console.print(f"Compared: {report['compared']}.", soft_wrap=True, markup=False)
    layers = table("layer", "norm", "norm of the other", "difference", "relative", "cosine")
    for item in report["layers"]:
        layers.add_row(
            "all" if item["layer"] is None else str(item["layer"]),
            *(_cell(item[key]) for key in ("norm", "other_norm", "difference", "relative")),
            _cell(item["cosine"]),
        )
    run.console.print(layers)
    if report["same"]:
        run.console.print("The two are the same adapter: equal weights, equal scale.")
    run.console.print(
        f"Written: {screen.near(run.folder / 'diff.json')}", soft_wrap=True, markup=False
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return screen.plain(text if len(text) <= 40 else f"{text[:37]}...")


def _without_path(sentence: str, name: str) -> str:
    """A sentence for the manifest, where a base's folder on this machine says nothing."""
    return sentence.replace(name, card.shown_name(name))


def _tell_written(run: Run, folder: Path, adapter: Adapter, key: str) -> None:
    run.record(**{key: {"folder": str(folder), "hash": adapter.hash}})
    run.console.print(f"adapter   {screen.near(folder)}", soft_wrap=True, markup=False)
    run.console.print("\nNext", style="bold")
    judge = command("task=evaluate", f"task.adapter={screen.near(folder)}")
    run.console.print(f"  # compare it with its base\n  {judge}", soft_wrap=True, markup=False)
