"""The loss: next-token cross-entropy over the answer's tokens, and nothing else."""

from __future__ import annotations

import numpy as np

from ..data.batches import Batch
from ..model.backend import mx, nn
from ..model.features import FeatureStore
from ..model.qwen3_vl import Inputs, Qwen3VL, assemble


def device_batch(
    batch: Batch, backbone: Qwen3VL, features: FeatureStore
) -> tuple[Inputs, mx.array, mx.array]:
    """A batch as the forward takes it.

    Returns:
        Inputs; ``where`` (M,) int32, flat indices (row · L + position) of the M positions that
        predict a trained token; ``wanted`` (M,) int32, those tokens.
    """
    inputs, _ = assemble(
        batch.tokens,
        [len(example.tokens) for example in batch.examples],
        features.get([(one.row.image_sha256, one.pixels) for one in batch.examples]),
        [example.pixels.grid for example in batch.examples],
        image_token=backbone.image_token,
        merge=backbone.merge,
    )
    flat = batch.targets.reshape(-1)
    where = np.flatnonzero(flat >= 0).astype(np.int32)
    return inputs, mx.array(where), mx.array(flat[where])


def token_losses(
    backbone: Qwen3VL,
    inputs: Inputs,
    where: mx.array,
    wanted: mx.array,
    *,
    checkpoint: bool = False,
) -> mx.array:
    """Cross-entropy in nats of each trained token, shape (M,), float32.

    The head is applied to the M positions that need it: prompt and padding never get logits.
    """
    h = backbone.hidden(inputs, checkpoint=checkpoint)
    chosen = h.reshape(-1, h.shape[-1])[where]
    logits = backbone.head(chosen).astype(mx.float32)
    return nn.losses.cross_entropy(logits, wanted)
