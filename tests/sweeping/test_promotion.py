"""Trials that wait and go on: the quota, what is told, and a search in which it happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.errors import ConfigError, Pruned
from mondrian_ft.sweepers import Pruner, SearchSettings
from mondrian_ft.sweeping import study
from mondrian_ft.sweeping.promotion import CONTINUES
from mondrian_ft.sweeping.space import Dimension

optuna = pytest.importorskip("optuna")
Typed = Callable[..., int]
SEARCH = (
    "-m",
    "hydra/sweeper=optuna",
    "trainer.eval_every=1",
    "lora.rank=2,4",
    "optimizer.learning_rate=tag(log,interval(1e-6,5e-2))",
    # Of this seed the first rate is 7e-3, and those after it are too low to get anywhere.
    "hydra.sweeper.sampler=random",
    "hydra.sweeper.seed=6",
    "hydra.sweeper.candidates=0",
)


class Replay:
    """A study of one key whose values have known curves, one trial after another."""

    def __init__(self, curves: Mapping[int, tuple[float, ...]], larger: bool = False, **more: Any):
        self.curves = curves
        self.settings = SearchSettings(pruner=Pruner.promote, n_trials=len(curves), **more)
        self.larger = larger
        self.storage = optuna.storages.InMemoryStorage()
        self.study = study.Study(self.storage, "s", self.settings)
        distribution = optuna.distributions.CategoricalDistribution(list(curves))
        self.space = {"x": Dimension(distribution)}
        self.updates = 0
        self.told: dict[int, str] = {}

    def run(self) -> None:
        for value in self.curves:
            self.begin(value)
        while self.study.promote():
            self.train(self.study.ask(self.space))

    def begin(self, value: int) -> None:
        while self.study.promote():
            self.train(self.study.ask(self.space))
        self.study.study.enqueue_trial({"x": value})
        self.train(self.study.ask(self.space))

    def train(self, trial: Any) -> None:
        curve = self.curves[trial.params["x"]]
        begun = len(self.study.trial(trial.number).intermediate_values)
        settings = {
            "pruner": "promote",
            "n_trials": self.settings.n_trials,
            "n_startup_trials": self.settings.n_startup_trials,
            "n_warmup_steps": self.settings.n_warmup_steps,
            "keep_fraction": self.settings.keep_fraction,
        }
        report = study.Reporter(self.storage, "s", trial.number, settings, "loss", self.larger)
        try:
            for evaluation, figure in enumerate(curve[begun:], begun + 1):
                self.updates += 1
                report(figure, 10 * evaluation, evaluation)
        except Pruned as reason:
            self.told[trial.number] = str(reason)
            self.study.tell(trial, None, "PRUNED")
        else:
            self.study.tell(trial, -curve[-1] if self.larger else curve[-1], "COMPLETE")

    def finished(self) -> list[int]:
        return [one.params["x"] for one in self.study.trials("COMPLETE")]


LATE = {1: (0.6, 0.5, 0.4), 2: (0.5, 0.45, 0.44), 3: (0.55, 0.3, 0.2), 4: (0.9, 0.8, 0.7)}
"""The third is behind the second at first, and best in the end."""


def test_what_waits_goes_on_when_it_is_among_the_best() -> None:
    """Promise: the best half of four is two, whatever came first; the one that is best late is
    found, because it waited and was not given up for good; nothing is trained twice."""
    replay = Replay(LATE, n_startup_trials=2, keep_fraction=0.5)
    replay.run()
    assert sorted(replay.finished()) == [2, 3]
    # Four first evaluations, and two more of each that went on.
    assert replay.updates == 4 + 2 * 2
    went_on = [one for one in replay.study.trials() if CONTINUES in one.user_attrs]
    assert [(one.params["x"], one.user_attrs[CONTINUES]) for one in went_on] == [(3, 2)]
    assert list(went_on[0].intermediate_values.values()) == [0.55, 0.3, 0.2]
    assert replay.study.count() == 4
    # The median gave it up: it is behind the one finished trial.
    told = {number: replay.told[number] for number in (0, 2)}
    assert told == {
        0: "its best loss up to there, 0.6000 after update 10 (evaluation 1), waits for others: 1 "
        "of 2 trials are measured before any goes on",
        2: "its best loss up to there, 0.5500 after update 10 (evaluation 1), is the 2nd of 3 "
        "there, and of 3 trials the best 1 go on",
    }


def test_a_small_study_ends_with_a_figure() -> None:
    """Promise: of fewer trials than are waited for, the best goes on once the last has begun."""
    replay = Replay({1: (0.6, 0.5), 2: (0.4, 0.3), 3: (0.5, 0.2)}, n_startup_trials=5)
    replay.run()
    assert replay.finished() == [2]


def test_the_grace_of_the_first_evaluations() -> None:
    """Promise: n_warmup_steps lets every trial reach that evaluation and the one after it."""
    replay = Replay(LATE, n_startup_trials=0, keep_fraction=0.25, n_warmup_steps=1)
    replay.run()
    assert min(len(one.intermediate_values) for one in replay.study.trials()) == 2
    assert 3 in replay.finished()


def test_a_figure_that_is_better_when_larger_waits_when_low() -> None:
    """Promise: of what is better when larger the high ones go on."""
    replay = Replay({1: (0.5, 0.6), 2: (0.9, 0.9)}, larger=True, n_startup_trials=0)
    replay.run()
    assert replay.finished() == [1, 2]  # the first had nothing before it
    replay = Replay({1: (0.9, 0.9), 2: (0.5, 0.6)}, larger=True, n_startup_trials=0)
    replay.run()
    assert replay.finished() == [1]
    assert "0.5000 after update 10" in replay.told[1]


def test_one_that_went_on_and_was_left_is_not_lost() -> None:
    """Promise: a promoted trial whose process is gone is begun anew as what it was; another that is
    killed before it has asked leaves it waiting to be asked for."""
    replay = Replay(LATE, n_startup_trials=0, keep_fraction=0.5)
    for value in (2, 3, 1):
        replay.begin(value)
    assert sorted(replay.finished()) == [2]
    replay.study.study.enqueue_trial({"x": 4})
    replay.train(replay.study.ask(replay.space))
    assert replay.study.promote()
    gone = replay.study.ask(replay.space)
    assert gone.params["x"] == 3
    replay.study.begin_anew(replay.study.trial(gone.number))
    assert not replay.study.promote()  # it is waiting to be asked for
    again = replay.study.ask(replay.space)
    assert again.user_attrs[CONTINUES] == 1
    replay.train(again)
    assert sorted(replay.finished()) == [2, 3]
    assert replay.study.count() == 4


def test_of_few_trials_more_go_on() -> None:
    """Promise: a quarter of five trials would be one, chosen by its first figure; half of them go
    on, of twenty eight, and of two hundred a quarter."""
    found = {n: SearchSettings(n_trials=n).fraction for n in (5, 20, 32, 200)}
    assert found == {5: 0.5, 20: 0.4, 32: 0.25, 200: 0.25}
    assert SearchSettings(n_trials=20, keep_fraction=0.1).fraction == 0.1


def test_a_fraction_that_is_none_is_refused() -> None:
    """Promise: the key is checked, and the message says what gives up nothing."""
    with pytest.raises(ConfigError, match=r"keep_fraction is 1\.0, .* pruner=none"):
        SearchSettings(keep_fraction=1.0).check()


def test_a_search_goes_on_with_what_waited(typed: Typed, bench: Path, capsys: Any) -> None:
    """Promise: by default a trial waits at its checkpoint and goes on from there under another
    number, to the bytes of a run that never waited; the table says what became of it."""
    place = bench / "promoted"
    more = ("hydra.sweeper.n_trials=2", "hydra.sweeper.n_startup_trials=2")
    assert typed(*SEARCH, f"hydra.sweep.dir={place}", *more) == 0
    told = capsys.readouterr().out
    assert "trial 0 is among the best now, and goes on as trial 2" in told
    assert "Resumed after update 1." in told
    content = json.loads((place / "sweep.json").read_text())
    assert [job["status"] for job in content["jobs"]] == ["pruned", "pruned", "done"]
    assert content["jobs"][0]["error"] == "went on as trial 2"
    assert "is the 2nd of 2 there, and of 2 trials the best 1 go on" in content["jobs"][1]["error"]
    assert content["best"] == "2"
    facts = json.loads((place / "2" / "run.json").read_text())
    assert facts["resumed_from"] == str(place / "0" / "adapter" / "checkpoints" / "step_000001")
    words = content["jobs"][2]["overrides"]
    keys = ("lora.rank=", "optimizer.learning_rate=")
    alone = [word for word in words if word.startswith(keys)]
    assert typed("trainer.eval_every=1", *alone, f"hydra.run.dir={bench / 'never-waited'}") == 0
    assert weights(place / "2") == weights(bench / "never-waited")
    # Typed again, nothing is left to do.
    before = (place / "2" / "run.json").read_bytes()
    assert typed(*SEARCH, f"hydra.sweep.dir={place}", *more) == 0
    assert (place / "2" / "run.json").read_bytes() == before
    assert not (place / "3").exists()


def weights(folder: Path) -> str:
    return sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
