"""``python -m benchmarks service``: the advisor service's model process, without HTTP around it.

Two adapters of the sample are trained, registered and asked through the supervisor, as the HTTP
process does it. Every answer under load is compared with what its arm gave alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import measure

CLIENTS = 16
MANY = 400
"""Asks between the first and the last look at the memory."""


@dataclass(frozen=True)
class Material:
    """A registry of one adapter, another adapter's directory, and what to ask about."""

    root: Path
    name: str
    second: Path
    prompt: str
    pictures: list[bytes]


def run(repeats: int) -> dict[str, Any]:
    """Start, latency of both arms, throughput of 16 clients, a moved channel, and memory."""
    with TemporaryDirectory() as folder:
        return asyncio.run(_measure(prepare(Path(folder)), repeats))


def prepare(folder: Path) -> Material:
    """Run the main job, and a training with another seed."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), "WANDB_MODE": "disabled"}
    argv = [sys.executable, "-m", "mondrian_ft", "tracking=none"]
    measure.process([*argv, "eval.max_examples=2"], cwd=folder, env=env)
    (data,) = folder.glob("outputs/sample/*/data")
    second = folder / "second"
    more = [f"data.output_dir={data}", f"task.output_dir={second}", "trainer.seed=1"]
    measure.process([*argv, "task=train", "trainer.max_steps=40", *more], cwd=folder, env=env)
    rows = [
        row
        for part in ("train", "val", "test")
        for row in json.loads((data / f"training_data_ansel_{part}.json").read_text())
    ]
    paths = list(dict.fromkeys(row["image_path"] for row in rows))
    (home,) = (path for path in (folder / "outputs" / "registry").iterdir() if path.is_dir())
    return Material(
        home.parent,
        home.name,
        second,
        rows[0]["prompt"],
        [Path(path).read_bytes() for path in paths],
    )


async def _measure(material: Material, repeats: int) -> dict[str, Any]:
    from mondrian_ft import registry
    from mondrian_ft.serving.protocol import State
    from mondrian_ft.serving.supervisor import Supervisor

    starts = []
    for _ in range(max(3, repeats)):
        one = Supervisor(_setup(material))
        started = time.perf_counter()
        await one.start()
        status = await one.settled(120)
        starts.append(time.perf_counter() - started)
        assert status.state is State.ready, status
        await one.stop()
    one = Supervisor(_setup(material), max_queue=1000)
    await one.start()
    await one.settled(120)
    await _answers(one, material, range(CLIENTS), ("base", "candidate"), CLIENTS)
    latency = await _latency(one, material, 8 * repeats)
    load = [await _load(one, material, arms) for _ in range(repeats) for arms in ARMS]
    memory = [one.status().memory_gb or 0.0]
    for part in range(4):
        numbers = range(part * MANY // 4, (part + 1) * MANY // 4)
        await _answers(one, material, numbers, ("base", "candidate"), CLIENTS, max_tokens=60)
        await asyncio.sleep(0.5)
        memory.append(one.status().memory_gb or 0.0)
        print(f"memory after {numbers.stop} asks: {memory[-1]:.3f} GB", flush=True)
    registry.register(material.root, material.name, material.second, facts={})
    (moved,) = await _answers(one, material, [0], ["candidate"], 1)
    assert moved.identity.version == "v2"
    # From asking to the first token: the history is read again, the files are checked, the adapter
    # is loaded and proved twice, and the prompt is read.
    switch = moved.seconds["first_token"]
    print(f"a moved channel: {switch:.3f} s to the first token of the new version", flush=True)
    await one.stop()
    return {
        "what": f"the model's process through its supervisor; {CLIENTS} clients, base and one "
        "adapter, constrained answers",
        "start_to_ready_seconds": measure.spread(starts, 2),
        "one_at_a_time": latency,
        "sixteen_clients": load,
        "moved_channel_to_first_token_seconds": round(switch, 3),
        "memory_gb": {"asks": MANY, "each_quarter": [round(value, 3) for value in memory]},
    }


ARMS = (("base",), ("candidate",), ("base", "candidate"))


async def _latency(one: Any, material: Material, pairs: int) -> dict[str, Any]:
    """Seconds a token of single asks, both arms of each picture in turn."""
    ratios, base, tuned = [], [], []
    for number in range(pairs):
        order = ("base", "candidate") if number % 2 else ("candidate", "base")
        taken = {}
        for arm in order:
            (answer,) = await _answers(one, material, [number], [arm], 1)
            taken[arm] = 1e3 * answer.seconds["total"] / answer.tokens
        ratios.append(taken["candidate"] / taken["base"])
        base.append(taken["base"])
        tuned.append(taken["candidate"])
    print(f"tuned / base, {pairs} pairs: {statistics.median(ratios):.3f}", flush=True)
    return {
        "pairs": pairs,
        "base_ms_a_token": measure.spread(base, 2),
        "tuned_ms_a_token": measure.spread(tuned, 2),
        "tuned_to_base": measure.spread(ratios, 3),
    }


async def _load(one: Any, material: Material, arms: Sequence[str]) -> dict[str, Any]:
    """The same 32 asks one at a time, and by 16 clients."""
    numbers = range(2 * CLIENTS)
    started = time.perf_counter()
    alone = await _answers(one, material, numbers, arms, 1)
    single = time.perf_counter() - started
    started = time.perf_counter()
    together = await _answers(one, material, numbers, arms, CLIENTS)
    crowd = time.perf_counter() - started
    same = sum(a.text == b.text for a, b in zip(alone, together, strict=True))
    waits = sorted(answer.seconds["total"] for answer in together)
    one_wait = statistics.median(answer.seconds["total"] for answer in alone)
    p95 = waits[int(0.95 * (len(waits) - 1))]
    print(
        f"{' and '.join(arms)}: {single / crowd:.2f} times the throughput, p95 {p95 / one_wait:.2f}"
        f" times one's, {same} of {len(alone)} texts the same",
        flush=True,
    )
    return {
        "arms": list(arms),
        "seconds_one_at_a_time": round(single, 2),
        "seconds_together": round(crowd, 2),
        "throughput": round(single / crowd, 2),
        "p95_to_single": round(p95 / one_wait, 2),
        "same_text": f"{same} of {len(alone)}",
    }


async def _answers(
    one: Any,
    material: Material,
    numbers: Sequence[int],
    arms: Sequence[str],
    clients: int,
    max_tokens: int | None = None,
) -> list[Any]:
    """Answers in the numbers' order; each client asks again when it has its answer."""
    from mondrian_ft.serving.protocol import Answer, Ask

    found: dict[int, Any] = {}
    left = iter(numbers)

    async def client() -> None:
        for number in left:
            image = material.pictures[number % len(material.pictures)]
            arm = arms[number % len(arms)]
            ask = Ask(f"ask {number}", image, material.prompt, arm, max_tokens)
            async for event in one.ask(ask):
                assert isinstance(event, Answer), event
                found[number] = event

    await asyncio.gather(*(client() for _ in range(clients)))
    return [found[number] for number in numbers]


def _setup(material: Material) -> Any:
    from mondrian_ft.sample import model_dir
    from mondrian_ft.serving.wire import Setup

    return Setup(
        str(model_dir()),
        "mondrian_ft sample model",
        4096,
        24576,
        arms=("candidate",),
        registry_root=str(material.root),
        registry_name=material.name,
        max_rows=CLIENTS,
        max_tokens=600,
    )
