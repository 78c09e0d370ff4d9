"""Answers through mlx-vlm's own generation, for architectures that have no fast path here.

One row at a time: mlx-vlm's caches are the architecture's own affair, and not all can be batched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError
from .backend import mx, number
from .base import Base
from .plain import PlainInputs

Allowed = Callable[[int | None], np.ndarray]
"""Given the latest token (None before the first), which may come next: (⌈V/32⌉,) int32, bit v % 32
of word v // 32 set where token v may."""


@dataclass(frozen=True)
class Answered:
    """Tokens of an answer, the end token included where there is one, and when the first came.

    ``first`` is in seconds from the start, prompt included.
    """

    tokens: list[int]
    first: float


def answer(
    base: Base,
    row: PlainInputs,
    allowed: Allowed | None = None,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answered:
    """One answer of the model as it is now.

    Args:
        row: the prompt, unpadded.
        allowed: what may come next; None leaves it free.
        temperature: 0 takes the most likely token.
        seed: of the draws, 32 bits.

    Raises:
        ModelError: the model gives logits that are not finite.
    """
    from mlx_vlm.generate import generate_step

    base.backbone.forget()  # pyright: ignore
    started, first, tokens = time.perf_counter(), 0.0, []
    guard = _Guard(base, allowed)
    key = mx.random.key(seed)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        if not temperature:
            return mx.argmax(logprobs, axis=-1)
        key, own = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=own)

    more: dict[str, Any] = dict(row.more)
    steps = generate_step(
        row.tokens,
        base.model,
        row.pixels,
        mx.ones(row.tokens.shape, mx.int32),
        max_tokens=max_tokens,
        sampler=draw,
        logits_processors=[guard],
        **more,
    )
    for token, _ in steps:
        first = first or time.perf_counter() - started
        tokens.append(int(token))
        if tokens[-1] in base.end_tokens or len(tokens) == max_tokens:
            break
    steps.close()
    return Answered(tokens, first)


class _Guard:
    """Looks at logits before a token is taken from them."""

    def __init__(self, base: Base, allowed: Allowed | None) -> None:
        self.base = base
        self.allowed = allowed
        self.begun = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if not number(mx.isfinite(logits).all()):
            raise ModelError(
                f"{self.base.identity.name} gives logits that are not finite; the weights or the "
                "adapter are damaged, or the dtype is too narrow"
            )
        if self.allowed is None:
            return logits
        words = self.allowed(int(number(tokens[-1])) if self.begun else None)
        self.begun = True
        each = (mx.array(words.view(np.uint32))[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1
        fine = each.reshape(-1)[: logits.shape[-1]].astype(mx.bool_)
        return mx.where(fine, logits, mx.array(-mx.inf, logits.dtype))
