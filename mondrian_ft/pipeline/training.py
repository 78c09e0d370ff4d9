"""Loading the base, training on it, and writing the adapter directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.batches import BatchStream, Example, TooLong, encode
from ..data.pixels import PixelSettings, fingerprint
from ..data.prompt import fingerprint as prompt_fingerprint
from ..data.rows import Row
from ..errors import DataError, Interrupted, TrainingError
from ..evaluation.probing import probe_inputs
from ..files import atomic_write_bytes, atomic_write_json
from ..model import adapter as adapters
from ..model import lora
from ..model.adapter import Adapter
from ..model.backend import describe, size_graphs
from ..model.base import Base, load_base
from ..model.features import FeatureCache, FeatureStore
from ..report.card import write_card
from ..sample import MODEL_NAME, model_dir
from ..training import bounds, callbacks, optim, preflight
from ..training.checkpoint import CheckpointDir
from ..training.trainer import Trainer
from .places import VISION_FEATURES
from .rows import Parts
from .words import resume_command

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run

_WRITTEN = (
    adapters.WEIGHTS,
    adapters.CONFIG,
    adapters.MANIFEST,
    "training_args.json",
    "training_log.jsonl",
    "README.md",
    "checkpoints",
    "evaluation",
)
"""What a run leaves in its adapter directory."""


def load_base_of(
    config: Config, run: Run, *, lazy: bool = False, to_train: bool = False
) -> tuple[Base, FeatureStore]:
    """The base model the config names, and a store for its view of photographs.

    ``lazy`` leaves the weights on the disk, for who only needs the tokenizer and the pictures;
    ``to_train`` is for who will train.
    """
    if to_train:
        size_graphs(small=config.trainer.grad_checkpoint)
    with run.console.status("loading the base model"):
        base = load_base(
            config.model.path or model_dir(),
            name=config.model.path or MODEL_NAME,
            dtype=config.model.dtype,
            quantize_bits=config.model.quantize_bits,
            lazy=lazy,
        )
    run.record(base=asdict(base.identity), backend=describe())
    run.console.print(
        f"Base:     {base.identity.name}, {base.identity.dtype}, {describe()}", markup=False
    )
    cache = FeatureCache(
        VISION_FEATURES.absolute(),
        base.backbone,
        pixels=fingerprint(base.image_processor, pixel_settings(config)),
        notice=run.warn,
    )
    return base, FeatureStore(base.backbone, disk=cache)


def pixel_settings(config: Config) -> PixelSettings:
    """Bounds on a photograph's pixels, from the config."""
    return PixelSettings(config.data.min_pixels, config.data.max_pixels)


def pixel_facts(base: Base, settings: PixelSettings) -> dict[str, Any]:
    """The settings and the fingerprint of the pixel pipeline, as an adapter records them."""
    return {**asdict(settings), "fingerprint": fingerprint(base.image_processor, settings)}


def encode_rows(
    config: Config,
    run: Run,
    base: Base,
    rows: Sequence[Row],
    features: FeatureStore | None = None,
) -> list[Example]:
    """Rows as the model takes them; one that is too long is named and left out.

    With ``features`` no photograph is decoded whose features are there, and none is held.
    """

    settings = pixel_settings(config)
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
                    known=features.has if features is not None else None,
                )
            )
        except TooLong as error:
            run.warn(str(error))
    return examples


def training_stream(
    config: Config,
    run: Run,
    base: Base,
    rows: Sequence[Row],
    features: FeatureStore | None = None,
) -> BatchStream:
    """The batches of a run: what the trainer gets, and what ``task=inspect`` shows.

    Raises:
        DataError: there are no rows, a photograph cannot be read, or every row is too long.
    """
    if not rows:
        raise DataError("there are no rows to train on; give data.train_split a share")
    examples = encode_rows(config, run, base, rows, features)
    if not examples:
        raise DataError("every training row is too long for the model; lower data.max_pixels")
    return BatchStream(
        examples,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        pad_token=base.pad_token,
        accumulate=config.trainer.accumulate,
    )


def train(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    folder: Path,
) -> tuple[Adapter, float | None]:
    """Train, and write the adapter directory. Returns it and its validation loss."""

    stream = training_stream(config, run, base, parts.train, features)
    examples = stream.examples
    validation = encode_rows(config, run, base, parts.val, features)
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
    pixels = pixel_facts(base, pixel_settings(config))
    plain = run.resolved
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
        "pixels": pixels["fingerprint"],
    }
    log = run.folder / "training_log.jsonl"
    checkpoints = CheckpointDir(folder / "checkpoints", identity, log=log)
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
    longest = max(len(example.tokens) for example in examples)
    width = int(base.backbone.text.norm.weight.size)
    largest = min(config.trainer.batch_size, len(examples)) * longest * width
    checkpointed = config.trainer.grad_checkpoint
    try:
        with (
            progress,
            bounds.bounded(largest, checkpoint=checkpointed),
            bounds.told_what_to_change(
                checkpoint=checkpointed,
                batch_size=config.trainer.batch_size,
                quantized=base.identity.quantization != "none",
            ),
        ):
            result = trainer.fit()
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with: {resume_command(config, run, folder)}") from None

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
        pixels=pixels,
        prompts=sorted({prompt_fingerprint(row.prompt) for row in parts.train}),
        data_lock=parts.lock,
        probe=probe_inputs(base, pixel_settings(config)),
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
    if log.is_file():
        atomic_write_bytes(folder / "training_log.jsonl", log.read_bytes())
    run.record(
        adapter={"folder": str(folder), "hash": adapter.hash}, training=adapter.manifest["training"]
    )
    run.tracker.summary({"val_loss": loss, "adapter_hash": adapter.hash})
    write_card(folder, adapter.manifest, None)
    return adapter, loss


def _checkpoint_to_resume(config: Config, run: Run, checkpoints: Any, folder: Path) -> Path | None:
    """Where to go on from, None to start afresh; an earlier run's files are moved aside."""
    wish = config.trainer.resume
    if wish == "never":
        # Only what a run writes is moved: the folder may hold, or be, something else as well.
        earlier = [folder / name for name in _WRITTEN if (folder / name).exists()]
        if (folder / adapters.MANIFEST).exists() or checkpoints.folder.exists():
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            aside = folder / f"before-{stamp}"
            aside.mkdir(parents=True)
            for path in earlier:
                shutil.move(path, aside / path.name)
            run.warn(f"{folder} held an earlier run, which is now in {aside}")
        return None
    if wish == "auto":
        return checkpoints.last()
    path = Path(wish)
    if not path.is_dir():
        raise TrainingError(f"trainer.resume={wish} is no folder; give never, auto or a checkpoint")
    return path
