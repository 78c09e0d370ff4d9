"""Batched greedy decoding, free or under a schema.

A batch's prompts are read once (`model.decode.prefill`); from there any number of answers can be
decoded, such as a free one and one under a schema. The host reads tokens one step behind the
device: step n + 1 is queued before the tokens of step n are looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.pixels import Grid
from ..errors import ModelError
from ..model import stock
from ..model.backend import ON_CPU, mx
from ..model.base import Base
from ..model.decode import Decoding, Prefilled, Steps, prefill
from ..model.plain import PlainInputs
from ..model.qwen3_vl import Unseen, VisionFeatures, assemble
from .constrain import Constraint
from .outputs import Output


@dataclass(frozen=True)
class Request:
    """One picture and one prompt, or a prompt alone.

    Attributes:
        tokens: prompt token ids, image tokens among them.
        features: the picture through the vision tower, or as it is where the forward takes it so;
            None without a picture.
        grid: the picture's patches; None without a picture.
    """

    tokens: Sequence[int]
    features: VisionFeatures | Unseen | None
    grid: Grid | None


def generate(
    base: Base,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    batch_size: int,
    constraint: Constraint | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Output]:
    """Answer every request; see :func:`generate_each`, with one constraint or none."""
    (outputs,) = generate_each(
        base,
        requests,
        [constraint],
        max_tokens=max_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return outputs


def generate_each(
    base: Base,
    requests: Sequence[Request],
    constraints: Sequence[Constraint | None],
    *,
    max_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    answered: Callable[[int, int, Output], None] = lambda request, constraint, output: None,
) -> list[list[Output]]:
    """Answer every request once under each constraint; the prompts are read once for all.

    Args:
        base: the model, with or without an adapter in it; it is put into evaluation mode.
        requests: in any order; answers come in the same order.
        constraints: what answers must keep to; None leaves them free.
        max_tokens: most tokens of an answer; one that reaches it is not ``finished``.
        batch_size: rows decoded together. Another batch size may change the last bit of a
            logit, and with it, where two tokens are all but equally likely, a token.
        temperature: 0 takes the most likely token; above it, tokens are drawn.
        seed: of the draws. A request's draws depend on it and on the request's place in
            ``requests``, not on the batch.
        progress: called with the number of requests answered so far.
        answered: called with each answer as soon as its batch is done, and with the places of its
            request and its constraint; what a killed run had is not lost then.

    Returns:
        For each constraint one :class:`Output` per request.

    Raises:
        ModelError: the model gives logits that are not finite, or a constraint cannot be kept.
    """
    found: list[list[Output]] = [[] for _ in constraints]
    base.model.eval()  # a dropout left on would make the answers random
    seeds = np.random.default_rng(seed).integers(0, 1 << 32, len(requests), np.uint32)
    if base.plain:
        for at, request in enumerate(requests):
            for number, constraint in enumerate(constraints):
                own = int(seeds[at])
                found[number].append(
                    _stock(base, request, constraint, max_tokens, temperature, own)
                )
                answered(at, number, found[number][-1])
            progress(at + 1)
        return found
    steps = Steps(base.backbone, temperature=temperature)
    for first in range(0, len(requests), batch_size):
        chosen = requests[first : first + batch_size]
        started = time.perf_counter()
        prompts = read_prompts(base, chosen)
        reading = time.perf_counter() - started
        for number, (outputs, constraint) in enumerate(zip(found, constraints, strict=True)):
            started = time.perf_counter() - reading
            answers, first_token = _decode(
                base,
                Decoding(
                    steps,
                    prompts,
                    capacity=prompts.keys[0].shape[2] + max_tokens,
                    seeds=seeds[first : first + batch_size],
                ),
                max_tokens,
                constraint,
            )
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
                        prefill_seconds=reading / len(chosen),
                        first_token_seconds=first_token - started,
                    )
                )
                answered(len(outputs) - 1, number, outputs[-1])
        progress(min(first + batch_size, len(requests)))
    return found


def _stock(
    base: Base,
    request: Request,
    constraint: Constraint | None,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Output:
    """One answer through mlx-vlm's own generation."""
    pixels, more = None, {}
    if isinstance(request.features, Unseen):
        pixels, more = base.backbone.arguments(request.features)  # pyright: ignore
    row = PlainInputs(mx.array([list(request.tokens)], mx.int32), pixels, more)
    matching = constraint.start(1) if constraint is not None else None

    def allowed(latest: int | None) -> np.ndarray:
        assert matching is not None
        if latest is not None and not matching.ended:
            matching.consume(0, latest)
        return matching.allowed([0])[0]

    started = time.perf_counter()
    given = stock.answer(
        base,
        row,
        None if matching is None else allowed,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    finished = bool(given.tokens) and given.tokens[-1] in base.end_tokens
    return Output(
        text=base.text(given.tokens[:-1] if finished else given.tokens),
        prompt_tokens=len(request.tokens),
        tokens=len(given.tokens),
        seconds=time.perf_counter() - started,
        finished=finished,
        prefill_seconds=given.first,
        first_token_seconds=given.first,
    )


def read_prompts(base: Base, requests: Sequence[Request]) -> Prefilled:
    """The prompts of some requests, read as one batch.

    Prompts of different lengths are padded on the right.

    Raises:
        ModelError: a request's image tokens are not its picture's.
    """
    backbone = base.backbone
    lengths = np.array([len(request.tokens) for request in requests])
    tokens = np.full((len(requests), int(lengths.max())), base.pad_token, np.int32)
    for row, request in enumerate(requests):
        tokens[row, : lengths[row]] = request.tokens
    inputs, following = assemble(
        tokens,
        lengths.tolist(),
        [request.features for request in requests],
        [request.grid for request in requests],
        image_token=backbone.image_token,
        merge=backbone.merge,
    )
    return prefill(backbone, inputs, lengths, following)


def _decode(
    base: Base,
    decoding: Decoding,
    max_tokens: int,
    constraint: Constraint | None,
    *,
    compact: bool = ON_CPU,
) -> tuple[list[list[int]], float]:
    """Token ids of each answer, the end token included where there is one; when the first came.

    ``compact`` drops rows that have ended once half of the batch has. On a CPU every row costs; on
    a GPU a step takes hardly longer with 16 rows than with 8, and each number of rows would be
    compiled anew.
    """
    ends = base.end_tokens
    answers: list[list[int]] = [[] for _ in range(decoding.rows)]
    rows = list(range(decoding.rows))  # the answer that each row of the batch belongs to
    open_rows = set(rows)
    matching = constraint.start(len(rows)) if constraint is not None else None
    first_token = 0.0
    decoding.choose(matching.allowed(rows) if matching is not None else None)
    for step in range(max_tokens):
        token = decoding.token
        last = step + 1 == max_tokens
        if not last:
            # Queued before this step's tokens are read, so that the device does not wait for the
            # host. Under a constraint only the logits can be: which tokens are allowed next, the
            # host finds out while the device computes them.
            decoding.advance(choosing=matching is None)
        values = np.array(token).tolist()
        first_token = first_token or time.perf_counter()
        for row, value in zip(rows, values, strict=True):
            if value < 0:
                raise ModelError(
                    f"{base.identity.name} gives logits that are not finite; the weights or the "
                    "adapter are damaged, or the dtype is too narrow"
                )
            if row in open_rows:
                answers[row].append(value)
                if matching is not None:
                    matching.consume(row, value)
                if value in ends:
                    open_rows.remove(row)
        if last or not open_rows:
            break
        if compact and 2 * len(open_rows) <= len(rows):
            places = [place for place, row in enumerate(rows) if row in open_rows]
            decoding.keep(places)
            rows = [rows[place] for place in places]
        if matching is not None:
            decoding.choose(matching.allowed(rows))
    return answers, first_token
