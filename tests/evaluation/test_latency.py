"""Seconds per token, arm beside arm on the same photographs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest

from mondrian_ft.evaluation import latency, stats
from mondrian_ft.evaluation.evaluator import Voice
from mondrian_ft.evaluation.outputs import Output
from mondrian_ft.model import lora
from mondrian_ft.model.features import FeatureStore


def test_all_arms_answer_and_the_model_is_as_before(lab, base) -> None:
    """Base, tuned and another adapter; afterwards the tuned one's own layers are in the model."""
    lab.attach(base, seed=3)
    own = lora.lora_layers(base.model)
    others = {"production": Voice(lambda: another(lab, base), "1" * 64)}
    examples = lab.examples(4)
    found = latency.measure(base, FeatureStore(base.backbone), examples, others, photographs=3)
    assert list(found) == ["base", "tuned", "production"]
    assert {len(times) for times in found.values()} == {3}
    assert all(seconds > 0 for times in found.values() for seconds in times)
    after = lora.lora_layers(base.model)
    assert {name: id(layer) for name, layer in after.items()} == {
        name: id(layer) for name, layer in own.items()
    }


@contextmanager
def another(lab: Any, base: Any):
    """Another adapter in place of the one that is there."""
    with lora.without_adapter(base.model):
        lab.attach(base, seed=4, rank=8)
        try:
            yield
        finally:
            lora.detach(base.model)


def test_each_photograph_meets_each_model_in_turn(lab, base, monkeypatch) -> None:
    """Who is in the model when it is timed, in which order, and what is made of the times."""
    lab.attach(base, seed=3)
    own = lora.lora_layers(base.model)
    asked: list[str] = []

    def generate(base: Any, requests: Any, **options: Any) -> list[Output]:
        layers = lora.lora_layers(base.model)
        same = layers and next(iter(layers.values())) is next(iter(own.values()))
        name = "tuned" if same else "production" if layers else "base"
        asked.append(name)
        pace = {"base": 0.1, "tuned": 0.2, "production": 0.4}[name]
        assert options["batch_size"] == 1
        return [Output("", 40, 11, 5.0 + 10 * pace, True, 4.0, 5.0)]

    monkeypatch.setattr(latency, "generate", generate)
    others = {"production": Voice(lambda: another(lab, base), "1" * 64)}
    features = FeatureStore(base.backbone)
    found = latency.measure(base, features, lab.examples(2), others, photographs=9)
    turn = ["base", "tuned", "production"]
    assert asked == [*turn, *turn, *reversed(turn)]
    assert found["tuned"] == pytest.approx([0.2, 0.2]), "the prompt's five seconds do not count"
    assert found["production"] == pytest.approx([0.4, 0.4])


def test_what_cannot_be_timed(lab, base, monkeypatch) -> None:
    """No adapter or no photograph: nothing. A short answer is left out, of every arm."""
    features = FeatureStore(base.backbone)
    assert latency.measure(base, features, lab.examples(2), {}, photographs=2) == {}
    lab.attach(base)
    assert latency.measure(base, features, lab.examples(2), {}, photographs=0) == {}
    tokens = iter([20, 20, 20, 3, 20, 20])

    def generate(*args: object, **options: object) -> list[Output]:
        return [Output("", 40, next(tokens), 3.0, True, 1.0, 1.0)]

    monkeypatch.setattr(latency, "generate", generate)
    found = latency.measure(base, features, lab.examples(2), {}, photographs=2)
    assert [len(times) for times in found.values()] == [1, 1]


def test_the_ratio_is_the_same_from_either_side() -> None:
    """A geometric mean: twice as slow one way is half as slow the other way."""
    ours = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 3.0]
    theirs = [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 3.0]
    found, back = stats.paired_ratio(ours, theirs), stats.paired_ratio(theirs, ours)
    assert found.n == 7
    assert found.ratio == pytest.approx((1 * 1 / 2 * 2 * 2 * 4) ** (1 / 7))
    assert back.ratio == pytest.approx(1 / (found.ratio or 0))
    assert found.interval is not None
    assert found.interval[0] < (found.ratio or 0) < found.interval[1]
    assert stats.paired_ratio([1.1] * 6, [1.0] * 6).interval == pytest.approx((1.1, 1.1))


def test_few_pairs_have_no_interval() -> None:
    """Five say nothing about a sixth, and none are no ratio."""
    assert stats.paired_ratio([1.0] * 5, [1.0] * 5).interval is None
    assert stats.paired_ratio([], []) == stats.Ratio(0, None, None)
