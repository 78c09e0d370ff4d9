"""From what was asked to critiques: which advisors, which arms, the asking, the job, the counts.

The same events are made for an answer that is awaited and for one that is streamed, so that both
say the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.store import advisor_id
from ..errors import ServerError, nearest
from . import planning
from .ab import Choice, Mode, Router, UnknownMode, mode_of
from .intake import Asked
from .jobs import FAILED, JobRefused, JobTable, Locked, Outcome
from .measuring import Meters
from .pages import Refused
from .planning import Persona, Plan, Slot
from .protocol import BASE, Answer, Ask, Failure, Fault, Model, Piece, State
from .tally import Tally

STATUS = {
    Fault.picture: 400,
    Fault.prompt: 400,
    Fault.adapter: 503,
    Fault.model: 500,
    Fault.deadline: 504,
    Fault.cancelled: 503,
    Fault.worker: 503,
    Fault.busy: 429,
}
"""The HTTP status of each reason for which there is no answer."""
GRACE = 5.0
"""Seconds beyond the deadline after which the model's process is not waited for."""
VOTABLE = 2_000
"""Answers kept in memory for a vote, the newest."""

Event = tuple[str, dict[str, Any]]
"""``start``, ``piece``, ``answer`` or ``error``, and what it says (JSON types)."""


@dataclass(frozen=True)
class Settings:
    """What holds for every request.

    Attributes:
        max_queue: asks waiting or under way together.
        deadline: seconds until an ask is given up; None waits.
        max_tokens: most tokens of an answer; None is the model's own limit.
        constrained: whether an answer must keep to the critique's schema.
        default_advisor: whose critique it is where a request names nobody.
    """

    max_queue: int
    deadline: float | None
    max_tokens: int | None
    constrained: bool
    default_advisor: str


class Desk:
    """Answers requests with one model.

    Args:
        model: who is asked.
        router: which arm.
        personas: the advisors by id.
        settings: see there.
        catalog: the versions and channels a request may name; read each time, in a thread.
        jobs: the job database; None writes none.
        meters: what is counted for Prometheus.
        tally: what is counted of each arm; None keeps it in memory.
        uploads: where uploaded photographs of new rows are kept; None keeps none.
    """

    def __init__(
        self,
        model: Model,
        router: Router,
        personas: Mapping[str, Persona],
        settings: Settings,
        *,
        catalog: Callable[[], Sequence[str]] = tuple,
        jobs: JobTable | None = None,
        meters: Meters | None = None,
        tally: Tally | None = None,
        uploads: Path | None = None,
    ) -> None:
        self.model, self.router, self.personas = model, router, dict(personas)
        self.settings, self.catalog, self.jobs = settings, catalog, jobs
        self.meters = meters or Meters()
        self.tally = tally or Tally(None, router.split)
        self.uploads = uploads
        self.waiting = 0
        self._seconds: float | None = None
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._aside: set[asyncio.Task[Any]] = set()

    # -- planning

    async def plan(self, asked: Asked, request_id: str) -> Plan:
        """Who is asked for what.

        Raises:
            Refused: an advisor, mode or version that there is not (400).
        """
        mode, drawn = self._mode(asked.mode), str(uuid.uuid4())
        key = asked.user or asked.job_id or drawn
        personas, several = self._personas(asked.advisor, key)
        if asked.version is not None:
            choice = await self.version(asked.version)
            if asked.mode is not None and str(mode) != choice.used:
                raise Refused(
                    400, f"version={asked.version[:80]} and mode={mode} contradict each other."
                )
            mode, choices = Mode(choice.used), [choice] * len(personas)
        else:
            try:
                choices = [self.router.choose(one.id, key, mode) for one in personas]
            except ServerError as error:
                raise Refused(400, str(error)) from None
        return Plan(asked, request_id, drawn, mode, personas, tuple(choices), several)

    def _mode(self, name: str | None) -> Mode:
        if name is None:
            return self.router.mode
        try:
            return mode_of(name)
        except UnknownMode as error:
            raise Refused(400, str(error)) from None

    async def version(self, name: str) -> Choice:
        """The arm that a request names itself: the base, a version or a channel.

        Raises:
            Refused: there is none (400). No path is ever taken from a client.
        """
        if name == BASE:
            return Choice(BASE, "base")
        known = await asyncio.to_thread(self.catalog)
        if name not in known:
            meant = nearest(name, [BASE, *known])
            hint = f"did you mean {meant}?" if meant else f"there are {', '.join([BASE, *known])}."
            raise Refused(400, f"There is no version or channel {name[:80]!r}; {hint}")
        return Choice(name, "fine_tuned")

    def _personas(self, names: str | None, key: str) -> tuple[tuple[Persona, ...], bool]:
        """The advisors a request names, each once, and whether it may have named several."""
        known = sorted(self.personas)
        plain = advisor_id(names)
        if plain == "all":
            return tuple(self.personas[name] for name in known), True
        if plain == "random":
            # Of who asks, so that a repeated request is answered by the same one.
            chosen = known[int(self.router.draw(key, "advisor") * len(known))]
            return (self.personas[chosen],), False
        listed = (names or self.settings.default_advisor).split(",")
        found: dict[str, Persona] = {}
        for name in listed:
            identity = advisor_id(name)
            if identity not in self.personas:
                meant = nearest(name.strip(), known)
                hint = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}."
                raise Refused(400, f"There is no advisor {name.strip()[:80]!r}; {hint}")
            found[identity] = self.personas[identity]
        return tuple(found.values()), len(listed) > 1

    # -- answering

    async def events(self, plan: Plan, *, stream: bool) -> AsyncGenerator[Event, None]:
        """A start, pieces if it streams, and one answer or error for each advisor, as they come.

        The job is closed before the last of them is told. Closing the generator stops what is
        under way, and the job has failed.

        Raises:
            Refused: the queue is full (429), the model or the database is not ready (503), or the
                job is not to be answered (404, 409).
        """
        self.enter(len(plan.personas))
        job_id: str | None = None
        closed = False
        try:
            taking = asyncio.ensure_future(self._take(plan))
            try:
                job_id, known = await asyncio.shield(taking)
            except asyncio.CancelledError:
                # The thread cannot be stopped, and may yet mark the row as being answered.
                self.aside(self._give_back(taking))
                raise
            yield "start", planning.start(plan, job_id)
            if known is not None:
                closed = True
                for body in known:
                    yield "answer", body
                return
            slots = [Slot(place) for place in range(len(plan.personas))]
            left = len(slots)
            async with aclosing(self._ask_all(plan, slots, job_id, stream)) as coming:
                async for name, body in coming:
                    left -= name != "piece"
                    if not left:
                        closed = True
                        name, body = await self._close(plan, slots, job_id, name, body)
                    yield name, body
        finally:
            self.leave(len(plan.personas))
            if job_id is not None and not closed:
                self.aside(self._give_up(job_id))

    def enter(self, asks: int) -> None:
        """Take room for some asks; `leave` gives it back.

        Raises:
            Refused: the model is not ready (503), or the queue is full (429).
        """
        self._check_ready()
        self._check_room(asks)
        self.waiting += asks

    def leave(self, asks: int) -> None:
        """Give back what `enter` took."""
        self.waiting -= asks

    def _check_ready(self) -> None:
        status = self.model.status()
        if status.state is State.loading:
            raise Refused(
                503,
                f"The model is loading ({status.stage or 'starting'}, {status.progress:.0%}); ask "
                "again in some seconds.",
                Retry_After="2",
            )
        if status.state is not State.ready:
            raise Refused(503, f"The model is {status.state}: {status.reason or 'no reason told'}.")

    def _check_room(self, asks: int) -> None:
        most = self.settings.max_queue
        if asks > most:
            raise Refused(
                400, f"{asks} advisors are more than this service answers at once, {most}."
            )
        if self.waiting + asks > most:
            raise Refused(
                429,
                f"{self.waiting} answers are waiting or under way, and no more than {most} may "
                "(serve.max_queue); ask again later.",
                Retry_After=str(self.retry_after()),
            )

    def retry_after(self) -> int:
        """Seconds for which one who is told to come again should wait, 1 to 60.

        As long as answers take of late, waiting included: by then as many as wait now have been
        answered (Little's law), so that there is room, and not everyone is back at once.
        """
        return 2 if self._seconds is None else max(1, min(60, math.ceil(self._seconds)))

    async def _take(self, plan: Plan) -> tuple[str | None, list[dict[str, Any]] | None]:
        """The job's id, and its answers if it was answered before."""
        if self.jobs is None:
            return plan.asked.job_id, None
        job_id = plan.asked.job_id
        if self.uploads is not None and job_id is None:
            # Before its row, which would else name a photograph that is nowhere.
            await asyncio.to_thread(planning.keep_upload, plan.asked, self.uploads)
        try:
            row = await asyncio.to_thread(
                self.jobs.take,
                job_id or plan.id,
                plan.request_sha256,
                advisor=",".join(one.id for one in plan.personas),
                filename=planning.file_name(plan.asked),
                new=job_id is None,
                replace=plan.asked.replace,
            )
        except JobRefused as error:
            raise Refused(error.status, str(error)) from None
        except Locked as error:
            raise Refused(503, f"{error} Ask again later.", Retry_After="5") from None
        if row is None:
            return job_id or plan.id, None
        try:
            stored = [
                {**body, "repeated": True} for body in json.loads(row["llm_outputs"])["answers"]
            ]
        except (KeyError, TypeError, ValueError):
            raise Refused(
                409,
                f"Job {plan.asked.job_id!r} was answered, but llm_outputs of its row no longer "
                "holds the answer as it was written; send replace=true to ask again.",
            ) from None
        return job_id, stored

    async def _ask_all(
        self, plan: Plan, slots: Sequence[Slot], job_id: str | None, stream: bool
    ) -> AsyncGenerator[Event, None]:
        """All advisors at once, so that the model can answer them together."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._ask(plan, slot, job_id, stream, queue.put_nowait))
            for slot in slots
        ]
        everything = asyncio.gather(*tasks)
        everything.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await everything
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(
        self,
        plan: Plan,
        slot: Slot,
        job_id: str | None,
        stream: bool,
        tell: Callable[[Event], None],
    ) -> None:
        persona, choice = plan.personas[slot.place], plan.choices[slot.place]
        ask = Ask(
            id=f"{plan.id}.{slot.place}",
            image=plan.asked.photograph.data,
            prompt=persona.prompt,
            arm=choice.arm,
            max_tokens=self.settings.max_tokens,
            constrained=self.settings.constrained,
            stream=stream,
            deadline=self.settings.deadline,
        )
        started = time.perf_counter()
        end: Answer | Failure | None = None
        async with aclosing(self.ask(ask, choice.used)) as coming:
            async for event in coming:
                if isinstance(event, Piece):
                    tell(("piece", {"advisor": persona.id, "text": event.text}))
                else:
                    end = event
        assert end is not None
        seconds = time.perf_counter() - started
        head = {
            "request_id": plan.request_id,
            "answer_id": ask.id,
            "job_id": job_id,
            "advisor": persona.id,
            "mode": str(plan.mode),
            "model_used": choice.used,
        }
        if isinstance(end, Failure):
            slot.status = self._status_of(end, plan)
            slot.body = {**head, "error": end.sentence, "fault": str(end.fault)}
            slot.body["parse_success"] = False
            if end.fault not in (Fault.cancelled, Fault.busy, Fault.picture):
                self.tally.failed(choice.used)
            tell(("error", {**slot.body, "status": slot.status}))
            return
        slot.body = {**head, **planning.told(end, persona, seconds)}
        parsed = slot.body["parse_success"]
        slot.status = 200 if parsed else 422
        self.tally.answered(choice.used, seconds, parsed, end.identity.hash)
        self.meters.answered(choice.used, parsed)
        self._remember(slot.body, plan)
        tell(("answer", slot.body) if parsed else ("error", {**slot.body, "status": 422}))

    def _status_of(self, failure: Failure, plan: Plan) -> int:
        if failure.fault is Fault.adapter and plan.asked.version is not None:
            return 400
        return STATUS[failure.fault]

    async def ask(self, ask: Ask, used: str) -> AsyncGenerator[Piece | Answer | Failure, None]:
        """The model's events, ended by a failure if it says nothing for too long; measured, as
        ``used``'s."""
        started = time.perf_counter()
        async with aclosing(self._events_of(ask)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    seconds = time.perf_counter() - started
                    before = seconds if self._seconds is None else self._seconds
                    self._seconds = before + 0.2 * (seconds - before)
                    self.meters.generated(used, event, seconds)
                elif isinstance(event, Failure):
                    self.meters.failed(used, event.fault)
                yield event

    async def _events_of(self, ask: Ask) -> AsyncGenerator[Piece | Answer | Failure, None]:
        limit = None if ask.deadline is None else ask.deadline + GRACE
        over = None if limit is None else asyncio.get_running_loop().time() + limit
        stream = self.model.ask(ask)
        try:
            while True:
                try:
                    async with asyncio.timeout_at(over):
                        event = await anext(stream)
                except StopAsyncIteration:
                    yield Failure(ask.id, Fault.worker, "The model's process gave no answer.")
                    return
                except TimeoutError:
                    yield Failure(
                        ask.id, Fault.deadline, f"There was no answer within {limit:g} seconds."
                    )
                    return
                yield event
                if not isinstance(event, Piece):
                    return
        finally:
            closing = getattr(stream, "aclose", None)
            if closing is not None:
                await closing()

    # -- the job

    async def _close(
        self,
        plan: Plan,
        slots: Sequence[Slot],
        job_id: str | None,
        name: str,
        body: dict[str, Any],
    ) -> Event:
        """Write the job's end; the last event, or the error that it could not be written."""
        if self.jobs is None or job_id is None:
            return name, body
        ended = planning.outcome(plan, slots)
        try:
            # Not stopped half-way when the client goes away now.
            await asyncio.shield(asyncio.to_thread(self.jobs.close, job_id, ended))
        except Locked as error:
            sentence = f"{error} The answer is kept and written as soon as that works."
            return "error", {**body, "error": sentence, "fault": "database", "status": 503}
        return name, body

    async def _give_back(self, taking: asyncio.Future[tuple[str | None, Any]]) -> None:
        """Close a job that was taken for nobody."""
        try:
            job_id, known = await taking
        except Refused:
            return  # It was not taken.
        if self.jobs is not None and job_id is not None and known is None:
            await self._give_up(job_id)

    async def _give_up(self, job_id: str) -> None:
        assert self.jobs is not None
        error = "The caller went away before there was an answer, or it could not be given."
        try:
            await asyncio.to_thread(self.jobs.close, job_id, Outcome(FAILED, error=error))
        except Locked:
            return  # It is kept, and `settle` tries again.

    async def settle(self) -> None:
        """Write what the database could not take before, and what was counted."""
        with suppress(ServerError):  # It is kept, and /ab tells.
            await asyncio.to_thread(self.tally.flush)
        if self.jobs is not None and self.jobs.unsettled:
            try:
                await asyncio.to_thread(self.jobs.settle)
            except Locked:
                return  # Counted in /metrics, and tried again.

    def aside(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something after its request is over."""
        task = asyncio.get_running_loop().create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    async def finish(self) -> None:
        """Wait for what goes on aside, and write what is left."""
        while self._aside:
            await asyncio.gather(*self._aside, return_exceptions=True)
        await self.settle()

    # -- votes

    def _remember(self, body: dict[str, Any], plan: Plan) -> None:
        photograph = hashlib.sha256(plan.asked.photograph.data).hexdigest()
        self._answers[body["answer_id"]] = {**body, "image_sha256": photograph}
        while len(self._answers) > VOTABLE:
            self._answers.popitem(last=False)

    def answer(self, answer_id: str) -> dict[str, Any] | None:
        """An answer of late, for a vote on it."""
        return self._answers.get(answer_id)
