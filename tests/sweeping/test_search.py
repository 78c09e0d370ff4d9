"""A search: what it is of, what it gives up, what it repeats, and how it goes on."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.errors import ConfigError, Pruned, SweepError
from mondrian_ft.sweepers import Pruner, SearchSettings
from mondrian_ft.sweeping import bound, space, study
from mondrian_ft.sweeping.search import JOURNAL

optuna = pytest.importorskip("optuna")
Typed = Callable[..., int]
SEARCH = (
    "-m",
    "hydra/sweeper=optuna",
    "trainer.eval_every=1",
    "lora.rank=2,4",
    "optimizer.learning_rate=tag(log,interval(1e-6,5e-2))",
    "hydra.sweeper.n_startup_trials=1",
    "hydra.sweeper.pruner=median",
    # Of this seed the first rate is 7e-3, and those after it are too low to get anywhere.
    "hydra.sweeper.sampler=random",
    "hydra.sweeper.seed=6",
)


def parsed(*words: str) -> tuple[space.Space, list[str]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return space.split(OverridesParser.create().parse_overrides(list(words)))


# --- what is searched


def test_words_become_distributions_and_back() -> None:
    """Promise: choices, ranges and intervals of Hydra's grammar are what Optuna searches, and a
    point it chooses is a command line again."""
    found, fixed = parsed(
        "lora.rank=4,8",
        "lora.method=choice(lora,dora)",
        "optimizer.learning_rate=tag(log,interval(1e-4,1e-2))",
        "trainer.epochs=int(interval(1,4))",
        "trainer.accumulate=range(1,8,2)",
        "lora.dropout=0.1,0.2",
        "lora.dropout=0.3",
    )
    assert fixed == ["lora.dropout=0.3"]
    kinds = {key: type(one.distribution).__name__ for key, one in found.items()}
    assert kinds == {
        "lora.rank": "CategoricalDistribution",
        "lora.method": "CategoricalDistribution",
        "optimizer.learning_rate": "FloatDistribution",
        "trainer.epochs": "IntDistribution",
        "trainer.accumulate": "IntDistribution",
    }
    assert found["lora.rank"].word(8) == "8"
    assert found["lora.method"].word("dora") == "dora"
    assert found["optimizer.learning_rate"].distribution.log
    assert found["optimizer.learning_rate"].word(2.5e-05) == "2.5e-05"
    assert found["trainer.accumulate"].distribution.high == 7
    with pytest.raises(ConfigError, match="nothing to search"):
        parsed("lora.rank=4")


# --- what is given up


def reporter(storage: Any, number: int, pruner: str, **more: Any) -> study.Reporter:
    settings = {"pruner": pruner, "n_startup_trials": 2, **more}
    return study.Reporter(storage, "s", number, settings, "val_loss", larger=False)


def trial_of(storage: Any, pruner: Pruner) -> Any:
    one = study.Study(storage, "s", SearchSettings(pruner=pruner, n_startup_trials=2))
    return one, one.study.ask()


def test_the_median_gives_up_with_its_reason() -> None:
    """Promise: a trial whose best figure is behind the median of the finished ones at the same
    evaluation is given up, and the reason has both figures."""
    storage = optuna.storages.InMemoryStorage()
    for curve in ((0.5, 0.3), (0.4, 0.2)):
        one, trial = trial_of(storage, Pruner.median)
        told = reporter(storage, trial.number, "median")
        for evaluation, value in enumerate(curve, 1):
            told(value, 10 * evaluation, evaluation)
        one.tell(trial, curve[-1], "COMPLETE")
    _, trial = trial_of(storage, Pruner.median)
    told = reporter(storage, trial.number, "median")
    told(0.42, 10, 1)
    told(None, 15, 2)  # what could not be measured says nothing
    with pytest.raises(Pruned) as reason:
        told(0.35, 20, 2)
    assert str(reason.value) == (
        "its best val_loss up to there, 0.3500 after update 20 (evaluation 2), is above 0.2500, "
        "the median of the 2 finished trials"
    )


def test_successive_halving_gives_up_with_its_reason() -> None:
    """Promise: with asha a trial outside the best third of those that came as far is given up."""
    storage = optuna.storages.InMemoryStorage()
    for value in (0.1, 0.2, 0.3):
        _, trial = trial_of(storage, Pruner.asha)
        told = reporter(storage, trial.number, "asha", reduction_factor=3)
        if value == 0.1:
            told(value, 10, 1)
            continue
        with pytest.raises(Pruned) as reason:
            told(value, 10, 1)
    assert str(reason.value) == (
        "its val_loss after update 10 (evaluation 1), 0.3000, is the 3rd of 3 there, and the "
        "best 1 in 3 goes on"
    )


def test_a_figure_that_is_better_when_larger() -> None:
    """Promise: what is ranked by format compliance gives up the low ones."""
    storage = optuna.storages.InMemoryStorage()
    settings = {"pruner": "median", "n_startup_trials": 1}
    one, trial = trial_of(storage, Pruner.median)
    study.Reporter(storage, "s", trial.number, settings, "format_compliance", True)(0.9, 10, 1)
    one.tell(trial, -0.9, "COMPLETE")
    _, trial = trial_of(storage, Pruner.median)
    told = study.Reporter(storage, "s", trial.number, settings, "format_compliance", True)
    with pytest.raises(Pruned, match=r"0\.5000 .* is below 0\.9000"):
        told(0.5, 10, 1)


# --- what is chosen


def test_the_luckiest_run_does_not_win() -> None:
    """Promise: of two configs the steadier one is chosen over the one with the best single run and
    even the better mean; one with a single run has no bound."""
    judged = {
        1: bound.judge([0.10, 0.30, 0.14], 0.9, larger=False),
        2: bound.judge([0.19, 0.20, 0.18], 0.9, larger=False),
        3: bound.judge([0.01], 0.9, larger=False),
    }
    assert judged[1].mean < judged[2].mean
    assert bound.choose(judged, larger=False) == 2
    # By hand: 0.19 + t(0.9, 2) 1.8856 * 0.01 / sqrt(3).
    assert judged[2].bound == pytest.approx(0.19 + 1.8856 * 0.01 / 3**0.5, abs=1e-6)
    assert bound.judge([0.19, 0.2, 0.18], 0.9, larger=True).bound == pytest.approx(
        0.19 - 1.8856 * 0.01 / 3**0.5, abs=1e-6
    )
    assert bound.choose({3: judged[3]}, larger=False) is None


# --- the whole, in seconds


@pytest.fixture(scope="session")
def kept(bench: Path) -> Path:
    return bench / "study"


def searched(typed: Typed, kept: Path, trials: int, *more: str) -> int:
    return typed(
        *SEARCH,
        f"hydra.sweep.dir={kept}",
        f"hydra.sweeper.n_trials={trials}",
        "hydra.sweeper.candidates=1",
        "hydra.sweeper.repeats=2",
        *more,
    )


@pytest.fixture
def searching(typed: Typed, kept: Path, capsys: Any) -> str:
    """Three trials and two repeats, run once; what was printed."""
    if not kept.exists():
        assert searched(typed, kept, 3) == 0
        (kept.parent / "study.txt").write_text(capsys.readouterr().out)
    return (kept.parent / "study.txt").read_text()


def test_a_search_prunes_repeats_and_chooses(searching: str, kept: Path) -> None:
    """Promise: trials are ranked, at least one is given up by its curve, the best is trained again
    with other seeds, and what is chosen is a command to type."""
    content = json.loads((kept / "sweep.json").read_text())
    states = [job["status"] for job in content["jobs"]]
    assert len(states) == 3
    assert set(states) == {"done", "pruned"}
    pruned = next(job for job in content["jobs"] if job["status"] == "pruned")
    assert "the median of the" in pruned["error"]
    assert pruned["value"] is None
    facts = json.loads((kept / pruned["job"] / "run.json").read_text())
    assert (facts["status"], facts["error"]) == ("pruned", pruned["error"])
    assert (kept / pruned["job"] / "adapter" / "checkpoints").is_dir()
    best = content["best"]
    assert best == content["ranking"][0]
    assert sorted(path.name for path in kept.glob("*-seed-*")) == [
        f"{best}-seed-1",
        f"{best}-seed-2",
    ]
    repeated = content["repeated"][best]
    assert len(repeated["values"]) == 2
    assert repeated["bound"] > repeated["mean"]
    assert f"Chosen by that bound: trial {best}." in searching
    assert "pruned: its best val_loss up to there" in searching.replace("\n", " ")


def test_a_killed_trial_goes_on_under_its_number(
    searching: str, typed: Typed, kept: Path, capsys: Any
) -> None:
    """Promise: a trial whose process is gone is taken over, not lost and not run twice; n_trials
    counts the study's trials, so that one more is run and nothing else again."""
    storage = study.open_storage(str(kept / JOURNAL))
    theirs = study.Study(storage, "study", SearchSettings())
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*/run.json")}
    gone = theirs.ask(parsed(*SEARCH[3:5])[0])
    (kept / str(gone.number)).mkdir()
    gone.set_user_attr("machine", "any")
    gone.set_user_attr("folder", str(kept / str(gone.number)))
    with (kept / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 5, "tri')  # killed while it wrote
    assert searched(typed, kept, 4) == 0
    told = capsys.readouterr().out
    assert "trial 3 was left by its process, and goes on" in told
    assert "Going on with" in told
    content = json.loads((kept / "sweep.json").read_text())
    assert [job["job"] for job in content["jobs"]] == ["0", "1", "2", "3"]
    assert content["jobs"][3]["status"] in ("done", "pruned")
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


def test_a_trial_that_is_the_same_is_not_trained_again(
    typed: Typed, bench: Path, capsys: Any
) -> None:
    """Promise: of a space of two points, four trials train two at the most."""
    words = [word for word in SEARCH if not word.startswith("optimizer.learning_rate")]
    place = bench / "two"
    more = ("hydra.sweeper.n_trials=4", "hydra.sweeper.candidates=0", "trainer.max_steps=1")
    assert typed(*words, f"hydra.sweep.dir={place}", *more, "optimizer.warmup_steps=0") == 0
    told = capsys.readouterr().out
    assert len(list(place.glob("*/run.json"))) <= 2
    assert "once more, and is not trained again" in told
    # A curve that counted with every repetition once became the median, and gave up all others.
    theirs = study.Study(study.open_storage(str(place / JOURNAL)), "two", SearchSettings())
    again = [one for one in theirs.trials() if "same_as" in one.user_attrs]
    assert again
    assert not any(one.intermediate_values for one in again)
    assert "by its one figure, which luck has a part in" in told


def test_a_study_of_something_else_is_refused(
    searching: str, typed: Typed, kept: Path, capsys: Any
) -> None:
    """Promise: another search space, or another fixed key, is named, and nothing is run."""
    before = (kept / JOURNAL).read_bytes()
    assert searched(typed, kept, 9, "lora.rank=2,4,8", "lora.alpha=16.0") == 2
    err = capsys.readouterr().err
    assert "lora.rank was one of 2, 4 and is one of 2, 4, 8" in err
    assert "lora.alpha was 32.0 and is 16.0" in err
    assert searched(typed, kept, 9, "lora.rank=2") == 2
    assert "lora.rank was one of 2, 4 and is not searched" in capsys.readouterr().err
    assert (kept / JOURNAL).read_bytes().startswith(before)
    assert len(list(kept.glob("?"))) == 4


def test_a_grid_does_not_go_into_a_study(
    searching: str, typed: Typed, kept: Path, capsys: Any
) -> None:
    """Promise: a folder is of one kind."""
    assert typed("-m", "lora.rank=2,4", f"hydra.sweep.dir={kept}") == 1
    assert "holds a search, and this is a grid" in capsys.readouterr().err


def test_a_read_only_storage_is_told(
    typed: Typed, bench: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a study that cannot be written is a sentence with the key, before any training."""

    def refuse(path: str) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(optuna.storages.journal, "JournalFileBackend", refuse)
    place = bench / "readonly-study"
    assert typed(*SEARCH, f"hydra.sweep.dir={place}") == 1
    err = capsys.readouterr().err
    assert "Read-only file system; give hydra.sweeper.storage" in err
    assert not list(place.glob("[0-9]"))


def test_a_trial_left_in_another_folder_is_begun_anew(
    searching: str, typed: Typed, kept: Path, bench: Path, capsys: Any
) -> None:
    """Promise: processes that share a study from folders of their own lose no point of it either,
    and leave a trial alone whose process lives."""
    from mondrian_ft.sweeping import book
    from mondrian_ft.sweeping.search import TRIAL_LOCK

    (bench / "there" / "alive").mkdir(parents=True)
    (bench / "there" / "gone").mkdir()
    theirs = study.Study(study.open_storage(str(kept / JOURNAL)), "study", SearchSettings())
    asked = {}
    for name in ("alive", "gone"):
        asked[name] = theirs.ask(parsed(*SEARCH[3:5])[0])
        asked[name].set_user_attr("machine", platform.node())
        asked[name].set_user_attr("folder", str(bench / "there" / name))
    with book.held(bench / "there" / "alive", print, TRIAL_LOCK):
        more = (f"hydra.sweeper.storage={kept / JOURNAL}", "hydra.sweeper.study_name=study")
        assert searched(typed, bench / "elsewhere", 1, *more) == 0
    told = capsys.readouterr().out
    assert f"trial {asked['gone'].number} was left by its process, and is begun anew" in told
    assert "1 trial still run by another process" in told
    states = {one.number: one for one in theirs.trials()}
    assert states[asked["alive"].number].state.name == "RUNNING"
    assert states[asked["gone"].number].state.name == "FAIL"
    anew = states[asked["gone"].number + 1]
    assert anew.params == asked["gone"].params
    assert anew.state.name in ("COMPLETE", "PRUNED")
    theirs.tell(asked["alive"], None, "FAIL")


def test_a_database_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Promise: the same for a database."""
    with pytest.raises(SweepError, match="the study cannot be kept in sqlite:///"):
        study.open_storage(f"sqlite:///{tmp_path}/no/such/folder.db")


def test_settings_out_of_range_are_refused(typed: Typed, bench: Path, capsys: Any) -> None:
    """Promise: a setting of the search is checked like any other key."""
    assert typed(*SEARCH, f"hydra.sweep.dir={bench}/x", "hydra.sweeper.repeats=1") == 2
    assert "hydra.sweeper.repeats is 1, but it must be 2 or more." in capsys.readouterr().err


def test_a_range_of_the_wrong_kind_is_refused(typed: Typed, bench: Path, capsys: Any) -> None:
    """Promise: a rank that would be 2.6 is told before there is a study; and a range given to a
    grid, which has no end, with what to type."""
    words = [word for word in SEARCH if not word.startswith("lora.rank")]
    place = bench / "kind"
    assert typed(*words, "lora.rank=interval(1,4)", f"hydra.sweep.dir={place}") == 2
    assert "but it must be a whole number" in capsys.readouterr().err
    assert not (place / JOURNAL).exists()
    assert typed("-m", "lora.rank=interval(1,4)") == 2
    assert "add hydra/sweeper=optuna, or name the values" in capsys.readouterr().err


def test_without_optuna_it_says_what_to_install(
    typed: Typed, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the extra is optional, and its name is in the error."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert typed(*SEARCH) == 1
    assert "pip install 'mondrian_ft[sweep]'" in capsys.readouterr().err
