"""Seconds per generated token, arm beside arm on the same photographs.

The times of an evaluation's answers (`Output.seconds`) cannot say this. They are of a whole batch,
so that rows share one time, which is that of the longest answer among them; they include reading
the prompt; and answers that were kept have the times of another day. Here each photograph is
answered alone, as the service does it, by all arms within seconds of each other, in turning order:
whatever else the machine does meets all of them. What counts is the time from the first token to
the last, so that neither the prompt nor the length of an answer matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..data.batches import Example
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
from .evaluator import Voice
from .generate import Request, generate

TOKENS = 33
"""Most tokens of a timed answer: 32 times between two tokens."""
FEWEST = 9
"""Tokens below which an answer is too short to be timed."""


def measure(
    base: Base,
    features: FeatureStore,
    examples: Sequence[Example],
    others: Mapping[str, Voice],
    *,
    photographs: int,
) -> dict[str, list[float]]:
    """Seconds per token by arm, a number for each photograph that every arm was timed on.

    Args:
        base: with the tuned model's adapter in it.
        examples: held-out ones, of whose photographs the first different ones are used.
        others: arms besides ``base`` and ``tuned``, which are always timed.
        photographs: how many, at most; one more is answered first and not counted.

    Raises:
        AdapterError, ModelError: an arm cannot be entered, or gives no sound logits.
    """
    if photographs < 1 or not lora.lora_layers(base.model):
        return {}
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.row.image_sha256, example)
    shown = list(first.values())[:photographs]
    arms: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "base": lambda: lora.without_adapter(base.model),
        "tuned": nullcontext,
    }
    for name, voice in others.items():
        layers = _layers(base, voice)
        arms[name] = lambda layers=layers: lora.wearing(base.model, layers)
    pictures = features.get([(one.row.image_sha256, one.pixels) for one in shown])
    requests = [
        Request(base.prompt_tokens(one.row.prompt, one.pixels.tokens), picture, one.pixels.grid)
        for one, picture in zip(shown, pictures, strict=True)
    ]
    for enter in arms.values():  # what is compiled at first use is compiled now
        with enter():
            _seconds(base, requests[0])
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number, request in enumerate(requests):
        # Each arm is first as often as it is last.
        times: dict[str, float | None] = {}
        for name in names if number % 2 == 0 else reversed(names):
            with arms[name]():
                times[name] = _seconds(base, request)
        if all(times.values()):
            for name, seconds in times.items():
                found[name].append(seconds or 0.0)
    return found


def _seconds(base: Base, request: Request) -> float | None:
    """Seconds from one token to the next, on average; None of an answer too short to say."""
    (output,) = generate(base, [request], max_tokens=TOKENS, batch_size=1)
    if output.tokens < FEWEST or output.first_token_seconds is None:
        return None
    return (output.seconds - output.first_token_seconds) / (output.tokens - 1)


def _layers(base: Base, voice: Voice) -> dict[str, Any]:
    """The LoRA layers that a voice puts into the model; reading them from the disk takes long."""
    with voice.enter():
        return lora.lora_layers(base.model)
