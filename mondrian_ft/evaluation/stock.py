"""Answers through mlx-vlm's own generation, for architectures that have no fast path here.

One row at a time: mlx-vlm's caches are the architecture's own affair, and not all can be batched.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..errors import ModelError
from ..model.backend import mx, number
from ..model.base import Base
from ..model.plain import PlainInputs
from .constrain import Constraint, Matching


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
    constraint: Constraint | None,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answered:
    """One answer of the model as it is now.

    Args:
        row: the prompt, unpadded.
        constraint: what the answer must keep to; None leaves it free.
        temperature: 0 takes the most likely token.
        seed: of the draws, 32 bits.

    Raises:
        ModelError: the model gives logits that are not finite, or a constraint cannot be kept.
    """
    from mlx_vlm.generate import generate_step

    started, first, tokens = time.perf_counter(), 0.0, []
    guard = _Guard(base, constraint)
    key = mx.random.key(seed)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        if not temperature:
            return mx.argmax(logprobs, axis=-1)
        key, own = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=own)

    steps = generate_step(
        row.tokens,
        base.model,
        row.pixels,
        mx.ones(row.tokens.shape, mx.int32),
        max_tokens=max_tokens,
        sampler=draw,
        logits_processors=[guard],
        **row.more,
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

    def __init__(self, base: Base, constraint: Constraint | None) -> None:
        self.base = base
        self.matching: Matching | None = constraint.start(1) if constraint is not None else None
        self.begun = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if not number(mx.isfinite(logits).all()):
            raise ModelError(
                f"{self.base.identity.name} gives logits that are not finite; the weights or the "
                "adapter are damaged, or the dtype is too narrow"
            )
        if self.matching is None:
            return logits
        if self.begun and not self.matching.ended:
            self.matching.consume(0, int(number(tokens[-1])))
        self.begun = True
        return mx.where(self._allowed(logits.shape[-1]), logits, mx.array(-mx.inf, logits.dtype))

    def _allowed(self, size: int) -> mx.array:
        assert self.matching is not None
        (words,) = self.matching.allowed([0])
        bits = mx.array(words.view("uint32"))
        each = (bits[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1
        return each.reshape(-1)[:size].astype(mx.bool_)
