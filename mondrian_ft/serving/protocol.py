"""What the HTTP process asks of the model's process, and what comes back.

The HTTP process imports no MLX and holds no weights: it sends an :class:`Ask` and gets events. All
of it is plain data that pickles, photographs as bytes. An event belongs to one ask by its ``id``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

BASE = "base"
"""Names the model without an adapter; any other arm is a channel, a version or a directory."""


@dataclass(frozen=True)
class Ask:
    """One photograph to be judged by one arm.

    Attributes:
        id: unique among those under way.
        image: the file's bytes, as uploaded.
        prompt: what is asked, without the chat template.
        arm: :data:`BASE`, or what the registry resolves when the ask is taken up.
        max_tokens: most tokens of the answer; None is the service's limit.
        constrained: whether the answer must keep to the critique's schema.
        stream: whether pieces of the text are wanted before the answer.
        deadline: seconds from sending until it is given up; None waits.
        temperature, seed: of the draws; 0 takes the most likely token.
    """

    id: str
    image: bytes
    prompt: str
    arm: str
    max_tokens: int | None = None
    constrained: bool = True
    stream: bool = False
    deadline: float | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Identity:
    """Which model answered: what no caller should have to guess.

    Attributes:
        arm: as it was asked for.
        version: the registry's, None for a base or a directory.
        hash: the adapter's 64 hexadecimal digits, None for the base.
        base: the base model's name and weights' fingerprint.
        pixels: fingerprint of the pixel pipeline.
    """

    arm: str
    version: str | None
    hash: str | None
    base: str
    base_weights: str
    pixels: str


@dataclass(frozen=True)
class Piece:
    """Some more of an answer's text."""

    id: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: all of it, without special tokens.
        finished: true when the model ended it, false when the token limit cut it.
        prompt_tokens, tokens: how many were read and generated.
        seconds: ``queued`` (sent until taken up), ``prefill``, ``first_token`` and ``total``, wall
            times from when it was sent, but ``prefill`` is its batch's alone.
    """

    id: str
    identity: Identity
    text: str
    finished: bool
    prompt_tokens: int
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


class Fault(StrEnum):
    """Why there is no answer."""

    picture = "picture"
    """The bytes are no photograph that can be read."""
    prompt = "prompt"
    """Prompt and picture are too long for the model."""
    adapter = "adapter"
    """The arm cannot be loaded or verified."""
    model = "model"
    """The model gave numbers that are not finite, or answering this one ask failed otherwise."""
    deadline = "deadline"
    """It was not done in time; the generation was stopped."""
    cancelled = "cancelled"
    """The caller went away; the generation was stopped."""
    worker = "worker"
    """The model's process ended or hung, and was replaced."""
    busy = "busy"
    """As many asks are waiting or under way as may (``serve.max_queue`` counts both, here and in
    the HTTP process): whoever has not got an answer yet is one of them."""


@dataclass(frozen=True)
class Failure:
    """There is no answer; ``sentence`` says why and what to do."""

    id: str
    fault: Fault
    sentence: str


Event = Piece | Answer | Failure


class State(StrEnum):
    """What the model's process is doing."""

    loading = "loading"
    ready = "ready"
    failed = "failed"
    stopping = "stopping"


@dataclass(frozen=True)
class Status:
    """The model's process as it is now.

    Attributes:
        state: see :class:`State`.
        stage: what it is at while loading, such as ``reading the base model``.
        progress: 0 to 1 while loading.
        reason: why it failed; empty otherwise.
        arms: the identity of each arm that is in memory.
        queued, running: asks waiting and under way.
        restarts: how often the process was replaced.
        memory_gb: resident, of the model's process.
        facts: more that is worth knowing (backend, versions; JSON types).
    """

    state: State
    stage: str = ""
    progress: float = 0.0
    reason: str = ""
    arms: tuple[Identity, ...] = ()
    queued: int = 0
    running: int = 0
    restarts: int = 0
    memory_gb: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Model(Protocol):
    """The model as the HTTP process sees it; ``supervisor.Supervisor`` is the real one."""

    def status(self) -> Status:
        """As of the last heartbeat; never waits."""
        ...

    def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """Events of one ask: pieces if it streams, then one answer or failure.

        Closing the iterator, or cancelling the task that reads it, stops the generation.
        """
        ...

    async def start(self) -> None:
        """Start the process; returns at once, see :meth:`status`."""
        ...

    async def stop(self) -> None:
        """Let what is under way end, within some seconds, and end the process."""
        ...
