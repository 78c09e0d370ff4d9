"""Arms, folds and reports as they are typed: who is asked answers, or is named with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import Finished, command, read_json, refused, run_folders, succeed
from .world import World


def judge(run: Finished, adapter: Path, *words: str, cwd: Path | None = None) -> Any:
    """``task=evaluate`` on four photographs of the sample run's split."""
    return command(
        "task=evaluate",
        f"task.adapter={adapter}",
        f"data.output_dir={run.folder / 'data'}",
        "eval.max_examples=4",
        "tracking=none",
        *words,
        cwd=cwd or run.cwd,
    )


def newest(cwd: Path) -> dict[str, Any]:
    """The newest run's evidence."""
    return read_json(run_folders(cwd)[-1] / "evaluation" / "comparison_report.json")["evidence"]


def test_every_arm_beside_the_others(sample_run: Finished, tmp_path: Path) -> None:
    """Production is another copy of the adapter here, so that it must answer the very same."""
    from mondrian_ft import registry

    registry.register(
        tmp_path / "registry", "sample-ansel", sample_run.adapter, facts={}, channel="production"
    )
    done = judge(
        sample_run,
        sample_run.adapter,
        "eval.arms=[base,tuned,production,base_examples]",
        "eval.constrained=true",
        "eval.examples=1",
        f"registry.root={tmp_path / 'registry'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    evidence = newest(sample_run.cwd)
    names = ("base", "tuned", "production", "base_examples")
    free = {name: evidence["arms"][name] for name in names}
    bound = {name: evidence["arms"][f"{name}_constrained"] for name in names}
    assert all(arm["format_strict"] == 1.0 for arm in bound.values())
    assert free["production"]["score_mae"] == free["tuned"]["score_mae"]
    assert free["production"]["adapter_hash"] == free["tuned"]["adapter_hash"]
    assert evidence["against"]["production"]["verdict"] == "no_worse"
    assert free["base_examples"]["prompt_tokens_mean"] > 1.5 * free["base"]["prompt_tokens_mean"]
    assert {"mean_score", "prompt_example"} < evidence["arms"].keys()
    assert set(evidence["constraint"]) == set(names)
    assert evidence["arms_failed"] == {}


def test_an_adapter_that_does_not_load(sample_run: Finished, tmp_path: Path) -> None:
    """The base is judged all the same, the reason is told and written, and the exit code is 1."""
    broken = tmp_path / "broken"
    shutil.copytree(sample_run.adapter, broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    sentence = refused(judge(sample_run, broken))
    assert "tuned could not be evaluated" in sentence
    assert "changed or damaged" in sentence
    evidence = newest(sample_run.cwd)
    assert list(evidence["arms_failed"]) == ["tuned"]
    assert evidence["arms"]["base"]["n"] == 4
    assert "tuned" not in evidence["arms"]


def test_nothing_in_production(sample_run: Finished, tmp_path: Path) -> None:
    """An arm that was asked for and is not there is a failure, not an arm fewer."""
    sentence = refused(
        judge(
            sample_run,
            sample_run.adapter,
            "eval.arms=[base,tuned,production]",
            f"registry.root={tmp_path / 'nothing'}",
        )
    )
    assert "production could not be evaluated" in sentence
    assert newest(sample_run.cwd)["arms"].keys() >= {"base", "tuned"}


def test_a_report_path_that_cannot_be_written(sample_run: Finished, tmp_path: Path) -> None:
    """Minutes of answers were once lost to a path that was a file's."""
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / "report.json"
    sentence = refused(judge(sample_run, sample_run.adapter, f"eval.report={place}"))
    assert "eval.report" in sentence
    assert "evaluation/comparison_report.json" in sentence
    assert newest(sample_run.cwd)["arms"]["tuned"]["n"] == 4


def test_folds_and_seeds_judge_every_row(world: World) -> None:
    """Two folds and two seeds: four adapters, each row answered twice, nothing registered."""
    done = succeed(
        "data=mondrian",
        "tracking=none",
        "eval.folds=2",
        "eval.seeds=2",
        "trainer.max_steps=1",
        "eval.max_tokens=20",
        cwd=world.cwd,
    )
    folder = max(world.cwd.glob("outputs/*/*/run.json")).parent
    evidence = read_json(folder / "evaluation" / "comparison_report.json")["evidence"]
    held = len(world.jobs) - read_json(folder / "run.json")["rows"]["test"]
    assert evidence["n"] == 2 * held
    assert evidence["n_photographs"] == held
    repeats = evidence["repeats"]
    assert [(one["fold"], one["seed"]) for one in repeats] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert len({one["adapter_hash"] for one in repeats}) == 4
    for one in repeats:
        trained = set(read_json(Path(one["adapter"]) / "manifest.json")["trained_on"])
        assert len(trained) == held - one["n"]
    assert not (world.cwd / "outputs" / "registry").exists()
    assert "train the adapter itself" in done.stdout
    assert "eval.folds" not in done.stdout.rsplit("train the adapter itself", 1)[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eval.folds=3", "data.folds=4"), "data.folds"),
        (("eval.folds=3", "data.folds=3", "data.fold=1"), "eval.folds=3 judges every fold"),
        (("eval.folds=1",), "eval.folds"),
        (("eval.seeds=0",), "eval.seeds"),
        (
            ("eval.seeds=2", "eval.judge_url=http://localhost:1/v1", "eval.judge_model=m"),
            "leave out one of them",
        ),
        (("task=evaluate", "eval.seeds=2"), "train adapters of their own"),
    ],
)
def test_folds_that_contradict(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    """Refused before anything runs; exit 2."""
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr


def test_the_report_says_the_same_as_the_terminal(sample_run: Finished) -> None:
    """The trivial arms stand in the closing table, and the verdict has interval and effect size."""
    for word in ("constant guess", "prompt example", "95 % interval", "effect size"):
        assert word in sample_run.stdout, word
    assert sample_run.report["evidence"]["change"]["score"]["effect_size"] > 0.5
