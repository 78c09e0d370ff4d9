"""A small training in a process of its own, which can be told to kill itself anywhere.

    python tests/training/killed.py MODEL SCRATCH RUN [EVENT]

It goes on from the newest checkpoint of RUN, and leaves ``final.safetensors`` there. With EVENT it
sends itself SIGKILL at that event, counted from 1: an update that ended, or anything that is done
to the files of the run, in the order it is done. A half written tensors file is an event as well,
and has a name too: ``step_000003/adapter.safetensors``. It prints the number of events.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def train(lab: Any, base: Any, run: Path, count: Any) -> None:
    """Train from the newest checkpoint, or the beginning, to the end; dropout and average on."""
    from mondrian_ft.model import lora
    from mondrian_ft.model.backend import mx

    lora.detach(base.model)
    lab.attach(base, live=False, dropout=0.3)
    trainer = lab.trainer(
        base,
        lab.examples(5),
        run,
        validation=lab.examples(2, "val"),
        batch_size=1,
        accumulate=2,
        max_steps=8,
        ema=0.9,
        callbacks=[Counting(count)],
    )
    last = trainer.checkpointer.last()
    if last is not None:
        trainer.checkpointer.restore(trainer, last)
    trainer.fit()
    mx.save_safetensors(str(run / "final.safetensors"), lora.tensors(base.model))


class Counting:
    """Counts every update."""

    def __init__(self, count: Any) -> None:
        self.count = count

    def on_step(self, state: Any, update: Any) -> None:
        self.count()

    def on_eval(self, state: Any) -> None: ...
    def on_end(self, state: Any) -> None: ...


def main() -> None:
    model, scratch, run = (Path(word) for word in sys.argv[1:4])
    deadly = sys.argv[4] if len(sys.argv) > 4 else ""
    from conftest import Lab

    from mondrian_ft.training import checkpoint

    scratch.mkdir(exist_ok=True)
    lab = Lab(scratch)
    lab.__dict__["model_dir"] = model
    base = lab.base
    seen = 0

    def count(name: str = "") -> None:
        nonlocal seen
        seen += 1
        if deadly in (str(seen), name or "-"):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in FILES and isinstance(args[0], str | os.PathLike):
            path = Path(args[0])
            if path.is_relative_to(run) and path.suffix != ".jsonl":
                count()

    save = checkpoint._save_tensors

    def save_in_halves(path: Path, values: Any) -> None:
        save(path, values)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        count(f"{path.parent.name.removeprefix('.tmp-')}/{path.name}")
        path.write_bytes(whole)

    checkpoint._save_tensors = save_in_halves
    sys.addaudithook(watch)
    train(lab, base, run, count)
    print(seen)


if __name__ == "__main__":
    main()
