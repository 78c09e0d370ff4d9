"""What a job finds of the one before it: nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mondrian_ft.sweeping import clean


def test_a_jobs_peak_of_memory_is_its_own() -> None:
    """The log's peak_memory_gb is the most since the run began, and MLX counts since the process
    did: a small job after a large one once had the large one's figure."""
    from mondrian_ft.model.backend import mx

    large = mx.zeros((64, 1024, 1024))
    mx.eval(large)
    assert mx.get_peak_memory() >= 256 << 20
    del large
    with clean.slate([]):
        assert mx.get_peak_memory() < 256 << 20


def test_what_is_printed_to_type_next_is_about_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was stopped once printed the sweep's own words with its adapter's folder behind
    them, which would have trained every job into that folder."""
    from mondrian_ft.pipeline import words

    sweep = ["mondrian-ft", "-m", "--config-dir=mine", "lora.rank=4,8", "model=sample"]
    monkeypatch.setattr(sys, "argv", sweep)
    with clean.slate(["model=sample", "lora.rank=8"]):
        assert words.without("model").endswith(" --config-dir=mine lora.rank=8")
    assert sys.argv == sweep
    with pytest.raises(KeyError), clean.slate([]):
        raise KeyError
    assert sys.argv == sweep


def test_a_presets_job_alone_is_no_sweep() -> None:
    """Typed as it stands, +sweep=seeds would sweep again."""
    assert clean.lone(["+sweep=seeds", "trainer.seed=1"])[-1] == "hydra.mode=RUN"
    assert clean.lone(["trainer.seed=1"]) == ["trainer.seed=1"]


def test_only_a_trial_reports(tmp_path: Path) -> None:
    """A job of a grid has nobody to report to, and is never given up."""
    assert clean.trial(tmp_path) is None
