"""The model's process: ``python -m mondrian_ft.serving.worker FD``, started by `supervisor`.

FD is one end of a socket; the other is the supervisor's. The first message is the `wire.Setup`,
then come asks and cancellations; events and heartbeats go back. The process ends when the other
end is gone, so that none is left over, whatever becomes of the HTTP process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, MondrianError
from . import wire
from .protocol import State, Status

if TYPE_CHECKING:
    from .engine import Engine

BEAT_EVERY = 0.25
"""Seconds between two heartbeats."""
FAILED = 3
"""Exit code of a process that could not get ready and has said why."""


class Worker:
    """The process: its socket, its engine, and what it says of itself."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.engine: Engine | None = None
        self.stopping = threading.Event()
        self.state, self.stage, self.progress, self.reason = State.loading, "starting", 0.0, ""
        self.facts: dict[str, Any] = {}
        self.turned = time.monotonic()
        self._sending = threading.Lock()

    def main(self) -> int:
        """Get ready, answer until told to stop, and return the exit code."""
        # Ctrl-C in a terminal reaches the whole group; the supervisor says when to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        try:
            setup = wire.receive(self.connection)
        except EOFError:
            return 0
        threading.Thread(target=self._beat_on, daemon=True, name="heartbeat").start()
        try:
            engine = self._load(setup)
        except MondrianError as error:
            self.state, self.reason = State.failed, str(error)
            self._beat()
            return FAILED
        self.engine = engine
        self.state, self.stage, self.progress = State.ready, "", 1.0
        self.turned = time.monotonic()
        self._beat()
        threading.Thread(target=self._listen, daemon=True, name="listener").start()
        while True:
            busy = engine.turn()
            self.turned = time.monotonic()
            if self.stopping.is_set() and not busy:
                break
            if not busy:
                engine.wait(0.1)
        engine.close()
        return 0

    def _load(self, setup: wire.Setup) -> Engine:
        """The engine, with the arms that have to be there."""
        self._at("importing MLX", 0.05)
        from ..data.pixels import PixelSettings, fingerprint
        from ..evaluation.probing import probe_inputs
        from ..model.backend import describe
        from ..model.base import load_base
        from ..model.features import FeatureCache, FeatureStore
        from .arms import Arms
        from .engine import Engine

        self._at("reading the base model", 0.2)
        base = load_base(
            setup.model,
            name=setup.name,
            dtype=setup.dtype,
            quantize_bits=setup.quantize_bits,
            other_precision=setup.other_precision,
            notice=_say,
        )
        if base.plain:
            raise ModelError(
                f"{base.identity.name} is a {base.backbone.model_type} model; the service answers "
                "with Qwen3-VL models alone, since others have no batches that rows can join"
            )
        settings = PixelSettings(setup.min_pixels, setup.max_pixels)
        self.facts = {
            "backend": describe(),
            "base": base.identity.name,
            "dtype": base.identity.dtype,
            "quantization": base.identity.quantization,
        }
        self._at("preparing the proof", 0.6)
        arms = Arms(
            base,
            probe_inputs(base, settings),
            folders=[arm for arm in setup.arms if "/" in arm or Path(arm).is_dir()],
            root=Path(setup.registry_root) if setup.registry_root else None,
            name=setup.registry_name,
            most=setup.max_adapters,
            merge_bytes=setup.merge_bytes,
        )
        for number, arm in enumerate(setup.arms):
            self._at(f"loading the arm {arm}", 0.7 + 0.25 * number / len(setup.arms))
            arms.take(arm)
        disk = None
        if setup.features_dir:
            disk = FeatureCache(
                Path(setup.features_dir),
                base.backbone,
                pixels=fingerprint(base.image_processor, settings),
                notice=_say,
            )
        self._at("compiling the schema", 0.95)
        return Engine(
            base,
            arms,
            settings,
            FeatureStore(base.backbone, max_bytes=setup.features_bytes, disk=disk),
            self._send,
            max_rows=setup.max_rows,
            max_tokens=setup.max_tokens,
            dimensions=setup.dimensions,
        )

    def _at(self, stage: str, progress: float) -> None:
        self.stage, self.progress = stage, progress

    def _listen(self) -> None:
        """Take messages; when the other end is gone, so is this process."""
        assert self.engine is not None
        try:
            while True:
                message = wire.receive(self.connection)
                if isinstance(message, wire.Take):
                    self.engine.submit(message.ask, message.sent)
                elif isinstance(message, wire.Cancel):
                    self.engine.cancel(message.id)
                elif isinstance(message, wire.Stop):
                    self.stopping.set()
        except EOFError:
            os._exit(0)

    def _beat_on(self) -> None:
        while True:
            self._beat()
            time.sleep(BEAT_EVERY)

    def _beat(self) -> None:
        # While it is loading there is no loop yet that could stand still.
        turned = time.monotonic() - self.turned if self.engine is not None else 0.0
        self._send(wire.Beat(self.status(), turned))

    def status(self) -> Status:
        """The process as it is now."""
        engine = self.engine
        ready = self.state is State.ready
        return Status(
            State.stopping if ready and self.stopping.is_set() else self.state,
            self.stage,
            self.progress,
            self.reason,
            arms=engine.arms.identities() if engine else (),
            queued=engine.queued if engine else 0,
            running=engine.running if engine else 0,
            memory_gb=resident_gb(),
            facts={**self.facts, "pid": os.getpid()},
        )

    def _send(self, message: Any) -> None:
        data = wire.pack(message)
        with self._sending:
            try:
                self.connection.sendall(data)
            except OSError:
                os._exit(0)  # nobody is there to be told anything


def resident_gb() -> float | None:
    """Memory of this process in GB as the system counts it; None where it does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGESIZE") / 1e9, 4)


def _say(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def main(argv: list[str], start: Callable[[socket.socket], Worker] = Worker) -> int:
    """The command line."""
    return start(socket.socket(fileno=int(argv[1]))).main()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
