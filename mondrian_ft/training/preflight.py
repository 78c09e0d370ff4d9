"""What is checked before the first update: cheap questions whose wrong answers cost a night."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from ..data.batches import Batch, Example, collate, in_order
from ..errors import TrainingError
from ..model.backend import mx, number
from ..model.base import Base
from ..model.features import FeatureStore
from ..model.qwen3_vl import Unseen, VisionFeatures, assemble
from .loss import device_batch, token_losses
from .optim import peak_reached


def check(base: Base, examples: Sequence[Example], features: FeatureStore) -> dict[str, float]:
    """Check masks and that the pictures reach the model.

    Args:
        base: the model that will be trained.
        examples: the training rows.
        features: their pictures.

    Returns:
        ``loss`` of a row with its own picture, ``loss_shuffled`` with another row's, or with the
        pieces of its own in another order where no other has its size, and ``loss_blank`` with an
        empty one, in nats.

    Raises:
        TrainingError: a row does not pass a :class:`Check`, the loss is not finite, or the picture
            changes nothing, or all pictures are one.
    """
    for batch in in_order(examples, 1, base.pad_token):
        for fault in batch_faults(base, batch):
            raise TrainingError(fault.sentence)
    if base.plain:
        _looks_back_only(base, examples[0], features)
    return _picture_matters(base, examples, features)


def _looks_back_only(base: Base, example: Example, features: FeatureStore) -> None:
    """See that what a model says does not depend on what comes after.

    A forward that is not our own may mask in its own way; one that shows an answer's tokens to
    those before them learns to copy, and its loss looks splendid.
    """
    inputs, where, _ = device_batch(
        collate([example], [0], base.pad_token), base.backbone, features
    )
    changed = np.array(inputs.tokens)
    changed[0, -1] = changed[0, -2]
    if changed[0, -1] == np.array(inputs.tokens)[0, -1]:
        changed[0, -1] = base.pad_token
    other = replace(inputs, tokens=mx.array(changed))
    before, after = (base.backbone.hidden_at(one, where[:-1]) for one in (inputs, other))
    moved = number(mx.abs(before - after).max())
    if not moved <= 1e-3 * number(mx.abs(before).max()):
        raise TrainingError(
            f"{base.identity.name}, a {base.backbone.model_type}, lets tokens see what comes after "
            f"them (another last token moves earlier logits by {moved:.2g}), so it would learn to "
            "copy the answer; the installed mlx-vlm computes it in a way that cannot be trained"
        )


class Check(StrEnum):
    """What is asked of every row of a batch, in the order it is asked."""

    trained = "something is trained"
    next = "each trained target is the token that comes next, without a gap"
    start = "what is trained begins with {"
    end = "the token that ends the answer is trained, as the last one"
    special = "no control token stands inside the answer"
    image = "there are as many image tokens as the picture has squares"


@dataclass(frozen=True)
class Fault:
    """A check that a row of a batch did not pass.

    Attributes:
        row: the row's place in its batch.
        check: which one.
        sentence: what is wrong with which row, and what to do.
    """

    row: int
    check: Check
    sentence: str


def batch_faults(base: Base, batch: Batch) -> list[Fault]:
    """What is wrong with the tokens and targets of a batch, the arrays that the loss is taken over.

    Nothing is asked of what the rows were made of: a mask is wrong in a batch or nowhere.
    """
    special = {base.backbone.image_token, *base.end_tokens, *base.tokenizer.all_special_ids}
    found = []

    def fault(check: Check, sentence: str) -> None:
        found.append(Fault(row, check, f"row {example.row.job_id}: {sentence}"))

    for row, example in enumerate(batch.examples):
        where = np.flatnonzero(batch.targets[row] >= 0)
        trained = batch.targets[row][where].tolist()
        following = batch.tokens[row][where[0] + 1 : where[-1] + 2].tolist() if trained else []
        images = int((batch.tokens[row] == base.backbone.image_token).sum())
        inside = [token for token in trained[:-1] if token in special]
        if not trained:
            fault(
                Check.trained,
                "none of its tokens is trained, so it teaches nothing; see whether its response "
                "is empty",
            )
        elif trained != following:
            fault(
                Check.next,
                f"the {len(trained)} trained targets are not the {len(following)} tokens that "
                "follow each other there, which is a fault of the program; please report it",
            )
        # A token that spells { spells it first. Blanks before it are no part of the format.
        elif not base.tokenizer.decode(trained[:1]).startswith("{"):
            fault(
                Check.start,
                f"the first trained tokens are {base.tokenizer.decode(trained[:4])!r}, not the "
                "start of a JSON object; its response has to begin with {",
            )
        if trained and trained[-1] not in base.end_tokens:
            fault(
                Check.end,
                "the end of the answer is not trained (the last trained token is "
                f"{base.tokenizer.decode(trained[-1:])!r}), so the model would not learn to stop; "
                "use the tokenizer that the model came with",
            )
        if inside:
            fault(
                Check.special,
                f"its answer holds {base.tokenizer.decode(inside[:1])}, which the model takes for "
                "a sign of its own; take it out of the analysis",
            )
        if images != example.pixels.tokens:
            fault(
                Check.image,
                f"it holds {images} image tokens, but its picture has {example.pixels.tokens} "
                f"squares; take {base.tokenizer.decode([base.backbone.image_token])} out of its "
                "prompt and response",
            )
    return found


def _picture_matters(
    base: Base, examples: Sequence[Example], features: FeatureStore
) -> dict[str, float]:
    example = examples[0]
    own = features.get([(example.row.image_sha256, example.pixels)])[0]
    blank = own.blank()
    other = next(
        (
            one
            for one in examples
            if one.row.image_sha256 != example.row.image_sha256
            and one.pixels.grid == example.pixels.grid
        ),
        None,
    )
    if other is not None:
        (shuffled,) = features.get([(other.row.image_sha256, other.pixels)])
    else:
        shuffled = own.backwards()
    batch = collate([example], [0], base.pad_token)

    def loss(picture: VisionFeatures | Unseen) -> float:
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

    seen, swapped, unseen = loss(own), loss(shuffled), loss(blank)
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
    if seen == swapped and example.pixels.tokens > 1:
        whose = "its own pieces in another order"
        if other is not None:
            whose = f"the picture of row {other.row.job_id}"
        raise TrainingError(
            f"row {example.row.job_id} has the same loss ({seen:.4f}) with its own picture and "
            f"with {whose}: the model sees that there is a picture, and not which; see whether the "
            "photographs are all alike, else the vision tower's weights are damaged"
        )
    return {"loss": seen, "loss_shuffled": swapped, "loss_blank": unseen}


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


def check_space(folder: Path, adapter_bytes: int) -> tuple[int, int]:
    """Bytes needed and free; refuses to start where the checkpoints will not fit.

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
    return needed, free
