"""Batched greedy decoding.

Prompts of different lengths are padded on the right for the prefill, where padding is exact.
Every row then writes its new keys and values into the same column; what matters to attention is a
token's rotary position, which each row counts on from its own prompt, and a mask that hides the
columns between a shorter prompt's end and the first new column.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.pixels import Grid
from ..errors import ModelError
from ..model.backend import mx
from ..model.base import Base
from ..model.qwen3_vl import Inputs, VisionFeatures, assemble
from .outputs import Output


@dataclass(frozen=True)
class Request:
    """One picture and one prompt.

    Attributes:
        tokens: prompt token ids, image tokens among them.
        features: the picture through the vision tower.
        grid: the picture's patches.
    """

    tokens: Sequence[int]
    features: VisionFeatures
    grid: Grid


def generate(
    base: Base,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Output]:
    """Answer every request.

    Args:
        base: the model, with or without an adapter in it; it is put into evaluation mode.
        requests: in any order; answers come in the same order.
        max_tokens: most tokens of an answer; one that reaches it is not ``finished``.
        batch_size: rows decoded together. Another batch size may change the last bit of a
            logit, and with it, rarely, a token.
        temperature: 0 takes the most likely token; above it, tokens are drawn.
        seed: of the draws.
        progress: called with the number of answers so far.

    Returns:
        One :class:`Output` per request. ``seconds`` is its batch's time over the batch's rows.

    Raises:
        ModelError: the model gives logits that are not finite.
    """
    outputs: list[Output] = []
    base.model.eval()  # a dropout left on would make the answers random
    mx.random.seed(seed)
    for first in range(0, len(requests), batch_size):
        chosen = requests[first : first + batch_size]
        started = time.perf_counter()
        answers = _decode(base, chosen, max_tokens, temperature)
        seconds = (time.perf_counter() - started) / len(chosen)
        for request, tokens in zip(chosen, answers, strict=True):
            finished = bool(tokens) and tokens[-1] in base.end_tokens
            outputs.append(
                Output(
                    text=base.text(tokens[:-1] if finished else tokens),
                    prompt_tokens=len(request.tokens),
                    tokens=len(tokens),
                    seconds=seconds,
                    finished=finished,
                )
            )
        progress(len(outputs))
    return outputs


def _decode(
    base: Base, requests: Sequence[Request], max_tokens: int, temperature: float
) -> list[list[int]]:
    """Token ids of each answer, the end token included where there is one."""
    backbone = base.backbone
    lengths = np.array([len(request.tokens) for request in requests])
    rows, width = len(requests), int(lengths.max())
    cache = backbone.new_cache()
    tokens = np.full((rows, width), base.pad_token, np.int32)
    for row, request in enumerate(requests):
        tokens[row, : lengths[row]] = request.tokens
    inputs, next_position = assemble(
        tokens,
        lengths.tolist(),
        [request.features for request in requests],
        [request.grid for request in requests],
        image_token=backbone.image_token,
        merge=backbone.merge,
    )
    h = backbone.hidden(inputs, cache=cache)
    last = mx.take_along_axis(h, mx.array(lengths - 1)[:, None, None], axis=1)
    token = _choose(backbone.head(last)[:, 0], temperature)

    # True where a column holds a token: a shorter prompt leaves a gap before the new columns.
    ends = frozenset(base.end_tokens)
    in_prompt = mx.arange(width)[None] < mx.array(lengths)[:, None]
    answers: list[list[int]] = [[] for _ in requests]
    open_rows = set(range(rows))
    for step in range(max_tokens):
        mx.async_eval(token)
        following = None
        if step + 1 < max_tokens:
            positions = mx.array(np.broadcast_to(next_position + step, (3, rows))[..., None])
            new = mx.ones((rows, step + 1), dtype=mx.bool_)
            mask = mx.concatenate([in_prompt, new], axis=1)[:, None, None, :]
            h = backbone.hidden(Inputs(token[:, None], positions), cache=cache, mask=mask)
            following = _choose(backbone.head(h)[:, 0], temperature)
            # The next step is queued before this one's tokens are read, so that the device does
            # not wait for the host.
            mx.async_eval(following)
        for row, value in enumerate(np.array(token).tolist()):
            if value < 0:
                raise ModelError(
                    f"{base.identity.name} gives logits that are not finite; the weights or the "
                    "adapter are damaged, or the dtype is too narrow"
                )
            if row in open_rows:
                answers[row].append(value)
                if value in ends:
                    open_rows.remove(row)
        if not open_rows or following is None:
            break
        token = following
    return answers


def _choose(logits: mx.array, temperature: float) -> mx.array:
    """Next tokens of logits (B, V), int32; -1 in a row whose logits are not all finite."""
    logits = logits.astype(mx.float32)
    if temperature > 0:
        token = mx.random.categorical(logits / temperature)
    else:
        token = mx.argmax(logits, axis=-1)
    sound = mx.isfinite(logits).all(axis=-1)
    return mx.where(sound, token.astype(mx.int32), -1)
