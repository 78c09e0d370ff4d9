"""A model's process without a model, for tests of what watches it; started like the real one.

``python pretended.py HOW FD``. It answers an ask with its own text, after ``max_tokens``
milliseconds and, if it streams, a piece at once. HOW it misbehaves:

    well        not at all
    dies        ends at once with code 7
    refuses     says that it cannot get ready
    silent      never says anything
    stuck       its heart beats, its loop does not turn
    once:FILE   dies at the first ask, if FILE is not there, and makes it
    poisoned    dies at every ask
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from mondrian_ft.serving import wire
from mondrian_ft.serving.protocol import Answer, Failure, Fault, Identity, Piece, State, Status


def main(how: str, connection: socket.socket) -> None:
    wire.receive(connection)
    if how == "dies":
        sys.exit(7)
    if how == "silent":
        time.sleep(60)
    lock = threading.Lock()
    ready = Status(State.ready, facts={"pid": os.getpid()})
    if how == "refuses":
        ready = Status(State.failed, reason="adapter x does not prove itself")

    def send(message: object) -> None:
        with lock:
            connection.sendall(wire.pack(message))

    def beat() -> None:
        while True:
            send(wire.Beat(ready, 100.0 if how == "stuck" else 0.0))
            time.sleep(0.05)

    threading.Thread(target=beat, daemon=True).start()
    cancelled: set[str] = set()

    def answer(take: wire.Take) -> None:
        ask = take.ask
        if ask.stream:
            send(Piece(ask.id, ask.prompt[:1]))
        by = time.monotonic() + (ask.max_tokens or 0) / 1000
        while time.monotonic() < by:
            if ask.id in cancelled:
                send(Failure(ask.id, Fault.cancelled, "Cancelled."))
                return
            time.sleep(0.01)
        identity = Identity(ask.arm, None, None, "none", "0", "0")
        send(Answer(ask.id, identity, ask.prompt, True, 1, os.getpid()))

    while True:
        try:
            message = wire.receive(connection)
        except EOFError:
            return
        if isinstance(message, wire.Stop):
            return
        if isinstance(message, wire.Cancel):
            cancelled.add(message.id)
        if isinstance(message, wire.Take):
            mark = Path(how.partition(":")[2] or os.devnull)
            if how == "poisoned" or (how.startswith("once:") and not mark.exists()):
                mark.touch()
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=answer, args=(message,), daemon=True).start()


if __name__ == "__main__":
    try:
        main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
    except BrokenPipeError:
        sys.exit(0)
