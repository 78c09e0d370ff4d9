"""The preflight in the terminal: each check a sentence, each refusal before the first update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.batches import Example
from ..errors import ModelError, MondrianError, TrainingError
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
from ..model.targets import ranges
from ..report import memory_screen
from ..training import memory as planner
from ..training import preflight, trial
from . import planning

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run


def base(
    config: Config, run: Run, base: Base, examples: Sequence[Example], features: FeatureStore
) -> dict[str, Any]:
    """What is asked of the base and the rows, before an adapter is put in. Returns what was found.

    Raises:
        TrainingError: a check is not passed.
    """
    run.console.print("Preflight", style="bold")
    plan = memory_plan(config, base, examples)
    if plan is not None:
        text = memory_screen.sentence(plan)
        if plan["fits"] is False:
            run.warn(f"{text}; task=memory tells more")
        else:
            _tell(run, "memory", text)
    found: dict[str, Any] = preflight.check(base, examples, features)
    rows = "1 row" if len(examples) == 1 else f"{len(examples):,} rows"
    _tell(
        run,
        "masks",
        f"{rows}: what is trained begins with {{ and ends with the end token, and no image token "
        "is trained",
    )
    _tell(
        run,
        "pictures",
        f"the loss of row {examples[0].row.job_id} is {found['loss']:.3f} with its own picture, "
        f"{found['loss_shuffled']:.3f} with another, {found['loss_blank']:.3f} with none",
    )
    return found | ({} if plan is None else {"predicted_peak": plan["bytes"]["total"]})


def adapter(
    config: Config,
    run: Run,
    base: Base,
    examples: Sequence[Example],
    features: FeatureStore,
    folder: Path,
) -> dict[str, Any]:
    """What is asked once the adapter is in the model. Returns what was found.

    Raises:
        TrainingError: a check is not passed.
    """
    what = trial.attached(base)
    parts = []
    if what.matrices:
        kinds = ", ".join(what.kinds)
        parts.append(f"{what.matrices} matrices ({kinds} of layers {ranges(what.layers)})")
    if what.vision:
        kinds = ", ".join(what.vision_kinds)
        parts.append(f"{what.vision} matrices of the vision tower ({kinds})")
    _tell(
        run,
        "adapter",
        f"{' and '.join(parts)}, {what.parameters:,} numbers; they are trained and nothing else is",
    )
    shortest = min(examples, key=lambda one: len(one.tokens))
    try:
        tried = trial.first_step(
            base, shortest, features, checkpoint=config.trainer.grad_checkpoint
        )
    except (MemoryError, RuntimeError) as error:
        spent = out_of_memory(error, config, base, examples, 0)
        if spent is None:
            raise
        raise spent from error
    _tell(
        run,
        "first step",
        f"one step on row {shortest.row.job_id} takes its loss from {tried.before:.4f} to "
        f"{tried.after:.4f}, and was undone",
    )
    size = sum(value.nbytes for value in lora.tensors(base.model).values())
    needed, free = preflight.check_space(folder, size)
    _tell(
        run,
        "disk",
        f"checkpoints take {needed / 1e9:.2f} GB at most, of {free / 1e9:.1f} GB that are free",
    )
    return {"step_before": tried.before, "step_after": tried.after}


def memory_plan(config: Config, base: Base, examples: Sequence[Example]) -> dict[str, Any] | None:
    """What ``task=memory`` would say of these rows; None where it knows no such model."""
    rows = [planner.Row(len(one.tokens), one.pixels.tokens, one.supervised) for one in examples]
    images = len({one.row.image_sha256 for one in examples})
    model = json.loads((base.folder / "config.json").read_text())
    try:
        return planning.plan_of(config, model, rows, images, base.image_processor)
    except ModelError:
        return None


def out_of_memory(
    error: BaseException, config: Config, base: Base, examples: Sequence[Example], step: int
) -> MondrianError | None:
    """What to raise instead of an allocation that failed; None where it is something else."""
    if not planner.is_out_of_memory(error):
        return None
    start = f"update {step + 1} ran out of memory"
    plan = memory_plan(config, base, examples)
    if plan is None:
        return TrainingError(f"{start}; lower trainer.batch_size or data.max_pixels")
    total = plan["bytes"]["total"]
    limit = total if plan["limit"] is None else min(total, plan["limit"]["bytes"])
    # It did not fit, whatever was predicted: only what takes a good deal less is worth a try.
    changes = [
        planner.Change(tuple(one["overrides"]), one["alone"], one["together"], one["costs"])
        for one in plan["changes"]
    ]
    least = planner.cheapest(changes, int(0.9 * limit))
    said = f"{start}; its peak was predicted at {memory_screen.gigabytes(total)}"
    if least is None:
        return TrainingError(f"{said}; use a smaller model, or close what else uses the memory")
    keys = " ".join(least[0])
    return TrainingError(
        f"{said}; the least that should help is {keys}, "
        f"{memory_screen.gigabytes(least[1])}; task=memory lists more"
    )


def _tell(run: Run, name: str, sentence: str) -> None:
    run.console.print(f"  {name:<11} {sentence}.", soft_wrap=True, markup=False, highlight=False)
