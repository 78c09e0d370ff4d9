"""Loading the base, training on it, and writing the adapter directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.batches import BatchStream, Example, TooLong, encode
from ..data.pixels import PixelSettings, fingerprint
from ..data.prompt import fingerprint as prompt_fingerprint
from ..data.rows import Row
from ..errors import DataError, Interrupted, PeerLost, TrainingError
from ..evaluation import evidence, metrics
from ..evaluation.monitoring import AnswerMonitor
from ..evaluation.probing import probe_inputs
from ..files import atomic_write_bytes, atomic_write_json
from ..model import adapter as adapters
from ..model import lora
from ..model.adapter import Adapter
from ..model.backend import describe, size_graphs
from ..model.base import Base, load_base
from ..model.features import FeatureCache, FeatureStore
from ..model.machine import RESTS_FROM
from ..model.targets import parse_layers
from ..report.card import write_card
from ..sample import MODEL_NAME, model_dir
from ..training import bounds, callbacks, lock, optim, parallel, preflight
from ..training.checkpoint import CheckpointDir
from ..training.parallel import ALONE, World
from ..training.trainer import Callback, Trainer, TrainState
from . import checking, inputs, resuming, together
from .places import VISION_FEATURES
from .rows import Parts
from .words import resume_command

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


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
            other_precision=config.model.allow_other_precision,
            notice=_once(run.warn),
        )
    run.record(base=asdict(base.identity), backend=describe())
    run.console.print(
        f"Base:     {base.identity.name}, {base.identity.dtype}, {describe()}", markup=False
    )
    if base.plain:
        run.console.print(
            f"          a {base.backbone.model_type} model, by mlx-vlm's own forward: slower than "
            "qwen3_vl, and nothing of its pictures is kept",
            markup=False,
        )
        return base, FeatureStore(base.backbone)
    cache = FeatureCache(
        VISION_FEATURES.absolute(),
        base.backbone,
        pixels=fingerprint(base.image_processor, pixel_settings(config)),
        notice=run.warn,
    )
    return base, FeatureStore(base.backbone, disk=cache)


def _once(tell: Callable[[str], object]) -> Callable[[str], object]:
    """Tells each sentence the first time; an adapter may be put in many times in a run."""
    told: set[str] = set()

    def notice(sentence: str) -> None:
        if sentence not in told:
            told.add(sentence)
            tell(sentence)

    return notice


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


def lora_spec(config: Config) -> lora.LoraSpec:
    """The adapter that the config asks for."""
    return lora.LoraSpec(
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        targets=tuple(config.lora.target_modules),
        method=str(config.lora.method),
        layers=None if config.lora.layers is None else parse_layers(config.lora.layers),
        vision=tuple(config.lora.vision),
    )


def train(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    folder: Path,
    world: World = ALONE,
) -> tuple[Adapter | None, float | None]:
    """Train, and write the adapter directory. Returns it and its validation loss.

    Of processes that train together only the first one writes; the others have no adapter.

    Raises:
        TrainingError: another process trains into ``folder``, or the run cannot start or go on.
    """
    with lock.held(folder, run.warn):
        return _train(config, run, base, features, parts, folder, world)


def _train(
    config: Config,
    run: Run,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    folder: Path,
    world: World,
) -> tuple[Adapter | None, float | None]:
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
    checks = checking.base(config, run, base, examples, features) if world.first else {}

    spec = lora_spec(config)
    lora.attach(base.model, spec, seed=config.trainer.seed)
    tensors = lora.tensors(base.model)
    if world.first:
        checks |= checking.adapter(config, run, base, examples, features, folder)
    run.console.print(
        f"Training: {len(examples)} rows, {total} updates, "
        f"{sum(value.size for value in tensors.values()):,} trained parameters",
        markup=False,
    )
    pixels = pixel_facts(base, pixel_settings(config))
    identity = resuming.identity(run, base, parts, pixels["fingerprint"], processes=world.size)
    together.agree(world, run, identity, [one.row.job_id for one in examples], base.model)
    log = run.folder / "training_log.jsonl"
    checkpoints = CheckpointDir(folder / resuming.CHECKPOINTS, identity, log=log)
    own = folder == run.folder / "adapter"
    if world.first:
        start = resuming.checkpoint(config, run, checkpoints, folder, named=not own)
    else:
        start = None
    start = parallel.share_folder(world, start, run.folder)
    rate = optim.learning_rate(
        config.optimizer.learning_rate,
        warmup=config.optimizer.warmup_steps,
        total=total,
        schedule=str(config.optimizer.schedule),
    )
    optimizer = optim.build(
        str(config.optimizer.name),
        rate,
        weight_decay=config.optimizer.weight_decay,
        plus=config.lora.plus,
        vision=(config.optimizer.vision_learning_rate or config.optimizer.learning_rate)
        / config.optimizer.learning_rate,
    )
    optimizer.init(base.model.trainable_parameters())
    answers = monitor(config, base, features, parts, validation)
    trainer = Trainer(
        base.backbone,
        optimizer,
        stream,
        features,
        validation,
        checkpoints if world.first else parallel.Unwritten(),
        max_steps=total,
        accumulate=config.trainer.accumulate,
        max_grad_norm=config.optimizer.max_grad_norm,
        save_every=config.trainer.save_every,
        eval_every=config.trainer.eval_every or updates,
        patience=config.trainer.patience,
        monitor=answers,
        max_bad_steps=config.trainer.max_bad_steps,
        spike=config.trainer.spike,
        ema=config.trainer.ema,
        grad_checkpoint=config.trainer.grad_checkpoint,
        world=world,
    )
    if start is not None:
        checkpoints.restore(trainer, start)
        if world.first:
            checkpoints.adopt(start)
        run.console.print(f"Resumed after update {trainer.state.step}.", markup=False)
        run.record(resumed_from=str(start))
    if world.first:
        run.tracker.follow(checkpoints.folder, start)
        inputs.tell(config, run, parts)
    progress = callbacks.Progress(run.console, total, trainer.state.step)
    looking: list[Callback] = [
        callbacks.Logging(run.tracker.log, total, answers.name if answers else None),
        callbacks.Warnings(run.warn, trainer.fault),
        progress,
    ]
    if run.trial is not None:
        # Last, so that what makes a search give up is in the log.
        looking.append(
            callbacks.Reporting(run.trial, every=trainer.eval_every, monitored=answers is not None)
        )
    trainer.callbacks = looking
    rest_tower(base, features, [*examples, *validation])
    longest = max(len(example.tokens) for example in examples)
    largest = min(config.trainer.batch_size, len(examples)) * longest * base.backbone.width
    try:
        with progress, bounds.bounded(largest, checkpoint=config.trainer.grad_checkpoint):
            result = trainer.fit()
    except Interrupted as error:
        raise Interrupted(f"{error}; go on with: {resume_command(config, run, folder)}") from None
    except PeerLost as error:
        raise together.going_on(error, world, resume_command(config, run, folder)) from error
    except (MemoryError, RuntimeError) as error:
        spent = checking.out_of_memory(error, config, base, examples, trainer.state.step)
        if spent is None:
            raise
        raise spent from error

    state = result.state
    if not world.first:
        return None, state.val_loss
    kept = checkpoints.best() if parts.test and state.best_step is not None else checkpoints.last()
    if kept is None:
        raise TrainingError(f"no checkpoint was left in {checkpoints.folder}")
    checkpoints.load_adapter(kept, base.model)
    base.model.eval()
    step = int(kept.name.removeprefix("step_"))
    kept_as = f"best {answers.name}" if answers else "best validation loss"
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
                "kept": kept_as if step == state.best_step and parts.test else "last",
                "val_loss": loss,
                "rows": len(examples),
                "rows_too_long": len(parts.train) - len(examples),
                "rows_seen": sum(1 for count in state.visits if count),
                "bad_steps": state.bad_steps,
                "stopped_early": result.stopped_early,
                "seconds": round(result.seconds, 1),
            },
            "preflight": checks,
            "trained_on": sorted({row.image_sha256 for row in parts.train}),
        },
    )
    atomic_write_json(folder / "training_args.json", run.resolved)
    write_visits(run, examples, state)
    if answers is not None:
        value = state.best_value if step == state.best_step else state.value
        run.record(monitor={"name": answers.name, "value": value})
    if log.is_file():
        atomic_write_bytes(folder / "training_log.jsonl", log.read_bytes())
    run.record(
        adapter={"folder": str(folder), "hash": adapter.hash}, training=adapter.manifest["training"]
    )
    run.tracker.summary({"val_loss": loss, "adapter_hash": adapter.hash})
    write_card(folder, adapter.manifest, None)
    return adapter, loss


def rest_tower(base: Base, features: FeatureStore, examples: Sequence[Example]) -> None:
    """Photographs through a large tower before the first update, for it to leave memory then."""
    if features.disk is None or not base.backbone.keeps_features or base.tower_bytes < RESTS_FROM:
        return
    features.prepare([(one.row.image_sha256, one.pixels) for one in examples])
    base.rest_tower()


def monitor(
    config: Config,
    base: Base,
    features: FeatureStore,
    parts: Parts,
    validation: Sequence[Example],
) -> AnswerMonitor | None:
    """What ``trainer.monitor`` names; None for the validation loss, which is measured anyway.

    Raises:
        TrainingError: there are no validation rows to stop by or to ask.
    """
    name = str(config.trainer.monitor)
    asked = name != "val_loss"
    if not validation and (asked or config.trainer.patience is not None):
        key = f"trainer.monitor={name}" if asked else f"trainer.patience={config.trainer.patience}"
        raise TrainingError(
            f"{key} goes by validation rows, and there are none; give data.val_split a share"
        )
    if not asked:
        return None
    return AnswerMonitor(
        base,
        features,
        validation,
        name,
        rows=config.trainer.monitor_rows,
        batch_size=config.eval.batch_size,
        max_tokens=config.eval.max_tokens,
        dimensions=evidence.agreed_dimensions([metrics.read(row.response) for row in parts.train]),
    )


def write_visits(run: Run, examples: Sequence[Example], state: TrainState) -> None:
    """How often each row was trained on, as ``row_visits.json`` in the run folder."""
    counts = [
        {"job_id": one.row.job_id, "advisor": one.row.advisor, "visits": count}
        for one, count in zip(examples, state.visits, strict=True)
    ]
    atomic_write_json(run.folder / "row_visits.json", counts, levels=1)
