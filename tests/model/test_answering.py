"""An adapter's layers in the forms in which it answers do what mlx-vlm's layers do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import AdapterError
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import answering, lora
from mondrian_ft.model.backend import mx, nn

SHAPES = [
    {"method": "lora"},
    {"method": "rslora", "rank": 3, "targets": ("k_proj", "v_proj", "o_proj", "up_proj")},
    {"method": "dora", "rank": 2},
    {"method": "lora", "layers": (1,), "targets": ("q_proj", "down_proj")},
]


def logits(base: Any) -> np.ndarray:
    from mondrian_ft.model.qwen3_vl import assemble

    tokens = np.arange(40, dtype=np.int32)[None] + 300
    inputs, _ = assemble(
        tokens, [40], [None], [None], image_token=base.backbone.image_token, merge=2
    )
    return np.array(base.backbone.head(base.backbone.hidden(inputs)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_both_forms_give_the_same_logits(lab, shape, bits) -> None:
    """Over matrices as they are, and over quantised ones, which are never added up."""
    base = lab.load(quantize_bits=bits)
    plain = logits(base)
    lab.attach(base, **shape)
    base.model.eval()
    expected = logits(base)
    assert np.abs(expected - plain).max() > 0.1
    layers = lora.take_out(base.model)
    before = {name: value.shape for name, value in _arrays(base)}
    for merge_bytes, kind in ((0, "JoinedLoRA"), (1 << 30, "JoinedLoRA" if bits else "MergedLoRA")):
        quick = answering.for_answering(layers, merge_bytes=merge_bytes)
        assert {type(layer).__name__ for layer in quick.values()} == {kind}
        assert list(quick) == list(layers)
        lora.put_in(base.model, quick)
        np.testing.assert_allclose(logits(base), expected, atol=2e-4)
        # One row at a time goes another way through the products.
        assert set(lora.take_out(base.model)) == set(layers)
        np.testing.assert_array_equal(logits(base), plain)
    # What it was made of is as it was.
    lora.put_in(base.model, layers)
    np.testing.assert_array_equal(logits(base), expected)
    lora.take_out(base.model)
    assert {name: value.shape for name, value in _arrays(base)} == before


def _arrays(base: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(base.model.parameters()))  # pyright: ignore


def test_layers_of_one_input_share_a_product_and_keep_nothing(lab, base) -> None:
    """Three of attention, two of the MLP; the input of a step does not outlive it."""
    lab.attach(base)
    quick = answering.join(lora.take_out(base.model))
    projections = {id(layer._projection): layer._projection for layer in quick.values()}
    assert sorted(one.users for one in projections.values()) == [1, 1, 1, 1, 2, 2, 3, 3]
    lora.put_in(base.model, quick)
    logits(base)
    assert all(one._x is None and one._z is None for one in projections.values())


def test_a_second_adapter_is_not_put_on_top(lab, base) -> None:
    """Its matrices would be those of the first."""
    lab.attach(base)
    layers = lora.take_out(base.model)
    lora.put_in(base.model, layers)
    with pytest.raises(AdapterError, match="already carries"):
        lora.put_in(base.model, layers)


def test_a_form_that_does_something_else_is_refused(lab, base, tmp_path) -> None:
    """The proof is of what answers, not of what was read."""
    from mondrian_ft.evaluation.probing import probe_inputs

    spec = lab.attach(base)
    inputs = probe_inputs(base, lab.settings)
    adapters.save(
        tmp_path,
        base,
        spec,
        pixels={"fingerprint": inputs.pixels},
        prompts=[],
        data_lock="d" * 64,
        facts={},
        probe=inputs,
    )
    lora.detach(base.model)
    adapter = adapters.load(tmp_path, base, probe=inputs)
    quick = answering.join(lora.take_out(base.model))
    lora.put_in(base.model, quick)
    adapters.prove(adapter, base, inputs)
    next(iter(quick.values())).lora_b = mx.zeros_like(next(iter(quick.values())).lora_b)
    with pytest.raises(AdapterError, match="logits"):
        adapters.prove(adapter, base, inputs)


def test_a_bias_is_outside_of_doras_factor(lab, base) -> None:
    """Such a layer keeps mlx-vlm's form."""
    lab.attach(base, method="dora", targets=("o_proj",))
    layers = lora.take_out(base.model)
    name, layer = next(iter(layers.items()))
    biased = nn.Linear(*layer.linear.weight.shape[::-1], bias=True)
    biased.weight = layer.linear.weight
    layer.linear = biased
    assert answering.join(layers)[name] is layer
