"""Will it fit? The peak of a run before anything is loaded, and what would lower it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.pixels import PixelSettings, count_tokens
from ..errors import DataError
from ..files import atomic_write_json
from ..model import targets
from ..model.backend import default_dtype
from ..model.front import load_front
from ..model.machine import memory_kind, memory_limit
from ..report import memory_screen
from ..sample import MODEL_NAME, model_dir
from ..training import memory as planner
from . import rows as data

if TYPE_CHECKING:
    from .. import tasks
    from ..config import Config
    from ..run import Run

NUMBERS = "memory.json"


def memory(task: tasks.Memory, config: Config, run: Run) -> None:
    """Predict the peak of training, and show what would lower it.

    Raises:
        DataError: there are no rows, or a photograph cannot be read.
        ModelError: the model's files cannot be read, or it is no Qwen3-VL.
    """
    parts = data.load(config, run)
    front = load_front(config.model.path or model_dir(), name=config.model.path or MODEL_NAME)
    settings = PixelSettings(config.data.min_pixels, config.data.max_pixels)
    counted = []
    for row in parts.train:
        image = count_tokens(row.image_path, front.image_processor, settings)
        prompt = len(front.encoder.prompt_tokens(row.prompt, image))
        answer = len(front.encoder.answer_tokens(row.response))
        counted.append(planner.Row(prompt + answer, image, answer))
    images = len({row.image_sha256 for row in parts.train})
    plan = plan_of(config, front.config, counted, images, front.image_processor)
    path = run.folder / NUMBERS
    atomic_write_json(path, plan)
    run.record(memory=plan)
    memory_screen.show(run.console, plan, page=path)


def plan_of(
    config: Config,
    model: Mapping[str, Any],
    rows: Sequence[planner.Row],
    images: int,
    image_processor: Any,
) -> dict[str, Any]:
    """The predicted peak, the limit, and what would lower it, as JSON holds it.

    Args:
        model: the model's ``config.json``.
        rows: token counts of the training rows.
        images: photographs among them.
        image_processor: the model's, for the size of its patches.

    Raises:
        DataError: there are no rows.
        ModelError: it is no Qwen3-VL.
    """
    if not rows:
        raise DataError("there are no rows to train on; give data.train_split a share")
    shape = planner.Shape.of(model)
    kind = memory_kind()
    costs = planner.COSTS[kind]
    setting = setting_of(config, model, images)
    found = planner.predict(shape, setting, rows, costs)
    side = image_processor.patch_size * image_processor.merge_size
    lower = planner.changes(
        shape,
        setting,
        rows,
        costs,
        accumulate=config.trainer.accumulate,
        token_pixels=side**2,
    )
    limit = memory_limit()
    advice = None
    if limit is not None and found.total > limit[0]:
        advice = planner.cheapest(lower, limit[0])
    lengths = sorted(row.tokens for row in rows)
    return {
        "backend": kind,
        "measured_backend": costs.measured,
        "rows": len(rows),
        "tokens": {
            "min": lengths[0],
            "median": lengths[len(lengths) // 2],
            "max": lengths[-1],
            "image_max": max(row.image_tokens for row in rows),
            "histogram": histogram(lengths),
        },
        "batch": {"rows": found.rows, "tokens": found.row_tokens},
        "bytes": {
            "weights": found.weights,
            "adapter": found.adapter,
            "features": found.features,
            "activations": found.activations,
            "work": found.work,
            "total": found.total,
        },
        "limit": None if limit is None else {"bytes": limit[0], "what": limit[1]},
        "fits": None if limit is None else found.total <= limit[0],
        "changes": [
            {
                "overrides": list(change.overrides),
                "costs": change.costs,
                "alone": change.alone,
                "together": change.together,
            }
            for change in lower
        ],
        "advice": None if advice is None else {"overrides": list(advice[0]), "bytes": advice[1]},
    }


def histogram(lengths: Sequence[int], bins: int = 8) -> list[dict[str, int]]:
    """How many rows have how many tokens, in equal steps; ``upto`` is inclusive."""
    step = max(1, -(-(max(lengths) - min(lengths) + 1) // bins))
    counts: dict[int, int] = {}
    for length in lengths:
        end = min(lengths) + ((length - min(lengths)) // step + 1) * step - 1
        counts[end] = counts.get(end, 0) + 1
    return [{"upto": end, "rows": counts[end]} for end in sorted(counts)]


def setting_of(config: Config, model: Mapping[str, Any], images: int) -> planner.Setting:
    """What of a config matters for memory."""
    stored = model.get("quantization") or {}
    dtype = str(config.model.dtype)
    wanted = str(default_dtype()).removeprefix("mlx.core.") if dtype == "auto" else dtype
    layers = None if config.lora.layers is None else targets.parse_layers(config.lora.layers)
    shape = planner.Shape.of(model)
    counts: dict[str, int] = {}
    for name in targets.matching(shape.names, config.lora.target_modules, layers):
        counts[targets.last(name)] = counts.get(targets.last(name), 0) + 1
    return planner.Setting(
        batch=config.trainer.batch_size,
        checkpoint=config.trainer.grad_checkpoint,
        itemsize=4 if wanted == "float32" else 2,
        bits=config.model.quantize_bits or stored.get("bits"),
        rank=config.lora.rank,
        adapted=tuple(sorted(counts.items())),
        magnitudes=str(config.lora.method) == "dora",
        images=0 if config.lora.vision else images,
        vision=tuple(targets.matching_vision(list(shape.tower_matrices), config.lora.vision)),
    )
