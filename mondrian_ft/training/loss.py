"""The loss: next-token cross-entropy over the answer's tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.batches import Batch
from ..data.rooms import Room
from ..model import blas, cpu_math, cuda_train
from ..model.backend import ON_CPU, mx
from ..model.features import FeatureStore
from ..model.qwen3_vl import Grid, Inputs, Qwen3VL, Unseen, VisionFeatures, assemble

CHUNK_BYTES = 128 << 20
"""Bound on the float32 logits that are in memory at a time."""
CUDA_CHUNK_BYTES = 512 << 20
"""The same where our own kernel takes 16 bits: the logits and their gradients."""


def device_batch(
    batch: Batch, backbone: Qwen3VL, features: FeatureStore, room: Room | None = None
) -> tuple[Inputs, mx.array, mx.array]:
    """A batch as the forward takes it.

    Args:
        batch: the rows.
        backbone: for whom.
        features: their pictures.
        room: what to fill up to; None to leave the batch as it is.

    Returns:
        Inputs; ``where`` (M,) int32, flat indices (row · L + position) of the M positions that
        predict a trained token; ``wanted`` (M,) int32, those tokens, -1 where M is filled up.
    """
    tokens, targets = batch.tokens, batch.targets
    lengths = [len(example.tokens) for example in batch.examples]
    pictures: list[VisionFeatures | Unseen | None] = list(
        features.pictures([(one.row.image_sha256, one.pixels) for one in batch.examples])
    )
    grids: list[Grid | None] = [example.pixels.grid for example in batch.examples]
    if room is not None:
        more = room.rows - len(tokens)
        space = [(0, more), (0, room.length - tokens.shape[1])]
        tokens = np.pad(tokens, space)
        targets = np.pad(targets, space, constant_values=-1)
        lengths, pictures, grids = (
            lengths + [0] * more,
            pictures + [None] * more,
            grids + [None] * more,
        )
    inputs, _ = assemble(
        tokens, lengths, pictures, grids, image_token=backbone.image_token, merge=backbone.merge
    )
    flat = targets.reshape(-1)
    where = np.flatnonzero(flat >= 0).astype(np.int32)
    wanted = flat[where]
    if room is not None:
        space = (0, room.trained - len(where))
        where, wanted = np.pad(where, space), np.pad(wanted, space, constant_values=-1)
        inputs = _filled(inputs, room.images)
    return inputs, mx.array(where), mx.array(wanted)


def _filled(inputs: Inputs, count: int) -> Inputs:
    """The image tokens' features, filled up to ``count``."""
    if inputs.features is None:
        return inputs
    more = count - inputs.features.shape[0]

    def fill(array: mx.array) -> mx.array:
        return mx.pad(array, [(0, more), (0, 0)])

    deepstack = tuple(fill(level) for level in inputs.deepstack)
    return replace(inputs, features=fill(inputs.features), deepstack=deepstack)


def device_parts(
    batch: Batch, backbone: Qwen3VL, features: FeatureStore, room: Room | None = None
) -> list[tuple[Inputs, mx.array, mx.array]]:
    """A batch as a device gains from: whole on a GPU, row by row on a CPU.

    There nothing is gained from larger products, and rows alone have no padding.
    """
    if not ON_CPU:
        return [device_batch(batch, backbone, features, room)]
    parts = []
    for number, example in enumerate(batch.examples):
        size = len(example.tokens)
        row = Batch(
            batch.tokens[number : number + 1, :size],
            batch.targets[number : number + 1, :size],
            batch.rows[number : number + 1],
            (example,),
        )
        parts.append(device_batch(row, backbone, features))
    return parts


@contextmanager
def evaluating(count: int) -> Iterator[None]:
    """While ``count`` rows are computed one by one, a product has one BLAS thread: on so small
    ones two of OpenBLAS's lose more by waiting for each other than they gain."""
    if not ON_CPU or count == 1:
        yield
        return
    with blas.threads(1):
        yield


def token_losses(
    backbone: Qwen3VL,
    inputs: Inputs,
    where: mx.array,
    wanted: mx.array,
    *,
    checkpoint: bool = False,
) -> mx.array:
    """Cross-entropy in nats of each trained token, shape (M,); see :func:`losses_and_hits`."""
    return losses_and_hits(backbone, inputs, where, wanted, checkpoint=checkpoint)[0]


def losses_and_hits(
    backbone: Qwen3VL,
    inputs: Inputs,
    where: mx.array,
    wanted: mx.array,
    *,
    checkpoint: bool = False,
) -> tuple[mx.array, mx.array]:
    """Cross-entropy in nats of each trained token, (M,) float32, and whether it was the likeliest
    one, (M,) int32.

    The last layer's products and the head are computed for the M positions that need them: prompt
    and padding never get logits. Positions whose ``wanted`` is negative fill M up; their loss is 0.
    """
    h = backbone.hidden_at(inputs, where, checkpoint=checkpoint)
    return chunked_cross_entropy(backbone, h, wanted)


def chunked_cross_entropy(
    backbone: Any, h: mx.array, wanted: mx.array, *, chunk_bytes: int | None = None
) -> tuple[mx.array, mx.array]:
    """Cross-entropy (M,) float32 of hidden states (M, D), the logits never all in memory.

    Beside it whether each wanted token was the likeliest, (M,) int32.

    Each chunk's gradient is computed beside its loss, while its logits are there; a loss depends
    on its own row of h alone, so the backward pass is one product with the cotangent.
    """
    kernel = cuda_train.fits(h.dtype, backbone.vocabulary)
    bound = chunk_bytes or (CUDA_CHUNK_BYTES if kernel else CHUNK_BYTES)
    most = max(64, bound // (4 * backbone.vocabulary))
    # Equal parts, or the last one might be too small to be worth a pass over the head's matrix.
    rows = max(1, -(-h.shape[0] // max(1, -(-h.shape[0] // most))))

    def all_three(h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        losses, slopes, hits = [], [], []
        for start in range(0, h.shape[0], rows):
            part, target = h[start : start + rows], wanted[start : start + rows, None]
            if slopes:
                # One after the other, or all chunks' logits might be there at once.
                (part,) = mx.depends([part], [losses[-1], slopes[-1]])
            if kernel:
                loss, hit, slope = cuda_train.cross_entropy(backbone.head(part), target[:, 0])
                losses.append(loss)
                hits.append(hit)
                slopes.append(backbone.head_back(slope))
                continue
            logits = backbone.head(part).astype(mx.float32)
            counted, target = target >= 0, mx.maximum(target, 0)
            weights, total, found = _softmax(logits, target)
            likeliest = mx.argmax(logits, axis=-1, keepdims=True) == target
            hits.append((counted & likeliest)[:, 0].astype(mx.int32))
            losses.append(mx.where(counted, mx.log(total) - found, 0)[:, 0])
            slope = _less_one(weights / total, target)
            slopes.append(backbone.head_back(slope.astype(part.dtype)) * counted.astype(part.dtype))
        return mx.concatenate(losses), mx.concatenate(slopes), mx.concatenate(hits)

    @mx.custom_function
    def cross_entropy(h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return all_three(h)

    @cross_entropy.vjp
    def back(h: Any, cotangents: Any, outputs: Any) -> mx.array:
        slope = outputs[1]
        return (cotangents[0][:, None] * slope.astype(mx.float32)).astype(slope.dtype)

    found: Any = cross_entropy(h)
    return found[0], found[2]


def _softmax(logits: mx.array, target: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """e to the (logits - their largest) (M, V), their sums, the targets' exponents (M, 1)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = cpu_math.exp(shifted) if ON_CPU else mx.exp(shifted)
    found = mx.take_along_axis(shifted, target, axis=-1)
    return weights, weights.sum(axis=-1, keepdims=True), found


def _less_one(shares: mx.array, target: mx.array) -> mx.array:
    """``shares`` (M, V), 1 less at the targets (M, 1)."""
    if ON_CPU:
        # Comparing every column costs as much as the head.
        own = mx.take_along_axis(shares, target, axis=-1)
        return mx.put_along_axis(shares, target, own - 1, axis=-1)
    # Within a compiled function this costs nothing, as it is part of the one kernel.
    return shares - (mx.arange(shares.shape[-1])[None] == target)
