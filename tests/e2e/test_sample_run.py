"""The main job on the embedded sample: the figures it promises, and the files it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mondrian_ft.files import sha256_file

from .conftest import Finished, finished, read_json, succeed


def check_figures(run: Finished) -> None:
    """What the main job promises of the sample, whatever its seed.

    At least 16 photographs are compared; the tuned model keeps the format in 95 % of its answers,
    errs at most 0.6 times as much as the base and 0.8 times as much as the best constant, and at
    least a quarter more where it is shown another photograph.
    """
    evidence = run.report["evidence"]
    arms = evidence["arms"]
    tuned, base = arms["tuned"], arms["base"]
    assert evidence["n_photographs"] >= 16
    assert tuned["format_strict"] >= 0.95
    assert tuned["score_mae"] <= 0.6 * base["score_mae"]
    assert tuned["score_mae"] <= 0.8 * arms["mean_score"]["score_mae"]
    assert tuned["score_mae_shuffled"] >= 1.25 * tuned["score_mae"]
    assert evidence["verdict"] == "better"
    # The base is a fair opponent: it keeps the format, and its scores are not absurd.
    assert base["format_strict"] >= 0.8
    assert base["score_mae"] <= 1.8 * arms["mean_score"]["score_mae"]


def check_unseen(run: Finished) -> None:
    """No photograph that is compared took part in training or in choosing the checkpoint."""
    seen = {part: {row["image_sha256"] for row in run.rows(part)} for part in ("train", "val")}
    compared = [sample["image_path"] for sample in run.report["sample_results"]]
    assert compared == [row["image_path"] for row in run.rows("test")]
    for path in compared:
        content = sha256_file(path)
        assert content not in seen["train"]
        assert content not in seen["val"]
    trained_on = set(read_json(run.adapter / "manifest.json")["trained_on"])
    assert trained_on == seen["train"]


def test_figures(sample_run: Finished) -> None:
    """Fine-tuning helps, measurably, on photographs that neither model has seen."""
    check_figures(sample_run)
    check_unseen(sample_run)


def test_every_row_is_trained(sample_run: Finished) -> None:
    """All training rows are seen, and the adapter is the best checkpoint by validation loss."""
    training = sample_run.facts["training"]
    assert training["rows_seen"] == training["rows"] == len(sample_run.rows("train"))
    lines = (sample_run.folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    steps = [one for one in log if one["kind"] == "step"]
    evals = {one["step"]: one["val_loss"] for one in log if one["kind"] == "eval"}
    assert [one["step"] for one in steps] == list(range(1, training["updates"] + 1))
    assert training["kept_update"] == min(evals, key=lambda step: evals[step])
    assert training["val_loss"] == min(evals.values())
    for key in ("epoch", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb"):
        assert all(key in one for one in steps)


def test_run_folder(sample_run: Finished) -> None:
    """The run folder holds what interface.md says, and what it takes to repeat the run."""
    files = {path.relative_to(sample_run.folder).as_posix() for path in _files(sample_run.folder)}
    assert {
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "run.json",
        "training_log.jsonl",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/manifest.json",
        "adapter/training_args.json",
        "adapter/training_log.jsonl",
        "adapter/README.md",
        "adapter/evaluation/comparison_report.json",
        "adapter/evaluation/report.html",
        "evaluation/comparison_report.json",
        "evaluation/report.html",
        "data/training_data_manifest.json",
        "data/link_report.json",
        "data/split.lock.json",
        *(f"data/training_data_ansel_{part}.json" for part in ("train", "val", "test", "meta")),
    } <= files
    assert not [name for name in files if ".tmp-" in name or name.endswith("traceback.txt")]
    report = read_json(sample_run.folder / "data" / "link_report.json")
    assert report["linked"] + len(report["left_out"]) == report["rows"]
    assert report["linked"] >= 104
    weights = [path for path in _files(sample_run.adapter / "checkpoints") if "model" in path.name]
    assert weights == []


def test_run_json(sample_run: Finished) -> None:
    """run.json tells what ran, on what, with which versions, and how it ended."""
    facts = sample_run.facts
    assert facts["status"] == "done"
    assert facts["task"] == "experiment"
    assert facts["warnings"] == []
    assert re.fullmatch(r"[0-9a-f]{64}", facts["config_hash"])
    assert facts["config"]["optimizer"]["learning_rate"] == 0.005
    assert facts["seconds"] > 0
    manifest = read_json(sample_run.adapter / "manifest.json")
    assert facts["adapter"]["hash"] == manifest["hash"]
    assert facts["data_lock"] == manifest["data_lock"]
    assert facts["config_hash"] == manifest["config_hash"]
    assert facts["base"] == manifest["base"]
    assert facts["evaluation"]["verdict"] == "better"
    assert facts["registered"] == {"name": "sample-ansel", "version": "v1"}
    assert facts["provenance"]["versions"]["mlx"] is not None
    assert sample_run.report["evidence"]["adapter_hash"] == manifest["hash"]


def test_wandb_offline(sample_run: Finished) -> None:
    """W&B got the numbers too, on disk, and nobody was asked for a key."""
    assert list((sample_run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert sample_run.stderr == ""


def test_closing_screen(sample_run: Finished) -> None:
    """The last lines give the verdict, the figures, the paths, and commands that can be typed."""
    shown = sample_run.stdout
    arms = sample_run.report["evidence"]["arms"]
    assert "Fine-tuning helped." in shown
    for arm in ("base", "tuned"):
        assert f"{arms[arm]['score_mae']:.2f}" in shown
    assert f"adapter  {sample_run.adapter.relative_to(sample_run.cwd)}\n" in shown
    assert f"report   {(sample_run.folder / 'report.html').relative_to(sample_run.cwd)}\n" in shown
    assert re.search(r"\n  \S+ -m mondrian_ft task=export ", shown)


def test_versions(sample_run: Finished) -> None:
    """The registry has the adapter, and lists it as JSON and nothing else."""
    done = succeed("task=versions", "task.format=json", "tracking=none", cwd=sample_run.cwd)
    (version,) = json.loads(done.stdout)
    assert version["version"] == "v1"
    assert version["hash"] == sample_run.facts["adapter"]["hash"]


def test_evaluating_a_registered_version_leaves_it_as_it_is(sample_run: Finished) -> None:
    """A version is its bytes: a later evaluation of it once replaced its report and its card."""
    version = sample_run.cwd / "outputs" / "registry" / "sample-ansel" / "v1"
    before = {path: path.read_bytes() for path in _files(version)}
    done = succeed(
        "task=evaluate",
        "task.adapter=v1",
        f"data.output_dir={sample_run.folder / 'data'}",
        "eval.max_examples=2",
        "eval.arms=[tuned]",
        "eval.max_tokens=20",
        "tracking=none",
        cwd=sample_run.cwd,
    )
    assert {path: path.read_bytes() for path in _files(version)} == before
    assert "report.html" in done.stdout


@pytest.mark.full
def test_same_seed_same_bytes(
    sample_run: Finished, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Run again, in another folder, the job gives the same adapter, byte for byte."""
    again = finished(tmp_path_factory.mktemp("again"), "tracking=none")
    weights = "adapter_model.safetensors"
    assert (again.adapter / weights).read_bytes() == (sample_run.adapter / weights).read_bytes()
    assert again.facts["data_lock"] == sample_run.facts["data_lock"]
    assert again.facts["config_hash"] == sample_run.facts["config_hash"]


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The figures are no luck of one seed: they hold on three other sets of photographs."""
    run = finished(tmp_path_factory.mktemp(f"seed{seed}"), f"data.seed={seed}", "tracking=none")
    check_figures(run)
    check_unseen(run)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
