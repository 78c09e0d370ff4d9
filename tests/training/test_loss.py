"""What is trained: the answer and its end, and nothing else."""

from __future__ import annotations

import numpy as np

from mondrian_ft.data.batches import collate
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.training.loss import device_batch, token_losses
from mondrian_ft.training.trainer import mean_loss


def reference(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cross-entropy in float64, position by position."""
    losses = []
    for row, column in zip(*np.nonzero(targets >= 0), strict=True):
        values = logits[row, column].astype(np.float64)
        top = values.max()
        normaliser = top + np.log(np.exp(values - top).sum())
        losses.append(normaliser - values[targets[row, column]])
    return np.array(losses)


def test_loss_equals_a_float64_reference_over_full_logits(lab, base) -> None:
    """The head where it is needed gives what full logits give, to float32's precision."""
    lab.attach(base)
    batch = collate(lab.examples(4), range(4), base.pad_token)
    store = FeatureStore(base.backbone)
    inputs, where, wanted = device_batch(batch, base.backbone, store)
    ours = np.array(token_losses(base.backbone, inputs, where, wanted))
    logits = np.array(base.backbone.head(base.backbone.hidden(inputs)))
    expected = reference(logits, batch.targets)
    assert ours.shape == expected.shape == (batch.supervised,)
    assert np.allclose(ours, expected, atol=2e-5)
    assert np.isclose(mean_loss(base.backbone, iter([batch]), store), expected.mean(), atol=1e-5)


def test_only_the_answer_and_its_end_are_trained(lab, base) -> None:
    """Prompt, picture and padding never; the answer's first token and its end always."""
    batch = collate(lab.examples(5), range(5), base.pad_token)
    _, where, wanted = device_batch(batch, base.backbone, FeatureStore(base.backbone))
    width = batch.tokens.shape[1]
    at, target = np.array(where), np.array(wanted)
    for row, example in enumerate(batch.examples):
        mine = (at >= row * width) & (at < (row + 1) * width)
        answer = base.answer_tokens(example.row.response)
        assert target[mine].tolist() == answer
        assert target[mine][-1] == base.tokenizer.eos_token_id
        # Each is predicted from the token before it, the first from the prompt's last.
        assert (at[mine] - row * width).tolist() == list(
            range(example.prompt_length - 1, len(example.tokens) - 1)
        )
        assert batch.tokens.reshape(-1)[at[mine] + 1].tolist() == answer
    assert base.backbone.image_token not in target
    assert (target == base.pad_token).sum() == 0
    assert batch.supervised == sum(example.supervised for example in batch.examples)


def test_gradients_do_not_reach_what_is_frozen(lab, base) -> None:
    """Only LoRA tensors are trainable; the base is not (resume once unfroze it elsewhere)."""
    from mlx.utils import tree_flatten

    from mondrian_ft.model import lora

    lab.attach(base)
    names = sorted(name for name, _ in tree_flatten(base.model.trainable_parameters()))
    assert names == sorted(lora.tensors(base.model))
