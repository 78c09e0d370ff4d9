"""What is checked before the first update: cheap questions whose wrong answers cost a night."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..data.batches import Example, collate
from ..errors import TrainingError
from ..model.backend import mx, number
from ..model.base import Base
from ..model.features import FeatureStore
from ..model.qwen3_vl import VisionFeatures, assemble
from .loss import token_losses
from .optim import peak_reached


def check(base: Base, examples: Sequence[Example], features: FeatureStore) -> dict[str, float]:
    """Check masks and that the picture reaches the model.

    Args:
        base: the model that will be trained.
        examples: the training rows.
        features: their pictures.

    Returns:
        ``loss`` of a row with its own picture and ``loss_blank`` with an empty one, in nats.

    Raises:
        TrainingError: an answer does not begin with ``{``, its end is not trained, a special token
            stands inside it, the loss is not finite, or the picture changes nothing.
    """
    special = {base.backbone.image_token, *base.end_tokens, *base.tokenizer.all_special_ids}
    for example in examples:
        answer = example.tokens[example.prompt_length :]
        if not base.text(answer[:4].tolist()).lstrip().startswith("{"):
            raise TrainingError(
                f"row {example.row.job_id}: the first trained tokens are "
                f"{base.text(answer[:4].tolist())!r}, not the start of a JSON object"
            )
        if int(answer[-1]) not in base.end_tokens:
            raise TrainingError(f"row {example.row.job_id}: the end of the answer is not trained")
        for token in answer[:-1].tolist():
            if token in special:
                raise TrainingError(
                    f"row {example.row.job_id}: its answer holds {base.tokenizer.decode([token])}, "
                    "which the model takes for a sign of its own; take it out of the analysis"
                )
    return _picture_matters(base, examples[0], features)


def _picture_matters(base: Base, example: Example, features: FeatureStore) -> dict[str, float]:
    own = features.get([(example.row.image_sha256, example.pixels)])[0]
    blank = VisionFeatures(own.features * 0, tuple(level * 0 for level in own.deepstack))
    batch = collate([example], [0], base.pad_token)

    def loss(picture: VisionFeatures) -> float:
        inputs, _ = assemble(
            batch.tokens,
            [len(example.tokens)],
            [picture],
            [example.pixels.grid],
            image_token=base.backbone.image_token,
            merge=base.backbone.merge,
        )
        flat = batch.targets.reshape(-1)
        where = mx.array([at for at, token in enumerate(flat.tolist()) if token >= 0])
        wanted = mx.array(flat[flat >= 0])
        return number(token_losses(base.backbone, inputs, where, wanted).mean())

    seen, unseen = loss(own), loss(blank)
    if not math.isfinite(seen):
        raise TrainingError(
            f"the loss of row {example.row.job_id} is {seen:g} before any training; the base's "
            "weights are damaged, or model.dtype is too narrow"
        )
    if seen == unseen:
        raise TrainingError(
            f"the picture of row {example.row.job_id} makes no difference to the loss ({seen:.4f} "
            "with and without it): the model is not being shown the photographs"
        )
    return {"loss": seen, "loss_blank": unseen}


def warnings(
    *,
    total: int,
    warmup: int,
    peak: float,
    save_every: int,
    batch_size: int,
    rows: int,
) -> list[str]:
    """Sentences about settings that are obeyed but surely not meant.

    Args:
        total: updates of the run.
        warmup, peak: of the learning rate.
        save_every: updates between checkpoints.
        batch_size, rows: of the training data.
    """
    found = []
    length = "1 update" if total == 1 else f"{total} updates"
    if warmup > total:
        reached = peak_reached(peak, warmup=warmup, total=total)
        found.append(
            f"optimizer.warmup_steps={warmup} is longer than the whole run of {length}: the "
            f"learning rate peaks at {reached:.2g} and never reaches {peak:g}"
        )
    elif warmup * 2 > total:
        found.append(
            f"optimizer.warmup_steps={warmup} takes up most of the run of {length}; the "
            f"learning rate peaks at {peak:g} in update {max(1, warmup)}"
        )
    if save_every > total:
        found.append(
            f"trainer.save_every={save_every} never comes in a run of {length}; checkpoints "
            "are written at each evaluation and at the end"
        )
    if rows < batch_size:
        found.append(
            f"trainer.batch_size={batch_size} is more than the {rows} training "
            f"{'row' if rows == 1 else 'rows'}; every batch has {rows}"
        )
    return found


def check_space(folder: Path, adapter_bytes: int) -> None:
    """Refuse to start where the checkpoints will not fit.

    A checkpoint holds the adapter and two moments of it; the last two, the best and one being
    written are there at once, and the adapter itself.

    Raises:
        TrainingError: the disk has less space than that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = adapter_bytes * (3 * 4 + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder} has {free / 1e9:.2f} GB free, training needs {needed / 1e9:.2f} GB for its "
            "checkpoints; free some space or choose another task.output_dir"
        )
