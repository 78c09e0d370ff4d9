"""What a sweep costs beside its trainings, and what a search saves."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import curves, measure

JOB = (
    "task=train",
    "tracking=none",
    "data.limit=24",
    "trainer.max_steps=8",
    "optimizer.warmup_steps=2",
)
JOBS = 4
SAMPLER_SEEDS = 3


def overhead(repeats: int) -> dict[str, Any]:
    """A job of a sweep beside the same job alone, each a whole process on the sample.

    The sweep of four jobs less the sweep of one is three jobs after the first. Both clocks are
    given: the wall's is what one waits for, the processor's moves less on a machine that others
    use as well.
    """
    taken: dict[str, list[tuple[float, float]]] = {"alone": [], "one": [], "four": []}
    seeds = ",".join(map(str, range(JOBS)))
    words = {
        "alone": [*JOB, "trainer.seed=0"],
        "one": ["-m", *JOB, "trainer.seed=0"],
        "four": ["-m", *JOB, f"trainer.seed={seeds}"],
    }
    with TemporaryDirectory() as folder:
        env = {**os.environ, "XDG_CACHE_HOME": folder, "WANDB_MODE": "disabled"}
        _timed(words["alone"], Path(folder), env)  # draws the sample, fills the cache
        for number in range(repeats):
            for name in taken:
                more = [] if name == "alone" else [f"hydra.sweep.dir=sweep-{name}-{number}"]
                taken[name].append(_timed([*words[name], *more], Path(folder), env))
                told = " and ".join(f"{one:.1f}" for one in taken[name][-1])
                print(f"{name}: {told} s by the wall's clock and the processor's", flush=True)
    found: dict[str, Any] = {
        "what": f"a training of 8 updates on 24 rows: alone, and as job 2 to {JOBS} of a sweep"
    }
    for place, clock in enumerate(("wall", "processor")):
        seconds = {name: [one[place] for one in each] for name, each in taken.items()}
        after = [
            (four - one) / (JOBS - 1)
            for four, one in zip(seconds["four"], seconds["one"], strict=True)
        ]
        alone = statistics.median(seconds["alone"])
        found[f"{clock}_seconds"] = {
            "alone": measure.spread(seconds["alone"], 1),
            "sweep_of_one": measure.spread(seconds["one"], 1),
            "each_after_the_first": measure.spread(after, 1),
            "first_over_alone": round(statistics.median(seconds["one"]) / alone - 1, 3),
            "after_the_first_over_alone": round(statistics.median(after) / alone - 1, 3),
        }
    return found


def _timed(words: list[str], cwd: Path, env: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of a process, by the wall's clock and the processor's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = measure.process([sys.executable, "-m", "mondrian_ft", *words], cwd=cwd, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def composing(repeats: int) -> dict[str, Any]:
    """Composing and validating a config: of a run, and of each further job of a sweep."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import HydraContext, RunMode

    from mondrian_ft.config import conf_dir, load, register_schemas
    from mondrian_ft.sweeping.composing import Composer

    register_schemas()
    times: dict[str, list[float]] = {"run": [], "run_cpu": [], "job": [], "job_cpu": []}
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", ["hydra.sweep.dir=x"], run_mode=RunMode.MULTIRUN)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        composer = Composer(config, context, lambda cfg: None)
        composer.compose(["lora.rank=1"])
        for number in range(10 * repeats):
            words = [f"lora.rank={number + 2}", "optimizer.learning_rate=1e-3"]
            for name, work in (
                ("run", lambda words=words: load(compose("config", overrides=words))),
                ("job", lambda words=words: composer.compose(words)),
            ):
                wall, cpu = time.perf_counter(), time.thread_time()
                work()
                times[name].append(time.perf_counter() - wall)
                times[f"{name}_cpu"].append(time.thread_time() - cpu)
    print({name: round(min(each), 3) for name, each in times.items()}, flush=True)
    return {
        "what": "compose + validate, seconds; a job is one after the first of its sweep",
        **{name: measure.spread(each, 4) for name, each in times.items()},
    }


def search(repeats: int) -> dict[str, Any]:
    """200 trials over the 48 points whose curves are stored, against the whole grid.

    Costs are counted in updates: those of a trial that is given up end at that evaluation, and a
    trial that is an earlier one again costs none, since it is not trained again. Every grid (one of
    each training seed whose curves are all there) is searched with several seeds of the sampler.
    The best of a grid is partly luck; ``regret`` is how much worse the chosen point is, to be read
    beside how far the best points' losses move from one training seed to another.
    """
    stored = json.loads(curves.PATH.read_text())
    seeds = [
        seed
        for seed in curves.SEEDS
        if all(curves.name(point, seed) in stored["curves"] for point in curves.points())
    ]
    found: dict[str, Any] = {
        "what": f"200 trials over 48 points, {stored['updates']} updates each at the most, "
        f"validation loss every {stored['eval_every']}; share of the grid's updates",
        "training_seeds": seeds,
        "seed_to_seed": _seed_to_seed(stored, seeds),
        "cases": {},
    }
    for sampler in ("tpe", "random"):
        for pruner in ("promote", "asha", "median"):
            each = [
                _searched(stored, sampler, pruner, seed, draw)
                for seed in seeds
                for draw in range(SAMPLER_SEEDS)
            ]
            found["cases"][f"{sampler}, {pruner}"] = case = {
                "searches": len(each),
                "best_of_the_grid_found": sum(one["rank"] == 1 for one in each),
                "worst_rank_chosen": max(one["rank"] for one in each),
                "regret": measure.spread([one["regret"] for one in each], 4),
                "share_of_the_grid": measure.spread([one["share"] for one in each]),
                "points_trained": measure.spread([one["trained"] for one in each], 0),
                "each": each,
            }
            print(f"{sampler:<7} {pruner:<7} {case}", flush=True)
    return found


def _seed_to_seed(stored: Mapping[str, Any], seeds: list[int]) -> float | None:
    """Median distance of a point's losses with two training seeds, of the twelve best points."""
    if len(seeds) < 2:
        return None
    losses = [
        [stored["curves"][curves.name(point, seed)][-1] for seed in seeds]
        for point in curves.points()
    ]
    best = sorted(losses, key=statistics.fmean)[:12]
    return round(
        statistics.median(abs(one - two) for each in best for one, two in combinations(each, 2)), 4
    )


def _searched(
    stored: Mapping[str, Any], sampler: str, pruner: str, seed: int, draw: int
) -> dict[str, Any]:
    """One study of the curves of one seed."""
    from optuna.distributions import CategoricalDistribution
    from optuna.storages import InMemoryStorage

    from mondrian_ft.errors import Pruned
    from mondrian_ft.sweepers import Pruner, Sampler, SearchSettings
    from mondrian_ft.sweeping.space import Dimension
    from mondrian_ft.sweeping.study import Reporter, Study

    settings = SearchSettings(
        n_trials=200, sampler=Sampler[sampler], pruner=Pruner[pruner], seed=draw
    )
    storage = InMemoryStorage()
    study = Study(storage, "s", settings)
    study.sample_as(0)
    space = {key: Dimension(CategoricalDistribution(each)) for key, each in curves.SPACE.items()}
    every, updates = int(stored["eval_every"]), int(stored["updates"])
    final = {
        curves.name(point, seed): stored["curves"][curves.name(point, seed)][-1]
        for point in curves.points()
    }
    ended: dict[str, Any] = {}
    spent, trained = 0, 0
    told = asdict(settings) | {"pruner": pruner}
    while study.promote() or study.count() < settings.n_trials:
        trial = study.ask(space)
        name = curves.name(trial.params, seed)
        begun = len(study.trial(trial.number).intermediate_values)
        if not begun:
            if (same := ended.get(name)) is not None:
                frozen = study.trial(same)
                study.tell(trial, frozen.value, frozen.state.name)
                continue
            trained += 1
        ended[name] = trial.number
        report = Reporter(storage, "s", trial.number, told, "val_loss", larger=False)
        try:
            for evaluation, value in enumerate(stored["curves"][name], 1):
                if evaluation > begun:
                    spent += every
                if evaluation >= begun:
                    report(value, evaluation * every, evaluation)
            study.tell(trial, final[name], "COMPLETE")
        except Pruned:
            study.tell(trial, None, "PRUNED")
    best = min(study.trials("COMPLETE"), key=lambda one: one.value)
    order = sorted(final.values())
    return {
        "seed": seed,
        "sampler_seed": draw,
        "rank": order.index(final[curves.name(best.params, seed)]) + 1,
        "regret": round(final[curves.name(best.params, seed)] - order[0], 4),
        "share": round(spent / (updates * len(final)), 3),
        "trained": trained,
        "pruned": len(study.trials("PRUNED")),
    }
