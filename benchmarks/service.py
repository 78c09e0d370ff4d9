"""``python -m benchmarks service``: the advisor service over HTTP, and mlx-vlm's server beside it.

Three adapters of the sample are trained and the first is registered; the service is
``python -m mondrian_ft task=serve``, the clients are Locust's, in a third process, all on the same
cores. Every answer under load is compared with what the same request got alone.
"""

from __future__ import annotations

import importlib.util
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

from . import measure, training_step
from .serving_load import Load, Round, Server, ours, put, theirs

CLIENTS = 16
LONG, SHORT = 150, 16
"""Most tokens of an answer whose time is measured, and of one that is only counted."""
MANY = 2000
"""Requests between the first and the last look at the memory."""
PARTS = 4
HANGS, LIMIT = 60.0, 300.0
"""Seconds after which mlx-vlm's server is given up, where it is known to stand still, and else."""


@dataclass(frozen=True)
class Material:
    """A registry with one adapter, two more adapter directories, and what to ask about.

    Attributes:
        cwd: where the service is started.
        root, name: the registry, and the name in it.
        more: directories of the second and the third adapter.
    """

    cwd: Path
    root: Path
    name: str
    more: tuple[Path, Path]
    prompt: str
    pictures: tuple[str, ...]

    def requests(
        self, models: Sequence[str], count: int, tokens: int, **fields: Any
    ) -> list[dict[str, Any]]:
        """Requests to these models in turn, each about the next photograph."""
        return [
            {
                "model": models[number % len(models)],
                "picture": self.pictures[number % len(self.pictures)],
                "max_tokens": tokens,
                "temperature": 0.0,
                **fields,
            }
            for number in range(count)
        ]


def run(repeats: int) -> dict[str, Any]:
    """Start, latency of both arms, throughput, a moved channel, many requests, and mlx-vlm."""
    if importlib.util.find_spec("locust") is None:
        sys.exit("The clients are Locust's: pip install -c constraints.txt -e '.[bench]'")
    with TemporaryDirectory() as folder:
        material = prepare(Path(folder))
        load = os.getloadavg()[0]
        entry = {
            "what": f"task=serve over HTTP, asked by Locust; {CLIENTS} clients; sample model, LoRA "
            "of seven matrices",
            "start": _starts(material, max(3, repeats)),
            **_of_ours(material, repeats),
            "mlx_vlm_server": _beside_theirs(material, repeats),
        }
        return {**entry, "system_load": [round(load, 1), round(os.getloadavg()[0], 1)]}


def prepare(folder: Path) -> Material:
    """Prepare the sample's rows, train three adapters on them, and register the first."""
    from mondrian_ft import registry

    env = {**training_step.environment(), "PYTHONPATH": str(training_step.ROOT)}
    env |= {"XDG_CACHE_HOME": str(folder), "WANDB_MODE": "disabled"}
    argv = [sys.executable, "-m", "mondrian_ft", "tracking=none"]
    data = folder / "data"
    measure.process([*argv, "task=prepare", f"data.output_dir={data}"], cwd=folder, env=env)
    adapters = [folder / f"adapter{number}" for number in range(3)]
    for seed, adapter in enumerate(adapters):
        words = [f"data.output_dir={data}", f"task.output_dir={adapter}", f"trainer.seed={seed}"]
        words += ["task=train", "trainer.max_steps=40"]
        done = measure.process([*argv, *words], cwd=folder, env=env)
        print(f"adapter {seed + 1} of 3: {done.seconds:.0f} s", flush=True)
    rows = [
        row
        for part in ("train", "val", "test")
        for row in json.loads((data / f"training_data_ansel_{part}.json").read_text())
    ]
    root, name = folder / "outputs" / "registry", "sample-ansel"
    registry.register(root, name, adapters[0], facts={})
    pictures = tuple(dict.fromkeys(row["image_path"] for row in rows))
    return Material(folder, root, name, (adapters[1], adapters[2]), rows[0]["prompt"], pictures)


def _served(material: Material) -> Any:
    words = [f"registry.root={material.root}", f"registry.name={material.name}"]
    words += ["task.adapter=candidate", "task.model_mode=fine_tuned"]
    return ours(material.cwd, *words)


def _starts(material: Material, count: int) -> dict[str, Any]:
    """From the command to /health saying ready, and of the model's process alone."""
    taken = []
    for _ in range(count):
        with _served(material) as server:
            taken.append(server.seconds)
    print(f"start to ready: {statistics.median(taken):.2f} s", flush=True)
    return {"command_to_ready_seconds": measure.spread(taken, 2)}


def _of_ours(material: Material, repeats: int) -> dict[str, Any]:
    from mondrian_ft import registry

    with _served(material) as server:
        put(
            server,
            material.requests(["base", "candidate"], 2 * CLIENTS, SHORT),
            material.prompt,
            CLIENTS,
            material.cwd,
        )
        entry: dict[str, Any] = {"one_at_a_time": _latency(server, material, 8 * repeats)}
        arms = (["base"], ["candidate"], ["base", "candidate"])
        entry["sixteen_clients"] = [
            _crowd(server, material, models) for _ in range(repeats) for models in arms
        ]
        registry.register(material.root, material.name, material.more[0], facts={})
        alone = _first_answer(server, material, "candidate")
        entry["moved_channel"] = {
            "seconds_to_first_answer": round(alone, 3),
            "under_load": _moved_under_load(server, material),
        }
        print(f"moved channel: {entry['moved_channel']}", flush=True)
        entry["many_requests"] = _many(server, material)
    return entry


def _latency(server: Server, material: Material, pairs: int) -> dict[str, Any]:
    """Seconds of the same request to both arms, one after the other, the order in turn."""
    requests = []
    for number in range(pairs):
        order = ("base", "candidate") if number % 2 else ("candidate", "base")
        picture = material.pictures[number % len(material.pictures)]
        requests += [{**one, "picture": picture} for one in material.requests(order, 2, LONG)]
    done = put(server, requests, material.prompt, 1, material.cwd)
    taken: dict[str, list[float]] = {"base": [], "candidate": []}
    tokens: dict[str, list[int]] = {"base": [], "candidate": []}
    for request, reply in zip(requests, done.replies, strict=True):
        taken[request["model"]].append(1e3 * reply.seconds / reply.tokens)
        tokens[request["model"]].append(reply.tokens)
    ratios = [b / a for a, b in zip(taken["base"], taken["candidate"], strict=True)]
    print(f"tuned / base, {pairs} pairs: {statistics.median(ratios):.3f}", flush=True)
    return {
        "pairs": pairs,
        "most_tokens": LONG,
        "tokens": {arm: measure.spread(found, 0) for arm, found in tokens.items()},
        "base_ms_a_token": measure.spread(taken["base"], 2),
        "tuned_ms_a_token": measure.spread(taken["candidate"], 2),
        "tuned_to_base": measure.spread(ratios, 3),
    }


def _crowd(server: Server, material: Material, models: Sequence[str]) -> dict[str, Any]:
    """The same requests one at a time, and twice as many by 16 clients."""
    requests = material.requests(models, 2 * CLIENTS, LONG)
    alone = put(server, requests[:CLIENTS], material.prompt, 1, material.cwd)
    crowd = put(server, requests, material.prompt, CLIENTS, material.cwd)
    same = sum(a.text == b.text for a, b in zip(alone.replies, crowd.replies, strict=False))
    found = {
        "arms": list(models),
        "requests_a_second": {
            "one_at_a_time": round(alone.per_second, 2),
            "together": round(crowd.per_second, 2),
        },
        "throughput": round(crowd.per_second / alone.per_second, 2),
        "p95_to_single": round(crowd.p95 / alone.p50, 2),
        "errors": alone.errors + crowd.errors,
        "same_text": f"{same} of {CLIENTS}",
    }
    print(found, flush=True)
    return found


def _first_answer(server: Server, material: Material, model: str) -> float:
    """Seconds of a request for one token."""
    done = put(server, material.requests([model], 1, 1), material.prompt, 1, material.cwd)
    assert done.errors == 0, done.replies
    return done.replies[0].seconds


def _moved_under_load(server: Server, material: Material) -> dict[str, Any]:
    """A channel moves while 8 clients ask it and the base; who was answered by whom."""
    from mondrian_ft import registry

    requests = material.requests(["base", "candidate"], 240, 40)
    before = registry.resolve(material.root, material.name, "candidate")
    probe = material.cwd / "probe"
    probe.mkdir(exist_ok=True)
    with Load(server, requests, material.prompt, 8, material.cwd) as load:
        load.wait_for(60)
        version = registry.register(material.root, material.name, material.more[1], facts={})
        moved = time.time()
        first = put(
            server, material.requests(["candidate"], 1, 1), material.prompt, 1, probe
        ).replies[0]
        done = load.finish()
    old, new = (
        json.loads((folder / "manifest.json").read_text())["hash"][:16]
        for folder in (before, version.path)
    )
    wrong = first.who != new
    for request, reply in zip(requests, done.replies, strict=True):
        if request["model"] == "base":
            wrong += reply.who in (old, new)
        elif reply.sent > moved:
            wrong += reply.who != new
        else:
            # One that was sent before may have been taken up after.
            wrong += reply.who not in (old, new)
    return {
        "requests": len(requests),
        "errors": done.errors,
        "answered_by_another_version": int(wrong),
        "seconds_to_first_answer": round(first.seconds, 3),
        "p50_of_the_load": round(done.p50, 3),
        "longest_of_the_load": round(max(reply.seconds for reply in done.replies), 3),
    }


def _many(server: Server, material: Material) -> dict[str, Any]:
    """Memory over many requests to three arms, and every answer against the same one alone."""
    models = ["base", "v1", "candidate"]
    distinct = len(models) * len(material.pictures)
    requests = material.requests(models, MANY, SHORT)
    # Both lengths may share a factor, so the pairs that come up are asked, not all there could be.
    pairs = list(dict.fromkeys((one["model"], one["picture"]) for one in requests))
    assert len(pairs) <= distinct
    singles = [{**requests[0], "model": model, "picture": picture} for model, picture in pairs]
    alone = put(server, singles, material.prompt, 1, material.cwd)
    expected = dict(zip(pairs, alone.replies, strict=True))
    memory, errors, others, per_second = [server.memory()], alone.errors, 0, []
    for part in range(PARTS):
        some = requests[part * MANY // PARTS : (part + 1) * MANY // PARTS]
        done: Round = put(server, some, material.prompt, CLIENTS, material.cwd)
        errors += done.errors
        for request, reply in zip(some, done.replies, strict=True):
            like = expected[request["model"], request["picture"]]
            others += (reply.text, reply.who) != (like.text, like.who)
        memory.append(server.memory())
        per_second.append(round(done.per_second, 1))
        print(f"after {(part + 1) * MANY // PARTS} requests: {memory[-1]} GB", flush=True)
    return {
        "requests": MANY,
        "most_tokens": SHORT,
        "arms": models,
        "errors": errors,
        "answers_that_are_not_as_alone": others,
        "requests_a_second": per_second,
        "memory_gb": memory,
    }


def _beside_theirs(material: Material, repeats: int) -> dict[str, Any]:
    """Two adapters in turn, 16 clients: the same requests to both servers, and one adapter."""
    from mondrian_ft.sample import model_dir

    env = {**training_step.environment(), "PYTHONPATH": str(training_step.ROOT)}
    env |= {"XDG_CACHE_HOME": str(material.cwd)}
    argv = [sys.executable, "-m", "mondrian_ft", "tracking=none", "task=export", "task.format=mlx"]
    exported = [material.cwd / f"mlx{number}" for number in (1, 2)]
    for label, folder in zip(("v1", "v2"), exported, strict=True):
        adapter = material.root / material.name / label
        words = [f"task.adapter={adapter}", f"task.output_dir={folder}"]
        measure.process([*argv, *words], cwd=material.cwd, env=env)
    # Free text: theirs constrains decoding to a schema only if it is sent one.
    free = material.requests(["v1", "v2"], 2 * CLIENTS, LONG, response_format={"type": "text"})
    # Theirs loads the model again for another adapter, and does not survive 16 clients who ask for
    # two: requests fail, then it stands still. One client in turn is how it can be used.
    cases = {
        "two_adapters_in_turn": (free, CLIENTS, HANGS),
        "two_adapters_one_client_of_theirs": (free, 1, LIMIT),
        "one_adapter": ([{**one, "model": "v1"} for one in free], CLIENTS, LIMIT),
    }
    places = {"v1": str(exported[0]), "v2": str(exported[1])}
    rounds: dict[str, dict[str, list[Round]]] = {name: {"ours": [], "theirs": []} for name in cases}
    for _ in range(min(repeats, 2)):
        for name, (requests, clients, limit) in cases.items():
            with _served(material) as server:
                _warm(server, material, requests)
                done = put(server, requests, material.prompt, CLIENTS, material.cwd)
                rounds[name]["ours"].append(done)
            named = [
                {**one, "model": str(model_dir()), "adapter_path": places[one["model"]]}
                for one in requests
            ]
            with theirs(material.cwd, model_dir()) as server:
                _warm(server, material, named)
                done = put(server, named, material.prompt, clients, material.cwd, limit)
                rounds[name]["theirs"].append(done)
            a, b = (rounds[name][side][-1] for side in ("ours", "theirs"))
            print(
                f"{name}: ours {a.per_second:.2f} requests/s, mlx-vlm's {b.per_second:.2f}, "
                f"errors {a.errors} and {b.errors}",
                flush=True,
            )
    return {
        "command": "python -m mlx_vlm.server --model <sample model>",
        "requests": 2 * CLIENTS,
        "clients": CLIENTS,
        "most_tokens": LONG,
        "seconds_until_theirs_was_given_up": {name: one[2] for name, one in cases.items()},
        **{name: _compared(found) for name, found in rounds.items()},
    }


def _warm(server: Server, material: Material, requests: Sequence[dict[str, Any]]) -> None:
    """Load what both adapters need, uncounted."""
    put(server, requests[:2], material.prompt, 1, material.cwd)


def _compared(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    ratios = [
        a.per_second / b.per_second
        for a, b in zip(rounds["ours"], rounds["theirs"], strict=True)
        if b.per_second
    ]
    replies = {side: [r for one in done for r in one.replies] for side, done in rounds.items()}
    same = sum(a.text.strip() == b.text.strip() for a, b in zip(*replies.values(), strict=True))
    return {
        # None if theirs answered nothing.
        "ours_to_theirs": measure.spread(ratios, 2) if ratios else None,
        "same_text": f"{same} of {len(replies['ours'])}",
        **{
            side: {
                "requests_a_second": measure.spread([one.per_second for one in done], 2),
                "p50_seconds": measure.spread([one.p50 for one in done], 2),
                "errors": sum(one.errors for one in done),
                "tokens": sum(reply.tokens for reply in replies[side]),
            }
            for side, done in rounds.items()
        },
    }
