"""An adapter's layers in the forms in which it answers do what mlx-vlm's layers do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import AdapterError
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import answering, lora
from mondrian_ft.model.backend import mx, nn
from mondrian_ft.model.decode import Steps

SHAPES = [
    {"method": "lora"},
    {"method": "rslora", "rank": 3, "targets": ("k_proj", "v_proj", "o_proj", "up_proj")},
    {"method": "dora", "rank": 2},
    {"method": "lora", "layers": (1,), "targets": ("q_proj", "down_proj")},
]


def logits(base: Any, rows: int = 1) -> np.ndarray:
    from mondrian_ft.model.qwen3_vl import assemble

    tokens = np.arange(40, dtype=np.int32)[None] + 300 + np.arange(rows, dtype=np.int32)[:, None]
    none = [None] * rows
    inputs, _ = assemble(
        tokens, [40] * rows, none, none, image_token=base.backbone.image_token, merge=2
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
    """As mlx-vlm's layer has it; alone and mixed, and a row without an adapter has the bias too."""
    lab.attach(base, method="dora", targets=("o_proj",))
    base.model.eval()
    name, layer = next(iter(lora.take_out(base.model).items()))
    biased = nn.Linear(*layer.linear.weight.shape[::-1], bias=True)
    biased.weight = layer.linear.weight
    layer.linear = biased
    x = mx.random.normal((2, 3, biased.weight.shape[1]))
    expected = np.array(layer(x))
    assert np.abs(np.array(biased(x)) - expected).max() > 0.01
    np.testing.assert_allclose(answering.join({name: layer})[name](x), expected, atol=1e-4)
    rows = answering.Rows(1)
    mixed = answering.mix([{name: layer}], rows)[name]
    rows.put([0, 1])
    found = np.array(mixed(x))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_array_equal(found[1], np.array(biased(x))[1])


@pytest.mark.parametrize("bits", [None, 4])
def test_each_row_of_a_mixture_has_its_own_adapter(lab, bits) -> None:
    """Other ranks, methods and matrices in one batch; a row of the base has the base's numbers."""
    base = lab.load(quantize_bits=bits)
    plain = logits(base, 7)
    adapters, expected = [], []
    for seed, shape in enumerate(SHAPES):
        lab.attach(base, seed=seed, **shape)
        base.model.eval()
        expected.append(logits(base, 7))
        adapters.append(lora.take_out(base.model))
    rows = answering.Rows(len(SHAPES))
    lora.put_in(base.model, answering.mix(adapters, rows))
    for which in ([4, 2, 0, 4, 3, 1, 2], [1, 1, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 3]):
        rows.put(which)
        found = logits(base, 7)
        for row, number in enumerate(which):
            if number == len(SHAPES):
                np.testing.assert_array_equal(found[row], plain[row])
            else:
                np.testing.assert_allclose(found[row], expected[number][row], atol=2e-4)
                assert np.abs(found[row] - plain[row]).max() > 0.1
    lora.take_out(base.model)
    np.testing.assert_array_equal(logits(base, 7), plain)


def test_another_adapters_overflow_stays_its_own(lab, base) -> None:
    """Times zero it would be no number, in everybody's rows."""
    layers = []
    for seed in (0, 1):
        lab.attach(base, seed=seed)
        base.model.eval()
        layers.append(lora.take_out(base.model))
    plain = logits(base, 2)
    for layer in layers[1].values():
        layer.lora_a = layer.lora_a * 3e38
    rows = answering.Rows(2)
    lora.put_in(base.model, answering.mix(layers, rows))
    rows.put([2, 1])
    found = logits(base, 2)
    np.testing.assert_array_equal(found[0], plain[0])
    assert not np.isfinite(found[1]).any()


def test_a_compiled_step_sees_whose_the_rows_are_now(lab, base, monkeypatch) -> None:
    """On a GPU steps are compiled; what they look at beside their arguments has to be told."""
    given: list[Any] = []
    monkeypatch.setattr(
        mx, "compile", lambda function, inputs=None: given.append(inputs) or function
    )
    rows = answering.Rows(1)
    Steps(base.backbone, changing=rows.arrays)
    assert sum(one is rows.arrays for one in given) == 2
