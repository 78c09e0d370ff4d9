"""Rows side by side on a CPU: the same numbers however many there are at a time, and no more held
than is said."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate, in_order
from mondrian_ft.model import lanes, lora, lora_layers, machine
from mondrian_ft.model.backend import ON_CPU, mx, nn
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.training import optim
from mondrian_ft.training.loss import device_parts, evaluating, token_losses
from mondrian_ft.training.step import UpdateStep
from mondrian_ft.training.trainer import mean_loss

pytestmark = pytest.mark.skipif(not ON_CPU, reason="a GPU computes a batch as a whole")


def updated(base: Any, examples: list[Any]) -> int:
    """Two updates on the same rows; returns the most memory they took, in bytes."""
    optimizer = optim.build("adamw", lambda done: mx.array(5e-3), weight_decay=0.01)
    optimizer.init(base.model.trainable_parameters())
    step = UpdateStep(base.backbone, optimizer)
    batch = collate(examples, range(len(examples)), base.pad_token)
    parts = device_parts(batch, base.backbone, FeatureStore(base.backbone))
    mx.eval([part[0].features for part in parts])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(2):
        with evaluating(len(parts)):
            done = step([parts], batch.supervised)
            mx.eval(step.arrays(), done.loss, done.applied)
    assert bool(done.applied.item())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_no_number_depends_on_the_cores(lab, base, monkeypatch, method) -> None:
    """A run goes on to the same bytes on a machine with other cores."""
    lab.attach(base, method=method)
    start = lora.tensors(base.model)
    found = []
    for cores in (1, 2, 8):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        assert lanes.count(5) == min(cores, machine.AT_ONCE)
        lora.set_tensors(base.model, start)
        updated(base, lab.examples(5))
        found.append(lab.weights(base))
    for other in found[1:]:
        assert all(np.array_equal(one, other[name]) for name, one in found[0].items())
    assert any(not np.array_equal(np.array(start[name]), one) for name, one in found[0].items())


def test_as_many_rows_are_held_as_there_are_lanes(lab, base, monkeypatch) -> None:
    """A row waits until the one before it in its lane has its gradient: six take no more than the
    lanes' number."""
    lab.attach(base)
    (one,) = lab.examples(1)
    answers = [one.tokens[one.prompt_length :]] * 20
    examples = [replace(one, tokens=np.concatenate([one.tokens, *answers]))] * 6
    peaks = {}
    for rows, cores in ((1, 1), (6, 1), (6, 2), (6, 4)):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        peaks[rows, cores] = updated(base, examples[:rows])
    assert peaks[6, 1] < 1.4 * peaks[1, 1]
    assert 1.4 * peaks[6, 1] < peaks[6, 2] < 2.4 * peaks[6, 1]
    assert 1.4 * peaks[6, 2] < peaks[6, 4]


def test_rows_are_queued_in_turn() -> None:
    """MLX's own width would queue all of one row before the first operation of the next."""
    assert int(os.environ["MLX_BFS_MAX_WIDTH"]) >= 200
    with lanes.lane(0, 1):
        assert mx.default_stream(mx.default_device()) == mx.default_stream(mx.cpu)
    usual = mx.default_stream(mx.cpu)
    used = []
    for number in range(4):
        with lanes.lane(number, 2):
            used.append(mx.default_stream(mx.cpu))
    assert used[0] == used[2] != used[1] == used[3]
    assert usual not in used
    assert mx.default_stream(mx.cpu) == usual


def test_base_and_adapter_added_up_are_the_two_apart(lab, base) -> None:
    """Losses and gradients, which are the adapter's own; and nothing of the sums stays."""
    lab.attach(base)
    examples = lab.examples(3)
    batch = collate(examples, range(3), base.pad_token)
    parts = device_parts(batch, base.backbone, FeatureStore(base.backbone))
    names = list(lora.tensors(base.model))

    def found() -> tuple[Any, dict[str, np.ndarray]]:
        from mlx.utils import tree_flatten

        def loss(_: Any) -> mx.array:
            return sum((token_losses(base.backbone, *part).sum() for part in parts), mx.array(0.0))

        value, grads = nn.value_and_grad(base.model, loss)(base.model)
        flat: Any = tree_flatten(grads)
        return np.array(value), {name: np.array(one) for name, one in flat}

    apart, gradients = found()
    with lora_layers.summed(base.model):
        assert all("_sum" in one for one in lora.lora_layers(base.model).values())
        together, summed = found()
        assert list(lora.tensors(base.model)) == names
    assert not any("_sum" in one for one in lora.lora_layers(base.model).values())
    assert together == pytest.approx(apart, rel=1e-6)
    assert summed.keys() == gradients.keys() == set(names)
    for name, value in gradients.items():
        assert np.abs(value).max() > 0
        assert np.abs(summed[name] - value).max() < 2e-5 * np.abs(value).max(), name


@pytest.mark.parametrize("case", ["dora", "dropout", "too large"])
def test_what_cannot_be_added_up_is_not(lab, base, monkeypatch, case) -> None:
    """DoRA's norms and dropout's masks are no part of one matrix, and memory is bounded."""
    changes = {"dora": {"method": "dora"}, "dropout": {"dropout": 0.1}}.get(case, {})
    if case == "too large":
        monkeypatch.setattr(machine, "SUMMED_BYTES", 1000)
    lab.attach(base, **changes)
    base.model.train()
    with lora_layers.summed(base.model):
        assert not any("_sum" in one for one in lora.lora_layers(base.model).values())


def test_validation_is_the_rows_own(lab, base) -> None:
    """Side by side, added up or not."""
    lab.attach(base)
    base.model.eval()
    examples, store = lab.examples(5), FeatureStore(base.backbone)
    found = mean_loss(base.backbone, in_order(examples, 2, base.pad_token), store)
    losses = [
        token_losses(base.backbone, *part)
        for batch in in_order(examples, 1, base.pad_token)
        for part in device_parts(batch, base.backbone, store)
    ]
    expected = float(np.concatenate([np.array(one) for one in losses]).mean())
    assert found == pytest.approx(expected, rel=1e-5)
