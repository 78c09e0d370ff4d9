"""LoRA layers: where they go, how they start, and that they come out again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import AdapterError
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx, nn
from mondrian_ft.model.qwen3_vl import Inputs


def logits(base) -> np.ndarray:
    tokens = mx.array([[5, 40, 41, 300]])
    positions = mx.broadcast_to(mx.arange(4, dtype=mx.int32), (3, 1, 4))
    return np.array(base.backbone.head(base.backbone.hidden(Inputs(tokens, positions))))


def test_every_named_matrix_of_every_layer_is_adapted(lab, base) -> None:
    """Seven in each of two layers, none in the tower; B is zero, so nothing changes yet."""
    before = logits(base)
    names = lora.attach(base.model, lab.spec(), seed=0)
    assert len(names) == 14
    assert names[0] == "language_model.model.layers.0.mlp.down_proj"
    assert list(lora.lora_layers(base.model)) == names
    assert all(np.any(v) == name.endswith("lora_a") for name, v in lab.weights(base).items())
    assert np.array_equal(before, logits(base))
    tensors = lora.tensors(base.model)
    assert tensors[f"{names[0]}.lora_a"].shape == (128, 4)
    assert tensors[f"{names[0]}.lora_b"].shape == (4, 64)


def test_a_subset_of_targets(lab, base) -> None:
    """Only what is named."""
    names = lora.attach(base.model, lab.spec(targets=("v_proj",)), seed=0)
    assert [name.rsplit(".", 1)[1] for name in names] == ["v_proj", "v_proj"]


@pytest.mark.parametrize(("method", "scale"), [("lora", 8 / 4), ("rslora", 8 / math.sqrt(4))])
def test_the_effective_scale(lab, base, method, scale) -> None:
    """lora: alpha / r, rslora: alpha / √r; it is what the layers multiply by."""
    spec = lab.attach(base, method=method)
    assert spec.scale == scale
    layer = next(iter(lora.lora_layers(base.model).values()))
    x = mx.random.normal((2, layer["lora_a"].shape[0]))
    expected = layer.linear(x) + scale * ((x @ layer["lora_a"]) @ layer["lora_b"])
    base.model.eval()
    assert np.allclose(np.array(layer(x)), np.array(expected), atol=1e-6)


def test_the_seed_fixes_the_start(lab, base) -> None:
    """Equal seeds, equal A matrices; another seed, others; no two layers alike."""
    found = []
    for seed in (1, 1, 2):
        lora.attach(base.model, lab.spec(), seed=seed)
        found.append(lab.weights(base))
        lora.detach(base.model)
    a = [name for name in found[0] if name.endswith("lora_a")]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in a)
    assert not any(np.array_equal(found[0][name], found[2][name]) for name in a)
    assert len({found[0][name].tobytes() for name in a}) == len(a)


def test_layers_draw_in_the_order_of_their_names(lab, base) -> None:
    """Not in the order modules happen to be stored in, which is no promise of anyone."""
    from mlx_vlm.trainer.peft.lora_layers import LoRALinear

    mx.random.seed(5)
    names = [f"layers.{n}.self_attn.{m}" for n in (0, 1) for m in ("k_proj", "q_proj")]
    expected = []
    for name in names:
        _, layer, _, matrix = name.split(".")
        linear = base.backbone.text.layers[int(layer)].self_attn[matrix]
        expected.append(np.array(LoRALinear.from_base(linear, r=4).lora_a))
    lora.attach(base.model, lab.spec(targets=("q_proj", "k_proj")), seed=5)
    found = [value for name, value in lab.weights(base).items() if name.endswith("lora_a")]
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_unknown_targets_are_refused_with_the_nearest(lab, base) -> None:
    """A target that matches nothing trains nothing; the model stays clean."""
    with pytest.raises(AdapterError, match=r"names q_prj, .* did you mean q_proj\?"):
        lora.attach(base.model, lab.spec(targets=("v_proj", "q_prj")), seed=0)
    with pytest.raises(AdapterError, match="names qkv, which matches no matrix"):
        lora.attach(base.model, lab.spec(targets=("qkv",)), seed=0)
    assert lora.lora_layers(base.model) == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rank": 0}, "rank 0"),
        ({"dropout": 1.0}, "dropout of 1"),
        ({"method": "loha"}, "method loha"),
        ({"layers": (1, 0)}, r"layers \[1, 0\]"),
    ],
)
def test_values_out_of_range_are_refused(lab, change, sentence) -> None:
    """Rank 0 once ended in a division by zero, and an unknown method was taken for lora."""
    with pytest.raises(AdapterError, match=sentence):
        lab.spec(**change)


def test_two_adapters_at_once_are_refused(lab, base) -> None:
    """LoRA on LoRA would train something no file can hold."""
    lab.attach(base)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        lora.attach(base.model, lab.spec(), seed=0)


def test_the_base_comes_back_bit_for_bit(lab, base) -> None:
    """For the length of a block, also when it fails, and for good."""
    before = logits(base)
    lab.attach(base)
    tuned = logits(base)
    assert not np.array_equal(before, tuned)
    with lora.without_adapter(base.model):
        assert np.array_equal(before, logits(base))
    assert np.array_equal(tuned, logits(base))
    with pytest.raises(KeyError), lora.without_adapter(base.model):
        raise KeyError
    assert np.array_equal(tuned, logits(base))
    lora.detach(base.model)
    assert np.array_equal(before, logits(base))
    assert lora.lora_layers(base.model) == {}


def stock(layer, x):
    """What mlx-vlm's own DoRA layer makes of x."""
    from mlx_vlm.trainer.peft.dora_layers import DoRALinear

    return DoRALinear.__call__(layer, x)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_dora_by_heart_equals_mlx_vlms(lab, bits) -> None:
    """In evaluation mode the norms are known beforehand; the numbers are the stock layer's."""
    base = lab.load(quantize_bits=bits)
    lab.attach(base, method="dora")
    for layer in lora.lora_layers(base.model).values():
        layer["m"] = layer["m"] * 1.1
    base.model.eval()
    for layer in lora.lora_layers(base.model).values():
        assert layer._remembered() is not None
        x = mx.random.normal((3, layer["lora_a"].shape[0]))
        expected = np.array(stock(layer, x))
        assert np.allclose(np.array(layer(x)), expected, atol=1e-5 * np.abs(expected).max())


def test_dora_forgets_what_no_longer_holds(lab) -> None:
    """Tensors set, changed in place or trained after the norms were learnt: never the old ones."""
    base = lab.load()
    lab.attach(base, method="dora")
    base.model.eval()
    layer = next(iter(lora.lora_layers(base.model).values()))
    x = mx.random.normal((2, layer["lora_a"].shape[0]))

    def check() -> None:
        assert layer._remembered() is None
        assert np.array_equal(np.array(layer(x)), np.array(stock(layer, x)))
        base.model.eval()
        assert layer._remembered() is not None

    before = np.array(layer(x))
    values = {n: value * 1.5 for n, value in lora.tensors(base.model).items()}
    lora.set_tensors(base.model, values)
    check()
    layer.m *= 2
    check()
    layer.lora_b = layer.lora_b * 2
    check()
    base.model.update({"language_model": {"model": {"norm": {"weight": mx.ones((64,))}}}})
    assert layer._remembered() is not None, "another module's weights are no reason"
    assert not np.allclose(before, np.array(layer(x)))
    base.model.train()
    assert layer._remembered() is not None
    assert np.array_equal(np.array(layer(x)), np.array(stock(layer, x)))
    assert not any("_known" in key for key in lora.tensors(base.model))


def test_dora_has_gradients_in_evaluation_mode(lab, base) -> None:
    """Known norms are constants; whoever differentiates gets the trained magnitudes' gradient."""
    from mondrian_ft.model.backend import nn

    lab.attach(base, method="dora")
    layer = next(iter(lora.lora_layers(base.model).values()))
    x = mx.random.normal((2, layer["lora_a"].shape[0]))
    found = []
    for mode in (True, False):
        layer.train(mode)
        _, gradients = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(x)
        found.append({part: np.array(gradients[part]) for part in ("lora_a", "lora_b", "m")})
    for part, value in found[0].items():
        assert np.abs(value).max() > 0
        assert np.array_equal(value, found[1][part])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_without_an_adapter_the_base_is_exact(lab, base, method) -> None:
    """Whatever the method, and with the norms known: the base's very bits, there and back."""
    before = logits(base)
    lab.attach(base, method=method)
    base.model.eval()
    tuned = logits(base)
    with lora.without_adapter(base.model):
        assert np.array_equal(before, logits(base))
    assert np.array_equal(tuned, logits(base))


def test_layers_sort_by_number() -> None:
    """Layer 2 before layer 10, so that seeds and files do not depend on spelling."""
    names = ["a.10.b", "a.2.b", "a.2.a"]
    assert sorted(names, key=lora._natural) == ["a.2.a", "a.2.b", "a.10.b"]


def test_targets_may_be_regular_expressions(lab, base) -> None:
    """A pattern for whole names; what PEFT is told names just these matrices again."""
    import re

    from mondrian_ft.model import layouts

    wanted = (r".*layers\.0\.self_attn\.[qk]_proj", r".*\.1\.mlp\..*")
    spec = lab.spec(targets=wanted)
    names = lora.attach(base.model, spec, seed=0)
    assert [name.removeprefix("language_model.model.layers.") for name in names] == [
        "0.self_attn.k_proj",
        "0.self_attn.q_proj",
        "1.mlp.down_proj",
        "1.mlp.gate_proj",
        "1.mlp.up_proj",
    ]
    pattern = layouts.peft_config(spec, base="b", tensors=lora.tensors(base.model))
    lora.detach(base.model)
    everywhere = lora.attach(base.model, lab.spec(), seed=0)
    matched = [
        name
        for name in everywhere
        if re.fullmatch(
            pattern["target_modules"],
            name.replace("language_model.model.", "model.language_model.", 1),
        )
    ]
    assert matched == names


def test_a_range_of_layers(lab, base) -> None:
    """As lora.layers gives it."""
    from mondrian_ft.model.targets import parse_layers, ranges

    assert parse_layers(["0-3", "7", "2-4"]) == (0, 1, 2, 3, 4, 7)
    assert ranges((0, 1, 2, 3, 4, 7)) == "0-4, 7"
    names = lora.attach(base.model, lab.spec(layers=parse_layers(["1"])), seed=0)
    assert {lora.layer_number(name) for name in names} == {1}
    lora.detach(base.model)
    with pytest.raises(AdapterError, match="the adapter has layer 2, but the model's last is 1"):
        lora.attach(base.model, lab.spec(layers=(1, 2)), seed=0)


@pytest.mark.parametrize(
    ("targets", "layers", "sentence"),
    [
        ((r".*\.mlp\.q_proj",), None, "in full such as language_model.model.layers.0"),
        (("[",), None, "no regular expression"),
        (
            (r".*layers\.0\..*", "q_proj"),
            (1,),
            r"matches nothing in the layers 1 of lora.layers",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(lab, base, targets, layers, sentence) -> None:
    """The model is left without an adapter."""
    with pytest.raises(AdapterError, match=sentence):
        lora.attach(base.model, lab.spec(targets=targets, layers=layers), seed=0)
    assert lora.lora_layers(base.model) == {}


def test_a_young_adapter_is_not_rounded_away_in_16_bits() -> None:
    """What an adapter adds, where it is a twentieth of the base's last bit: most of its sum is
    there, as it is added before anything is rounded. Added afterwards, nearly all of it is lost."""
    from mondrian_ft.model.lora_layers import LoRALayer, project

    mx.random.seed(0)
    linear = nn.Linear(256, 512, bias=False)
    linear.weight = linear.weight.astype(mx.bfloat16)
    layer = LoRALayer.from_base(linear, r=8, scale=2.0)
    layer.lora_b = mx.full(layer.lora_b.shape, 1e-6)
    layer.lora_a = mx.abs(layer.lora_a)
    x = mx.abs(mx.random.normal((64, 256))).astype(mx.bfloat16)
    exact = (2.0 * (x.astype(mx.float32) @ layer.lora_a) @ layer.lora_b).sum()

    def added(made: mx.array) -> float:
        share: Any = (made.astype(mx.float32) - linear(x).astype(mx.float32)).sum() / exact
        return float(share.item())

    (trained,) = project((layer,), x)
    for made in (layer(x), trained):
        assert 0.8 < added(made) < 1.2
    afterwards = 2.0 * (x @ layer.lora_a.astype(x.dtype)) @ layer.lora_b
    later = linear(x) + afterwards.astype(x.dtype)
    assert added(later) < 0.5
