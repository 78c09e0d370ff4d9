"""One of several processes that train a tiny model together; ``launch`` starts them.

    mlx.launch -n 2 -- python tests/training/together.py WHAT FOLDER [JSON]

WHAT is ``train``, or a way in which it goes wrong. JSON changes the trainer's options. The first
process leaves ``weights.npz`` and ``told.json`` in FOLDER.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

OPTIONS: dict[str, Any] = {"batch_size": 2, "accumulate": 2, "max_steps": 3, "eval_every": 3}
"""Five rows in updates of four, so that every second update has a single row."""


def launch(
    folder: Path, count: int, *command: object, seconds: float = 120, **environ: str
) -> tuple[str, str]:
    """What processes launched together wrote on standard output and error, when all had ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        # The ring takes this port and those behind it.
        port = min(found.getsockname()[1], 65_000)
    program = Path(sys.executable).with_name("mlx.launch")
    words = [program, "-n", count, "--starting-port", port, "--", *command]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "out.txt").open("w+") as out, (folder / "err.txt").open("w+") as err:
        launched = subprocess.Popen(
            [str(word) for word in words],
            # At the end of its own input mlx.launch spins.
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environ},
        )
        with launched:
            try:
                launched.wait(seconds)
            finally:
                launched.kill()
        out.seek(0)
        err.seek(0)
        return out.read(), err.read()


def trainer_of(lab: Any, base: Any, folder: Path, world: Any = None, **options: Any) -> Any:
    """A trainer of five rows, alone or with others."""
    from mondrian_ft.training.parallel import ALONE, Unwritten

    options = OPTIONS | options
    lab.attach(base, live=False, dropout=options.pop("dropout", 0.0))
    trainer = lab.trainer(
        base, lab.examples(5), folder, validation=lab.examples(3, "val"), **options
    )
    trainer.batches.accumulate = trainer.accumulate
    trainer.world = world or ALONE
    if not trainer.world.first:
        trainer.checkpointer = Unwritten()
    return trainer


class Seen:
    """Losses, norms and validation losses."""

    def __init__(self) -> None:
        self.told: dict[str, list[Any]] = {"loss": [], "norm": [], "right": [], "val": []}

    def on_step(self, state: Any, update: Any) -> None:
        self.told["loss"].append(update.loss)
        self.told["norm"].append(update.grad_norm)
        self.told["right"].append(update.correct)

    def on_eval(self, state: Any) -> None:
        self.told["val"].append(state.val_loss)

    def on_end(self, state: Any) -> None: ...


def train(lab: Any, base: Any, folder: Path, world: Any = None, **options: Any) -> Seen:
    """Train to the end, and leave what came of it."""
    seen = Seen()
    trainer = trainer_of(lab, base, folder, world, **options)
    trainer.callbacks = [seen]
    from mondrian_ft.training.parallel import share_folder

    start = share_folder(
        trainer.world, trainer.checkpointer.last(), folder / f"rank{trainer.world.rank}"
    )
    if start is not None:
        from mondrian_ft.training.checkpoint import CheckpointDir

        CheckpointDir(start.parent, {"lora.rank": 4}).restore(trainer, start)
    trainer.fit()
    np.savez(folder / f"weights{trainer.world.rank}.npz", **lab.weights(base))
    (folder / f"told{trainer.world.rank}.json").write_text(json.dumps(seen.told))
    return seen


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    from mondrian_ft.errors import MondrianError
    from mondrian_ft.launched import launched
    from mondrian_ft.training.parallel import World

    me = launched()
    try:
        world = World(me, timeout=options.pop("timeout", 60.0))
        if what == "differ":
            mine = {"lora.rank": 4 + 4 * (me.rank == 1), "data lock": "a", "base weights": "b"}
            world.agree({"lora.rank": 4})
            world.agree(mine)
        elif what == "alone":
            # The launcher stops the others as soon as one is gone; here they are to hear it first.
            if not options.get("silent"):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            world.meet()
            if me.rank == 1:
                if options.get("silent"):
                    time.sleep(60)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)
            world.meet()
        else:
            from conftest import Lab

            own = Lab(folder / f"scratch{me.rank}")
            own.folder.mkdir(parents=True, exist_ok=True)
            own.__dict__["model_dir"] = folder / "tiny"
            train(own, own.base, folder, world, **options)
    except MondrianError as error:
        print(f"rank {me.rank}: {type(error).__name__}: {error}", flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
