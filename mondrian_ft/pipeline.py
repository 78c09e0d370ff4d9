"""The tasks' bodies: what each verb does, in the order it does it.

Config objects stop here. The rooms below take values, and could be used from a notebook in the
same way as these functions use them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.rows import Row, check_disjoint, data_lock, read_rows
from .errors import AdapterError, DataError, Interrupted, TrainingError
from .files import atomic_write_bytes, atomic_write_json, atomic_write_text
from .report import screen

if TYPE_CHECKING:
    from . import tasks
    from .config import Config
    from .data.batches import Example
    from .data.pixels import PixelSettings
    from .model.adapter import Adapter
    from .model.base import Base
    from .model.features import FeatureStore
    from .run import Run

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Parts:
    """The rows of a run, and where the held-out ones were read from."""

    train: list[Row]
    val: list[Row]
    test: list[Row]
    lock: str
    source: str

    @property
    def judged(self) -> list[Row]:
        """The rows an evaluation uses: the test part if there is one, else the validation part."""
        return self.test or self.val


def experiment(task: tasks.Experiment, config: Config, run: Run) -> float | None:
    """The whole main job. Returns the validation loss of the adapter that was kept."""
    folder = _adapter_dir(task.output_dir, run)
    parts = _linked_and_prepared(config, run)
    base, features = _load_base(config, run)
    adapter, loss = _train(config, run, base, features, parts, folder)
    if parts.judged:
        report = _evaluate(config, run, base, features, parts, adapter)
        page = run.folder / "report.html"
        version = _register(config, run, adapter.folder)
        screen.show_closing(
            run.console,
            report,
            adapter=adapter.folder,
            page=page,
            commands=[
                ("what the adapter was trained on, and all versions", _command("task=versions")),
                (
                    f"give {version} to mlx-vlm",
                    _command(
                        "task=export", "task.format=mlx", f"task.adapter={_near(adapter.folder)}"
                    ),
                ),
            ],
        )
    else:
        run.warn("there is neither a test nor a validation part, so the adapter was not evaluated")
        _register(config, run, adapter.folder)
    return loss


def link(task: tasks.Link, config: Config, run: Run) -> None:
    """Job database, photographs and analyses to a manifest."""
    _link(config, run)


def prepare(task: tasks.Prepare, config: Config, run: Run) -> None:
    """Manifest to rows. Without ``data.manifest`` and a linked folder, links first."""
    from .data.link import MANIFEST_NAME

    folder = _data_dir(config, run)
    if config.data.manifest is None and not (folder / MANIFEST_NAME).is_file():
        _link(config, run)
    _prepare(config, run)


def train(task: tasks.Train, config: Config, run: Run) -> float | None:
    """Prepared rows to an adapter directory. Returns the validation loss, if there is one."""
    folder = _adapter_dir(task.output_dir, run)
    parts = _rows(config, run)
    base, features = _load_base(config, run)
    adapter, loss = _train(config, run, base, features, parts, folder)
    run.console.print(f"adapter  {screen.near(adapter.folder)}", soft_wrap=True, markup=False)
    run.console.print("\nNext", style="bold")
    data = _near(_data_dir(config, run))
    judge = _command(
        "task=evaluate", f"task.adapter={_near(adapter.folder)}", f"data.output_dir={data}"
    )
    run.console.print(f"  # compare it with its base\n  {judge}", soft_wrap=True, markup=False)
    return loss


def evaluate(task: tasks.Evaluate, config: Config, run: Run) -> float | None:
    """Base against tuned. Returns the tuned score error, or None without an adapter."""
    from .model import adapter as adapters

    parts = _rows(config, run)
    base, features = _load_base(config, run)
    adapter = None
    if task.adapter is not None:
        settings = _pixel_settings(config)
        print_of = _pixel_facts(base, settings)["fingerprint"]
        adapter = adapters.load(_find_adapter(task.adapter, config), base, pixels=print_of)
    elif [arm for arm in config.eval.arms if arm != "base"]:
        run.warn("task.adapter is not set, so only the base is evaluated")
    report = _evaluate(config, run, base, features, parts, adapter)
    screen.show_closing(
        run.console,
        report,
        adapter=adapter.folder if adapter else None,
        page=run.folder / "report.html",
    )
    return report["evidence"]["arms"].get("tuned", {}).get("score_mae")


def export(task: tasks.Export, config: Config, run: Run) -> None:
    """An adapter directory to another layout."""
    from .model import adapter as adapters

    if task.adapter is None:
        raise AdapterError("task.adapter is not set; give the adapter directory to export")
    adapter = adapters.read(_find_adapter(task.adapter, config))
    folder = Path(task.output_dir) if task.output_dir else run.folder / "export"
    write = {"mlx": adapters.export_mlx, "peft": adapters.export_peft}[task.format]
    write(adapter, folder)
    run.record(exported={"format": str(task.format), "folder": str(folder), "hash": adapter.hash})
    run.console.print(f"exported {screen.near(folder)}", soft_wrap=True, markup=False)


def register(task: tasks.Register, config: Config, run: Run) -> None:
    """An adapter directory to the registry's next version."""
    if task.adapter is None:
        raise AdapterError("task.adapter is not set; give the adapter directory to register")
    _register(config, run, Path(task.adapter))


def versions(task: tasks.Versions, config: Config, run: Run) -> None:
    """The registry's versions, oldest first."""
    from . import registry

    found = registry.versions(Path(config.registry.root), _registry_name(config))
    if task.format == "json":
        print(json.dumps([version.as_dict() for version in found], indent=2))
        return
    if not found:
        run.console.print(
            f"The registry has no version of {_registry_name(config)} yet; the main job registers "
            "one.",
            markup=False,
        )
        return
    run.console.print(screen.versions_table([version.as_dict() for version in found]))


def sample_model(task: tasks.SampleModel, config: Config, run: Run) -> float | None:
    """Trains the sample's base model again. Returns its final training loss."""
    from .sample import pretrain

    folder = Path(task.output_dir) if task.output_dir else run.folder / "model"
    recipe = pretrain.Recipe(
        pictures=task.pictures, steps=task.steps, batch=task.batch_size, seed=task.seed
    )
    facts = pretrain.train(folder, recipe, lambda line: run.console.print(f"  {line}"))
    facts |= pretrain.judge(folder, task.judged)
    atomic_write_text(folder / "README.md", pretrain.card(recipe, facts))
    run.record(sample_model=facts)
    for name, value in facts.items():
        run.console.print(f"{name:<24} {value}", markup=False)
    run.console.print(f"model    {screen.near(folder)}", soft_wrap=True, markup=False)
    return float(facts["final_loss"])


# --- data -----------------------------------------------------------------------------------


def _link(config: Config, run: Run) -> None:
    from .data.link import MANIFEST_NAME, NoUsableRows, link_into

    data = config.data
    if data.db_path is None:
        from .sample import sample_data

        sample = sample_data(data.seed, Path("outputs/cache/sample").absolute())
        db_path, source, analyses = sample.db_path, sample.source_dir, sample.analysis_dir
    else:
        db_path, source, analyses = data.db_path, Path(data.source_dir or ""), data.analysis_dir
    folder = _data_dir(config, run)
    try:
        result = link_into(folder, db_path, source, analyses, data.advisor, limit=data.limit)
    except NoUsableRows as error:
        screen.show_link(run.console, error.report)
        raise
    run.record(link={"rows": result.report["rows"], "linked": result.report["linked"]})
    screen.show_link(run.console, result.report, folder / MANIFEST_NAME)


def _prepare(config: Config, run: Run) -> Parts:
    from .data.dataset import part_path
    from .data.dataset import prepare as prepare_rows
    from .data.link import MANIFEST_NAME

    data = config.data
    folder = _data_dir(config, run)
    prepared = prepare_rows(
        data.manifest or folder / MANIFEST_NAME,
        advisor=data.advisor,
        train_split=data.train_split,
        val_split=data.val_split,
        test_split=data.test_split,
        seed=data.seed,
        output_dir=folder,
        limit=data.limit,
    )
    parts = _parts(prepared, folder, data.advisor)
    counts = ", ".join(f"{len(getattr(parts, part))} {part}" for part in PARTS)
    run.record(rows={part: len(getattr(parts, part)) for part in PARTS}, data_lock=parts.lock)
    run.console.print(f"Prepared {counts}, split by photograph.", markup=False)
    where = screen.near(part_path(folder, data.advisor, "train"))
    run.console.print(f"Rows:     {where}", soft_wrap=True, markup=False)
    return parts


def _linked_and_prepared(config: Config, run: Run) -> Parts:
    if config.data.train_data is not None:
        return _rows(config, run)
    if config.data.manifest is None:
        _link(config, run)
    return _prepare(config, run)


def _rows(config: Config, run: Run) -> Parts:
    """The rows that were prepared, or that ``data.train_data`` and ``data.val_data`` name."""
    from .data.dataset import load_prepared, part_path

    data = config.data
    if data.train_data is None and data.val_data is None:
        if data.output_dir is None:
            # Nothing was prepared that could be meant, so this run prepares for itself.
            return _linked_and_prepared(config, run)
        parts = _parts(
            load_prepared(data.output_dir, data.advisor), Path(data.output_dir), data.advisor
        )
    else:
        prepared = None
        if (
            data.output_dir is not None
            and part_path(data.output_dir, data.advisor, "train").is_file()
        ):
            prepared = load_prepared(data.output_dir, data.advisor)
        train_rows = read_rows(data.train_data) if data.train_data else []
        val_rows = read_rows(data.val_data) if data.val_data else []
        if prepared is not None:
            train_rows = train_rows or prepared.train
            val_rows = val_rows or prepared.val
        named = {"train": train_rows, "val": val_rows, "test": []}
        check_disjoint(named)
        source = data.val_data or data.train_data or ""
        parts = Parts(train_rows, val_rows, [], data_lock(named), str(source))
    run.record(rows={part: len(getattr(parts, part)) for part in PARTS}, data_lock=parts.lock)
    return parts


def _parts(prepared: Any, folder: Path, advisor: str | None) -> Parts:
    from .data.dataset import part_path

    judged = "test" if prepared.test else "val"
    return Parts(
        prepared.train,
        prepared.val,
        prepared.test,
        prepared.meta["data_lock"],
        str(part_path(folder, advisor, judged)),
    )


def _data_dir(config: Config, run: Run) -> Path:
    return Path(config.data.output_dir) if config.data.output_dir else run.folder / "data"


# --- model ----------------------------------------------------------------------------------


def _load_base(config: Config, run: Run) -> tuple[Base, FeatureStore]:
    from .model.backend import describe
    from .model.base import load_base
    from .model.features import FeatureStore

    with run.console.status("loading the base model"):
        base = load_base(
            config.model.path,
            dtype=config.model.dtype,
            quantize_bits=config.model.quantize_bits,
        )
    run.record(base=asdict(base.identity), backend=describe())
    run.console.print(
        f"Base:     {base.identity.name}, {base.identity.dtype}, {describe()}", markup=False
    )
    return base, FeatureStore(base.backbone)


def _pixel_settings(config: Config) -> PixelSettings:
    from .data.pixels import PixelSettings

    return PixelSettings(config.data.min_pixels, config.data.max_pixels)


def _pixel_facts(base: Base, settings: PixelSettings) -> dict[str, Any]:
    from .data.pixels import fingerprint

    return {**asdict(settings), "fingerprint": fingerprint(base.image_processor, settings)}


def _encode(config: Config, run: Run, base: Base, rows: Sequence[Row]) -> list[Example]:
    """Rows as the model takes them; one that is too long is named and left out."""
    from .data.batches import TooLong, encode

    settings = _pixel_settings(config)
    longest = int(base.backbone.longest)
    examples = []
    for row in rows:
        try:
            examples.append(
                encode(
                    row,
                    base,
                    base.image_processor,
                    settings,
                    base.backbone.image_token,
                    longest=longest,
                )
            )
        except TooLong as error:
            run.warn(str(error))
    return examples


# --- training -------------------------------------------------------------------------------


def _train(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    folder: Path,
) -> tuple[Adapter, float | None]:
    """Train, and write the adapter directory. Returns it and its validation loss."""
    from .config import as_dict
    from .data.batches import BatchStream
    from .data.prompt import fingerprint
    from .model import adapter as adapters
    from .model import lora
    from .training import callbacks, optim, preflight
    from .training.checkpoint import CheckpointDir
    from .training.trainer import Trainer

    if not parts.train:
        raise DataError("there are no rows to train on; give data.train_split a share")
    examples = _encode(config, run, base, parts.train)
    validation = _encode(config, run, base, parts.val)
    if not examples:
        raise DataError("every training row is too long for the model; lower data.max_pixels")
    stream = BatchStream(
        examples,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        pad_token=base.pad_token,
    )
    updates = -(-stream.per_epoch // config.trainer.accumulate)
    total = updates * config.trainer.epochs
    if config.trainer.max_steps is not None:
        total = min(total, config.trainer.max_steps)
    for sentence in preflight.warnings(
        total=total,
        warmup=config.optimizer.warmup_steps,
        peak=config.optimizer.learning_rate,
        save_every=config.trainer.save_every,
        batch_size=config.trainer.batch_size,
        rows=len(examples),
    ):
        run.warn(sentence)
    checks = preflight.check(base, examples, features)

    spec = lora.LoraSpec(
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        targets=tuple(config.lora.target_modules),
        method=str(config.lora.method),
    )
    lora.attach(base.model, spec, seed=config.trainer.seed)
    tensors = lora.tensors(base.model)
    preflight.check_space(folder, sum(value.nbytes for value in tensors.values()))
    run.console.print(
        f"Training: {len(examples)} rows, {total} updates, "
        f"{sum(value.size for value in tensors.values()):,} trained parameters",
        markup=False,
    )
    pixel_facts = _pixel_facts(base, _pixel_settings(config))
    plain = as_dict(config)
    identity = {
        f"{group}.{key}": value
        for group in ("lora", "optimizer", "trainer")
        for key, value in plain[group].items()
        if key != "resume"
    }
    identity |= {
        "data lock": parts.lock,
        "base weights": base.identity.weights,
        "base quantisation": base.identity.quantization,
        "pixels": pixel_facts["fingerprint"],
    }
    checkpoints = CheckpointDir(folder / "checkpoints", identity)
    start = _checkpoint_to_resume(config, run, checkpoints, folder)
    rate = optim.learning_rate(
        config.optimizer.learning_rate,
        warmup=config.optimizer.warmup_steps,
        total=total,
        schedule=str(config.optimizer.schedule),
    )
    optimizer = getattr(optim, config.optimizer.name)(
        rate, weight_decay=config.optimizer.weight_decay
    )
    optimizer.init(base.model.trainable_parameters())
    trainer = Trainer(
        base.backbone,
        optimizer,
        stream,
        features,
        validation,
        checkpoints,
        max_steps=total,
        accumulate=config.trainer.accumulate,
        max_grad_norm=config.optimizer.max_grad_norm,
        save_every=config.trainer.save_every,
        eval_every=config.trainer.eval_every or updates,
        patience=config.trainer.patience,
        grad_checkpoint=config.trainer.grad_checkpoint,
    )
    if start is not None:
        checkpoints.restore(trainer, start)
        run.console.print(f"Resumed after update {trainer.state.step}.", markup=False)
    progress = callbacks.Progress(run.console, total, trainer.state.step)
    trainer.callbacks = [callbacks.Logging(run.tracker.log), progress]
    try:
        with progress:
            result = trainer.fit()
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with: {_resume_command(config, run, folder)}") from None

    state = result.state
    kept = checkpoints.best() if parts.test and state.best_step is not None else checkpoints.last()
    if kept is None:
        raise TrainingError(f"no checkpoint was left in {checkpoints.folder}")
    checkpoints.load_adapter(kept, base.model)
    base.model.eval()
    step = int(kept.name.removeprefix("step_"))
    loss = state.best_loss if step == state.best_step else state.val_loss
    adapter = adapters.save(
        folder,
        base,
        spec,
        pixels=pixel_facts,
        prompts=sorted({fingerprint(row.prompt) for row in parts.train}),
        data_lock=parts.lock,
        facts={
            "advisor": config.data.advisor,
            "config_hash": run.config_hash,
            "training": {
                "updates": state.step,
                "kept_update": step,
                "kept": "best validation loss"
                if step == state.best_step and parts.test
                else "last",
                "val_loss": loss,
                "rows": len(examples),
                "rows_seen": sum(1 for count in state.visits if count),
                "stopped_early": result.stopped_early,
                "seconds": round(result.seconds, 1),
            },
            "preflight": checks,
            "trained_on": sorted({row.image_sha256 for row in parts.train}),
        },
    )
    atomic_write_json(folder / "training_args.json", plain)
    log = run.folder / "training_log.jsonl"
    if log.is_file():
        atomic_write_bytes(folder / "training_log.jsonl", log.read_bytes())
    run.record(
        adapter={"folder": str(folder), "hash": adapter.hash}, training=adapter.manifest["training"]
    )
    run.tracker.summary({"val_loss": loss, "adapter_hash": adapter.hash})
    _write_card(adapter, None)
    return adapter, loss


def _checkpoint_to_resume(config: Config, run: Run, checkpoints: Any, folder: Path) -> Path | None:
    """Where to go on from, None to start afresh; an earlier run's files are moved aside."""
    wish = config.trainer.resume
    if wish == "never":
        earlier = [folder / "manifest.json", checkpoints.folder]
        if any(path.exists() for path in earlier):
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            aside = folder.with_name(f"{folder.name}.before-{stamp}")
            shutil.move(folder, aside)
            run.warn(f"{folder} held an earlier run, which is now in {aside}")
        return None
    if wish == "auto":
        return checkpoints.last()
    path = Path(wish)
    if not path.is_dir():
        raise TrainingError(f"trainer.resume={wish} is no folder; give never, auto or a checkpoint")
    return path


# --- evaluation -----------------------------------------------------------------------------


def _evaluate(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    adapter: Adapter | None,
) -> dict[str, Any]:
    """Compare the arms, write the reports, and return the comparison."""
    from .evaluation import comparison
    from .evaluation.evaluator import Evaluator
    from .report import html

    rows = parts.judged[: config.eval.max_examples]
    if not rows:
        raise DataError(
            "there are no held-out rows to evaluate; give data.val_split or data.test_split a share"
        )
    if adapter is not None:
        _check_unseen(adapter, rows)
    examples = _encode(config, run, base, rows)
    if not examples:
        raise DataError("every held-out row is too long for the model; lower data.max_pixels")
    arms = [str(arm) for arm in config.eval.arms if adapter is not None or arm == "base"]
    evaluator = Evaluator(
        base,
        features,
        max_tokens=config.eval.max_tokens,
        batch_size=config.eval.batch_size,
        temperature=config.eval.temperature,
        seed=config.trainer.seed,
    )
    run.console.print(f"Evaluating {len(examples)} held-out photographs.", markup=False)
    with run.console.status("answering") as status:
        outputs = evaluator.run(
            examples, arms, lambda arm, done: status.update(f"{arm}: {done} of {len(examples)}")
        )
    report = comparison.build(
        rows=[example.row for example in examples],
        arms=outputs,
        train_rows=parts.train,
        base_model=base.identity.name,
        lora_path=str(adapter.folder) if adapter else None,
        validation_data=parts.source,
        settings={
            "max_tokens": config.eval.max_tokens or evaluator.limit(examples),
            "batch_size": config.eval.batch_size,
            "temperature": config.eval.temperature,
            "pixels": _pixel_facts(base, _pixel_settings(config)),
            "data_lock": parts.lock,
            "base": asdict(base.identity),
        },
        adapter_hash=adapter.hash if adapter else None,
    )
    path = Path(config.eval.report) if config.eval.report else None
    path = path or run.folder / "evaluation" / "comparison_report.json"
    atomic_write_json(path, report)
    facts = json.loads((run.folder / "run.json").read_text())
    log = run.folder / "training_log.jsonl"
    if not log.is_file() and adapter is not None:
        log = adapter.folder / "training_log.jsonl"
    page = html.write(report, log, facts, run.folder / "report.html")
    atomic_write_bytes(path.parent / "report.html", page.read_bytes())
    if adapter is not None:
        _attach_evaluation(adapter, report, page)
    evidence = report["evidence"]
    run.record(evaluation={"report": str(path), "verdict": evidence["verdict"]})
    run.tracker.summary(
        {
            f"{arm}/{key}": facts_of[key]
            for arm, facts_of in evidence["arms"].items()
            for key in ("format_strict", "score_mae")
            if facts_of.get(key) is not None
        }
        | {"verdict": evidence["verdict"]}
    )
    return report


def _attach_evaluation(adapter: Adapter, report: dict[str, Any], page: Path) -> None:
    """Put the evaluation beside the weights it is about; a registered version is left as it is."""
    folder = adapter.folder / "evaluation"
    try:
        atomic_write_json(folder / "comparison_report.json", report)
    except PermissionError:
        return
    atomic_write_bytes(folder / "report.html", page.read_bytes())
    _write_card(adapter, report)


def _check_unseen(adapter: Adapter, rows: Sequence[Row]) -> None:
    """Refuse to judge an adapter on photographs it was trained on."""
    seen = set(adapter.manifest.get("trained_on", []))
    known = [row for row in rows if row.image_sha256 in seen]
    if known:
        raise DataError(
            f"{len(known)} of {len(rows)} photographs to evaluate were trained on by "
            f"{adapter.folder.name}, {known[0].image_path.name} first; evaluate on the split it "
            "was trained with (data.output_dir), or on other photographs"
        )


def _write_card(adapter: Adapter, report: dict[str, Any] | None) -> None:
    from .report.card import card

    atomic_write_text(adapter.folder / "README.md", card(adapter.manifest, report))


# --- registry -------------------------------------------------------------------------------


def _register(config: Config, run: Run, folder: Path) -> str:
    from . import registry

    version = registry.register(
        Path(config.registry.root),
        _registry_name(config),
        folder,
        facts={"run": str(run.folder), "config_hash": run.config_hash},
    )
    run.record(registered={"name": _registry_name(config), "version": version.version})
    run.console.print(f"Registered as {_registry_name(config)} {version.version}.", markup=False)
    return version.version


def _registry_name(config: Config) -> str:
    if config.registry.name is not None:
        return config.registry.name
    model = "sample" if config.model.path is None else Path(config.model.path).name
    return f"{model}-{config.data.advisor or 'all'}".lower()


def _find_adapter(name: str, config: Config) -> Path:
    """An adapter directory, or a version or channel of the registry."""
    if Path(name).exists() or "/" in name:
        return Path(name)
    from . import registry

    return registry.resolve(Path(config.registry.root), _registry_name(config), name)


# --- words ----------------------------------------------------------------------------------


def _adapter_dir(output_dir: str | None, run: Run) -> Path:
    return Path(output_dir) if output_dir else run.folder / "adapter"


def _near(path: Path) -> str:
    return screen.near(path)


def _command(*overrides: str) -> str:
    """A command with this run's own choices of model, data and experiment, and the given ones."""
    kept = [
        word
        for word in sys.argv[1:]
        if word.lstrip("+").startswith(("experiment=", "model", "data", "registry"))
        and not word.startswith(tuple(f"{over.split('=')[0]}=" for over in overrides))
    ]
    return " ".join(["python -m mondrian_ft", *kept, *overrides])


def _resume_command(config: Config, run: Run, folder: Path) -> str:
    dropped = ("trainer.resume=", "task.output_dir=", "data.output_dir=")
    kept = [word for word in sys.argv[1:] if not word.startswith(dropped)]
    data = _near(_data_dir(config, run))
    added = [f"task.output_dir={_near(folder)}", f"data.output_dir={data}", "trainer.resume=auto"]
    return " ".join(["python -m mondrian_ft", *kept, *added])
