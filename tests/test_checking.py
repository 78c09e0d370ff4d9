"""The preflight of a run, and what is said when memory runs out all the same."""

from __future__ import annotations

from typing import Any

import pytest

from mondrian_ft.errors import TrainingError
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.pipeline import checking, planning
from mondrian_ft.report import memory_screen
from mondrian_ft.schema import Config, LoraConfig, TrainerConfig
from mondrian_ft.training import trial


def config_of(**trainer: Any) -> Config:
    return Config(lora=LoraConfig(rank=4), trainer=TrainerConfig(**trainer))


def test_out_of_memory_names_the_cheapest_change(lab, base) -> None:
    """Promise: whoever runs out of memory is told what to change; other errors stay themselves."""
    spent = RuntimeError("[malloc_or_wait] Unable to allocate 8 bytes.")
    told = checking.out_of_memory(spent, config_of(), base, lab.examples(3), 0)
    assert isinstance(told, TrainingError)
    assert str(told).startswith("update 1 ran out of memory; its peak was predicted at 0.0")
    assert "the least that should help is " in str(told)
    assert any(key in str(told) for key in ("grad_checkpoint=true", "batch_size=1"))
    bug = RuntimeError("[matmul] shapes do not match")
    assert checking.out_of_memory(bug, config_of(), base, lab.examples(3), 0) is None


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        (10**12, "training is predicted to take 0.01 GB at its peak, of 1000.00 GB (here)"),
        (10**3, "and still 0.00 GB with"),
        (None, "does not say how much memory it has"),
    ],
)
def test_whether_it_fits_is_one_sentence(lab, base, monkeypatch, limit, sentence) -> None:
    """Fits, does not whatever is changed, or nobody knows."""
    found = None if limit is None else (limit, "here")
    monkeypatch.setattr(planning, "memory_limit", lambda: found)
    plan = checking.memory_plan(config_of(), base, lab.examples(3))
    assert plan is not None
    assert sentence in memory_screen.sentence(plan)


def test_a_change_that_makes_it_fit_is_named(lab, base, monkeypatch) -> None:
    """Promise: the key to type, and the peak with it."""
    plan = checking.memory_plan(config_of(batch_size=4), base, lab.examples(4))
    assert plan is not None
    total = plan["bytes"]["total"]
    monkeypatch.setattr(planning, "memory_limit", lambda: (int(0.8 * total), "here"))
    plan = checking.memory_plan(config_of(batch_size=4), base, lab.examples(4))
    assert plan is not None
    assert plan["fits"] is False
    assert plan["advice"]["bytes"] <= 0.8 * total
    assert " ".join(plan["advice"]["overrides"]) in memory_screen.sentence(plan)


def test_a_trial_leaves_everything_as_it_was(lab, base) -> None:
    """Adapter, mode and random state; and the loss falls by what the gradient says."""
    lab.attach(base, dropout=0.3)
    base.model.eval()
    mx.random.seed(7)
    before, drawn = lab.weights(base), mx.random.state[0].tolist()  # pyright: ignore
    example = lab.examples(1)[0]
    found = trial.first_step(base, example, FeatureStore(base.backbone))
    assert found.after < found.before
    after = lab.weights(base)
    assert all((before[name] == after[name]).all() for name in before)
    assert mx.random.state[0].tolist() == drawn  # pyright: ignore
    assert not base.model.training


def test_an_adapter_that_the_loss_does_not_reach_is_refused(lab, base) -> None:
    """A matrix cut off from the loss has no gradient, and would be written untrained."""
    lab.attach(base, live=False)
    name, layer = next(iter(lora.lora_layers(base.model).items()))
    layer["lora_a"] = mx.zeros_like(layer["lora_a"])
    with pytest.raises(TrainingError, match=f"no gradient in 1 of the.*{name}"):
        trial.first_step(base, lab.examples(1)[0], FeatureStore(base.backbone))


def test_a_trial_that_runs_out_of_memory_says_so(lab, base, tmp_path, monkeypatch) -> None:
    """The first backward pass of a run is the preflight's: its failure is told the same way."""

    class Quiet:
        class console:
            print = staticmethod(lambda *words, **options: None)

    def spent(*given: Any, **options: Any) -> Any:
        raise RuntimeError("cudaMallocAsync(&p, n) failed: out of memory")

    lab.attach(base)
    monkeypatch.setattr(trial, "first_step", spent)
    run: Any = Quiet()
    with pytest.raises(TrainingError, match="update 1 ran out of memory"):
        checking.adapter(
            config_of(), run, base, lab.examples(2), FeatureStore(base.backbone), tmp_path
        )
