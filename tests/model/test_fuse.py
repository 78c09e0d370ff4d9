"""One model from base and adapter: what is written is what was tuned."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mondrian_ft.errors import ModelError
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import agreement, fuse, lora, shards
from mondrian_ft.model.backend import mx
from mondrian_ft.model.base import load_base

from .test_adapter import save


@pytest.fixture(scope="module")
def tuned(lab, tmp_path_factory) -> dict[str, Any]:
    """Adapters of each method by name, and the logits with them."""
    found = {}
    for method in lora.METHODS:
        base = lab.load()
        spec = lab.attach(base, method=method)
        if method == "dora":
            for layer in lora.lora_layers(base.model).values():
                layer["m"] = layer["m"] * 1.1
        written = save(base, spec, tmp_path_factory.mktemp("adapters") / method)
        found[method] = (written, agreement.probe_logits(base))
    return found


def apart(reference: Any, other: Any) -> float:
    return max(d.largest for d in agreement.distances(reference, other).values())


def published(base: Any, adapter: Any, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    spec, tensors = (adapter.spec, adapter.tensors) if adapter else (None, None)
    fuse.write_published(folder, base, spec=spec, tensors=tensors, **options)
    return folder


@pytest.mark.parametrize("method", lora.METHODS)
def test_a_fused_folder_is_base_and_adapter(base, tuned, tmp_path, method) -> None:
    """On a text and a picture; config, tokenizer, processor and template are the base's own."""
    adapter, logits = tuned[method]
    folder = published(base, adapter, tmp_path / "fused")
    assert apart(logits, agreement.probe_logits(load_base(folder))) < 1e-4
    assert apart(logits, agreement.probe_logits(base)) > 0.1
    for path in base.folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "README.md":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert (
        load_file(folder / "model.safetensors").keys()
        == load_file(base.folder / "model.safetensors").keys()
    )


def test_only_adapted_matrices_change(base, tuned, tmp_path) -> None:
    """Everything else is the base's, bit for bit."""
    folder = published(base, tuned["lora"][0], tmp_path / "fused")
    before, after = (load_file(f / "model.safetensors") for f in (base.folder, folder))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    matrices = {name.rsplit(".", 1)[0] for name in tuned["lora"][0].tensors}
    assert changed == {f"{fuse.to_published_name(name)}.weight" for name in matrices}


def test_large_models_are_cut_into_files(base, tuned, tmp_path) -> None:
    """With an index, every tensor in one file, none larger than asked unless it is one tensor."""
    adapter, logits = tuned["lora"]
    folder = published(base, adapter, tmp_path / "fused", largest=100_000)
    index = json.loads((folder / shards.INDEX).read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = {name: load_file(folder / name) for name in files}
    assert {k: n for n, tensors in found.items() for k in tensors} == index["weight_map"]
    total = sum(value.nbytes for tensors in found.values() for value in tensors.values())
    assert index["metadata"]["total_size"] == total
    for tensors in found.values():
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 100_000
    assert apart(logits, agreement.probe_logits(load_base(folder))) < 1e-4
    # And such a folder can be the base of the next export.
    again = published(load_base(folder), None, tmp_path / "again")
    assert apart(logits, agreement.probe_logits(load_base(again))) < 1e-4


def test_weights_are_read_one_at_a_time(base, tuned, tmp_path, monkeypatch) -> None:
    """Never two models in memory: a tensor is read when the one before it is written."""
    happened = []
    load, write = shards._from_bytes, shards._to_bytes
    monkeypatch.setattr(
        shards, "_from_bytes", lambda *args: (happened.append("read"), load(*args))[1]
    )
    monkeypatch.setattr(
        shards, "_to_bytes", lambda array: (happened.append("write"), write(array))[1]
    )
    published(base, tuned["lora"][0], tmp_path / "fused")
    assert happened[:4] == ["read", "write"] * 2
    assert happened == ["read", "write"] * (len(happened) // 2)


def test_half_precision_stays_and_is_merged_in_float32(lab, tuned, tmp_path) -> None:
    """Rounded once, after the sum: summed in bfloat16 an update would be rounded away."""
    base = load_base(lab.halve(lab.write_model(tmp_path / "half", seed=1)))
    adapter = tuned["lora"][0]
    folder = published(base, adapter, tmp_path / "fused")
    entries = {entry.name: entry for entry in shards.read_entries(folder)}
    assert {entry.dtype for entry in entries.values()} == {"BF16"}
    name = "language_model.model.layers.0.mlp.down_proj"
    stored = {e.name: e for e in shards.read_entries(base.folder)}
    key = f"{fuse.to_published_name(name)}.weight"
    a, b = (np.array(adapter.tensors[f"{name}.{part}"]) for part in ("lora_a", "lora_b"))
    whole = np.array(stored[key].load().astype(mx.float32)) + adapter.spec.scale * (a @ b).T
    expected = mx.array(whole).astype(mx.bfloat16)
    same = mx.mean((entries[key].load() == expected).astype(mx.float32))
    assert float(np.array(same)) > 0.999, "but for sums that lie on the edge between two roundings"


def test_ties_are_written_where_both_read_them(lab, tmp_path) -> None:
    """transformers reads the top-level flag, mlx-vlm the text model's."""
    folder = lab.write_model(tmp_path / "untied", seed=3, tie_word_embeddings=False)
    base = lab.load(folder)
    made = published(base, None, tmp_path / "fused")
    config = json.loads((made / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (
        False,
        False,
    )
    assert "lm_head.weight" in load_file(made / "model.safetensors")
    assert apart(agreement.probe_logits(base), agreement.probe_logits(load_base(made))) == 0


def test_a_tied_models_head_is_dropped(lab, tmp_path) -> None:
    """Some folders hold the embedding twice; transformers would warn of the second."""
    folder = lab.write_model(tmp_path / "twice", seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"] * 0
    from safetensors.numpy import save_file

    save_file(weights, folder / "model.safetensors")
    base = lab.load()
    base.folder = folder
    assert "lm_head.weight" not in load_file(
        published(base, None, tmp_path / "out") / "model.safetensors"
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fusing_with_a_quantised_base_uses_what_was_trained_on(lab, tmp_path, method) -> None:
    """The dequantised weights, or the adapter would be put onto others than it learnt with."""
    base = lab.load(quantize_bits=4)
    spec = lab.attach(base, method=method)
    adapter = save(base, spec, tmp_path / "adapter")
    logits = agreement.probe_logits(base)
    lora.detach(base.model)
    folder = published(base, adapter, tmp_path / "fused")
    fused = load_base(folder)
    assert fused.identity.quantization == "none"
    assert apart(logits, agreement.probe_logits(fused)) < 1e-4


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4])
def test_quantised_for_mlx_vlm(lab, tuned, tmp_path, method, bits) -> None:
    """Read back it is the very model that was measured; the errors are of its own weights."""
    adapter, _ = tuned[method]
    base = lab.load(quantize_bits=bits)
    errors = fuse.quantize_merged(base, adapter.spec, adapter.tensors)
    assert len(errors) == 14
    assert all(0.01 < value["weight"] < 0.2 < value["update"] for value in errors.values())
    measured = agreement.probe_logits(base)
    folder = tmp_path / "q4"
    folder.mkdir()
    fuse.write_quantized(folder, base)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    read = load_base(folder)
    assert read.identity.quantization == "4 bits, groups of 64"
    assert apart(measured, agreement.probe_logits(read)) == 0
    # And back into the published layout, dequantised: names, the patch kernel, the config.
    whole = published(read, None, tmp_path / "whole")
    assert "quantization" not in json.loads((whole / "config.json").read_text())
    assert apart(measured, agreement.probe_logits(load_base(whole))) < 1e-4


def test_the_error_of_a_matrix_is_what_it_says(lab, tuned) -> None:
    """Against NumPy: of the quantised sum, over the sum and over the update."""
    adapter, _ = tuned["lora"]
    base = lab.load()
    name = "language_model.model.layers.1.self_attn.v_proj"
    weight = np.array(base.backbone.text.layers[1].self_attn.v_proj.weight)
    a, b = (np.array(adapter.tensors[f"{name}.{part}"]) for part in ("lora_a", "lora_b"))
    update = adapter.spec.scale * (a @ b).T
    errors = fuse.quantize_merged(base, adapter.spec, adapter.tensors)[name]
    layer = base.backbone.text.layers[1].self_attn.v_proj
    back = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4)
    off = np.linalg.norm(np.array(back) - weight - update)
    assert np.isclose(errors["weight"], off / np.linalg.norm(weight + update), rtol=1e-4)
    assert np.isclose(errors["update"], off / np.linalg.norm(update), rtol=1e-3)


def test_a_model_that_no_group_divides(lab) -> None:
    """Nothing would be quantised, and the folder would only be called so."""
    base = lab.load()
    for _, module in base.model.language_model.named_modules():
        if "weight" in module and module.weight.ndim == 2:
            module.weight = mx.zeros((module.weight.shape[0], 65))
    with pytest.raises(ModelError, match="nothing would be quantised"):
        fuse.quantize_merged(base, None, {})


def test_a_matrix_that_the_files_lack(base, tuned, tmp_path) -> None:
    """An adapter is never merged in part."""
    adapter = tuned["lora"][0]
    tensors = dict(adapter.tensors)
    tensors["language_model.model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((1, 1))
    with pytest.raises(ModelError, match=r"no weights of language_model\.model\.layers\.9"):
        fuse.write_published(tmp_path, base, spec=adapter.spec, tensors=tensors)


def test_damaged_base_files(tmp_path) -> None:
    """Told as what they are."""
    (tmp_path / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"{nope")
    with pytest.raises(ModelError, match="is damaged"):
        shards.read_entries(tmp_path)


def test_a_full_disk_is_an_os_error(base, tmp_path, monkeypatch) -> None:
    """Which whoever made the folder turns into a sentence, and removes what was begun."""

    def full(_: Any) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_to_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        fuse.write_published(tmp_path, base)


def test_effect_share() -> None:
    """0 is the tuned model, 1 is as far off as the base; a shift of all logits is no difference."""
    noise = np.random.default_rng(0)
    base = {"text": noise.normal(size=(5, 50)), "image": noise.normal(size=(9, 50))}
    tuned = {name: value + noise.normal(size=value.shape) for name, value in base.items()}
    half = {name: (value + base[name]) / 2 for name, value in tuned.items()}
    shifted = {name: value + 3.0 for name, value in tuned.items()}
    assert agreement.effect_share(base, tuned, tuned) == 0
    assert np.isclose(agreement.effect_share(base, tuned, base), 1)
    assert np.isclose(agreement.effect_share(base, tuned, half), 0.5)
    assert agreement.effect_share(base, tuned, shifted) < 1e-12
    assert agreement.effect_share(base, base, tuned) == float("inf")
    broken = {**tuned, "text": np.full((5, 50), np.nan)}
    assert agreement.distances(tuned, broken)["text"].largest == float("inf")


def test_adapter_files_beside_a_model_stay_behind(lab, tmp_path) -> None:
    """A stray adapter in the base's folder is no part of the exported model."""
    folder = lab.write_model(tmp_path / "base", seed=1)
    (folder / adapters.CONFIG).write_text("{}")
    made = published(load_base(folder), None, tmp_path / "out")
    assert not (made / adapters.CONFIG).exists()
