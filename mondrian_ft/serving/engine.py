"""The model's loop: takes asks up, advances every row by a token, sends what it has.

One thread owns the model and turns the loop; asks and cancellations come in from any thread. All
asks, of whatever arm, are rows of one batch (`model.running`). An ask's prompt is read alone, by
its arm, between two steps, and its row joins the batch. While all rows are of one arm they are
answered with that arm's own form, else with a mixture in which each row has its own adapter (see
`arms`). Nothing in an answer depends on who else was under way, but for the last bits of a logit,
which matter where two tokens are all but equally likely.

What goes wrong with one ask fails that ask. A step that fails is everybody's: the process ends, and
`supervisor` has the asks answered by another.

Of the prompts nothing is shared: the picture comes first in the model's template, and all that
follows depends on it. The tower's view of a photograph is kept, by the photograph's content, and
shared by all arms but those with an adapter in the tower, which look for themselves each time.
"""

from __future__ import annotations

import hashlib
import io
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.pixels import Grid, Pixels, PixelSettings, open_photograph, to_pixels
from ..errors import AdapterError, ModelError, MondrianError
from ..evaluation.constrain import Constraint, Matching
from ..evaluation.generate import Request, read_prompts
from ..model.base import Base
from ..model.features import FeatureStore
from ..model.running import Running
from .arms import Arm, Arms
from .protocol import Answer, Ask, Event, Failure, Fault, Identity, Piece

PIECE_EVERY = 0.04
"""Seconds between two pieces of one answer's text at the least."""
KNOWN_GRIDS = 4096
"""Photographs whose size in patches is remembered; with their features kept, they need no more."""
NOT_FINITE = (
    "The model gave numbers that are not finite for this photograph and prompt; the weights or the "
    "adapter are damaged, or the dtype is too narrow."
)


class _Bytes(io.BytesIO):
    """A photograph as it came; errors name it so, where a file's would name the file."""

    def __str__(self) -> str:
        return "the photograph"


class _Photograph:
    """A photograph whose patches are made when somebody needs them."""

    def __init__(self, make: Callable[[], Pixels], grid: Grid | None) -> None:
        self._make = make
        self._made = make() if grid is None else None
        self.grid: Grid = grid if grid is not None else self.whole.grid

    @property
    def whole(self) -> Pixels:
        if self._made is None:
            self._made = self._make()
        return self._made

    @property
    def patches(self) -> np.ndarray:
        return self.whole.patches


class _Refusal(MondrianError):
    """An ask cannot be answered."""

    def __init__(self, fault: Fault, sentence: str) -> None:
        super().__init__(sentence)
        self.fault = fault


@dataclass(eq=False)
class _Job:
    """An ask, from when it came until it was answered.

    Attributes:
        sent: when its caller asked, of the monotonic clock.
        photograph: being read in another thread.
        arm: who answers, from when it was taken up.
        taken: when it was taken up.
        matching: where the answer stands in the schema; None if it is free.
        tokens: of the answer, the end token included.
        told: characters of the text that were sent as pieces, and when the last was.
    """

    ask: Ask
    sent: float
    picture: str
    photograph: Future[_Photograph]
    limit: int
    arm: Arm | None = None
    identity: Identity | None = None
    taken: float = 0.0
    prefill: float = 0.0
    first: float = 0.0
    prompt_tokens: int = 0
    matching: Matching | None = None
    bits: np.ndarray | None = None
    tokens: list[int] = field(default_factory=list)
    text: _Text | None = None
    told_at: float = 0.0

    @property
    def due(self) -> float:
        return np.inf if self.ask.deadline is None else self.sent + self.ask.deadline


class _Text:
    """The text of tokens as they come, without decoding all of it each time."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.sent = ""
        self._whole = 0
        self._from = 0

    def more(self, tokens: list[int]) -> str:
        """What can be told of ``tokens`` beyond what was; half a character is kept back."""
        before = self.base.text(tokens[self._from : self._whole])
        now = self.base.text(tokens[self._from :])
        if len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._from, self._whole = self._whole, len(tokens)
        self.sent += now[len(before) :]
        return now[len(before) :]


class Engine:
    """Answers asks with the arms of one base.

    Args:
        base: the model; ``arms`` decides what is in it.
        arms: who can answer.
        settings: pixel bounds.
        features: keeps the tower's view of photographs.
        emit: called with every event, in the loop's thread.
        max_rows: asks decoded together, of all arms.
        max_tokens: most tokens of any answer.
        dimensions: names that constrained answers must have; None leaves them to the model.
    """

    def __init__(
        self,
        base: Base,
        arms: Arms,
        settings: PixelSettings,
        features: FeatureStore,
        emit: Callable[[Event], object],
        *,
        max_rows: int = 16,
        max_tokens: int = 2048,
        dimensions: tuple[str, ...] | None = None,
    ) -> None:
        self.base, self.arms, self.settings, self.features = base, arms, settings, features
        self.emit = emit
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.constraint = Constraint.critique(base, dimensions, decimals=True)
        self.answered = 0
        self._inbox: deque[_Job | str] = deque()
        self._woken = threading.Event()
        self._waiting: deque[_Job] = deque()
        self._batch: Running | None = None
        self._jobs: dict[int, _Job] = {}  # by the places of their rows
        self._grids: OrderedDict[str, Grid] = OrderedDict()
        # One thread: photographs are read in the order they came, beside the model's work.
        self._reader = ThreadPoolExecutor(1, "photographs")

    # --- from any thread --------------------------------------------------------------------

    def submit(self, ask: Ask, sent: float | None = None) -> None:
        """Answer an ask; ``sent`` is when it was asked, of the monotonic clock."""
        picture = hashlib.sha256(ask.image).hexdigest()
        limit = min(ask.max_tokens or self.max_tokens, self.max_tokens)
        photograph = self._reader.submit(self._open, ask.image, picture)
        sent = time.monotonic() if sent is None else sent
        self._inbox.append(_Job(ask, sent, picture, photograph, limit))
        self._woken.set()

    def cancel(self, name: str) -> None:
        """Stop answering the ask with this id; if it is under way, its failure says so."""
        self._inbox.append(name)
        self._woken.set()

    @property
    def queued(self) -> int:
        """Asks that wait to be taken up."""
        return len(self._waiting) + sum(isinstance(one, _Job) for one in tuple(self._inbox))

    @property
    def running(self) -> int:
        """Asks that are being answered."""
        return len(self._jobs)

    # --- the loop's thread ------------------------------------------------------------------

    def turn(self) -> bool:
        """Take up at most one ask, and advance every row by a token.

        Returns:
            Whether anything is waiting or under way.
        """
        self._woken.clear()
        self._come_in()
        self._end_overdue()
        self._take_up()
        if self._batch is not None:
            self._step(self._batch)
        return bool(self._waiting or self._jobs or self._inbox)

    def wait(self, seconds: float) -> None:
        """Until something comes in, or so long."""
        self._woken.wait(seconds)

    def run(self) -> None:
        """Turn until nothing is waiting or under way."""
        while self.turn():
            pass

    def close(self) -> None:
        """Stop the thread that reads photographs."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _come_in(self) -> None:
        while self._inbox:
            one = self._inbox.popleft()
            if isinstance(one, str):
                self._end(
                    lambda job, name=one: job.ask.id == name,
                    Fault.cancelled,
                    "The caller went away, so the generation was stopped.",
                )
            else:
                self._waiting.append(one)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        self._end(
            lambda job: job.due <= now,
            Fault.deadline,
            "The answer was not done within its deadline, so the generation was stopped; ask "
            "again when fewer are waiting, allow more time, or lower max_tokens.",
        )

    def _end(self, which: Callable[[_Job], bool], fault: Fault, sentence: str) -> None:
        """Fail jobs, wherever they are; their rows are computed no more."""
        for job in [job for job in self._waiting if which(job)]:
            self._waiting.remove(job)
            job.photograph.cancel()
            self._fail(job, fault, sentence)
        for place, job in list(self._jobs.items()):
            if which(job):
                self._leave(place)
                self._fail(job, fault, sentence)

    def _fail(self, job: _Job, fault: Fault, sentence: str) -> None:
        self.answered += 1
        self.emit(Failure(job.ask.id, fault, sentence))

    def _leave(self, place: int) -> None:
        assert self._batch is not None
        del self._jobs[place]
        self._batch.leave(place)
        if not self._jobs:
            self._batch = None  # with all its columns

    # --- taking up --------------------------------------------------------------------------

    def _open(self, image: bytes, picture: str) -> _Photograph:
        """In the other thread."""

        def make() -> Pixels:
            photograph = open_photograph(_Bytes(image))
            return to_pixels(photograph, self.base.image_processor, self.settings)

        return _Photograph(make, self._grids.get(picture))

    def _take_up(self) -> None:
        """The ask that has waited longest, if there is room and its photograph has been read."""
        if not self._waiting or self.running >= self.max_rows:
            return
        job = self._waiting[0]
        # With nothing else to do, the photograph is waited for, but a cancellation is seen.
        done, _ = wait([job.photograph], timeout=0.0 if self._jobs else 0.05)
        if not done:
            return
        self._waiting.popleft()
        try:
            photograph = self._read(job)
            job.taken = time.monotonic()
            job.identity, job.arm = self.arms.take(job.ask.arm)
            self._join(job, job.arm, photograph)
        except _Refusal as refusal:
            self._fail(job, refusal.fault, _sentence(refusal))
        except AdapterError as error:
            self._fail(job, Fault.adapter, _sentence(error))
        except ModelError as error:
            self._fail(job, Fault.prompt, _sentence(error))
        except Exception as error:
            self._fail_unforeseen(job, error)

    def _read(self, job: _Job) -> _Photograph:
        try:
            return job.photograph.result()
        except MondrianError as error:
            raise _Refusal(Fault.picture, str(error)) from error
        except Exception as error:  # Pillow's plugins raise anything on a made-up file
            raise _Refusal(
                Fault.picture,
                f"the photograph cannot be read ({type(error).__name__}: {error}); send another",
            ) from error

    def _fail_unforeseen(self, job: _Job, error: Exception) -> None:
        """One ask's trouble is no other's; what it was is in the service's log."""
        print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        self._fail(
            job,
            Fault.model,
            f"Answering this failed ({type(error).__name__}: {error}); the service's log says "
            "where. Others are answered.",
        )

    def _join(self, job: _Job, arm: Arm, photograph: _Photograph) -> None:
        """Read the prompt, and let the row join the others.

        Raises:
            AdapterError: the arm does not prove itself beside the others'.
            ModelError: picture and prompt together are more than the model takes.
        """
        grid = photograph.grid
        count = grid[0] * grid[1] * grid[2] // self.base.backbone.merge**2
        tokens = self.base.prompt_tokens(job.ask.prompt, count)
        longest = self.base.backbone.longest
        if len(tokens) + job.limit > longest:
            raise ModelError(
                f"the prompt has {len(tokens)} tokens ({count} of them the photograph's) and the "
                f"answer may have {job.limit}, together more than the {longest} that "
                f"{self.base.identity.name} takes; shorten the prompt or lower max_tokens"
            )
        self.arms.mix([*(other.arm for other in self._jobs.values() if other.arm), arm])
        self.arms.put_in(arm)
        # Only now: an arm may have an adapter in the tower, and sees the photograph by itself.
        (features,) = self.features.get([(job.picture, photograph)])
        self._grids[job.picture] = grid
        self._grids.move_to_end(job.picture)
        while len(self._grids) > KNOWN_GRIDS:
            self._grids.popitem(last=False)
        started = time.monotonic()
        start = read_prompts(self.base, [Request(tokens, features, grid)])
        job.prefill = time.monotonic() - started
        job.prompt_tokens = len(tokens)
        if job.ask.constrained:
            job.matching = self.constraint.start(1)
            (job.bits,) = job.matching.allowed([0])
        if job.ask.stream:
            job.text = _Text(self.base)
        batch = self._batch or Running(arm.steps)
        place = batch.join(start, seed=job.ask.seed & 0xFFFFFFFF, temperature=job.ask.temperature)
        self._batch, self._jobs[place] = batch, job

    # --- steps ------------------------------------------------------------------------------

    def _step(self, batch: Running) -> None:
        """A token for every row."""
        moved = batch.settle()
        self._jobs = {moved.get(place, place): job for place, job in self._jobs.items()}
        rows = [
            self._jobs[place].arm if place in self._jobs else None for place in range(batch.places)
        ]
        batch.steps = self.arms.put_in_rows(rows)
        batch.choose(self._allowed(batch.places))
        token = batch.token
        # Queued before the tokens are read, so that the device does not wait for the host.
        batch.advance()
        values: list[int] = np.array(token).tolist()
        now = time.monotonic()
        for place, job in list(self._jobs.items()):
            try:
                done = self._append(job, values[place], now)
            except Exception as error:
                self._fail_unforeseen(job, error)
                done = True
            if done:
                self._leave(place)
        bound = [job for job in self._jobs.values() if job.matching is not None]
        matchers = [job.matching.matchers[0] for job in bound if job.matching is not None]
        # While the device computes.
        for job, bits in zip(bound, self.constraint.allowed(matchers), strict=True):
            job.bits = bits

    def _allowed(self, places: int) -> np.ndarray | None:
        """Which tokens may come next in each place; None if any may in all."""
        if all(job.bits is None for job in self._jobs.values()):
            return None
        bits = np.full((places, self.constraint.words), -1, np.int32)
        for place, job in self._jobs.items():
            if job.bits is not None:
                bits[place] = job.bits
        return bits

    def _append(self, job: _Job, token: int, now: float) -> bool:
        """Add a token to an answer; whether that was the last."""
        if token < 0:
            self._fail(job, Fault.model, NOT_FINITE)
            return True
        job.first = job.first or now
        job.tokens.append(token)
        if job.matching is not None:
            try:
                job.matching.consume(0, token)
            except ModelError as error:
                self._fail(job, Fault.model, _sentence(error))
                return True
        ended = token in self.base.end_tokens
        if ended or len(job.tokens) >= job.limit:
            self._finish(job, ended, now)
            return True
        if job.text is not None and now - job.told_at >= PIECE_EVERY:
            job.told_at = now
            if piece := job.text.more(job.tokens):
                self.emit(Piece(job.ask.id, piece))
        return False

    def _finish(self, job: _Job, ended: bool, now: float) -> None:
        assert job.identity is not None
        text = self.base.text(job.tokens[:-1] if ended else job.tokens)
        if job.text is not None and text.startswith(job.text.sent) and text != job.text.sent:
            self.emit(Piece(job.ask.id, text[len(job.text.sent) :]))
        seconds = {
            "queued": job.taken - job.sent,
            "prefill": job.prefill,
            "first_token": job.first - job.sent,
            "total": now - job.sent,
        }
        self.answered += 1
        self.emit(
            Answer(
                id=job.ask.id,
                identity=job.identity,
                text=text,
                finished=ended,
                prompt_tokens=job.prompt_tokens,
                tokens=len(job.tokens),
                seconds={name: round(value, 6) for name, value in seconds.items()},
            )
        )


def _sentence(error: Any) -> str:
    """An error as a sentence of its own."""
    text = str(error).strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
