"""Ours, transformers', PEFT's and the fused model give the same logits, on texts and pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import foreign, fuse, imports, layouts, lora

from .reference import (
    Rows,
    assert_agree,
    assert_differ,
    load_reference,
    ours,
    theirs,
    torch_inputs,
)

METHODS = ("lora", "rslora", "dora")
VISION = ("qkv", "proj", "linear_fc1", "linear_fc2")


def reference_logits(base: Any, model: Any, rows: Rows) -> list[np.ndarray]:
    return theirs(model, rows, image_token=base.backbone.image_token, pad=base.pad_token)


def saved(lab: Any, base: Any, folder: Path, **changes: Any) -> Path:
    """An adapter directory with live weights; the model is its base again."""
    spec = lab.attach(base, **changes)
    if spec.method == "dora":
        # Magnitudes that training has moved: at their start they would hide a missing one.
        for layer in lora.lora_layers(base.model).values():
            layer["m"] = layer["m"] * 1.1 + 0.05
    adapters.save(
        folder,
        base,
        spec,
        pixels={"min_pixels": 1024, "max_pixels": 16384, "fingerprint": "f" * 16},
        prompts=[],
        data_lock="d" * 64,
        facts={},
    )
    lora.detach(base.model)
    return folder


def with_adapter(base: Any, folder: Path, rows: Rows) -> list[np.ndarray]:
    with adapters.applied(folder, base):
        return ours(base, rows)


def test_the_base_is_transformers_base(base: Any, rows: Rows) -> None:
    """Text, pictures of several sizes, and all of them in one padded batch."""
    found = reference_logits(base, load_reference(base.folder), rows)
    assert_agree(ours(base, rows), found)
    assert np.abs(np.concatenate(found)).max() > 3, "a scale on which the tolerance means something"


def test_a_gelu_variant_is_noticed(base: Any, rows: Rows, tmp_path: Path) -> None:
    """The smallest wrong thing there is: erf instead of tanh in the tower's activation.

    Every next token stays the same, so only the differences can tell.
    """
    planted = tmp_path / "planted"
    shutil.copytree(base.folder, planted)
    config = json.loads((planted / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == "gelu_pytorch_tanh"
    config["vision_config"]["hidden_act"] = "gelu"
    (planted / "config.json").write_text(json.dumps(config))
    other = reference_logits(base, load_reference(planted), rows)
    mine = ours(base, rows)
    with pytest.raises(AssertionError, match="logits differ by up to"):
        assert_agree(mine, other)


@pytest.mark.parametrize("vision", [(), VISION])
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_our_directory_untouched(
    lab: Any, base: Any, rows: Rows, tmp_path: Path, method: str, vision: tuple[str, ...]
) -> None:
    """Every tensor under a key that PEFT asks for (others only warn), and the same numbers."""
    from peft import PeftModel, get_peft_model_state_dict  # pyright: ignore[reportMissingImports]

    folder = saved(lab, base, tmp_path / "adapter", method=method, vision=vision)
    reference = load_reference(base.folder)
    untouched = reference_logits(base, reference, rows)
    tuned = PeftModel.from_pretrained(reference, folder)
    stored = load_file(folder / adapters.WEIGHTS)
    asked: dict[str, Any] = get_peft_model_state_dict(tuned)
    assert stored.keys() == asked.keys()
    assert all(np.array_equal(stored[name], asked[name].numpy()) for name in stored)
    found = reference_logits(base, tuned, rows)
    assert_differ(untouched, found)
    assert_agree(with_adapter(base, folder, rows), found)


@pytest.mark.parametrize("vision", [(), VISION])
@pytest.mark.parametrize("method", METHODS)
def test_the_fused_folder_is_base_and_adapter(
    lab: Any, base: Any, rows: Rows, tmp_path: Path, method: str, vision: tuple[str, ...]
) -> None:
    """In transformers, in mlx-vlm's own loader and in ours; in several files with an index."""
    from mlx_vlm.utils import load

    from mondrian_ft.model.base import load_base
    from mondrian_ft.model.qwen3_vl import Qwen3VL

    folder = saved(lab, base, tmp_path / "adapter", method=method, vision=vision)
    adapter = adapters.read(folder)
    expected = with_adapter(base, folder, rows)
    fused = tmp_path / "fused"
    fused.mkdir()
    fuse.write_published(fused, base, spec=adapter.spec, tensors=adapter.tensors, largest=200_000)
    assert len(list(fused.glob("*.safetensors"))) > 1
    assert_differ(ours(base, rows), expected)
    assert_agree(expected, reference_logits(base, load_reference(fused), rows))
    assert_agree(expected, ours(load_base(fused), rows))
    model, _ = load(str(fused))
    again = load_base(fused)
    again.backbone = Qwen3VL(model)
    assert_agree(expected, ours(again, rows))


def test_a_model_with_a_head_of_its_own(lab: Any, rows: Rows, tmp_path: Path) -> None:
    """transformers reads one flag of tying and mlx-vlm another; the folder sets both."""
    folder = lab.write_model(tmp_path / "untied", seed=4, tie_word_embeddings=False)
    base = lab.load(folder)
    fused = tmp_path / "out"
    fused.mkdir()
    fuse.write_published(fused, base)
    config = json.loads((fused / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert_agree(ours(base, rows), reference_logits(base, load_reference(fused), rows))


TARGETS: dict[str, Any] = {
    "a list": ["q_proj", "v_proj", "down_proj"],
    "a pattern": r"model\.language_model\.layers\.\d+\.(self_attn\.o_proj|mlp\.(up|gate)_proj)",
    "one layer": r".*language_model\.layers\.1\..*_proj",
    "uneven": r".*language_model\.layers\.(0\.self_attn\.q_proj|1\.self_attn\.[qk]_proj)",
}


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, "a list"),
        ({}, "a pattern"),
        ({"use_rslora": True}, "one layer"),
        ({"use_dora": True}, "a list"),
        ({"use_dora": True}, "uneven"),
        ({"use_dora": True, "use_rslora": True}, "a pattern"),
    ],
)
def test_what_peft_trains_is_imported(
    base: Any, rows: Rows, tmp_path: Path, options: dict[str, Any], targets: str
) -> None:
    """A few real steps in PyTorch, saved by PEFT, read here: the same logits."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[targets], **options)
    model: Any = get_peft_model(load_reference(base.folder), config)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    model.train()
    for _ in range(4):
        inputs = torch_inputs(rows, base.backbone.image_token, base.pad_token)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "peft")
    expected = reference_logits(base, model, rows)
    untouched = ours(base, rows)

    read = imports.read_foreign(tmp_path / "peft")
    assert read.layout == imports.PEFT
    foreign.attach(base, read)
    assert_differ(untouched, expected)
    assert_agree(ours(base, rows), expected)


def test_all_linear_reaches_the_tower(base: Any, rows: Rows, tmp_path: Path) -> None:
    """PEFT's "all-linear" adapts the vision tower and its mergers too; all of it comes along."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(load_reference(base.folder), config)
    model.save_pretrained(tmp_path / "peft")
    expected = reference_logits(base, model, rows)
    untouched = ours(base, rows)
    read = imports.read_foreign(tmp_path / "peft")
    assert any(name.startswith("vision_tower.merger.") for name in read.tensors)
    foreign.attach(base, read)
    assert_differ(untouched, expected)
    assert_agree(ours(base, rows), expected)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_in_the_tower_are_pytorchs(
    lab: Any, base: Any, rows: Rows, tmp_path: Path, method: str
) -> None:
    """The same loss over the same padded batch: what each tensor of an adapter on language model,
    tower and mergers would learn from it."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import PeftModel  # pyright: ignore[reportMissingImports]

    from mondrian_ft.model.backend import mx, nn
    from mondrian_ft.model.qwen3_vl import Unseen, assemble

    folder = saved(lab, base, tmp_path / "adapter", method=method, vision=VISION)
    model: Any = PeftModel.from_pretrained(load_reference(base.folder), folder, is_trainable=True)
    inputs = torch_inputs(rows, base.backbone.image_token, base.pad_token)
    targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, 1024), targets.reshape(-1)).backward()
    theirs_of = {
        name.replace("_vector.default.weight", "_vector").replace(
            ".default", ""
        ): value.grad.numpy()
        for name, value in model.named_parameters()
        if value.requires_grad
    }

    adapters.load(folder, base)
    given, _ = assemble(
        rows.padded(base.pad_token),
        rows.lengths,
        [Unseen(mx.array(p), g) if p is not None and g else None for _, p, g in rows.rows],
        [grid for _, _, grid in rows.rows],
        image_token=base.backbone.image_token,
        merge=base.backbone.merge,
    )
    flat = targets.reshape(-1).numpy()
    trained = mx.array(np.flatnonzero(flat >= 0))
    wanted = mx.array(flat[flat >= 0])

    def loss(_: Any) -> mx.array:
        found = base.backbone.head(base.backbone.hidden(given))[:, :-1].reshape(-1, 1024)
        return nn.losses.cross_entropy(found[trained], wanted).mean()

    _, grads = nn.value_and_grad(base.model, loss)(base.model)
    from mlx.utils import tree_flatten

    mine = {
        layouts.to_peft_name(name): np.array(value).T
        for name, value in tree_flatten(grads)  # pyright: ignore
    }
    assert mine.keys() == theirs_of.keys()
    assert any("visual.deepstack_merger_list" in name for name in mine)
    scale = max(float(np.abs(value).max()) for value in theirs_of.values())
    for name, value in theirs_of.items():
        assert np.abs(mine[name] - value).max() < 1e-5 * scale, name


def test_pixels_are_transformers_pixels(lab: Any, base: Any, tmp_path: Path) -> None:
    """The same photograph gives the same patches, whichever processor cuts it up."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mondrian_ft.data.pixels import open_photograph, to_pixels

    reference = Qwen2VLImageProcessorPil.from_pretrained(base.folder)
    for row in lab.rows(4, name="pixels"):
        photograph = open_photograph(row.image_path)
        mine = to_pixels(photograph, base.image_processor, lab.settings)
        size = {
            "shortest_edge": lab.settings.min_pixels,
            "longest_edge": lab.settings.max_pixels,
        }
        found = reference(images=photograph, size=size, return_tensors="np")
        assert tuple(found["image_grid_thw"][0]) == mine.grid
        assert np.abs(found["pixel_values"] - mine.patches).max() < 1e-6
