"""Questions that are asked before the first update."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import Batch, collate
from mondrian_ft.errors import TrainingError
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.training import preflight


def test_sound_rows_pass(lab, base) -> None:
    """The loss with the picture and with an empty one differ."""
    found = preflight.check(base, lab.examples(3), FeatureStore(base.backbone))
    assert found["loss"] != found["loss_blank"]


def changed(example: Any, base: Any, fault: str) -> Any:
    tokens = example.tokens.copy()
    if fault == "start":
        return dataclasses.replace(example, prompt_length=example.prompt_length + 3)
    if fault == "end":
        return dataclasses.replace(example, tokens=tokens[:-1])
    tokens[-4] = base.backbone.image_token if fault == "image" else base.tokenizer.eos_token_id
    return dataclasses.replace(example, tokens=tokens)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("start", "not the start of a JSON object"),
        ("end", "end of the answer is not trained"),
        ("image", r"its answer holds <\|image_pad\|>"),
        ("stop", r"its answer holds <\|im_end\|>"),
    ],
)
def test_wrong_masks_are_refused(lab, base, fault, sentence) -> None:
    """A mask that begins at the wrong place, a lost end, a special token inside an answer."""
    examples = lab.examples(3)
    examples[2] = changed(examples[2], base, fault)
    with pytest.raises(TrainingError, match=sentence) as caught:
        preflight.check(base, examples, FeatureStore(base.backbone))
    assert "row2" in str(caught.value)


def test_blanks_before_the_answer_are_refused(lab, base) -> None:
    """A mask that begins one token early trains a line break first; it was once let through."""
    examples = lab.examples(1)
    early = dataclasses.replace(examples[0], prompt_length=examples[0].prompt_length - 1)
    with pytest.raises(TrainingError, match=r"first trained tokens are '\\n\{") as caught:
        preflight.check(base, [early], FeatureStore(base.backbone))
    assert "has to begin with {" in str(caught.value)


def spoilt(batch: Batch, base: Any, fault: str) -> Batch:
    """A batch whose second row is wrong in its arrays, though its example is sound."""
    tokens, targets = batch.tokens.copy(), batch.targets.copy()
    where = np.flatnonzero(targets[1] >= 0)
    if fault == "trained":
        targets[1] = -1
    elif fault == "gap":
        targets[1, where[5]] = -1
    elif fault == "shifted":
        targets[1, where] = np.roll(targets[1, where], 1)
    elif fault == "end":
        targets[1, where[-1]] = -1
    else:
        tokens[1, batch.examples[1].image_start] = base.pad_token
    return dataclasses.replace(batch, tokens=tokens, targets=targets)


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        ("trained", preflight.Check.trained, "none of its tokens is trained"),
        ("gap", preflight.Check.next, "are not the"),
        ("shifted", preflight.Check.next, "follow each other"),
        ("end", preflight.Check.end, "would not learn to stop"),
        ("image", preflight.Check.image, "but its picture has 8 squares"),
    ],
)
def test_the_arrays_are_what_is_checked(lab, base, fault, check, sentence) -> None:
    """Not the rows they were made of: the loss is taken over the arrays."""
    sound = collate(lab.examples(2), [0, 1], base.pad_token)
    assert preflight.batch_faults(base, sound) == []
    found = preflight.batch_faults(base, spoilt(sound, base, fault))
    assert {fault.row for fault in found} == {1}
    assert found[0].check == check
    assert found[0].sentence.startswith("row row1: ")
    assert sentence in found[0].sentence


def test_a_picture_that_changes_nothing_is_refused(lab, base) -> None:
    """The loss falls without pictures too, which is how nobody notices."""
    example = lab.examples(1)[0]
    store = FeatureStore(base.backbone)
    (features,) = store.get([(example.row.image_sha256, example.pixels)])
    blank = dataclasses.replace(
        features,
        features=features.features * 0,
        deepstack=tuple(level * 0 for level in features.deepstack),
    )
    store._kept[example.row.image_sha256, example.pixels.grid] = blank
    with pytest.raises(TrainingError, match="makes no difference"):
        preflight.check(base, [example], store)


def test_a_base_with_broken_weights_is_refused(lab) -> None:
    """Before the first update rather than at it."""
    base = lab.load()
    norm = base.backbone.text.norm
    norm.weight = norm.weight * float("nan")
    with pytest.raises(TrainingError, match="is nan before any training"):
        preflight.check(base, lab.examples(1), FeatureStore(base.backbone))


def warn(**changes: Any) -> list[str]:
    sound = {
        "total": 100,
        "warmup": 10,
        "peak": 2e-4,
        "save_every": 25,
        "batch_size": 2,
        "rows": 50,
    }
    return preflight.warnings(**{**sound, **changes})


def test_settings_that_are_surely_not_meant_are_named() -> None:
    """Obeyed, with a sentence that holds the figures."""
    assert warn() == []
    (sentence,) = warn(total=80, warmup=100)
    assert "warmup_steps=100" in sentence
    assert "80 updates" in sentence
    assert "1.6e-04" in sentence or "0.00016" in sentence
    (sentence,) = warn(warmup=60)
    assert "most of the run" in sentence
    (sentence,) = warn(save_every=250)
    assert "trainer.save_every=250 never comes" in sentence
    (sentence,) = warn(rows=1)
    assert "trainer.batch_size=2 is more than the 1 training row;" in sentence


def test_too_little_space_is_refused_before_training(tmp_path, monkeypatch) -> None:
    """Three checkpoints of three tensors each, one being written, and the adapter."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, 12_999))
    with pytest.raises(TrainingError, match="GB free, training needs"):
        preflight.check_space(tmp_path / "new", 1000)
    preflight.check_space(tmp_path / "new", 999)


def test_the_checks_leave_the_model_as_it_was(lab, base) -> None:
    """They look; no weight moves."""
    from mlx.utils import tree_flatten

    before = {n: np.array(v) for n, v in tree_flatten(base.model.parameters())}
    preflight.check(base, lab.examples(2), FeatureStore(base.backbone))
    for name, value in tree_flatten(base.model.parameters()):
        assert np.array_equal(before[name], np.array(value)), name
