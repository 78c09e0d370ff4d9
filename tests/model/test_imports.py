"""Adapters of other programs are read exactly, or refused with the reason."""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as to_bytes

from mondrian_ft.errors import AdapterError
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import foreign, imports, layouts, lora

Arrays = dict[str, np.ndarray]
PREFIX = "language_model.model.layers."
FIRST = f"{PREFIX}0.mlp.down_proj"
PEFT_FIRST = "base_model.model.model.language_model.layers.0.mlp.down_proj"


@dataclass
class Source:
    """An adapter as another program wrote it: config, tensors, and their file's name."""

    config: dict[str, Any]
    arrays: Arrays
    name: str = adapters.WEIGHTS
    more: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / self.name).write_bytes(to_bytes({k: v.copy() for k, v in self.arrays.items()}))
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        for name, content in self.more.items():
            (folder / name).write_bytes(content)
        return folder


def weights(lab: Any, base: Any, **changes: Any) -> Arrays:
    """Live adapter tensors by our names; the model is its base again."""
    spec = lab.attach(base, **changes)
    if spec.method == "dora":
        for layer in lora.lora_layers(base.model).values():
            layer["m"] = layer["m"] * 1.1
    found = lab.weights(base)
    lora.detach(base.model)
    return found


def renamed(arrays: Arrays, how: Callable[[str], str]) -> Arrays:
    return {how(name): value for name, value in arrays.items()}


def peft(lab: Any, base: Any, **changes: Any) -> Source:
    arrays = weights(lab, base, **changes)
    config = layouts.peft_config(lab.spec(**changes), base="someone/base", tensors=arrays)
    return Source(config, layouts.to_peft(arrays))


def mlx_vlm(lab: Any, base: Any, **changes: Any) -> Source:
    arrays = weights(lab, base, **changes)
    return Source(layouts.mlx_config(lab.spec(**changes), arrays), arrays, "adapters.safetensors")


def mlx_lm(lab: Any, base: Any, **changes: Any) -> Source:
    """The last layer alone, by the names of a language model alone."""
    arrays = weights(lab, base, **{"layers": (1,), **changes})
    config = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {
            "rank": 4,
            "scale": 20.0,
            "dropout": 0.0,
            "keys": sorted({name.split(".", 4)[4].rsplit(".", 1)[0] for name in arrays}),
        },
    }
    names = renamed(arrays, lambda name: name.removeprefix("language_model."))
    return Source(config, names, "adapters.safetensors")


def old(lab: Any, base: Any, **changes: Any) -> Source:
    """As the users' first adapters were."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    arrays = weights(lab, base, **{"targets": targets, **changes})
    names = renamed(arrays, lambda name: name.replace("lora_a", "A").replace("lora_b", "B"))
    return Source({"rank": 4, "alpha": 0.5, "dropout": 0.1}, names, "adapters.safetensors")


def attached(base: Any, read: foreign.Foreign) -> tuple[lora.LoraSpec, Arrays]:
    spec = foreign.attach(base, read)
    found = {name: np.array(value) for name, value in lora.tensors(base.model).items()}
    lora.detach(base.model)
    return spec, found


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("method", lora.METHODS)
def test_peft_directories(lab, base, tmp_path, method) -> None:
    """What we write is PEFT's layout; read as a stranger's it is the same adapter."""
    expected = weights(lab, base, method=method)
    read = imports.read_foreign(peft(lab, base, method=method).write(tmp_path / "in"))
    spec, found = attached(base, read)
    assert read.layout == imports.PEFT
    assert (spec.method, spec.scale) == (method, lab.spec(method=method).scale)
    assert spec.layers is None
    assert same(found, expected)


def test_dora_with_rslora_keeps_its_scale(lab, base, tmp_path) -> None:
    """alpha / √r, told as the alpha that DoRA here divides by r."""
    source = peft(lab, base, method="dora")
    source.config |= {"use_rslora": True, "lora_alpha": 3}
    read = imports.read_foreign(source.write(tmp_path / "in"))
    assert read.spec.method == "dora"
    assert math.isclose(read.spec.scale, 3 / math.sqrt(4), rel_tol=1e-15)
    assert any("same effective scale" in line for line in read.assumed)


def _of_text_only(source: Source) -> None:
    source.arrays = renamed(
        source.arrays, lambda name: name.replace("model.language_model.", "model.", 1)
    )


def _of_older_transformers(source: Source) -> None:
    source.arrays = renamed(
        source.arrays,
        lambda name: name.replace("model.model.language_model.", "model.language_model.model.", 1),
    )


def _with_adapter_names(source: Source) -> None:
    source.arrays = renamed(source.arrays, lambda name: name.replace(".weight", ".default.weight"))


def _as_bfloat16(source: Source) -> None:
    """Halved precision that loses nothing: what is written is read back."""
    for name, value in source.arrays.items():
        source.arrays[name] = (value.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("form", [_of_text_only, _of_older_transformers, _with_adapter_names])
def test_forms_of_pefts_names(lab, base, tmp_path, form) -> None:
    """A language model's alone, those of transformers before 4.52, and a raw state's."""
    expected = weights(lab, base)
    source = peft(lab, base)
    form(source)
    read = imports.read_foreign(source.write(tmp_path / "in"))
    assert same(attached(base, read)[1], expected)
    told = any("a language model's alone" in line for line in read.assumed)
    assert told == (form is _of_text_only)


def test_bfloat16_is_read(lab, base, tmp_path) -> None:
    """NumPy has no such type, and adapters are often saved in it."""
    from mondrian_ft.model.backend import mx

    source = peft(lab, base)
    _as_bfloat16(source)
    folder = source.write(tmp_path / "in")
    mx.save_safetensors(
        str(folder / adapters.WEIGHTS),
        {name: mx.array(value).astype(mx.bfloat16) for name, value in source.arrays.items()},
    )
    read = imports.read_foreign(folder)
    assert same(attached(base, read)[1], layouts.from_peft(source.arrays))


def test_the_base_in_the_file_is_skipped_and_told(lab, base, tmp_path) -> None:
    """Some savers put the adapted matrices beside their adapters."""
    source = peft(lab, base)
    expected = layouts.from_peft(source.arrays)
    source.arrays[f"{PEFT_FIRST}.base_layer.weight"] = np.ones((64, 128), np.float32)
    read = imports.read_foreign(source.write(tmp_path / "in"))
    assert same(attached(base, read)[1], expected)
    assert any("1 matrices of its base lie in the file" in line for line in read.assumed)


def test_unknown_keys_of_peft_are_told(lab, base, tmp_path) -> None:
    """A key of a later version is neither believed nor passed over in silence."""
    source = peft(lab, base)
    source.config |= {"use_newlora": True, "peft_version": "9.9", "eva_config": None}
    read = imports.read_foreign(source.write(tmp_path / "in"))
    told = [line for line in read.assumed if "not known here" in line]
    assert told == ["use_newlora=True in adapter_config.json is not known here and was not used"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_matrices_left_out_get_no_update(lab, base, tmp_path, method) -> None:
    """A pattern may adapt q in one layer and q and v in the other: the rest stays the base's."""
    source = mlx_vlm(lab, base, method=method, targets=("q_proj", "v_proj"))
    dropped = f"{PREFIX}0.self_attn.v_proj"
    source.arrays = {k: v for k, v in source.arrays.items() if not k.startswith(dropped)}
    source.config["lora_parameters"]["keys"].remove(dropped)
    read = imports.read_foreign(source.write(tmp_path / "in"))
    assert any("1 matrices" in line and "update of zero" in line for line in read.assumed)
    foreign.attach(base, read)
    from mondrian_ft.model.backend import mx

    layer = lora.lora_layers(base.model)[dropped]
    x = mx.random.normal((3, 64))
    assert np.allclose(np.array(layer(x)), np.array(layer.linear(x)), atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mlx_vlm(lab, base, tmp_path, method) -> None:
    """As exported for it, and as the weights file alone."""
    source = mlx_vlm(lab, base, method=method)
    folder = source.write(tmp_path / "in")
    for given in (folder, folder / "adapters.safetensors"):
        read = imports.read_foreign(given)
        spec, found = attached(base, read)
        assert (read.layout, spec.method, spec.scale) == (imports.MLX_VLM, method, 2.0)
        assert same(found, source.arrays)


def test_mlx_vlm_itself_writes_what_is_read(lab, tmp_path) -> None:
    """Its own trainer's layers and its own way to save them, both now and earlier."""
    from mlx_vlm.trainer.peft.utils import get_peft_model, save_adapter

    from mondrian_ft.model.backend import mx

    for legacy, rule in ((False, None), (True, "alpha_over_rank")):
        other = lab.load()
        model = get_peft_model(
            other.model, ["q_proj", "down_proj"], rank=4, alpha=6, verbose=False, legacy=legacy
        )
        for name, module in model.named_modules():
            for part in ("lora_b", "B"):
                if part in module and "proj" in name:
                    module[part] = 0.1 * mx.random.normal(module[part].shape)
        model.eval()
        folder = tmp_path / str(legacy)
        folder.mkdir()
        save_adapter(model, folder / "adapters.safetensors")
        expected = text_logits(other)
        read = imports.read_foreign(folder, rule)
        fresh = lab.load()
        before = text_logits(fresh)
        spec = foreign.attach(fresh, read)
        assert spec.scale == 1.5
        assert np.abs(expected - text_logits(fresh)).max() < 1e-5
        assert np.abs(expected - before).max() > 0.01


def text_logits(base: Any) -> np.ndarray:
    from mondrian_ft.model.backend import mx
    from mondrian_ft.model.qwen3_vl import Inputs

    tokens = mx.array([[5, 40, 41, 300]])
    positions = mx.broadcast_to(mx.arange(4, dtype=mx.int32), (3, 1, 4))
    return np.array(base.backbone.head(base.backbone.hidden(Inputs(tokens, positions))))


def test_mlx_lm(lab, base, tmp_path) -> None:
    """The last layers alone, with names that know nothing of a vision tower."""
    source = mlx_lm(lab, base)
    read = imports.read_foreign(source.write(tmp_path / "in"))
    spec, found = attached(base, read)
    assert (read.layout, spec.layers, spec.scale) == (imports.MLX_LM, (1,), 20.0)
    assert same(found, {f"language_model.{name}": v for name, v in source.arrays.items()})


def test_a_scale_comes_back_to_the_last_bit(lab, base, tmp_path) -> None:
    """We keep alpha, mlx keeps scale: dividing what was multiplied must not move it."""
    source = mlx_vlm(lab, base, rank=4)
    for scale in (0.1, 1 / 3, 20.0, 7.3, 1e-3):
        source.config["lora_parameters"]["scale"] = scale
        folder = source.write(tmp_path / str(scale))
        assert imports.read_foreign(folder).spec.scale == scale


@pytest.mark.parametrize(("rule", "scale"), [("alpha", 0.5), ("alpha_over_rank", 0.125)])
def test_old_files_are_told_the_rule(lab, base, tmp_path, rule, scale) -> None:
    """Rank 4 and alpha 0.5 meant one of two things, a factor of four apart."""
    source = old(lab, base)
    spec, found = attached(base, imports.read_foreign(source.write(tmp_path / "in"), rule))
    assert (spec.scale, spec.dropout) == (scale, 0.1)
    names = renamed(source.arrays, lambda n: f"{n[:-1]}lora_{n[-1].lower()}")
    assert same(found, names)


def test_old_files_ask_for_the_rule(lab, base, tmp_path) -> None:
    """With both choices, and the effective scales they give."""
    folder = old(lab, base).write(tmp_path / "in")
    with pytest.raises(AdapterError) as caught:
        imports.read_foreign(folder)
    told = str(caught.value)
    assert "task.scale_rule=alpha multiplies by 0.5" in told
    assert "task.scale_rule=alpha_over_rank by 0.125" in told


@pytest.mark.parametrize("make", [peft, mlx_vlm])
def test_a_rule_where_the_scale_is_stated_is_refused(lab, base, tmp_path, make) -> None:
    """It would be ignored."""
    folder = make(lab, base).write(tmp_path / "in")
    with pytest.raises(AdapterError, match="states the scale itself"):
        imports.read_foreign(folder, "alpha")


# --- what is refused --------------------------------------------------------------------------


def setting(key: str, value: Any) -> Callable[[Source], None]:
    return lambda source: source.config.update({key: value})


def parameter(key: str, value: Any) -> Callable[[Source], None]:
    return lambda source: source.config["lora_parameters"].update({key: value})


def tensor(name: str, value: Any = None) -> Callable[[Source], None]:
    array = np.ones((4, 64), np.float32) if value is None else value
    return lambda source: source.arrays.update({name: array})


def without(name: str) -> Callable[[Source], Any]:
    return lambda source: source.arrays.pop(name)


def all_names(old_part: str, new_part: str) -> Callable[[Source], None]:
    def change(source: Source) -> None:
        source.arrays = renamed(source.arrays, lambda n: n.replace(old_part, new_part))

    return change


def mixed_ranks(source: Source) -> None:
    for part in ("lora_a", "lora_b"):
        value = source.arrays[f"{FIRST}.{part}"]
        source.arrays[f"{FIRST}.{part}"] = value[:, :2] if part == "lora_a" else value[:2]


VISUAL = "base_model.model.model.visual.blocks.0.attn.qkv"
REFUSED: dict[str, tuple[Any, Callable[[Source], Any], str]] = {
    "rank_pattern": (peft, setting("rank_pattern", {"q_proj": 8}), "ranks of their own"),
    "alpha_pattern": (peft, setting("alpha_pattern", {"q_proj": 8}), "strengths of their own"),
    "bias": (peft, setting("bias", "lora_only"), "trained biases"),
    "lora_bias": (peft, setting("lora_bias", True), "a trained bias in its LoRA layers"),
    "modules_to_save": (
        peft,
        setting("modules_to_save", ["lm_head"]),
        "modules that were trained whole",
    ),
    "transposed": (peft, setting("fan_in_fan_out", True), "transposed matrices"),
    "pissa": (peft, setting("init_lora_weights", "pissa_niter_4"), "its first matrices were taken"),
    "not LoRA": (peft, setting("peft_type", "LOHA"), "peft_type LOHA"),
    "no rank": (peft, setting("r", None), "r is None, but it must be a whole number"),
    "alpha a text": (peft, setting("lora_alpha", "16"), "lora_alpha is '16', but it must be a num"),
    "alpha infinite": (peft, setting("lora_alpha", math.inf), "lora_alpha is inf"),
    "a bias tensor": (peft, tensor(f"{PEFT_FIRST}.bias"), "a trained bias"),
    "half of the tower": (peft, tensor(f"{VISUAL}.lora_A.weight"), "has no lora_b; the file is"),
    "another tower": (
        peft,
        tensor("base_model.model.visual.blocks.0.attn.qkv.lora_A.weight"),
        "adapts a vision tower whose names are not Qwen3-VL",
    ),
    "the head": (peft, tensor("base_model.model.lm_head.lora_A.weight"), "adapts lm_head"),
    "an embedding": (
        peft,
        tensor("base_model.model.model.language_model.embed_tokens.lora_embedding_A"),
        "an embedding's adapter",
    ),
    "a whole module": (
        peft,
        tensor("base_model.model.lm_head.modules_to_save.weight"),
        "a whole module",
    ),
    "foreign prefix": (peft, all_names("language_model", "text_model"), "another architecture"),
    "foreign tensor": (peft, tensor("base_model.model.model.norm.weight"), "no LoRA tensor"),
    "no magnitude": (peft, setting("use_dora", True), "has no m; the file is incomplete"),
    "a magnitude too many": (
        peft,
        tensor(f"{PEFT_FIRST}.lora_magnitude_vector", np.ones(64, np.float32)),
        "does not speak of DoRA",
    ),
    "half a pair": (peft, without(f"{PEFT_FIRST}.lora_A.weight"), "down_proj has no lora_a"),
    "wrong rank": (peft, setting("r", 8), "tensors of rank 4, but adapter_config.json speaks of 8"),
    "mixed ranks": (mlx_vlm, mixed_ranks, r"mixes ranks: 2 \(.*down_proj\), 4 \("),
    "two layouts": (mlx_vlm, tensor(f"{FIRST}.A"), "mixes .*names, as no program writes them"),
    "two prefixes": (mlx_vlm, tensor("model.layers.0.mlp.up_proj.lora_a"), "mixes .*names"),
    "full fine-tuning": (mlx_vlm, setting("fine_tune_type", "full"), "fine_tune_type is 'full'"),
    "keys of another": (
        mlx_vlm,
        parameter("keys", [f"{PREFIX}7.mlp.up_proj"]),
        "layers.7.mlp.up_proj, for which adapters.safetensors has no tensors",
    ),
    "keys that lack one": (
        mlx_lm,
        parameter("keys", ["mlp.up_proj"]),
        "does not name .*, for which adapters.safetensors has tensors",
    ),
    "rank 0": (mlx_vlm, parameter("rank", 0), "rank is 0, but it must be 1 or more"),
    "old rank 0": (old, setting("rank", 0), "rank is 0, but it must be 1 or more"),
    "dropout a text": (mlx_vlm, parameter("dropout", "a"), "dropout is 'a', but it must be"),
    "dropout 1": (peft, setting("lora_dropout", 1.0), "a dropout of 1 is out of range"),
    "not finite": (mlx_vlm, lambda s: s.arrays[f"{FIRST}.lora_a"].fill(np.nan), "not finite"),
    "integers": (
        mlx_vlm,
        tensor(f"{FIRST}.lora_a", np.ones((128, 4), np.int32)),
        "is of type I32",
    ),
    "cannot be multiplied": (
        mlx_vlm,
        tensor(f"{FIRST}.lora_a", np.ones((4, 128), np.float32)),
        "cannot be multiplied",
    ),
    "nothing": (mlx_vlm, lambda source: source.arrays.clear(), "holds no LoRA tensors"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_kept_exactly_is_refused(lab, base, tmp_path, fault) -> None:
    """Each by its own sentence; nothing is dropped in silence."""
    make, change, sentence = REFUSED[fault]
    source = make(lab, base)
    change(source)
    with pytest.raises(AdapterError, match=sentence):
        imports.read_foreign(source.write(tmp_path / "in"))


UNFIT: dict[str, tuple[Any, Callable[[Source], Any], str]] = {
    "inputs": (
        mlx_vlm,
        tensor(f"{FIRST}.lora_a", np.ones((96, 4), np.float32)),
        r"down_proj.lora_a has shape \(96, 4\), tiny needs \(128, 4\); set model.path",
    ),
    "layers": (
        peft,
        all_names("layers.1.", "layers.9."),
        r"has language_model.model.layers.9.* no such matrix \(it has 2 layers\)",
    ),
    "matrices": (
        peft,
        all_names("self_attn.q_proj", "attention.wq"),
        "attention.wq, and tiny has no such matrix",
    ),
    "last layers": (
        mlx_lm,
        all_names("layers.1.", "layers.0."),
        "speaks of the last 1 layers, its file of the layers 0, and tiny has 2",
    ),
    "quantisation": (
        mlx_vlm,
        setting("base_quantization", {FIRST: {"bits": 4, "group_size": 64}}),
        "a base quantised to 4 bits, here tiny is quantised to: none",
    ),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_an_adapter_of_another_base_is_refused(lab, base, tmp_path, fault) -> None:
    """The model stays its base."""
    make, change, sentence = UNFIT[fault]
    source = make(lab, base)
    change(source)
    read = imports.read_foreign(source.write(tmp_path / "in"))
    with pytest.raises(AdapterError, match=sentence):
        foreign.attach(base, read)
    assert not lora.lora_layers(base.model)


def test_a_base_that_is_quantised_as_the_adapters_was(lab, tmp_path) -> None:
    """mlx-vlm records its base's quantisation; a fitting one is taken, in unpacked shapes."""
    quantized = lab.load(quantize_bits=4)
    source = mlx_vlm(lab, quantized)
    source.config["base_quantization"] = {FIRST: {"bits": 4, "group_size": 64}}
    read = imports.read_foreign(source.write(tmp_path / "in"))
    assert same(attached(quantized, read)[1], source.arrays)


class Trap:
    """What a pickle may hold: it says so if anybody opens it."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def _zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    return content.getvalue()


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _header_flipped(content: bytes) -> bytes:
    return content[:12] + bytes([content[12] ^ 0x80]) + content[13:]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_truncated, "is no whole safetensors file"),
        (_header_flipped, "is no whole safetensors file"),
        (lambda _: b"", "is no whole safetensors file"),
        (lambda _: b"{}", "is no whole safetensors file"),
        (lambda _: pickle.dumps(Trap()), "is a pickle and not a safetensors file"),
        (lambda _: pickle.dumps(Trap(), protocol=0), "is no whole safetensors file"),
        (lambda _: _zip(), "is a zip archive"),
    ],
)
def test_damaged_and_disguised_files(lab, base, tmp_path, damage, sentence) -> None:
    """Refused unopened: whatever is in a pickle must not run."""
    folder = peft(lab, base).write(tmp_path / "in")
    file = folder / adapters.WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(AdapterError, match=sentence):
        imports.read_foreign(folder)


def test_a_torch_file_is_named_and_not_opened(lab, base, tmp_path) -> None:
    """PEFT before 2024 wrote adapter_model.bin."""
    source = peft(lab, base)
    source.more["adapter_model.bin"] = _zip()
    folder = source.write(tmp_path / "in")
    (folder / adapters.WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, which is a pickle or may hold"):
        imports.read_foreign(folder)


def test_what_is_missing(lab, base, tmp_path) -> None:
    """No folder, no weights, two of them, no config, no JSON."""
    with pytest.raises(AdapterError, match="does not exist"):
        imports.read_foreign(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds no adapter"):
        imports.read_foreign(tmp_path / "empty")
    source = peft(lab, base)
    source.more["adapters.safetensors"] = b""
    folder = source.write(tmp_path / "two")
    with pytest.raises(AdapterError, match="give the one to import"):
        imports.read_foreign(folder)
    for content, sentence in (("{", "is no JSON"), ("[]", "is no JSON object")):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(AdapterError, match=sentence):
            imports.read_foreign(folder / adapters.WEIGHTS)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="nobody can tell the scale"):
        imports.read_foreign(folder / adapters.WEIGHTS)
