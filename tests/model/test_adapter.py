"""An adapter directory is loaded as what it says it is, or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mondrian_ft.errors import AdapterError
from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import export, layouts, lora
from mondrian_ft.model.backend import mx

FIRST = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"


def save(base: Any, spec: Any, folder: Path, **changes: Any) -> adapters.Adapter:
    values = {
        "pixels": {"min_pixels": 1, "max_pixels": 2, "fingerprint": "f" * 16},
        "prompts": ["p" * 16],
        "data_lock": "d" * 64,
        "facts": {"advisor": "ansel"},
        **changes,
    }
    return adapters.save(folder, base, spec, **values)


def full_logits(lab: Any, base: Any) -> np.ndarray:
    from mondrian_ft.data.batches import collate
    from mondrian_ft.model.features import FeatureStore
    from mondrian_ft.training.loss import device_batch

    base.model.eval()
    batch = collate(lab.examples(2), range(2), base.pad_token)
    inputs, _, _ = device_batch(batch, base.backbone, FeatureStore(base.backbone))
    return np.array(base.backbone.head(base.backbone.hidden(inputs)))


@pytest.fixture
def saved(lab, base, tmp_path) -> Path:
    """An adapter directory; the model is its base again."""
    spec = lab.attach(base)
    save(base, spec, tmp_path / "adapter")
    lora.detach(base.model)
    return tmp_path / "adapter"


def test_a_saved_adapter_comes_back_exactly(lab, base, tmp_path) -> None:
    """Weights, logits, scale and facts."""
    spec = lab.attach(base, method="rslora", dropout=0.1)
    written = save(base, spec, tmp_path / "adapter")
    weights, logits = lab.weights(base), full_logits(lab, base)
    lora.detach(base.model)
    loaded = adapters.load(tmp_path / "adapter", base, pixels="f" * 16)
    assert loaded.hash == written.hash
    assert loaded.spec == spec
    assert loaded.manifest["advisor"] == "ansel"
    assert loaded.manifest["base"]["weights"] == base.identity.weights
    assert all(np.array_equal(weights[name], now) for name, now in lab.weights(base).items())
    assert np.array_equal(logits, full_logits(lab, base))
    assert base.model.training is False


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reseal(folder: Path) -> None:
    """Make the manifest agree with the weights, as a careful forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    manifest["hash"] = adapters.identity_hash(weights, float(manifest["lora"]["scale"]))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    reseal(folder)


def rename_prefix(tensors: dict) -> None:
    for name in list(tensors):
        tensors[name.replace("model.language_model", "model.text_model")] = tensors.pop(name)


def no_effect(tensors: dict) -> None:
    for name, value in tensors.items():
        tensors[name] = value * ("lora_A" in name)


def not_finite(tensors: dict) -> None:
    tensors[FIRST] = tensors[FIRST] * np.float32("nan")


def flip_byte(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    reseal(folder)


def pickled(folder: Path) -> None:
    """What PyTorch writes, renamed; it is never unpickled."""
    import pickle

    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    reseal(folder)


def in_bfloat16(folder: Path) -> None:
    """A type that numpy does not know."""
    path = str(folder / "adapter_model.safetensors")
    found: Any = mx.load(path)
    mx.save_safetensors(path, {name: value.astype(mx.bfloat16) for name, value in found.items()})
    reseal(folder)


def manifest(change: Any) -> Any:
    return lambda folder: edit_json(folder / "manifest.json", change)


def config(change: Any) -> Any:
    return lambda folder: edit_json(folder / "adapter_config.json", change)


def tensors(change: Any) -> Any:
    return lambda folder: edit_tensors(folder, change)


FAULTS: dict[str, tuple[Any, str]] = {
    "foreign prefix": (tensors(rename_prefix), "text_model.*belongs to no matrix of the model"),
    "wrong rank": (
        tensors(lambda t: t.update({FIRST: t[FIRST][:2].copy()})),
        r"layers.0.mlp.down_proj.lora_a has shape \(128, 2\), the model needs \(128, 4\)",
    ),
    "missing tensor": (tensors(lambda t: t.pop(FIRST)), "1 tensors are missing"),
    "extra tensor": (
        tensors(lambda t: t.update({FIRST.replace(".0.", ".9."): t[FIRST].copy()})),
        "1 match nothing in the model, language_model.model.layers.9",
    ),
    "changed byte": (flip_byte, "the weights have hash .* the manifest says"),
    "a pickle": (pickled, r"is damaged \(Error while deserializing"),
    "bfloat16": (in_bfloat16, "tensors of type BF16, where an adapter directory has float32"),
    "float16": (
        tensors(lambda t: t.update({name: v.astype(np.float16) for name, v in t.items()})),
        "holds tensors of type float16",
    ),
    "cut file": (truncate, "adapter_model.safetensors is damaged"),
    "another base": (
        manifest(lambda m: m["base"].update(name="other", weights="0" * 16)),
        "was trained on other .* set model.path",
    ),
    "another quantisation": (
        manifest(lambda m: m["base"].update(quantization="4 bits, groups of 64")),
        "quantised to 4 bits, groups of 64, here it is none",
    ),
    "edited scale": (
        config(lambda c: c.update(lora_alpha=64)),
        "gives an effective scale of 16, the manifest 2",
    ),
    "scale edited in both": (
        lambda folder: (
            edit_json(folder / "adapter_config.json", lambda c: c.update(lora_alpha=64)),
            edit_json(folder / "manifest.json", lambda m: m["lora"].update(alpha=64, scale=16.0)),
        ),
        "its weights are those it was saved with",
    ),
    "rank edited": (config(lambda c: c.update(r=8, lora_alpha=16)), "LoRA with rank 8"),
    "made DoRA": (config(lambda c: c.update(use_dora=True)), "DoRA with rank 4"),
    "rank 0": (manifest(lambda m: m["lora"].update(rank=0)), "rank 0 cannot be made"),
    "unknown method": (
        manifest(lambda m: m["lora"].update(method="loha")),
        "method loha is unknown",
    ),
    "unknown target": (
        manifest(lambda m: m["lora"].update(targets=["qkv"])),
        "names qkv, which matches no matrix",
    ),
    "other pixels": (
        manifest(lambda m: m["pixels"].update(fingerprint="0" * 16)),
        "trained on pixels prepared as 0000000000000000",
    ),
    "no pixels": (manifest(lambda m: m.pop("pixels")), "does not say how the pixels"),
    "zero effect": (tensors(no_effect), "changes nothing"),
    "not finite": (tensors(not_finite), "logits that are not finite"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors",
    ),
    "manifest no JSON": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json is no JSON",
    ),
    "manifest a list": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        "manifest.json is no JSON object",
    ),
    "manifest of other types": (manifest(lambda m: m.update(pixels=1)), "pixels is no object"),
    "manifest incomplete": (manifest(lambda m: m["lora"].pop("rank")), "incomplete manifest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(base, saved, fault) -> None:
    """Each fault has its sentence, and the model is left as clean as it was."""
    damage, sentence = FAULTS[fault]
    damage(saved)
    with pytest.raises(AdapterError, match=sentence) as caught:
        adapters.load(saved, base, pixels="f" * 16)
    assert "\n" not in str(caught.value)
    assert lora.lora_layers(base.model) == {}


def test_the_sentences_tell_the_faults_apart() -> None:
    """No two faults share a sentence."""
    sentences = [sentence for _, sentence in FAULTS.values()]
    assert len(set(sentences)) == len(sentences)


def test_a_missing_folder_is_named(base, tmp_path) -> None:
    with pytest.raises(AdapterError, match=re.escape(f"{tmp_path / 'none'} does not exist")):
        adapters.load(tmp_path / "none", base)


def test_an_adapter_that_changes_nothing_is_not_written(lab, base, tmp_path) -> None:
    """Fresh layers have B = 0; a weak adapter is no such thing."""
    spec = lab.attach(base, live=False)
    with pytest.raises(AdapterError, match="changes nothing"):
        save(base, spec, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    layer = next(iter(lora.lora_layers(base.model).values()))
    layer["lora_b"] = mx.full(layer["lora_b"].shape, 1e-4)
    save(base, spec, tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused(lab, base, saved) -> None:
    """A real one: equal shapes, other weights."""
    folder = lab.write_model(saved.parent / "other", seed=2)
    other = lab.load(folder)
    with pytest.raises(AdapterError, match=r"set model.path to the base it was trained on"):
        adapters.load(saved, other)
    assert lora.lora_layers(other.model) == {}


def test_an_adapter_of_the_quantised_base_is_refused(lab, saved) -> None:
    """A real one: the same folder, quantised to 4 bits after loading."""
    quantised = lab.load(quantize_bits=4)
    with pytest.raises(AdapterError, match="here it is 4 bits, groups of 64"):
        adapters.load(saved, quantised)


@pytest.mark.parametrize("bits", [None, 4])
def test_another_precision_has_to_be_asked_for(lab, base, tmp_path, bits) -> None:
    """An adapter of the quantised base on the floating-point one, and the reverse: refused with the
    key that allows it; allowed, it is told, and everything but the recorded logits is checked."""
    trained, used = (lab.load(quantize_bits=bits), {"quantize_bits": 4 if bits is None else None})
    spec = lab.attach(trained)
    probe = probe_inputs(trained, lab.settings)
    folder = tmp_path / "adapter"
    pixels = {"min_pixels": 1024, "max_pixels": 16384, "fingerprint": probe.pixels}
    adapters.save(
        folder, trained, spec, pixels=pixels, prompts=[], data_lock="d", facts={}, probe=probe
    )
    strict = lab.load(**used)
    with pytest.raises(AdapterError, match=r"here it is .* model.allow_other_precision=true"):
        adapters.load(folder, strict, probe=probe)
    assert lora.lora_layers(strict.model) == {}
    told: list[str] = []
    other = lab.load(**used, other_precision=True, notice=told.append)
    adapters.load(folder, other, probe=probe)
    assert len(told) == 1
    assert "its recorded logits cannot be compared" in told[0]
    lora.detach(other.model)
    checks = {check.name: check for check in adapters.examine(folder, other, probe)}
    assert all(check.holds for check in checks.values())
    assert checks["picture logits"].expected == "not compared in another precision"
    # What does not depend on the precision is refused as ever.
    content = json.loads((folder / adapters.MANIFEST).read_text())
    content["base"]["weights"] = "0" * 16
    (folder / adapters.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=r"set model.path to the base it was trained on"):
        adapters.load(folder, other, probe=probe)
    # On its own base nothing is told, and the logits are compared.
    content["base"]["weights"] = trained.identity.weights
    (folder / adapters.MANIFEST).write_text(json.dumps(content))
    same = lab.load(quantize_bits=bits, other_precision=True, notice=told.append)
    checks = {check.name: check for check in adapters.examine(folder, same, probe)}
    assert checks["picture logits"].expected.startswith("within")
    assert len(told) == 1


def test_equal_training_gives_equal_bytes_with_no_time_or_path(
    lab, base, tmp_path, monkeypatch
) -> None:
    """Same seed, same file, wherever and whenever; another seed, another file."""
    files = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / f"run-{number}"
        spec = lab.attach(base, live=False, dropout=0.2)
        trainer = lab.trainer(base, lab.examples(4), folder, seed=seed, max_steps=2)
        trainer.fit()
        # The manifest tells the time; the weights file has to be free of it.
        save(base, spec, folder / "adapter", facts={"created": number})
        lora.detach(base.model)
        files.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]
    assert str(tmp_path).encode() not in files[0]
    header = json.loads(files[0][8 : 8 + int.from_bytes(files[0][:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == sorted(header)
    assert all(entry["dtype"] == "F32" for entry in header.values())


def test_a_dora_adapter_of_some_layers_comes_back_exactly(lab, base, tmp_path) -> None:
    """Magnitudes travel too, and only the layers named are adapted, there and back."""
    spec = lab.attach(base, method="dora", layers=(1,), targets=("q_proj", "up_proj"))
    for layer in lora.lora_layers(base.model).values():
        layer["m"] = layer["m"] * 1.1
    save(base, spec, tmp_path / "adapter")
    logits, values = full_logits(lab, base), lora.tensors(base.model)
    assert len(values) == 6
    lora.detach(base.model)
    loaded = adapters.load(tmp_path / "adapter", base)
    assert loaded.spec == spec
    assert np.array_equal(logits, full_logits(lab, base))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["use_dora"] is True
    pattern = re.compile(settings["target_modules"])
    assert pattern.fullmatch("model.language_model.layers.1.self_attn.q_proj")
    assert not pattern.fullmatch("model.language_model.layers.0.self_attn.q_proj")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    assert found[f"{prefix}.lora_magnitude_vector"].shape == (64,)


def test_layers_that_the_model_lacks_are_refused(lab, base) -> None:
    """An adapter of a deeper base."""
    with pytest.raises(AdapterError, match="has layer 7, but the model's last is 1"):
        lora.attach(base.model, lab.spec(layers=(0, 7)), seed=0)


def test_the_layout_is_pefts(lab, base, saved) -> None:
    """Names, shapes and config keys that PeftModel.from_pretrained expects."""
    found = load_file(saved / "adapter_model.safetensors")
    assert found[FIRST].shape == (4, 128)
    assert found[FIRST.replace("lora_A", "lora_B")].shape == (64, 4)
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8.0)
    pattern = re.compile(settings["target_modules"])
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in found}
    assert all(pattern.fullmatch(name) for name in names)
    assert not pattern.fullmatch("model.visual.blocks.0.attn.proj")


def test_peft_names_round_trip(lab, base) -> None:
    """Every tensor's name, there and back; foreign ones are refused."""
    lab.attach(base)
    names = list(lora.tensors(base.model))
    assert [layouts.from_peft_name(layouts.to_peft_name(name)) for name in names] == names
    assert len({layouts.to_peft_name(name) for name in names}) == len(names)
    for foreign in (
        "language_model.model.layers.0.mlp.up_proj.lora_a",
        FIRST.replace("lora_A.weight", "lora_magnitude_vector.weight"),
        "base_model.model.model.audio.blocks.0.attn.qkv.lora_A.weight",
    ):
        with pytest.raises(AdapterError, match="belongs to no matrix"):
            layouts.from_peft_name(foreign)


def test_the_mlx_export_gives_equal_logits_in_mlx_vlm(lab, base, saved, tmp_path) -> None:
    """Loaded by mlx-vlm's own loader into a fresh base: the same numbers, bit for bit."""
    from mlx_vlm.trainer.peft.utils import apply_lora_layers

    adapter = adapters.load(saved, base)
    ours = full_logits(lab, base)
    export.export_mlx(adapter, tmp_path / "mlx")
    other = lab.load()
    apply_lora_layers(other.model, tmp_path / "mlx")
    assert lora.lora_layers(other.model).keys() == lora.lora_layers(base.model).keys()
    assert np.array_equal(ours, full_logits(lab, other))


def test_the_peft_export_is_the_two_files(saved, base, tmp_path) -> None:
    """Byte for byte."""
    export.export_peft(adapters.read(saved), tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in (tmp_path / "peft").iterdir():
        assert path.read_bytes() == (saved / path.name).read_bytes()


def test_the_manifest_is_written_last(lab, base, tmp_path, monkeypatch) -> None:
    """A crash between weights and manifest leaves a folder that is refused, not half believed."""
    spec = lab.attach(base)
    save(base, spec, tmp_path / "adapter")
    layer = next(iter(lora.lora_layers(base.model).values()))
    layer["lora_b"] = layer["lora_b"] * 2
    real = adapters.atomic_write_json

    def crash(path: Path, content: Any) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(adapters, "atomic_write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        save(base, spec, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="the weights have hash"):
        adapters.read(tmp_path / "adapter")
