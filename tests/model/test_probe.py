"""An adapter proves that it is applied as when it was saved, or is refused by name."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageOps
from safetensors.numpy import load_file, save_file

from mondrian_ft.data import prompt
from mondrian_ft.data.pixels import PixelSettings
from mondrian_ft.errors import AdapterError
from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import lora, probe, proof
from mondrian_ft.model.backend import mx, nn

FIRST = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
PACKAGE = Path(adapters.__file__).parents[1]


def saved_adapter(lab: Any, base: Any, folder: Path, **changes: Any) -> Path:
    """An adapter with a proof; the model is its base again."""
    spec = lab.attach(base, **changes)
    inputs = probe_inputs(base, lab.settings)
    adapters.save(
        folder,
        base,
        spec,
        pixels={"min_pixels": 1024, "max_pixels": 16384, "fingerprint": inputs.pixels},
        prompts=[],
        data_lock="d" * 64,
        facts={},
        probe=inputs,
    )
    lora.detach(base.model)
    return folder


@pytest.fixture
def saved(lab, base, tmp_path) -> Path:
    return saved_adapter(lab, base, tmp_path / "adapter")


@pytest.fixture
def own(lab) -> Any:
    """A base that a test may damage."""
    return lab.load()


def edit(folder: Path, change: Callable[[dict], Any], name: str = "manifest.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def reseal(folder: Path) -> None:
    """Make hash and scale agree with the weights, as a careful forger would; not the proof."""
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    about = manifest["lora"]
    about["scale"] = about["alpha"] / about["rank"]
    manifest["hash"] = adapters.identity_hash(weights, about["scale"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def tensors(change: Callable[[dict], Any]) -> Callable[[Path, Any, Any], None]:
    def damage(folder: Path, base: Any, monkeypatch: Any) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors")
        reseal(folder)

    return damage


def manifest(change: Callable[[dict], Any]) -> Callable[[Path, Any, Any], None]:
    return lambda folder, base, monkeypatch: edit(folder, change)


def foreign(found: dict) -> None:
    for name in list(found):
        found[name.replace("model.language_model", "model.text_model")] = found.pop(name)


def wrong_rank(found: dict) -> None:
    """All of rank 2, in themselves a whole adapter."""
    for name, value in found.items():
        found[name] = (value[:2] if "lora_A" in name else value[:, :2]).copy()


def scaled(found: dict, by: float, part: str = "lora_B") -> None:
    for name, value in found.items():
        found[name] = value * np.float32(by if part in name else 1)


def flip(folder: Path, base: Any, monkeypatch: Any) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def stronger(folder: Path, *, scale: bool, hash: bool) -> None:
    """Another alpha in both files; with the stated scale, and with the hash."""
    edit(folder, lambda c: c.update(lora_alpha=64.0), "adapter_config.json")
    edit(folder, lambda m: m["lora"].update(alpha=64.0))
    if scale:
        edit(folder, lambda m: m["lora"].update(scale=16.0))
    if hash:
        reseal(folder)


def library_scales(folder: Path, base: Any, monkeypatch: Any) -> None:
    """mlx-vlm did this in April 2026: alpha before, alpha / rank after."""
    from mondrian_ft.model.lora_layers import LoRALayer

    real = LoRALayer.from_base

    def other(*args: Any, scale: float, r: int, **options: Any) -> Any:
        return real(*args, scale=scale / r, r=r, **options)

    monkeypatch.setattr(LoRALayer, "from_base", other)


def library_multiplies(folder: Path, base: Any, monkeypatch: Any) -> None:
    """The layers state the right scale and apply another: no file and no attribute shows it."""
    from mondrian_ft.model.lora_layers import LoRALayer

    def call(self: Any, x: Any) -> Any:
        return self.linear(x) + self.scale / 8 * ((x @ self.lora_a) @ self.lora_b)

    monkeypatch.setattr(LoRALayer, "__call__", call)


def gelu(folder: Path, base: Any, monkeypatch: Any) -> None:
    """The tower's activation in its exact form instead of the tanh approximation."""
    for block in base.backbone.tower.blocks:
        monkeypatch.setattr(block.mlp, "act_fn", nn.GELU())


def no_exif(folder: Path, base: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: image)


def other_resize(folder: Path, base: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(base.image_processor, "image_mean", [0.5, 0.5, 0.48])


def other_words(folder: Path, base: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(prompt, "CLOSING", "Analyse the image.")


def other_template(folder: Path, base: Any, monkeypatch: Any) -> None:
    tokenizer = base.tokenizer
    changed = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>advisor")
    assert changed != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", changed)


def other_tokenizer(folder: Path, base: Any, monkeypatch: Any) -> None:
    base.tokenizer.add_tokens(["photograph"])


MISMATCHES: dict[str, tuple[Callable[[Path, Any, Any], Any], str]] = {
    "missing tensor": (tensors(lambda t: t.pop(FIRST)), "1 tensors are missing"),
    "extra tensor": (
        tensors(lambda t: t.update({FIRST.replace(".0.", ".9."): t[FIRST].copy()})),
        "1 match nothing in the model",
    ),
    "wrong rank": (tensors(wrong_rank), r"has shape \(128, 2\), the model needs \(128, 4\)"),
    "foreign prefix": (tensors(foreign), "text_model.*belongs to no matrix of the model"),
    "another base": (
        manifest(lambda m: m["base"].update(name="other", weights="0" * 16)),
        r"trained on other \(weights 0{16}\), but the base here is tiny .*set model.path",
    ),
    "another quantisation": (
        manifest(lambda m: m["base"].update(quantization="4 bits, groups of 64")),
        "quantised to 4 bits, groups of 64, here it is none; set model.quantize_bits",
    ),
    "changed weights": (flip, "the weights have hash .* the file was changed or damaged"),
    "scale of one file": (
        lambda folder, *_: edit(folder, lambda c: c.update(lora_alpha=64.0), "adapter_config.json"),
        "adapter_config.json gives an effective scale of 16, the manifest 2",
    ),
    "scale not of its alpha": (
        lambda folder, *_: stronger(folder, scale=False, hash=False),
        r"states an effective scale of 2.0, but LoRA with rank 4 and alpha 64 has 16",
    ),
    "scale edited throughout": (
        lambda folder, *_: stronger(folder, scale=True, hash=False),
        "its weights are those it was saved with, but with an effective scale of 16",
    ),
    "scale rule of the library": (
        library_scales,
        "its layers would multiply by 0.5, but it was trained with an effective scale of 2",
    ),
    "scale applied otherwise": (
        library_multiplies,
        "on the probe's text the logits with the adapter are .* though the base alone agrees",
    ),
    "other pixels": (other_resize, "trained on pixels prepared as .*data.max_pixels=16384"),
    "other upright": (no_exif, "the picture of its proof was"),
    "other prompt": (other_words, "the prompt of its proof was"),
    "other template": (other_template, "the chat template of its proof was"),
    "other tokenizer": (other_tokenizer, "the tokenizer of its proof was"),
    "zero effect": (tensors(lambda t: scaled(t, 0)), "changes nothing"),
    "not finite": (tensors(lambda t: scaled(t, float("nan"))), "logits that are not finite"),
    "another forward": (gelu, "on the probe's picture the base alone, without the adapter, is"),
    "no proof": (manifest(lambda m: m.pop("probe")), "holds no proof .*task=import_adapter"),
    "newer proof": (manifest(lambda m: m["probe"].update(version=9)), "its proof is of version 9"),
    "damaged proof": (
        manifest(lambda m: m["probe"]["inputs"][0].pop("top")),
        "its recorded proof cannot be read",
    ),
}
"""Everything that an adapter, or what is around it, can be other than it was."""


@pytest.mark.parametrize("name", MISMATCHES)
def test_each_mismatch_is_refused_in_its_own_words(lab, own, saved, monkeypatch, name) -> None:
    """One sentence each, which no other mismatch's pattern takes; the model is left clean."""
    damage, pattern = MISMATCHES[name]
    damage(saved, own, monkeypatch)
    with pytest.raises(AdapterError, match=pattern) as caught:
        adapters.load(saved, own, probe=probe_inputs(own, lab.settings))
    told = str(caught.value)
    assert told.startswith(str(saved))
    assert "\n" not in told
    assert lora.lora_layers(own.model) == {}
    others = [one for one, (_, other) in MISMATCHES.items() if re.search(other, told)]
    assert others == [name]


@pytest.mark.parametrize("name", MISMATCHES)
def test_verifying_names_it_among_the_checks_that_hold(lab, own, saved, monkeypatch, name) -> None:
    """`examine` finds what `load` refuses, goes on after it, and leaves the model clean."""
    damage, pattern = MISMATCHES[name]
    damage(saved, own, monkeypatch)
    found = adapters.examine(saved, own, probe_inputs(own, lab.settings))
    assert lora.lora_layers(own.model) == {}
    failed = [check for check in found if not check.holds]
    assert any(re.search(pattern, check.refusal) for check in failed)
    assert all(check.expected != check.found for check in failed)
    assert found[0].holds
    if name in ("another base", "changed weights", "other pixels", "no proof"):
        assert found[-1].name in ("effect", "picture logits"), "the rest was not looked at"


def test_a_careful_forger_is_found_by_the_logits(lab, base, saved) -> None:
    """Scale, config and hash all edited to agree: only what comes out of the model tells."""
    stronger(saved, scale=True, hash=True)
    with pytest.raises(AdapterError, match="the logits with the adapter are"):
        adapters.load(saved, base, probe=probe_inputs(base, lab.settings))


def test_another_adapters_weights_are_found_by_the_logits(lab, base, saved, tmp_path) -> None:
    """A file of the same shapes put in its place, and the hash with it."""
    other = saved_adapter(lab, base, tmp_path / "other", seed=9)
    weights = (other / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(weights)
    reseal(saved)
    with pytest.raises(AdapterError, match="its proof is another adapter's"):
        adapters.load(saved, base, probe=probe_inputs(base, lab.settings))


def test_another_base_and_quantisation_for_real(lab, base, saved, tmp_path) -> None:
    """Both are told, with the logits they give, when everything is checked."""
    for other, name in (
        (lab.load(lab.write_model(tmp_path / "second", seed=2)), "base"),
        (lab.load(quantize_bits=4), "quantisation"),
    ):
        found = adapters.examine(saved, other, probe_inputs(other, lab.settings))
        failed = {check.name for check in found if not check.holds}
        assert failed == {name, "text logits", "picture logits"}


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_sound_adapter_proves_everything(lab, base, tmp_path, method) -> None:
    """Every check holds, with every method; the record has what it says it has."""
    folder = saved_adapter(lab, base, tmp_path / "adapter", method=method)
    inputs = probe_inputs(base, lab.settings)
    checks = adapters.examine(folder, base, inputs)
    assert [check.refusal for check in checks if not check.holds] == []
    assert len({check.name for check in checks}) == len(checks)
    kept = json.loads((folder / "manifest.json").read_text())["probe"]
    assert [one["name"] for one in kept["inputs"]] == ["text", "picture"]
    assert set(kept["digests"]) == {"picture", "prompt", "template", "tokens"}
    assert set(kept["tolerance"]) == {"float32", "bfloat16", "float16"}
    for one in kept["inputs"]:
        assert len(one["top"]) == len(one["tuned"]) == len(one["base"]) == probe.TOP
        assert one["tuned"] == sorted(one["tuned"], reverse=True)
        assert one["effect"] > 0
    assert adapters.load(folder, base, probe=inputs).manifest["probe"] == kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_between_dtypes_the_coarser_tolerance_counts(lab, base, saved, dtype) -> None:
    """Saved in float32 and loaded in 16 bits, and the other way round."""
    other = lab.load(dtype=dtype)
    inputs = probe_inputs(other, lab.settings)
    adapters.load(saved, other, probe=inputs)
    spec = adapters.read(saved).spec
    kept = json.loads((saved / "manifest.json").read_text())
    adapters.save(
        saved, other, spec, pixels=kept["pixels"], prompts=[], data_lock="", facts={}, probe=inputs
    )
    adapters.load(saved, base, probe=probe_inputs(base, lab.settings))
    exact, coarse = (
        probe.tolerance(("float32", "CPU"), (each, "CPU")) for each in ("float32", dtype)
    )
    assert coarse > 100 * exact


def test_a_measure_too_coarse_for_the_effect_says_so(lab, base, tmp_path) -> None:
    """In 16 bits a weak adapter could be missing and nothing would show; that is told."""
    spec = lab.attach(base)
    for layer in lora.lora_layers(base.model).values():
        layer["lora_b"] = layer["lora_b"] * 1e-3
    inputs = probe_inputs(base, lab.settings)
    adapters.save(
        tmp_path / "weak",
        base,
        spec,
        pixels={"fingerprint": inputs.pixels},
        prompts=[],
        data_lock="",
        facts={},
        probe=inputs,
    )
    lora.detach(base.model)
    for dtype, told in (("float32", False), ("bfloat16", True)):
        checks = adapters.examine(tmp_path / "weak", lab.load(dtype=dtype), inputs)
        assert all(check.holds for check in checks)
        assert ("too coarse to see its effect" in checks[-1].found) == told


def test_cuda_float32_is_given_what_its_products_have() -> None:
    """TF32 keeps ten bits of a mantissa, as float16 does."""
    assert probe.tolerance(("float32", "CUDA")) == probe.TOLERANCE["float16"]
    assert probe.tolerance(("float32", "Metal")) == probe.TOLERANCE["float32"]
    assert probe.tolerance(("bfloat16", "CUDA"), ("float32", "CPU")) == probe.TOLERANCE["bfloat16"]


def test_the_inputs_come_through_the_one_way_in(lab, base) -> None:
    """Text alone and a picture that is upright though its file lies on its side; repeatable."""
    first, second = (probe_inputs(base, lab.settings) for _ in range(2))
    assert first.digests == second.digests
    text, picture = first.inputs
    assert text.patches is None
    assert picture.grid is not None
    assert picture.grid[2] > picture.grid[1], "the photograph lies on its side"
    image = (picture.tokens == base.backbone.image_token).sum()
    assert image == picture.grid[1] * picture.grid[2] // base.backbone.merge**2
    assert "Analyze the provided image." in base.text(picture.tokens)
    other = probe_inputs(base, PixelSettings(1024, 8192))
    assert other.pixels != first.pixels
    assert {key for key in other.digests if other.digests[key] != first.digests[key]} == {"picture"}


def test_the_picture_counts(lab, base, saved) -> None:
    """Another picture moves the logits by far more than the tolerance: the model looks at it."""
    adapters.load(saved, base)
    text, picture = probe_inputs(base, lab.settings).inputs
    assert picture.patches is not None
    kept = json.loads((saved / "manifest.json").read_text())["probe"]
    turned = replace(picture, patches=np.ascontiguousarray(picture.patches[::-1]))
    found = probe.compare(kept, probe.run(base, [text, turned]), dtype="float32")
    assert found[0].tuned < found[0].allowed
    assert found[1].tuned > 100 * found[1].allowed
    with pytest.raises(AdapterError, match="cannot be read"):
        probe.compare(kept, probe.run(base, [text]), dtype="float32")


def test_the_probe_leaves_the_model_as_it_was(lab, base) -> None:
    """Mode, layers and weights; and without an adapter there is nothing to probe."""
    inputs = probe_inputs(base, lab.settings).inputs
    with pytest.raises(AdapterError, match="no adapter in the model to probe"):
        probe.run(base, inputs)
    lab.attach(base, dropout=0.5)
    before, layers = lab.weights(base), lora.lora_layers(base.model)
    base.model.train()
    one, two = probe.run(base, inputs), probe.run(base, inputs)
    assert base.model.training
    assert all(np.array_equal(a.tuned, b.tuned) for a, b in zip(one, two, strict=True))
    assert all(layers[name] is now for name, now in lora.lora_layers(base.model).items())
    assert all(np.array_equal(before[name], now) for name, now in lab.weights(base).items())


def test_nothing_is_written_of_an_adapter_without_effect(lab, base, tmp_path) -> None:
    spec = lab.attach(base, live=False)
    inputs = probe_inputs(base, lab.settings)
    with pytest.raises(AdapterError, match="changes nothing"):
        adapters.save(
            tmp_path / "a", base, spec, pixels={}, prompts=[], data_lock="", facts={}, probe=inputs
        )
    assert not (tmp_path / "a").exists()
    layer = next(iter(lora.lora_layers(base.model).values()))
    layer["lora_b"] = mx.full(layer["lora_b"].shape, 1e-4)
    base.model.eval()
    assert not any(one.unchanged for one in probe.run(base, inputs.inputs))


def test_a_missing_directory_is_one_failed_check(lab, base, tmp_path) -> None:
    (only,) = adapters.examine(tmp_path / "none", base, probe_inputs(base, lab.settings))
    assert not only.holds
    assert "no adapter directory" in only.refusal


def test_checks_stop_at_the_first_refusal(tmp_path) -> None:
    """What comes after a refusal is not computed."""

    def checks() -> Iterator[proof.Check]:
        yield proof.Check("a", "1", "1")
        yield proof.Check("b", "1", "2", "it is 2; make it 1")
        raise AssertionError("looked further")

    with pytest.raises(AdapterError, match="it is 2; make it 1"):
        proof.require(tmp_path, checks())


def calls(path: Path) -> Iterator[tuple[str, set[str | None]]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in ("adapters", "adapter"):
                yield node.func.attr, {keyword.arg for keyword in node.keywords}


def test_every_way_into_a_model_asks_for_the_proof() -> None:
    """Whatever of the package saves or loads an adapter gives the probe; reading needs no model."""
    found = [
        (f"{path.relative_to(PACKAGE)}: {name}", keywords)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "model"
        for name, keywords in calls(path)
        if name in ("load", "applied", "save")
    ]
    assert len(found) >= 3
    assert [where for where, keywords in found if "probe" not in keywords] == []
    attached = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if "lora.set_tensors(" in path.read_text(encoding="utf-8")
    ]
    # Foreign tensors and averages are new adapters, which get their proof when they are saved; a
    # checkpoint goes on with its own run, under an identity of its own; a run's moving average and
    # its trial step are tensors of the very run, put back after a look.
    assert attached == [
        "model/adapter.py",
        "model/foreign.py",
        "pipeline/exchange.py",
        "training/average.py",
        "training/checkpoint.py",
        "training/trial.py",
    ]
