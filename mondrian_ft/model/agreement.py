"""How far two models are apart, in logits on a text and on a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .backend import mx
from .base import Base
from .qwen3_vl import Grid, assemble

TEXT = "The horizon is level, the light is low, and the near rocks lead to a far ridge."
_WIDTH, _HEIGHT = 128, 96

Logits = Mapping[str, np.ndarray]
"""``text`` and ``image``: (tokens, vocabulary), float32."""


@dataclass(frozen=True)
class Distance:
    """How far one model's logits are from another's.

    Attributes:
        largest: the largest absolute difference.
        relative: the same as a share of the largest absolute logit of the reference.
        same_choice: share of tokens for which both would choose the same next token, 0 to 1.
    """

    largest: float
    relative: float
    same_choice: float


def probe_logits(base: Base) -> dict[str, np.ndarray]:
    """A model's logits, with whatever adapter is in it, on two fixed inputs.

    The picture is drawn, of colours and edges in both directions, so that every patch differs.
    """
    was_training = base.model.training
    base.model.eval()
    try:
        return {"text": _text_logits(base), "image": _image_logits(base)}
    finally:
        base.model.train(was_training)


def distances(reference: Logits, other: Logits) -> dict[str, Distance]:
    """How far ``other`` is from ``reference``, for each input.

    Logits that are not finite count as infinitely far.
    """
    return {name: _distance(reference[name], other[name]) for name in reference}


def effect_share(base: Logits, tuned: Logits, other: Logits) -> float:
    """The distance of ``other`` from ``tuned`` in units of what the adapter changed.

    Root mean squares over both inputs of the logits less each token's mean, which softmax does not
    see: 0 is the same model, 1 is as far off as the base is.
    """

    def spread(a: Logits, b: Logits) -> float:
        total, count = 0.0, 0
        for name in a:
            off = a[name].astype(np.float64) - b[name]
            off -= off.mean(axis=-1, keepdims=True)
            total, count = total + float((off**2).sum()), count + off.size
        return (total / count) ** 0.5

    changed = spread(base, tuned)
    return spread(tuned, other) / changed if changed else float("inf")


def _distance(reference: np.ndarray, other: np.ndarray) -> Distance:
    if not np.isfinite(other).all():
        return Distance(float("inf"), float("inf"), 0.0)
    largest = float(np.abs(reference - other).max())
    same = float((reference.argmax(-1) == other.argmax(-1)).mean())
    return Distance(largest, largest / float(np.abs(reference).max()), same)


def _text_logits(base: Base) -> np.ndarray:
    tokens = np.array([base.tokenizer.encode(TEXT, add_special_tokens=False)], np.int32)
    return _logits(base, tokens, None, None)


def _image_logits(base: Base) -> np.ndarray:
    tokens, patches, grid = drawn_picture(base)
    return _logits(base, tokens[None], patches, grid)


def drawn_picture(base: Base) -> tuple[np.ndarray, np.ndarray, Grid]:
    """A drawn picture and a text about it: tokens (L,) int32, patches (P, C) float32, grid."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    picture = np.stack([(x * 3) % 256, (y * 5 + x) % 256, (x // 16 + y // 16) % 2 * 200])
    pixels = base.image_processor(
        [picture.astype(np.uint8)],
        min_pixels=_WIDTH * _HEIGHT // 2,
        max_pixels=_WIDTH * _HEIGHT * 2,
    )
    t, h, w = (int(n) for n in pixels["image_grid_thw"][0])
    count = t * h * w // base.backbone.merge**2
    tokens = np.array(base.prompt_tokens(TEXT, count), np.int32)
    return tokens, np.asarray(pixels["pixel_values"], np.float32), (t, h, w)


def _logits(
    base: Base,
    tokens: np.ndarray,
    pixels: np.ndarray | None,
    grid: tuple[int, int, int] | None,
) -> np.ndarray:
    backbone = base.backbone
    picture = None
    if pixels is not None and grid is not None:
        (picture,) = backbone.encode(pixels, grid)
    inputs, _ = assemble(
        tokens,
        [tokens.shape[1]],
        [picture],
        [grid],
        image_token=backbone.image_token,
        merge=backbone.merge,
    )
    logits = backbone.head(backbone.hidden(inputs))[0].astype(mx.float32)
    return np.array(logits)
