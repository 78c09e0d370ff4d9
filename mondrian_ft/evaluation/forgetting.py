"""What an adapter costs on questions it was not trained for.

The base answers a few general questions greedily; then base and tuned are both charged for those
very answers, token by token. No labels are needed: a tuned model that can still do what its base
could finds the base's answers about as likely as the base does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from ..data.batches import Example
from ..errors import ModelError
from ..model import lora
from ..model.backend import mx, nn
from ..model.base import Base
from ..model.features import FeatureStore
from ..model.qwen3_vl import assemble
from .generate import Request, generate
from .outputs import Output

OF_A_PHOTOGRAPH = (
    "Describe the photograph in one sentence.",
    "What is in the foreground, and what is in the background?",
    "You advise photographers. Reply in JSON. Describe the photograph in image_description, score "
    "its dimensions from 0 to 10 with a comment and a recommendation each, then give "
    "overall_score, key_strengths, priority_improvements and technical_notes.\n\n"
    "Analyze the provided image.",
)
"""Asked of each photograph. None names an advisor; the last is for bases that know little else."""
OF_TEXT = ("What is photography?",)
"""Asked without a photograph."""
PHOTOGRAPHS = 4
"""Held-out photographs that are asked about; with the text, one batch of sixteen or fewer."""
LONGEST = 48
"""Most tokens of an answer: a sentence or two, and of a critique what is seen, not the scores and
the advice, which an adapter is there to change."""
SURE = 0.25
"""Nats a token up to which the base knows an answer; above it, it guesses. What it guesses at is
no ability that could be lost, and any adapter makes it guess otherwise."""
FEWEST = 3
"""Known answers that a mean is taken of."""


@dataclass(frozen=True)
class Forgetting:
    """Losses on those answers of the base's own to the general set that it is sure of.

    Attributes:
        n: answers it is sure of.
        asked: answers it gave.
        prompts: different prompts among the ``n``.
        base_loss, tuned_loss: nats, mean over the tokens of the ``n`` answers.
    """

    n: int
    asked: int
    prompts: int
    base_loss: float
    tuned_loss: float

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Asked:
    """A question as it is put to the base and to the tuned model, and the base's answer as tokens.

    The two differ where they see the photograph differently.
    """

    prompt: str
    request: Request
    tuned: Request
    answer: list[int]


def measure(
    base: Base, features: FeatureStore, examples: Sequence[Example], *, batch_size: int = 16
) -> Forgetting | None:
    """Ask the general set; the adapter that is in ``base`` is the tuned model.

    Answers are tokenised again from their text, as those of training rows are, so both models are
    charged for the same tokens. One that the limit cut has no end to be charged for.

    Args:
        examples: held-out ones, of whose photographs the first four different ones are shown.

    Returns:
        None if it could not be measured: there is no adapter, the base is sure of fewer than three
        answers, or a model's numbers are not finite.
    """
    if not lora.lora_layers(base.model):
        return None
    base.model.eval()  # a dropout left on would count as forgotten
    try:
        seen = _questions(base, features, examples)
        with lora.without_adapter(base.model):
            questions = _questions(base, features, examples)
            said = generate(
                base,
                [request for _, request in questions],
                max_tokens=LONGEST,
                batch_size=batch_size,
            )
            # An adapter in the tower sees the photographs in another way than the base does.
            views = [request for _, request in seen]
            asked = [
                _Asked(prompt, request, view, answer)
                for (prompt, request), view, output in zip(questions, views, said, strict=True)
                if (answer := _tokens(base, output))
            ]
            before = _losses(base, asked, batch_size)
    except ModelError:  # such as logits that are not finite
        return None
    known = [at for at, loss in enumerate(before) if loss / len(asked[at].answer) <= SURE]
    if len(known) < FEWEST:
        return None
    kept = [asked[at] for at in known]
    count = sum(len(one.answer) for one in kept)
    looked = [replace(one, request=one.tuned) for one in kept]
    tuned = math.fsum(_losses(base, looked, batch_size)) / count
    if not math.isfinite(tuned):
        return None
    return Forgetting(
        n=len(kept),
        asked=len(asked),
        prompts=len({one.prompt for one in kept}),
        base_loss=math.fsum(before[at] for at in known) / count,
        tuned_loss=tuned,
    )


def _questions(
    base: Base, features: FeatureStore, examples: Sequence[Example]
) -> list[tuple[str, Request]]:
    """Each prompt with what is given to the model; without those that leave no room to answer."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.row.image_sha256, example)
    shown = list(first.values())[:PHOTOGRAPHS]
    pictures = features.get([(one.row.image_sha256, one.pixels) for one in shown])
    found = [
        (prompt, Request(base.prompt_tokens(prompt, one.pixels.tokens), picture, one.pixels.grid))
        for one, picture in zip(shown, pictures, strict=True)
        for prompt in OF_A_PHOTOGRAPH
    ]
    found += [(prompt, Request(base.text_prompt_tokens(prompt), None, None)) for prompt in OF_TEXT]
    room = base.backbone.longest - LONGEST
    return [one for one in found if len(one[1].tokens) < room]


def _tokens(base: Base, output: Output) -> list[int]:
    tokens = base.answer_tokens(output.text)
    return tokens if output.finished else tokens[:-1]


def _losses(base: Base, asked: Sequence[_Asked], batch_size: int) -> list[float]:
    """Cross-entropy in nats of each answer, summed over its tokens."""
    found: list[float] = []
    for first in range(0, len(asked), batch_size):
        chosen = asked[first : first + batch_size]
        lengths = [len(one.request.tokens) + len(one.answer) for one in chosen]
        tokens = np.full((len(chosen), max(lengths)), base.pad_token, np.int32)
        where: list[int] = []
        for row, one in enumerate(chosen):
            tokens[row, : lengths[row]] = [*one.request.tokens, *one.answer]
            # A position predicts the token after it.
            start = row * tokens.shape[1] + len(one.request.tokens) - 1
            where += range(start, start + len(one.answer))
        inputs, _ = assemble(
            tokens,
            lengths,
            [one.request.features for one in chosen],
            [one.request.grid for one in chosen],
            image_token=base.backbone.image_token,
            merge=base.backbone.merge,
        )
        h = base.backbone.hidden(inputs)
        logits = base.backbone.head(h.reshape(-1, h.shape[-1])[mx.array(where)])
        wanted = mx.array([token for one in chosen for token in one.answer])
        losses = iter(np.array(nn.losses.cross_entropy(logits.astype(mx.float32), wanted)).tolist())
        found += [math.fsum(islice(losses, len(one.answer))) for one in chosen]
    return found
