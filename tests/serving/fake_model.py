"""A model that needs no weights: it answers what its photograph, prompt and arm say, and counts."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from PIL import Image

from mondrian_ft.data.critique import DIMENSIONS
from mondrian_ft.serving.protocol import (
    BASE,
    Answer,
    Ask,
    Event,
    Failure,
    Fault,
    Identity,
    Piece,
    State,
    Status,
)

HASHES = {"production": "a" * 64, "v1": "b" * 64, "v2": "a" * 64, "watkins-arm": "c" * 64}
"""The adapter of each arm there is; v2 is what production means."""
VERSIONS = {"production": "v2", "v1": "v1", "v2": "v2", "watkins-arm": "v7"}


def critique_of(ask: Ask) -> str:
    """The answer to an ask: equal asks, equal answers; another arm or photograph, another one."""
    digest = hashlib.sha256(ask.image + ask.prompt.encode() + ask.arm.encode()).digest()
    scores = [digest[place] % 11 for place in range(len(DIMENSIONS))]
    value = {
        "image_description": f"A photograph, judged by {ask.arm}.",
        "dimensions": [
            {
                "name": name,
                "score": score,
                "comment": f"{name} holds, for {ask.arm}.",
                "recommendation": f"For {name}: wait for the light.",
            }
            for name, score in zip(DIMENSIONS, scores, strict=True)
        ],
        "overall_score": round(sum(scores) / len(scores), 1),
        "key_strengths": ["The light on the ridge", "A quiet sky"],
        "priority_improvements": ["A firmer foreground"],
        "technical_notes": "Sharp throughout.",
    }
    return json.dumps(value)


def identity_of(arm: str) -> Identity:
    return Identity(
        arm=arm,
        version=VERSIONS.get(arm),
        hash=HASHES.get(arm, "e" * 64 if "/" in arm else None),
        base="fake-vlm",
        base_weights="d" * 64,
        pixels="0123456789abcdef",
    )


@dataclass
class FakeModel:
    """`protocol.Model`, with knobs.

    Attributes:
        delay: seconds of an answer.
        pieces: into how many a stream is cut.
        hold: after so many pieces a stream waits until this is None.
        state, reason, progress: of its status.
        faults: what the next asks fail with, before any is answered.
        text: what every ask is answered; None is `critique_of`.
        asked: every ask, in order.
        answered, cancelled: how many came to their end, and how many were stopped before.
        running, most: asks under way, now and at most.
        started, stopped: how often.
        arms: of its status, besides the base.
    """

    delay: float = 0.0
    pieces: int = 5
    hold: int | None = None
    state: State = State.ready
    reason: str = ""
    progress: float = 1.0
    faults: list[Fault] = field(default_factory=list)
    text: str | None = None
    asked: list[Ask] = field(default_factory=list)
    answered: int = 0
    cancelled: int = 0
    running: int = 0
    most: int = 0
    started: int = 0
    stopped: int = 0
    arms: list[str] = field(default_factory=lambda: ["production"])

    def status(self) -> Status:
        arms = tuple(identity_of(arm) for arm in (BASE, *self.arms))
        return Status(
            self.state, "reading the base model", self.progress, self.reason, arms, memory_gb=0.5
        )

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        self.asked.append(ask)
        self.running += 1
        self.most = max(self.most, self.running)
        ended = False
        try:
            end = self._end(ask)
            if isinstance(end, Answer) and ask.stream:
                size = -(-len(end.text) // self.pieces)
                for number, start in enumerate(range(0, len(end.text), size)):
                    while self.hold is not None and number >= self.hold:
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(self.delay / self.pieces)
                    yield Piece(ask.id, end.text[start : start + size])
            else:
                await asyncio.sleep(self.delay)
            ended = True
            yield end
        finally:
            self.answered += ended
            self.cancelled += not ended
            self.running -= 1

    def _end(self, ask: Ask) -> Answer | Failure:
        if self.faults:
            fault = self.faults.pop(0)
            return Failure(ask.id, fault, f"It failed on purpose ({fault}).")
        try:
            with Image.open(io.BytesIO(ask.image)) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            return Failure(ask.id, Fault.picture, f"The photograph cannot be decoded ({error}).")
        text = critique_of(ask) if self.text is None else self.text
        seconds = {"queued": 0.0, "prefill": 0.0, "first_token": 0.01, "total": self.delay}
        whole = ask.max_tokens is None or ask.max_tokens >= len(text.split())
        return Answer(ask.id, identity_of(ask.arm), text, whole, 100, len(text.split()), seconds)

    async def start(self) -> None:
        self.started += 1

    async def stop(self) -> None:
        self.stopped += 1
