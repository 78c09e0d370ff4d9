"""Training in several processes at once: which tasks can, and how they start as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError, PeerLost
from ..launched import Launched, launched

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Run
    from ..training.parallel import World

TASKS = ("experiment", "train")
T = TypeVar("T")


def refusal(config: Config, me: Launched, *, task: str, sweeping: bool) -> ConfigError | None:
    """Why several processes cannot do together what a config asks for; None where they can."""
    if me.size == 1:
        return None
    alone = "start it without mlx.launch"
    rows = config.trainer.batch_size * config.trainer.accumulate
    sentence = None
    if sweeping:
        sentence = (
            "a sweep (-m) starts its jobs in one process; start it without mlx.launch, or each "
            "job with an mlx.launch of its own"
        )
    elif task not in TASKS:
        sentence = f"task={task} is done by one process, and {me.size} were started; {alone}"
    elif config.eval.folds is not None or config.eval.seeds > 1:
        sentence = f"eval.folds and eval.seeds train one adapter after another; {alone}"
    elif config.trainer.overfit is not None:
        sentence = f"trainer.overfit is done by one process, and {me.size} were started; {alone}"
    elif rows < me.size:
        sentence = (
            f"an update has {rows} row{'s' if rows > 1 else ''} (trainer.batch_size "
            f"{config.trainer.batch_size} x trainer.accumulate {config.trainer.accumulate}), too "
            f"few for {me.size} processes; raise one of the two, or start fewer processes"
        )
    if sentence is None:
        return None
    error = ConfigError(sentence)
    error.common = True
    return error


def join(config: Config, run: Run) -> World:
    """The processes that this run trains with, reached; itself alone if it was not launched so.

    Raises:
        PeerLost: one of the others cannot be reached.
    """
    from ..training.parallel import ALONE, World

    me = launched()
    if me.size == 1:
        return ALONE
    world = World(me, timeout=config.trainer.peer_timeout, lost=run.abandon)
    run.record(processes=me.size)
    rows = config.trainer.batch_size * config.trainer.accumulate
    run.console.print(
        f"Together: {me.size} processes share the {rows} rows of each update; the first one writes",
        markup=False,
    )
    return world


def going_on(error: PeerLost, world: World, command: str) -> PeerLost:
    """The error with what to do next; ``command`` names folders, which only the first one has."""
    told = PeerLost(
        f"{error}; go on with: {command}"
        if world.first
        else f"{error}; if it was process 0, go on from its checkpoints with task.output_dir=(its "
        "adapter folder) and trainer.resume=auto"
    )
    told.aloud = error.aloud
    return told


def after_the_first(world: World, work: Callable[[], T]) -> T:
    """What ``work`` gives: where processes share a folder, the first one has written it by then."""
    if world.size == 1:
        return work()
    if not world.first:
        world.meet()
        return work()
    done = work()
    world.meet()
    return done


def agree(world: World, run: Run, identity: dict[str, Any], rows: list[str], model: Any) -> None:
    """Make sure that all processes are about to train the same.

    Args:
        identity: what a resumed run is compared by.
        rows: job ids of the training rows, in the order in which batches are drawn from them.
        model: with the adapter in it, before the first update.

    Raises:
        PeersDiffer: they are not.
    """
    if world.size == 1:
        return
    import numpy as np

    from ..model import lora

    weights = hashlib.sha256()
    for name, value in sorted(lora.tensors(model).items()):
        weights.update(name.encode() + np.array(value).tobytes())
    versions = run.versions
    world.agree(
        identity
        | {
            "config": run.config_hash,
            "training rows": hashlib.sha256("\n".join(rows).encode()).hexdigest(),
            "adapter before the first update": weights.hexdigest(),
            "mlx": versions.get("mlx"),
            "mondrian_ft": versions.get("mondrian_ft"),
        }
    )
