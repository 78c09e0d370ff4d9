"""The model's process as the HTTP process has it: started, watched, replaced, and asked.

Nothing here imports MLX. Asks wait in a queue with a bound; as many go to the model's process as it
can have under way, and a few more, so that it is never idle. If the process ends or stands still,
it is killed and another takes its place. What it had is asked once more, unless part of the answer
was told already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import wire
from .protocol import Ask, Event, Failure, Fault, Piece, State, Status

AHEAD = 4
"""Asks that the model's process has beside those it can answer together; it reads their pictures
meanwhile."""


@dataclass(frozen=True)
class Limits:
    """How long the model's process may be silent, and how often it is replaced; seconds.

    Attributes:
        silence: without a heartbeat; then the process is stopped, swapped out or dead.
        stuck: without a turn of its loop, though its heart beats. One turn reads a prompt or
            loads an adapter, and on a GPU may compile.
        loading: from its start until it is ready.
        stopping: from being told to stop until it is killed.
        backoff: before the second start in a row; doubles with each further one.
        attempts: starts in a row that may fail.
        steady: ready for so long, or having answered something, a start was no failure.
    """

    silence: float = 10.0
    stuck: float = 120.0
    loading: float = 600.0
    stopping: float = 30.0
    backoff: float = 0.5
    attempts: int = 4
    steady: float = 60.0


@dataclass(eq=False)
class _Entry:
    """An ask that somebody waits for.

    Attributes:
        due: when it is given up, of the monotonic clock.
        told: whether a piece of its answer was told.
        again: whether it was asked again already.
    """

    ask: Ask
    sent: float
    due: float | None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    told: bool = False
    again: bool = False


class Supervisor:
    """See the module; implements `protocol.Model`.

    Args:
        setup: what the process is started with.
        max_queue: asks that may wait or be under way together, as the HTTP side counts them; one
            more is refused as busy.
        limits: see :class:`Limits`.
        command: what is started, for tests; the socket's number is appended.
    """

    def __init__(
        self,
        setup: wire.Setup,
        *,
        max_queue: int = 64,
        limits: Limits | None = None,
        command: Sequence[str] = (sys.executable, "-m", "mondrian_ft.serving.worker"),
    ) -> None:
        self.setup = setup
        self.max_queue = max_queue
        self.limits = limits or Limits()
        self.command = tuple(command)
        self.restarts = 0
        self.pid: int | None = None
        self._status = Status(State.loading, "starting")
        self._entries: dict[str, _Entry] = {}
        self._waiting: deque[_Entry] = deque()
        self._sent: dict[str, _Entry | None] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._changed = asyncio.Event()
        self._stopping = False
        self._answered = 0
        self._ready_at: float | None = None

    # --- what the HTTP process calls --------------------------------------------------------

    async def start(self) -> None:
        """Start the process; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(), name="supervisor")

    async def settled(self, timeout: float | None = None) -> Status:
        """The status when the process is ready or has failed for good.

        Raises:
            TimeoutError: neither within ``timeout`` seconds.
        """
        await asyncio.wait_for(self._settled.wait(), timeout)
        return self.status()

    def status(self) -> Status:
        """As of the last heartbeat; never waits."""
        status = self._status
        if self._stopping and status.state is not State.failed:
            status = replace(status, state=State.stopping)
        return replace(status, queued=len(self._waiting) + status.queued, restarts=self.restarts)

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """Events of one ask: pieces if it streams, then one answer or failure.

        Closing the iterator, or cancelling the task that reads it, stops the generation.

        Raises:
            ValueError: an ask with this id is under way.
        """
        if ask.id in self._entries or ask.id in self._sent:
            raise ValueError(f"an ask with the id {ask.id} is under way; ids must be unique")
        if refusal := self._refusal(ask):
            yield refusal
            return
        now = time.monotonic()
        entry = _Entry(ask, now, None if ask.deadline is None else now + ask.deadline)
        self._entries[ask.id] = entry
        self._waiting.append(entry)
        self._pump()
        try:
            while True:
                event = await self._next(entry)
                yield event
                if not isinstance(event, Piece):
                    return
        finally:
            self._forget(entry)

    async def stop(self) -> None:
        """Let what is under way end, within ``limits.stopping`` seconds, and end the process."""
        self._stopping = True
        if self._task is None:
            return
        by = time.monotonic() + self.limits.stopping
        while self._entries and not self._task.done() and time.monotonic() < by:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.01, by - time.monotonic()))
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._fail_all("The service was stopped before this was answered; ask again.")
        self._settled.set()

    # --- asks -------------------------------------------------------------------------------

    def _refusal(self, ask: Ask) -> Failure | None:
        if self._stopping:
            return Failure(ask.id, Fault.worker, "The service is stopping; ask again later.")
        if self._task is None:
            return Failure(ask.id, Fault.worker, "The model's process was not started.")
        if self._status.state is State.failed:
            return Failure(ask.id, Fault.worker, f"The model is not there: {self._status.reason}")
        if len(self._entries) >= self.max_queue:
            return Failure(
                ask.id,
                Fault.busy,
                f"{len(self._entries)} asks are waiting or under way already, which is all that "
                "may; ask again in a while.",
            )
        return None

    async def _next(self, entry: _Entry) -> Event:
        if entry.due is None:
            return await entry.events.get()
        try:
            return await asyncio.wait_for(
                entry.events.get(), max(0.0, entry.due - time.monotonic())
            )
        except TimeoutError:
            return Failure(
                entry.ask.id,
                Fault.deadline,
                f"There was no answer within {entry.ask.deadline:g} seconds, so the generation "
                "was stopped; ask again when fewer are waiting, or allow more time.",
            )

    def _forget(self, entry: _Entry) -> None:
        """Nobody waits for it any more, whether it was answered or not."""
        name = entry.ask.id
        self._entries.pop(name, None)
        if entry in self._waiting:
            self._waiting.remove(entry)
        if self._sent.get(name) is entry:
            # Its place in the process is free when the process has said so.
            self._sent[name] = None
            self._write(wire.Cancel(name))
        self._changed.set()

    def _pump(self) -> None:
        """Send what the process has room for."""
        if self._status.state is not State.ready or self._writer is None:
            return
        while self._waiting and len(self._sent) < self.setup.max_rows + AHEAD:
            entry = self._waiting.popleft()
            self._sent[entry.ask.id] = entry
            self._write(wire.Take(entry.ask, entry.sent))

    def _write(self, message: Any) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.pack(message))

    def _take(self, event: Event) -> None:
        """An event from the process; of an ask that nobody waits for, only its end matters."""
        entry = self._sent.get(event.id)
        if isinstance(event, Piece):
            if entry is not None:
                entry.told = True
                entry.events.put_nowait(event)
            return
        self._answered += 1
        self._sent.pop(event.id, None)
        if entry is not None:
            entry.events.put_nowait(event)
        self._pump()

    # --- the process ------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep a process running until it cannot be, or the task is cancelled."""
        failures = 0
        while True:
            answered, self._ready_at = self._answered, None
            reason, final = await self._run_once()
            lasted = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
            worked = self._answered > answered or lasted > self.limits.steady
            failures = 1 if worked else failures + 1
            if final or failures >= self.limits.attempts:
                if not final:
                    reason = f"it ended {failures} times in a row, the last time so: {reason}"
                self._status = Status(State.failed, reason=reason)
                self._fail_all(f"The model is not there: {reason}")
                self._settled.set()
                return
            self.restarts += 1
            self._status = Status(State.loading, f"starting again, as {reason}")
            await asyncio.sleep(self.limits.backoff * 2 ** (failures - 1))

    async def _run_once(self) -> tuple[str, bool]:
        """One process from its start to its end.

        Returns:
            Why it ended, and whether another would end in the same way.
        """
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                # What is printed there is no answer of ours.
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            return f"the model's process cannot be started ({error})", False
        finally:
            theirs.close()
        self.pid = process.pid
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._write(self.setup)
        reason: str | None = None
        try:
            reason = await self._follow(reader)
        finally:
            await self._end(process, gently=reason is None)
            self._hand_back()
        if self._status.state is State.failed:
            return self._status.reason, True
        return reason or _ending(process.returncode), False

    async def _follow(self, reader: asyncio.StreamReader) -> str:
        """Take messages until the process is silent; why it is."""
        started = time.monotonic()
        while True:
            try:
                # Not wait_for, which until Python 3.12 swallows a cancellation that comes together
                # with a message: a service that was told to stop went on.
                async with asyncio.timeout(self.limits.silence):
                    message = await wire.receive_async(reader)
            except TimeoutError:
                return f"the model's process was silent for {self.limits.silence:g} seconds"
            except (EOFError, ConnectionError):
                return ""
            if not isinstance(message, wire.Beat):
                self._take(message)
                continue
            self._status = message.status
            if message.status.state is State.failed:
                return message.status.reason
            if message.turned > self.limits.stuck:
                return f"the model's loop stood still for {message.turned:.0f} seconds"
            if message.status.state is State.ready:
                self._ready_at = self._ready_at or time.monotonic()
                self._settled.set()
                self._pump()
            elif time.monotonic() - started > self.limits.loading:
                return f"the model was not ready after {self.limits.loading:g} seconds"

    async def _end(self, process: asyncio.subprocess.Process, *, gently: bool) -> None:
        """See that the process is gone. One that hangs, or is stopped, does not hear SIGTERM."""
        if gently:
            self._write(wire.Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)
        elif self._writer is not None:
            self._writer.close()
        if process.returncode is None:
            # After its socket has closed it may be ending by itself, with a code that says why.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 0.2)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.pid = None

    def _hand_back(self) -> None:
        """What the process had goes to the next one, or fails."""
        had, self._sent = list(self._sent.values()), {}
        for entry in reversed([entry for entry in had if entry is not None]):
            if entry.told or entry.again:
                entry.events.put_nowait(
                    Failure(
                        entry.ask.id,
                        Fault.worker,
                        "The model's process ended while this was answered, and was replaced; ask "
                        "again.",
                    )
                )
            else:
                entry.again = True
                self._waiting.appendleft(entry)

    def _fail_all(self, sentence: str) -> None:
        self._waiting.clear()
        for name, entry in self._entries.items():
            entry.events.put_nowait(Failure(name, Fault.worker, sentence))


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        more = ", as when memory is short" if name == "SIGKILL" else ""
        return f"the model's process was ended by {name}{more}"
    return f"the model's process ended with code {code}; its last words are in the service's log"


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
