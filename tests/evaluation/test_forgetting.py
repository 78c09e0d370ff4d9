"""What base and tuned lose on the base's own answers to general questions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mondrian_ft.evaluation import forgetting
from mondrian_ft.evaluation.forgetting import measure
from mondrian_ft.evaluation.generate import Request, generate
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx
from mondrian_ft.model.features import FeatureStore


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is sure of nothing; here whatever it says counts."""
    monkeypatch.setattr(forgetting, "SURE", math.inf)


def store(base: Any) -> FeatureStore:
    return FeatureStore(base.backbone)


@pytest.mark.usefixtures("sure")
def test_an_adapter_that_does_nothing_forgets_nothing(lab, base) -> None:
    """A fresh adapter is its base: the two losses are one number."""
    lab.attach(base, live=False)
    found = measure(base, store(base), lab.examples(5))
    assert found is not None
    assert (found.n, found.asked, found.prompts) == (13, 13, 4)
    assert found.tuned_loss == pytest.approx(found.base_loss, abs=1e-6)


@pytest.mark.usefixtures("sure")
def test_a_stronger_adapter_forgets_more(lab, base) -> None:
    """The base's side stays as it is, the tuned side rises; batches change neither."""
    lab.attach(base)
    examples = lab.examples(5)
    weak = measure(base, store(base), examples)
    for layer in lora.lora_layers(base.model).values():
        layer["lora_b"] = 4 * layer["lora_b"]
    strong = measure(base, store(base), examples)
    apart = measure(base, store(base), examples, batch_size=3)
    assert weak is not None
    assert strong is not None
    assert apart is not None
    assert strong.base_loss == weak.base_loss < weak.tuned_loss < strong.tuned_loss
    assert apart.base_loss == pytest.approx(strong.base_loss, abs=1e-4)
    assert apart.tuned_loss == pytest.approx(strong.tuned_loss, abs=1e-4)
    assert lora.lora_layers(base.model)


@pytest.mark.usefixtures("sure")
def test_the_loss_is_that_of_training(lab, base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token what the trainer would measure on rows with these answers."""
    from dataclasses import replace

    from mondrian_ft.data.batches import collate, encode
    from mondrian_ft.training.loss import device_batch, token_losses

    monkeypatch.setattr(forgetting, "OF_TEXT", ())
    monkeypatch.setattr(forgetting, "FEWEST", 1)
    lab.attach(base)
    examples = lab.examples(2)
    found = measure(base, store(base), examples)
    with lora.without_adapter(base.model):
        questions = forgetting._questions(base, store(base), examples)
        asked = [request for _, request in questions]
        outputs = generate(base, asked, max_tokens=forgetting.LONGEST, batch_size=16)
    prompts = len(forgetting.OF_A_PHOTOGRAPH)
    rows = [
        replace(examples[at // prompts].row, prompt=prompt, response=output.text)
        for at, ((prompt, _), output) in enumerate(zip(questions, outputs, strict=True))
    ]
    image = base.backbone.image_token
    encoded = [encode(row, base, base.image_processor, lab.settings, image) for row in rows]
    cut = [
        one if output.finished else replace(one, tokens=one.tokens[:-1])
        for one, output in zip(encoded, outputs, strict=True)
    ]
    batch = collate(cut, range(len(cut)), base.pad_token)
    losses = token_losses(base.backbone, *device_batch(batch, base.backbone, store(base)))
    assert found is not None
    assert found.tuned_loss == pytest.approx(float(np.array(losses).mean()), abs=1e-4)


def test_what_the_base_only_guesses_is_not_counted(lab, base, monkeypatch) -> None:
    """Answers above the bound are left out of both losses; of too few none is given."""
    lab.attach(base)
    examples = lab.examples(5)
    assert measure(base, store(base), examples) is None
    seen: list[list[float]] = []
    losses = forgetting._losses

    def spy(base: Any, asked: Any, batch_size: int) -> list[float]:
        found = losses(base, asked, batch_size)
        seen.append([loss / len(one.answer) for loss, one in zip(found, asked, strict=True)])
        return found

    monkeypatch.setattr(forgetting, "_losses", spy)
    assert measure(base, store(base), examples) is None
    bound = sorted(seen[0])[4]
    monkeypatch.setattr(forgetting, "SURE", bound)
    found = measure(base, store(base), examples)
    assert found is not None
    assert (found.n, found.asked) == (5, 13)
    assert found.base_loss <= bound
    assert len(seen[-1]) == 5


@pytest.mark.usefixtures("sure")
def test_what_cannot_be_measured_is_none(lab, base) -> None:
    """No adapter, an adapter of no numbers, a model that holds no more: None, and no error."""
    examples = lab.examples(2)
    assert measure(base, store(base), examples) is None
    lab.attach(base)
    assert measure(base, store(base), examples) is not None
    longest = base.backbone.longest
    base.backbone.longest = forgetting.LONGEST
    try:
        assert measure(base, store(base), examples) is None
    finally:
        base.backbone.longest = longest
    layer = next(iter(lora.lora_layers(base.model).values()))
    layer["lora_b"] = mx.full(layer["lora_b"].shape, float("nan"))
    assert measure(base, store(base), examples) is None


def test_a_base_of_no_numbers_is_none(lab) -> None:
    """A damaged base answers nothing that could be forgotten."""
    base = lab.load()
    lab.attach(base)
    norm = base.backbone.text.norm
    norm.weight = mx.full(norm.weight.shape, float("nan"))
    assert measure(base, store(base), lab.examples(2)) is None


def test_a_prompt_alone_is_answered_as_beside_pictures(lab, base) -> None:
    """A request without a picture: alone or in a batch with pictures, one answer."""
    (example,) = lab.examples(1)
    (picture,) = store(base).get([("a", example.pixels)])
    shown = Request(
        base.prompt_tokens("Judge it.", example.pixels.tokens), picture, example.pixels.grid
    )
    text = Request(base.text_prompt_tokens("What is light?"), None, None)
    options: dict[str, Any] = {"max_tokens": 12, "batch_size": 4}
    (alone,) = generate(base, [text], **options)
    together = generate(base, [shown, text, shown], **options)
    assert together[1].text == alone.text
    assert together[0].text == generate(base, [shown], **options)[0].text
