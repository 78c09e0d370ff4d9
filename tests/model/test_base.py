"""Loading a base: what it knows of itself, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.errors import ModelError
from mondrian_ft.model import base as bases
from mondrian_ft.model import lora


@pytest.fixture
def folder(lab, tmp_path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(lab.model_dir, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/no-such", "one/two/three"])
def test_a_path_that_is_no_folder(path: str) -> None:
    """What looks like a path never goes to the network."""
    with pytest.raises(ModelError, match="is not a folder; give the folder"):
        bases.load_base(path)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def half_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def lost_tensor(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.language_model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_config, "holds no config.json, so it is no model folder"),
        (no_weights, "holds no .safetensors file; download mine completely"),
        (bad_json, "config.json is no JSON object"),
        (lambda f: edit_config(f, model_type="qwen2_vl"), "mine cannot be loaded from"),
        (lambda f: edit_config(f, model_type=None), "names no model_type"),
        (half_weights, "mine cannot be loaded from"),
        (lost_tensor, "mine cannot be loaded from .*[Mm]issing"),
    ],
    ids=[
        "no config",
        "no weights",
        "bad JSON",
        "another model",
        "no model",
        "half weights",
        "lost tensor",
    ],
)
def test_a_damaged_folder_is_one_sentence(folder, damage, sentence) -> None:
    """Half downloads and other models, before anything is computed."""
    damage(folder)
    with pytest.raises(ModelError, match=sentence) as caught:
        bases.load_base(folder, name="mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-VL-4B-Instruct", "someone/qwen3-vl-v1.5", "mlx-community/x-4bit"]
)
@pytest.mark.parametrize("kind", ["os", "hub", "client"])
def test_a_hub_model_without_a_network(monkeypatch, name, kind) -> None:
    """Whatever the hub's client raises; a name with a dot is a name too (once taken for a path)."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    class ProxyError(Exception):
        """An HTTP client's own, with no common base."""

    error = {
        "os": OSError("Name or service not known"),
        "hub": LocalEntryNotFoundError("cannot reach the hub\nsecond line"),
        "client": ProxyError("proxy refused"),
    }[kind]
    asked = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append(repo)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"could not be downloaded .*model=sample") as caught:
        bases.load_base(name)
    assert asked == [name]
    assert str(error).splitlines()[0] in str(caught.value)
    assert "second line" not in str(caught.value)


def test_a_downloaded_hub_model_is_loaded(monkeypatch, folder) -> None:
    """The hub gives a folder; the name stays the hub's."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    loaded = bases.load_base("Some/Model")
    assert loaded.identity.name == "Some/Model"
    assert loaded.folder == folder


def test_identity_tells_bases_apart_and_not_places(lab, base, folder) -> None:
    """A copy elsewhere is the same base; one changed weight or config is another."""
    same = bases.weights_fingerprint(folder)
    assert same == base.identity.weights
    assert base.identity.quantization == "none"
    assert base.identity.dtype == "float32"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    changed = bases.weights_fingerprint(folder)
    edit_config(folder, extra=1)
    assert len({same, changed, bases.weights_fingerprint(folder)}) == 3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_float_base_is_quantised_on_request(lab, base, bits) -> None:
    """The language model's matrices only; recorded; LoRA goes on top and trains."""
    quantised = lab.load(quantize_bits=bits)
    assert quantised.identity.quantization == f"{bits} bits, groups of 64"
    assert quantised.identity.weights == base.identity.weights
    layer = quantised.backbone.text.layers[0]
    assert layer.self_attn.q_proj.bits == bits
    assert "scales" not in quantised.backbone.tower.blocks[0].attn.qkv
    lab.attach(quantised)
    examples = lab.examples(2)
    from mondrian_ft.data.batches import collate
    from mondrian_ft.model.features import FeatureStore
    from mondrian_ft.training.trainer import mean_loss

    batch = collate(examples, range(2), base.pad_token)
    with lora.without_adapter(quantised.model):
        rough = mean_loss(quantised.backbone, iter([batch]), FeatureStore(quantised.backbone))
    exact = mean_loss(base.backbone, iter([batch]), FeatureStore(base.backbone))
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.3 if bits == 4 else 0.05)


def test_nothing_to_quantise_is_an_error(lab) -> None:
    """It once recorded 4 bits of a model that stayed as it was."""
    from mondrian_ft.model.backend import nn

    class Odd(nn.Module):
        """A model none of whose matrices has a multiple of 64 inputs."""

        def __init__(self) -> None:
            super().__init__()
            self.language_model = nn.Sequential(nn.Linear(96, 64))

    with pytest.raises(ModelError, match="nothing would be quantised"):
        bases._quantize(Odd(), 4, lab.model_dir)


def test_a_stored_quantisation_is_recorded_and_not_redone(lab, folder) -> None:
    """Other bits than the folder's are refused."""
    edit_config(folder, quantization={"bits": 4, "group_size": 64})
    assert bases._quantize(None, None, folder) == "4 bits, groups of 64"
    assert bases._quantize(None, 4, folder) == "4 bits, groups of 64"
    with pytest.raises(ModelError, match=r"quantize_bits=8, but .* is quantised to 4 bits already"):
        bases._quantize(None, 8, folder)


def test_the_base_is_frozen_and_in_evaluation_mode(base) -> None:
    from mlx.utils import tree_flatten

    assert tree_flatten(base.model.trainable_parameters()) == []
    assert base.model.training is False


def test_dtype_is_obeyed(lab) -> None:
    """The weights are what the identity says."""
    from mondrian_ft.model.backend import mx

    half = lab.load(dtype="bfloat16")
    assert half.identity.dtype == "bfloat16"
    assert half.backbone.text.layers[0].mlp.up_proj.weight.dtype == mx.bfloat16


def test_prompt_tokens_are_a_prefix_of_the_whole(lab, base) -> None:
    """Joined, prompt and answer are what the tokenizer makes of the whole text at once."""
    from mondrian_ft.sample.base_model import TURN

    answer = '{"image_description": "Une crête, à l’aube — 8/10."}'
    prompt = base.prompt_tokens("Judge it.\n", 6)
    whole = f"{TURN[0]}Judge it.\n{TURN[1]}{answer}<|im_end|>"
    ids = base.tokenizer.encode(
        whole.replace("<|image_pad|>", "<|image_pad|>" * 6), add_special_tokens=False
    )
    assert [*prompt, *base.answer_tokens(answer)] == ids
    assert prompt.count(base.backbone.image_token) == 6
    assert base.text(base.answer_tokens(answer)) == answer


def test_a_prompt_with_an_image_place_of_its_own_is_refused(base) -> None:
    """Two places for one picture: the second would be text to nobody."""
    with pytest.raises(ModelError, match="makes 2 image places of one picture"):
        base.prompt_tokens("Look: <|image_pad|>", 4)


def test_end_and_pad_tokens(base) -> None:
    """Both of Qwen's ends stop an answer; padding is none of the trained tokens."""
    names = {base.tokenizer.decode([token]) for token in base.end_tokens}
    assert names == {"<|im_end|>", "<|endoftext|>"}
    assert base.tokenizer.decode([base.pad_token]) == "<|endoftext|>"
    assert np.isscalar(base.pad_token)


def test_a_lazy_base_reads_no_weights_and_makes_the_same_tokens(lab, base) -> None:
    """Looking at batches must not wait for gigabytes that nothing computes with."""
    from mlx.utils import tree_flatten

    from mondrian_ft.model.backend import mx

    held: Any = tree_flatten(base.model.parameters())
    weights = sum(value.nbytes for _, value in held)
    before = mx.get_active_memory()
    lazy = lab.load(lazy=True)
    assert mx.get_active_memory() - before < weights / 100
    assert lazy.identity == base.identity
    assert lazy.prompt_tokens("Judge it.", 6) == base.prompt_tokens("Judge it.", 6)
    assert lazy.answer_tokens('{"a": 1}') == base.answer_tokens('{"a": 1}')
    before = mx.get_active_memory()
    mx.eval(lazy.model.parameters())
    assert mx.get_active_memory() - before > weights / 2


def test_texts_have_a_fingerprint_of_their_own(lab, tmp_path) -> None:
    """Kept answers must not outlive the chat template or tokenizer they were asked through, which
    the fingerprint of the weights does not cover."""
    from mondrian_ft.model.base import load_encoder, weights_fingerprint

    folder = Path(shutil.copytree(lab.model_dir, tmp_path / "model"))
    first, weights = load_encoder(folder).fingerprint, weights_fingerprint(folder)
    assert load_encoder(folder).fingerprint == first == lab.base.encoder.fingerprint
    seen = {first}
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            with (folder / name).open("a") as file:
                file.write("\n")
            seen.add(load_encoder(folder).fingerprint)
    assert len(seen) >= 3
    assert weights_fingerprint(folder) == weights
