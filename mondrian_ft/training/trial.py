"""A first step on trial: that training reaches the adapter, and that the loss feels it.

Everything is put back afterwards, the random state as well: a run after a trial gives the same
bytes as one without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.batches import Example, collate
from ..errors import TrainingError
from ..model import lora
from ..model.backend import mx, nn, number
from ..model.base import Base
from ..model.features import FeatureStore
from .loss import device_batch, token_losses

STEP = 0.02
"""Share of the loss that the trial's step would take away if the loss were a plane."""


@dataclass(frozen=True)
class Attached:
    """What is trained: adapted matrices, their kinds, tensors and numbers.

    ``matrices``, ``kinds`` and ``layers`` are the language model's, ``vision`` and ``vision_kinds``
    the vision tower's.
    """

    matrices: int
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    vision: int
    vision_kinds: tuple[str, ...]
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Tried:
    """Mean loss (nats) of a row before and after one step, and the gradient's norm."""

    before: float
    after: float
    grad_norm: float


def attached(base: Base) -> Attached:
    """See that the adapter is in the model, and that it and nothing else is trained.

    Raises:
        TrainingError: there is none, a tensor of it is frozen, or something else is trained.
    """
    from mlx.utils import tree_flatten

    layers, tensors = lora.lora_layers(base.model), lora.tensors(base.model)
    if not layers:
        raise TrainingError("no adapter is in the model, so there is nothing to train")
    flat: Any = tree_flatten(base.model.trainable_parameters())
    trained = {name for name, _ in flat}
    if frozen := sorted(tensors.keys() - trained):
        raise TrainingError(
            f"{len(frozen)} tensors of the adapter are frozen, {frozen[0]} first, so they would "
            "never change; please report it"
        )
    if loose := sorted(trained - tensors.keys()):
        size = sum(value.size for name, value in flat if name in loose)
        raise TrainingError(
            f"{len(loose)} tensors beside the adapter would be trained ({size:,} numbers, "
            f"{loose[0]} first): the base has to be frozen; please report it"
        )
    decoder = [name for name in layers if not lora.in_tower(name)]
    tower = [name for name in layers if lora.in_tower(name)]
    return Attached(
        matrices=len(decoder),
        kinds=tuple(sorted({name.rsplit(".", 1)[-1] for name in decoder})),
        layers=tuple(sorted({lora.layer_number(name) for name in decoder})),
        vision=len(tower),
        vision_kinds=tuple(sorted({name.rsplit(".", 1)[-1] for name in tower})),
        tensors=len(tensors),
        parameters=sum(value.size for value in tensors.values()),
    )


def first_step(
    base: Base, example: Example, features: FeatureStore, *, checkpoint: bool = False
) -> Tried:
    """One step down the gradient of one row's loss, taken and undone.

    Args:
        checkpoint: recompute layers in the backward pass, as the run will.

    Raises:
        TrainingError: the gradient is not finite or does not reach the adapter, or the loss does
            not change.
    """
    from mlx.utils import tree_flatten

    inputs, where, wanted = device_batch(
        collate([example], [0], base.pad_token), base.backbone, features
    )

    def loss(_: Any = None) -> mx.array:
        losses = token_losses(base.backbone, inputs, where, wanted, checkpoint=checkpoint)
        return losses.mean()

    with _put_back(base):
        base.model.eval()
        before = number(loss())
        base.model.train()
        _, grads = nn.value_and_grad(base.model, loss)(base.model)
        flat: dict[str, mx.array] = dict(tree_flatten(grads))  # pyright: ignore
        norm = _norm(flat)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of row {example.row.job_id} is {norm:g} before any training; the "
                "base's weights are damaged, or model.dtype is too narrow"
            )
        # A starts with a zero gradient, because B starts at zero.
        silent = [
            name
            for name, one in flat.items()
            if name.endswith("lora_b") and number(mx.abs(one).max()) == 0
        ]
        if norm == 0 or silent:
            which = silent[0] if silent else "all of it"
            raise TrainingError(
                f"the loss of row {example.row.job_id} has no gradient in {len(silent) or 'any'} "
                f"of the adapter's matrices, {which} first, so they would not learn; leave them "
                "out of lora.target_modules or lora.vision, or please report it"
            )
        values = lora.tensors(base.model)
        scale = STEP * before / norm**2
        moved = {n: value - (scale * flat[n]).astype(value.dtype) for n, value in values.items()}
        lora.set_tensors(base.model, moved)
        base.model.eval()
        after = number(loss())
    if after == before:
        raise TrainingError(
            f"a step along the gradient leaves the loss of row {example.row.job_id} at "
            f"{before:.6f}: what is trained does not reach the loss; please report it"
        )
    return Tried(before, after, norm)


def _norm(tensors: Mapping[str, mx.array]) -> float:
    squares = [mx.square(one.astype(mx.float32)).sum() for one in tensors.values()]
    return math.sqrt(number(mx.stack(squares).sum()))


@contextmanager
def _put_back(base: Base) -> Iterator[None]:
    """The adapter, the mode and the random state, as they were."""
    values = lora.tensors(base.model)
    training = base.model.training
    state: Any = mx.random.state
    high, low = np.array(state[0]).tolist()
    try:
        yield
    finally:
        lora.set_tensors(base.model, values)
        base.model.train(training)
        mx.random.seed(high << 32 | low)
