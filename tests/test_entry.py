"""What a person meets at the terminal: help, one sentence per mistake, exit codes, run folders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mondrian_ft
from mondrian_ft import __main__ as entry
from mondrian_ft import __version__
from mondrian_ft.errors import DataError, Interrupted
from mondrian_ft.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
QUIET = "tracking=none"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are typed in an empty folder, with nothing of the tester's environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A pipeline whose functions only remember that they were called."""
    module = types.ModuleType("mondrian_ft.pipeline")
    module.calls = []  # type: ignore[attr-defined]

    def remember(name: str) -> Callable[..., None]:
        def called(task: Any, config: Any, run: Any) -> None:
            module.calls.append((name, task, config, run))  # type: ignore[attr-defined]

        return called

    for name in TASKS:
        setattr(module, name, remember(name))
    monkeypatch.setitem(sys.modules, "mondrian_ft.pipeline", module)
    monkeypatch.setattr(mondrian_ft, "pipeline", module, raising=False)
    return module


def typed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Runs the command line in this process and returns the exit code."""
    monkeypatch.setattr("sys.argv", ["mondrian-ft", *argv])
    return entry.main()


def process(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a person does."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "mondrian_ft", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def run_folders(parent: Path) -> list[Path]:
    return sorted(path.parent for path in parent.rglob("run.json"))


# --- help


def test_help_is_quick_and_ours() -> None:
    """--help answers in 1.5 s, without a warning, and names every task and experiment."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        done = process("--help")
        seconds.append(time.perf_counter() - start)
    assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds) < 1.5
    for word in (*TASKS, "ansel_v1", "dry_run", "qwen3_vl_4b_4bit", "--config-dir", "-m "):
        assert word in done.stdout
    assert "Hydra is" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_help_lists_a_persons_own_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What --config-dir adds is shown where ours is."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "night.yaml").write_text("# @package _global_\n")
    assert typed(monkeypatch, "--config-dir", "mine", "--help") == 0
    assert "ansel_v1, dry_run, night" in capsys.readouterr().out


def test_the_entry_imports_nothing_heavy() -> None:
    """Help and the whole way to a task pay for neither MLX nor plots nor W&B."""
    script = """
import sys, types
import mondrian_ft
fake = types.ModuleType("mondrian_ft.pipeline")
fake.link = lambda task, config, run: None
sys.modules["mondrian_ft.pipeline"] = mondrian_ft.pipeline = fake
from mondrian_ft.__main__ import main
sys.argv = ["mondrian-ft", "task=link"]
assert main() == 0
heavy = {"mlx", "mlx_vlm", "mlx_lm", "transformers", "matplotlib", "scipy", "wandb", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """--version is this program's, not Hydra's."""
    assert typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mondrian_ft {__version__}\n"


# --- mistakes on the command line


@pytest.mark.parametrize("override", ["lora.rnk=4", "+lora.rnk=4"])
def test_a_typo_exits_2_and_suggests_the_key(override: str) -> None:
    """Done when 6, as a person types it."""
    done = process(override)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: there is no key lora.rnk; did you mean lora.rank?\n"


MISTAKES = {
    "model=sampel": "there is no model=sampel; did you mean model=sample?",
    "modl=sample": "there is no key modl; did you mean model?",
    "model=llama": "model is one of qwen3_vl_4b, qwen3_vl_4b_4bit, sample (or set a key",
    "lora=4": "there is no lora=4; lora is one of all_linear, attention",
    "+experiment=ansel_v2": "there is no +experiment=ansel_v2; did you mean +experiment=ansel_v1?",
    "experiment=ansel_v1": "an experiment is added with a plus: +experiment=ansel_v1",
    "+experimnt=ansel_v1": "there is no key experimnt; did you mean +experiment=NAME?",
    "task=evaluat": "there is no task=evaluat; did you mean task=evaluate?",
    "task=[link,train]": "task chooses one task",
    "task.adapter=x": "task=experiment has no key task.adapter; it takes task.output_dir.",
    "train": "train is not key=value; did you mean task=train?",
    "ansel_v1": "ansel_v1 is not key=value; did you mean +experiment=ansel_v1?",
    "lora.rank": "lora.rank has no value; write lora.rank=…",
    "rank=8": "there is no key rank; did you mean lora.rank?",
    "lr=3": "there is no key lr; did you mean optimizer.learning_rate?",
    "lora.rank.x=3": "there is no key lora.rank.x; did you mean lora.rank?",
    "lora.rank=abc": "lora.rank is abc, but it must be a whole number.",
    "lora.rank=4.5": "lora.rank is 4.5, but it must be a whole number.",
    "lora.rank=null": "lora.rank is null, but it must be a whole number.",
    "data.limit=all": "data.limit is all, but it must be a whole number or null.",
    "lora.dropout=low": "lora.dropout is low, but it must be a number.",
    "trainer.grad_checkpoint=maybe": "it must be true or false.",
    "lora.target_modules=q_proj": "it must be a list, written [a,b].",
    "optimizer.schedule=cosin": "cosine, linear or constant; did you mean cosine?",
    "eval.arms=[base,tunde]": "and base_examples_constrained; did you mean tuned?",
    "tracking.mode=on": "it must be auto, online, offline or disabled",
    "lora.rank=[1": "cannot read lora.rank=[1",
    "~lora.rank": "lora.rank cannot be removed",
    "+lora.rank=4": "lora.rank is there already; write lora.rank=…, without the plus.",
    "data.limit=${foo}": "data.limit: interpolation key 'foo' not found",
    "hydra.run.dri=x": "there is no key hydra.run.dri; did you mean hydra.run.dir?",
    "data.train_split=0.9": "but the three shares must add up to 1.",
    "--epochs=3": "--epochs is not an option here; keys are given as key=value: trainer.epochs=3",
    "--save_freq=9": "keys are given as key=value: trainer.save_every=9",
    "--config-dir=nowhere": "there is no folder",
    "lora.rank=4,8": "sweep them with -m, or write a list: lora.rank=[4,8]",
    "hydra.sweeper.rank_by=val_los": (
        "must be monitor, val_loss or score_mae; did you mean val_loss?"
    ),
    "+sweep=seed": "there is no +sweep=seed; did you mean +sweep=seeds?",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_sentence(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """Exit 2, one line on standard error that says what to type, and no run folder."""
    assert typed(monkeypatch, argument) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert MISTAKES[argument] in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "HYDRA_FULL_ERROR" not in os.environ


# --- mistakes in a person's own YAML

OWN = {
    "lora:\n  rnk: 4\n": "experiment/own.yaml: there is no key lora.rnk; did you mean lora.rank?",
    "lora:\n  rank: four\n": "experiment/own.yaml: lora.rank is four, but it must be a whole",
    "lora: 4\n": "experiment/own.yaml: lora is 4, but it is a group; set its keys",
    "optimizer:\n  schedule: cosin\n": "did you mean cosine?",
    "task:\n  adaptr: x\n": "experiment/own.yaml: task=experiment has no key task.adaptr",
    "lora:\n  rank: 4\n  rank: 5\n": "own.yaml is not valid YAML: found duplicate key rank at line",
    "lora:\n  rank: 4\n bad: [1\n": "own.yaml is not valid YAML",
    "defaults:\n  - override /model: sampel\n": "there is no model=sampel; did you mean",
    "defaults:\n  - override /modl: sample\n": "there is no group modl; did you mean model?",
    "defaults:\n  - model: sample\n": "write 'override /model: sample'",
    "- a\n": "experiment/own.yaml: ",
}


@pytest.mark.parametrize("text", OWN)
def test_a_mistake_in_a_file_names_the_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A typo in YAML exits 2 like one on the command line, and says which file it is in."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(f"# @package _global_\n{text}")
    assert typed(monkeypatch, "--config-dir", "mine", "+experiment=own") == 2
    err = capsys.readouterr().err
    assert OWN[text] in err
    assert err.count("\n") == 1


def test_an_experiment_without_its_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The commonest slip with Hydra is explained and not only refused."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("lora:\n  rank: 4\n")
    assert typed(monkeypatch, "--config-dir", "mine", "+experiment=own") == 2
    assert "# @package _global_" in capsys.readouterr().err


def test_a_persons_own_experiment_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    """A folder beside an installed wheel is enough: --config-dir and +experiment."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\nexperiment_name: own\nlora:\n  rank: 4\n"
    )
    assert typed(monkeypatch, "--config-dir", "mine", "+experiment=own", QUIET) == 0
    ((_, _, config, run),) = pipeline.calls
    assert config.lora.rank == 4
    assert run.folder.parent == tmp_path / "outputs" / "own"


# --- a run


@pytest.mark.parametrize("name", TASKS)
def test_each_task_runs_its_own_function(
    name: str, monkeypatch: pytest.MonkeyPatch, pipeline: Any, tmp_path: Path, capsys: Any
) -> None:
    """task=NAME reaches the function of that name, in a run folder that ends as done."""
    assert typed(monkeypatch, f"task={name}", QUIET) == 0
    ((called, task, config, run),) = pipeline.calls
    assert called == name
    assert config.task is task
    assert type(task) is TASKS[name]
    assert run_folders(tmp_path) == [run.folder]
    assert run.folder.parent == tmp_path / "outputs" / "sample"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", run.folder.name)
    assert (run.folder / ".hydra" / "overrides.yaml").exists()
    assert state(run.folder)["status"] == "done"
    assert capsys.readouterr() == ("", "")


def test_paths_are_relative_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    """./training_data is the one of the folder the command is typed in."""
    assert typed(monkeypatch, "task=link", QUIET, "data.output_dir=./training_data") == 0
    ((_, _, config, _),) = pipeline.calls
    assert config.data.output_dir == str(tmp_path / "training_data")
    assert Path.cwd() == tmp_path


def failing(error: BaseException) -> Callable[..., None]:
    def fail(task: Any, config: Any, run: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "status", "sentence"),
    [
        (DataError("mondrian.db is empty."), 1, "failed", "error: mondrian.db is empty.\n"),
        (Interrupted("stopped; resume with x"), 130, "interrupted", "error: stopped; resume"),
        (KeyboardInterrupt(), 130, "interrupted", "error: interrupted.\n"),
        (ZeroDivisionError("odd"), 1, "failed", "error: unexpected ZeroDivisionError: odd;"),
    ],
)
def test_a_failure_is_one_sentence_and_a_code(
    error: BaseException,
    code: int,
    status: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: Any,
    capsys: Any,
) -> None:
    """1 the run failed, 130 interrupted; no traceback, and the folder says the same."""
    pipeline.link = failing(error)
    assert typed(monkeypatch, "task=link", QUIET) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    (folder,) = run_folders(tmp_path)
    assert state(folder)["status"] == status


def test_full_error_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    """HYDRA_FULL_ERROR=1 is the way to see where; it stays set as it was."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    pipeline.link = failing(DataError("no rows."))
    assert typed(monkeypatch, "task=link", QUIET) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no rows.\n")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
    assert typed(monkeypatch, "lora.rnk=4") == 2
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_ends_like_ctrl_c(tmp_path: Path) -> None:
    """A killed job leaves a closed run folder and exits 130."""
    script = """
import sys, time, types
import mondrian_ft
fake = types.ModuleType("mondrian_ft.pipeline")
def link(task, config, run):
    print("ready", flush=True)
    time.sleep(30)
fake.link = link
sys.modules["mondrian_ft.pipeline"] = mondrian_ft.pipeline = fake
from mondrian_ft.__main__ import main
sys.argv = ["mondrian-ft", "task=link", "tracking=none"]
sys.exit(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert err == "error: interrupted.\n"
    (folder,) = run_folders(tmp_path)
    assert state(folder)["status"] == "interrupted"


# --- a sweep


def test_a_sweep_runs_every_job_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    """-m runs one job a value, under one sweep folder, in one W&B group."""
    assert typed(monkeypatch, "-m", "task=link", QUIET, "lora.rank=4,8") == 0
    assert [config.lora.rank for _, _, config, _ in pipeline.calls] == [4, 8]
    runs = [run for *_, run in pipeline.calls]
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [run.folder for run in runs] == [sweep / "0", sweep / "1"]
    assert {run.group for run in runs} == {sweep.name}
    assert "job 1: task=link tracking=none lora.rank=8" in capsys.readouterr().err


def test_a_failed_job_does_not_stop_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    """The other jobs run, the failed one is told by its number, and the sweep exits 1."""

    def link(task: Any, config: Any, run: Any) -> None:
        if config.lora.rank == 4:
            raise DataError("no rows.")

    pipeline.link = link
    assert typed(monkeypatch, "-m", "task=link", QUIET, "lora.rank=4,8,16") == 1
    err = capsys.readouterr().err
    assert "error: job 0: no rows.\n" in err
    assert err.endswith("1 of 3 jobs failed; the others are done.\n")
    assert "Traceback" not in err
    statuses = [state(folder)["status"] for folder in run_folders(tmp_path)]
    assert statuses == ["failed", "done", "done"]


def test_ctrl_c_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    """An interrupted job is not followed by the next."""
    pipeline.link = failing(Interrupted("stopped; resume with x"))
    assert typed(monkeypatch, "-m", "task=link", QUIET, "lora.rank=4,8") == 130
    assert "stopped; resume with x" in capsys.readouterr().err
    assert len(run_folders(tmp_path)) == 1


def test_a_typo_in_a_sweep_starts_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    """All values are composed before the first job starts."""
    assert typed(monkeypatch, "-m", "task=link", QUIET, "lora.rnk=4,8") == 2
    assert "did you mean lora.rank?" in capsys.readouterr().err
    assert pipeline.calls == []
    assert typed(monkeypatch, "-m", "task=link", QUIET, "model=sample,sampel") == 2
    assert "did you mean model=sample?" in capsys.readouterr().err


def test_a_value_out_of_range_fails_its_job_only(
    monkeypatch: pytest.MonkeyPatch, pipeline: Any, capsys: Any
) -> None:
    """A job whose config does not validate is told as such; the sweep's exit code is 2."""
    assert typed(monkeypatch, "-m", "task=link", QUIET, "lora.rank=0,8") == 2
    assert "error: job 0: lora.rank is 0, but it must be 1 or more." in capsys.readouterr().err
    assert len(pipeline.calls) == 1
