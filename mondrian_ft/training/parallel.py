"""Several processes train one adapter: who they are, what they sum, and what they agree on.

Every process has the base, the adapter and all rows. Each takes its share of an update's rows; the
sums of their gradients, losses and counts are then the same for all, and so is everything decided
by them. The first process (rank 0) alone writes.

What is summed is computed before it is sent: on Metal a command that waits for another machine is
stopped after some 5 seconds. A process that stops answering would be waited for without end, so a
watch ends this one instead. Source: ml-explore/mlx issue 4475.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.batches import Batch, Example, collate
from ..errors import PeerLost, PeersDiffer
from ..launched import ONLY, Launched, address
from ..model.backend import mx

if TYPE_CHECKING:
    from .trainer import Trainer

TIMEOUT = 600.0
"""Seconds to wait for the other processes where nobody says."""


class World:
    """The processes that train together; alone by default, and then nothing is sent.

    Args:
        me: which process this is, of how many.
        timeout: seconds to wait for the others, above 0.
        group: MLX's group of them; None for the processes this one was launched with.
        lost: called with a sentence before a wait that has lasted too long ends this process.

    Raises:
        PeerLost: the others cannot be reached.
    """

    def __init__(
        self,
        me: Launched = ONLY,
        *,
        timeout: float = TIMEOUT,
        group: Any = None,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.size = me.rank, me.size
        self.timeout = timeout
        self.lost = lost
        self.step = 0
        self._group = group
        self._wish = self._agreed = False
        if self.size > 1 and group is None:
            self._group = self._joined()
            found = self._group.rank(), self._group.size()
            if found != (self.rank, self.size):
                raise _aloud(
                    f"MLX says that this is process {found[0]} of {found[1]}, its launcher that it "
                    f"is {self.rank} of {self.size}; start all of them with one mlx.launch"
                )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    # --- shares -----------------------------------------------------------------------------

    def most(self, batch_size: int, accumulate: int) -> int:
        """Rows of a micro-batch of one process, at most."""
        return min(batch_size, -(-batch_size * accumulate // self.size))

    def share(
        self, batches: Sequence[Batch], examples: Sequence[Example], most: int, pad_token: int
    ) -> Sequence[Batch]:
        """This process's part of an update: every ``size``-th row, as micro-batches of its own.

        Rows stand longest first, so each process gets long and short ones. Where an epoch ends
        there may be fewer rows than processes, and no batch is returned for some.

        Args:
            batches: those of the whole update.
            examples: what they index.
            most: rows of a micro-batch; see :meth:`most`.
            pad_token: fills rows on the right.
        """
        if self.size == 1:
            return batches
        rows = [row for batch in batches for row in batch.rows][self.rank :: self.size]
        parts = [rows[at : at + most] for at in range(0, len(rows), most)]
        return [collate(examples, part, pad_token) for part in parts]

    def seed(self, seed: int, step: int) -> None:
        """Give an update random numbers of its own, other ones in each process."""
        if self.size > 1:
            mixed = np.random.SeedSequence([seed, step, self.rank]).generate_state(1)[0]
            mx.random.seed(int(mixed))

    # --- sums -------------------------------------------------------------------------------

    @property
    def summed(self) -> Callable[[mx.array, mx.array, Any], tuple[mx.array, mx.array, Any]] | None:
        """Sums loss, right tokens and gradient over the processes; None for one alone."""
        return self._summed if self.size > 1 else None

    def _summed(self, loss: mx.array, right: mx.array, gradient: Any) -> tuple[Any, Any, Any]:
        """Loss () float32, right tokens () int32, and a gradient: a vector or a list of arrays.

        All of it goes as one vector, with one number more: whether this process was asked to stop.
        """
        arrays = gradient if isinstance(gradient, list) else [gradient]
        wish = mx.array(float(self._wish))
        flat = [one.reshape(-1).astype(mx.float32) for one in [*arrays, loss, right, wish]]
        total = self._sum(mx.concatenate(flat))
        ends = np.cumsum([one.size for one in flat])[:-1].tolist()
        *parts, loss_, right_, wishes = mx.split(total, ends)
        self._agreed = bool(wishes.item())
        parts = [part.reshape(one.shape) for part, one in zip(parts, arrays, strict=True)]
        whole = parts if isinstance(gradient, list) else parts[0]
        return loss_.reshape(()), right_.reshape(()).astype(right.dtype), whole

    def stopping(self, asked: bool) -> bool:
        """Whether to stop before the next update: all together, one update after one was asked."""
        if self.size == 1:
            return asked
        self._wish = asked
        return self._agreed

    def mean(self, total: float, count: int) -> float:
        """The mean of what all processes summed, equal in all of them."""
        if self.size == 1:
            return total / count
        pairs = [
            struct.unpack("<dd", one) for one in self._gathered(struct.pack("<dd", total, count))
        ]
        return sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives in the first process, a JSON value; the others wait for it."""
        if self.size == 1:
            return work()
        return json.loads(self.sent(json.dumps(work()).encode() if self.first else b""))

    def sent(self, data: bytes, *, by: int = 0) -> bytes:
        """The bytes of one process, in all of them; what the others pass does not matter."""
        if self.size == 1:
            return data
        mine = self.rank == by
        (size,) = struct.unpack("<q", self._gathered(struct.pack("<q", len(data)))[by])
        whole = np.frombuffer(data, np.uint8) if mine else np.zeros(size, np.uint8)
        # The others' are zeros, so that the sum is what the one sent.
        return np.array(self._sum(mx.array(whole))).tobytes() if size else b""

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Make sure that all processes were given the same.

        Args:
            facts: flat, JSON values; told by their names where they differ.

        Raises:
            PeersDiffer: they were not. Every process raises it, with the same sentence.
        """
        if self.size == 1:
            return
        mine = json.loads(json.dumps(dict(facts), default=str))
        digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
        digests = self._gathered(digest)
        other = next((n for n, one in enumerate(digests) if one != digests[0]), None)
        if other is None:
            return
        here, there = (json.loads(self.sent(json.dumps(mine).encode(), by=n)) for n in (0, other))
        # Keys first, which a person can change; then what can only be told by a hash.
        names = sorted({*here, *there}, key=lambda name: ("." not in name, name))
        told = [
            f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} in process 0"
            for name in names
            if here.get(name) != there.get(name)
        ]
        raise PeersDiffer(
            f"process {other} of {self.size} would train something else: {'; '.join(told)}; give "
            "every process the same command, data, base model and versions"
        )

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self._gathered(b"\1")

    def _joined(self) -> Any:
        """MLX's group of the processes.

        Raises:
            PeerLost: they cannot be reached; each says so of itself, as it may be the only one.
        """
        began = time.monotonic()
        over: list[int] = []
        try:
            with _alarm(self.timeout, over):
                return mx.distributed.init(strict=True)
        except RuntimeError as error:
            _finish()
            told = str(error)
            if over:
                raise _aloud(self._silence()) from error
            if "Couldn't bind" in told:
                raise _aloud(
                    f"cannot listen for the others at {address(self.rank)} ({_reason(told)}); if "
                    "the port is another program's, give mlx.launch another --starting-port"
                ) from error
            if "Couldn't connect" in told:
                other = (self.rank + 1) % self.size
                seconds = time.monotonic() - began
                raise _aloud(
                    f"cannot reach process {other} of {self.size} at {address(other)}, tried for "
                    f"{seconds:.0f} s ({_reason(told)}): it was not started, has ended, or a "
                    "firewall is between them; start all of them at once, with one mlx.launch"
                ) from error
            raise _aloud(
                f"cannot join the other processes of this run ({told}); start all {self.size} at "
                "once, with one mlx.launch"
            ) from error

    def _gathered(self, data: bytes) -> list[bytes]:
        """As many bytes of every process, in the order of their ranks."""
        row = mx.array(np.frombuffer(data, np.uint8))
        found = self._together(lambda: mx.distributed.all_gather(row, group=self._group))
        return [one.tobytes() for one in np.array(found).reshape(self.size, len(data))]

    def _sum(self, values: mx.array) -> mx.array:
        mx.eval(values)
        return self._together(lambda: mx.distributed.all_sum(values, group=self._group))

    def _together(self, work: Callable[[], mx.array]) -> mx.array:
        """What the processes compute together, waited for."""
        with self._waiting():
            done = work()
            mx.eval(done)
        return done

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """A wait for the others: an error where one is gone, an end where one stays silent."""
        watch = threading.Timer(self.timeout, self._give_up)
        watch.daemon = True
        watch.start()
        try:
            yield
        except RuntimeError as error:
            _finish()
            lost = PeerLost(
                f"another process of this run has failed or can no longer be reached ({error}), "
                f"{self._when()}; its own message, if it left one, says why"
            )
            # One of the others is enough to speak for a first one that is gone.
            lost.aloud = self.rank == self.size - 1
            raise lost from error
        finally:
            watch.cancel()

    def _when(self) -> str:
        return f"after update {self.step}" if self.step else "before the first update"

    def _silence(self) -> str:
        return (
            f"the other processes of this run have not answered for {self.timeout:g} s, "
            f"{self._when()}: one hangs, or its machine is asleep or cut off; if one may take so "
            "long, raise trainer.peer_timeout"
        )

    def _give_up(self) -> None:
        """End this process: the thread that waits cannot be reached."""
        sentence = self._silence()
        try:
            if self.lost is not None:
                self.lost(sentence)
            else:
                print(f"process {self.rank}: error: {sentence}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)


def _short(value: Any) -> str:
    """A value as a sentence shows it: of a hash its first 12 digits."""
    is_hash = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return f"{value[:12]}…" if is_hash else repr(value)


@contextmanager
def _alarm(seconds: float, over: list[int]) -> Iterator[None]:
    """Interrupt a call of the system that waits longer, and note that in ``over``.

    MLX joins the processes without releasing Python's lock, so that no thread could watch it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda signum, frame: over.append(signum))
    # Again every second: the first may come between two calls that wait.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _aloud(sentence: str) -> PeerLost:
    error = PeerLost(sentence)
    error.aloud = True
    return error


def _reason(told: str) -> str:
    """What MLX says of a failed call of the system, with the error's name for its number."""
    found = re.search(r"error: (\d+)", told)
    return os.strerror(int(found[1])) if found else told


def _finish() -> None:
    """Make sure that what follows the loss of another process is written and said in full.

    The launcher stops the rest of them about a second after one is gone, and MLX's threads say of
    each connection that it is lost, which would stand in the middle of a sentence.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.2)


ALONE = World()
"""One process."""


class Unwritten:
    """The checkpoints of a process that writes none: the first one does."""

    def save(self, trainer: Trainer) -> Path:
        """Waits for nobody, writes nothing."""
        return Path("the first process's checkpoint")

    def mark_best(self, step: int) -> None:
        """Does nothing."""

    def last(self) -> None:
        """None: nothing of this process is on a disk."""


def share_folder(world: World, folder: Path | None, into: Path) -> Path | None:
    """The files of the first process's folder, in every process; no disk has to be shared.

    Args:
        folder: in the first process, what to send, without folders in it; None for nothing.
        into: where the others put it.

    Returns:
        The folder: the first process's own, the others' copy, or None.
    """
    if world.size == 1:
        return folder
    names: Any = world.from_first(
        lambda: None if folder is None else sorted(one.name for one in folder.iterdir())
    )
    if names is None:
        return None
    name = str(world.from_first(lambda: folder.name if folder else ""))
    for one in names:
        data = world.sent((folder / one).read_bytes() if world.first and folder else b"")
        if not world.first:
            (into / name).mkdir(parents=True, exist_ok=True)
            (into / name / one).write_bytes(data)
    return folder if world.first else into / name
