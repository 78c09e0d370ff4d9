"""LoRA in the vision tower and its mergers: the right gradients, and no picture seen by another's
eyes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.errors import AdapterError
from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import agreement, combine, export, foreign, fuse, imports, lora
from mondrian_ft.model.backend import mx, nn
from mondrian_ft.model.base import load_base
from mondrian_ft.model.features import FeatureCache, FeatureStore
from mondrian_ft.training.loss import device_batch, token_losses

from .test_qwen3_vl import flat, largest, stock_logits

TOWER = ("qkv", "proj", "linear_fc1", "linear_fc2")
MERGERS = (".*merger.*",)


@pytest.fixture
def batch(lab, base) -> Any:
    """Five rows, four picture sizes, right-padded."""
    return collate(lab.examples(5), range(5), base.pad_token)


def photographs(batch: Any) -> list[Any]:
    return [(one.row.image_sha256, one.pixels) for one in batch.examples]


def saved(lab: Any, base: Any, folder: Path, **changes: Any) -> adapters.Adapter:
    """An adapter directory with a proof; the model is its base again."""
    spec = lab.attach(base, **{"vision": TOWER, **changes})
    inputs = probe_inputs(base, lab.settings)
    adapter = adapters.save(
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
    return adapter


def with_adapter(base: Any, folder: Path) -> dict[str, np.ndarray]:
    with adapters.applied(folder, base):
        return agreement.probe_logits(base)


def furthest(some: Any, others: Any) -> float:
    return max(largest(some[name], others[name]) for name in some)


# --- which matrices ---------------------------------------------------------------------------


def test_every_named_matrix_of_the_tower_is_adapted(lab, base) -> None:
    """Two blocks of four, the merger's two and the deepstack level's two; beside the decoder's."""
    lab.attach(base, vision=TOWER)
    names = list(lora.lora_layers(base.model))
    tower = [name for name in names if lora.in_tower(name)]
    assert len(names) - len(tower) == 2 * 7
    assert len(tower) == 2 * 4 + 2 + 2
    assert "vision_tower.deepstack_merger_list.0.linear_fc1" in tower
    assert lora.reaches_tower(base.model)
    lora.detach(base.model)
    assert not lora.reaches_tower(base.model)


def test_the_mergers_alone(lab, base) -> None:
    """A regular expression for whole names, and no matrix of the language model."""
    lab.attach(base, targets=(), vision=MERGERS)
    assert list(lora.lora_layers(base.model)) == [
        "vision_tower.deepstack_merger_list.0.linear_fc1",
        "vision_tower.deepstack_merger_list.0.linear_fc2",
        "vision_tower.merger.linear_fc1",
        "vision_tower.merger.linear_fc2",
    ]


def test_the_decoder_begins_as_without_the_tower(lab, base) -> None:
    """The seed gives the language model's matrices the same start either way."""
    lab.attach(base, live=False)
    alone = lab.weights(base)
    lora.detach(base.model)
    lab.attach(base, live=False, vision=TOWER)
    both = lab.weights(base)
    assert all(np.array_equal(both[name], value) for name, value in alone.items())


@pytest.mark.parametrize(
    ("vision", "sentence"),
    [
        ("q_proj", r"lora.vision names q_proj, .* it has linear_fc1, .* qkv; query, key and value"),
        ("linear_fc3", r"matches no matrix of the vision tower; .* did you mean linear_fc"),
        (".*mergers.*", r"names \.\*mergers\.\*, .* in full such as vision_tower\."),
        ("(", r"lora.vision has \(, which is no regular expression"),
    ],
)
def test_what_matches_nothing_is_refused(lab, base, vision, sentence) -> None:
    """Qwen3-VL's query, key and value are one matrix: a target list of others would do nothing."""
    with pytest.raises(AdapterError, match=sentence):
        lora.attach(base.model, lab.spec(vision=(vision,)), seed=0)
    assert not lora.lora_layers(base.model)
    with pytest.raises(AdapterError, match=r"qkv.* in the vision tower: name them in lora.vision"):
        lora.attach(base.model, lab.spec(targets=("qkv",)), seed=0)
    with pytest.raises(AdapterError, match=r"without a matrix cannot be made"):
        lora.attach(base.model, lab.spec(targets=()), seed=0)


# --- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_equal_those_of_the_stock_forward(lab, base, batch, method, checkpoint) -> None:
    """Through the merger and the deepstack level into every block, mixed picture sizes, to 1e-5."""
    lab.attach(base, vision=TOWER, method=method)
    inputs, where, wanted = device_batch(batch, base.backbone, FeatureStore(base.backbone))
    assert inputs.features is None
    assert len(inputs.unseen) == 5

    def ours(_: Any) -> mx.array:
        return token_losses(base.backbone, inputs, where, wanted, checkpoint=checkpoint).mean()

    def stock(model: Any) -> mx.array:
        logits = stock_logits(model, batch).reshape(-1, 1024)[where]
        return nn.losses.cross_entropy(logits, wanted).mean()

    base.model.train()
    loss, grads = nn.value_and_grad(base.model, ours)(base.model)
    other, wanted_grads = nn.value_and_grad(base.model, stock)(base.model)
    mx.eval(loss, grads, other, wanted_grads)
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    mine, theirs = flat(grads), flat(wanted_grads)
    assert sorted(mine) == sorted(theirs) == sorted(lora.tensors(base.model))
    scale = max(float(mx.abs(value).max()) for value in theirs.values())
    for name, value in theirs.items():
        assert float(mx.abs(value).max()) > 0, name
        assert largest(mine[name], value) < 1e-5 * scale, name


@pytest.mark.parametrize("vision", [TOWER, MERGERS])
def test_the_tower_learns(lab, base, tmp_path, vision) -> None:
    """The trainer moves every tensor of it, and the loss falls."""
    lab.attach(base, live=False, targets=("o_proj",), vision=vision)
    before = lab.weights(base)
    trainer = lab.trainer(base, lab.examples(4), tmp_path, validation=lab.examples(2, "val"))
    first = trainer.validation_loss()
    trainer.fit()
    after = lab.weights(base)
    assert trainer.state.val_loss < first
    assert all(not np.array_equal(before[name], after[name]) for name in before)


def test_a_resumed_run_ends_with_the_same_bits(lab, base, tmp_path) -> None:
    """Dropout on, in the tower as well, with its own learning rate; stopped in the middle."""

    def start(folder: Path, **options: Any) -> Any:
        lora.detach(base.model)
        lab.attach(base, live=False, dropout=0.3, vision=TOWER)
        examples = lab.examples(5)
        return lab.trainer(base, examples, folder, accumulate=2, vision=0.3, **options)

    start(tmp_path / "straight").fit()
    expected = lab.weights(base)
    stopped = start(tmp_path / "stopped", save_every=3)
    for _ in range(3):
        stopped._advance()
    path = stopped.checkpointer.save(stopped)
    again = start(tmp_path / "stopped")
    assert not lab.weights(base)["vision_tower.blocks.0.attn.qkv.lora_b"].any()
    again.checkpointer.restore(again, path)
    again.fit()
    found = lab.weights(base)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


# --- the cache ----------------------------------------------------------------------------------


def test_what_was_kept_is_the_bases_alone(lab, base, batch, tmp_path) -> None:
    """Features planted in memory and on disk are the base's answer, and never the tuned one's.

    A cached feature that outlives a change of the tower would be a picture seen with the eyes of
    another model, and nothing would tell.
    """
    asked = photographs(batch)
    truth = FeatureStore(base.backbone).get(asked)

    def planted() -> FeatureStore:
        store = FeatureStore(
            base.backbone, disk=FeatureCache(tmp_path / "cache", base.backbone, pixels="p")
        )
        assert store.disk is not None
        for (name, pixels), one in zip(asked, truth, strict=True):
            stale = type(one)(one.features * 0 + 7, tuple(level * 0 for level in one.deepstack))
            store.disk.write(name, pixels.grid, stale)
        return store

    store = planted()
    assert float(store.get(asked)[0].features.max()) == 7  # the plant is where it is looked for
    files = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    lab.attach(base, vision=TOWER)
    tuned = store.get(asked)
    expected = [base.backbone.encode(pixels.patches, pixels.grid)[0] for _, pixels in asked]
    for one, other in zip(tuned, expected, strict=True):
        assert np.array_equal(np.array(one.features), np.array(other.features))
        assert np.array_equal(np.array(one.deepstack[0]), np.array(other.deepstack[0]))
    assert all(one.patches.shape[1] == 1536 for one in store.pictures(asked))  # type: ignore
    assert largest(tuned[0].features, truth[0].features) > 0.01
    # Nothing of the tuned tower was kept, neither here nor there.
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == files
    with lora.without_adapter(base.model):
        assert float(store.get(asked)[0].features.max()) == 7
    lora.detach(base.model)
    assert float(store.get(asked)[0].features.max()) == 7


def test_an_update_changes_what_is_seen(lab, base, batch) -> None:
    """Between two asks the tower may have moved: the second answer is the moved tower's."""
    lab.attach(base, vision=TOWER)
    store = FeatureStore(base.backbone)
    first = store.get(photographs(batch))
    layers = lora.lora_layers(base.model)
    layers["vision_tower.blocks.0.attn.qkv"]["lora_b"] *= 2
    second = store.get(photographs(batch))
    assert largest(first[0].features, second[0].features) > 1e-3


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_saved_loaded_and_proved(lab, base, tmp_path, method) -> None:
    """The proof is of the picture as the adapter sees it; every check holds."""
    adapter = saved(lab, base, tmp_path / "adapter", method=method)
    assert adapter.spec.vision == TOWER
    probe = probe_inputs(base, lab.settings)
    checks = adapters.examine(tmp_path / "adapter", base, probe)
    assert [check.refusal for check in checks if not check.holds] == []
    loaded = adapters.load(tmp_path / "adapter", base, probe=probe)
    assert loaded.hash == adapter.hash
    assert lora.reaches_tower(base.model)


def test_an_adapter_of_the_tower_alone_has_an_effect(lab, base, tmp_path) -> None:
    """On the picture, not on the text; it is no adapter that changes nothing."""
    adapter = saved(lab, base, tmp_path / "adapter", targets=(), vision=MERGERS)
    effects = {one["name"]: one["effect"] for one in adapter.manifest["probe"]["inputs"]}
    assert effects["text"] == 0
    assert effects["picture"] > 0.01
    # Also where there is no pixel pipeline to make a probe with.
    adapters.load(tmp_path / "adapter", base)
    lora.detach(base.model)
    checks = adapters.examine(tmp_path / "adapter", base, probe_inputs(base, lab.settings))
    assert all(check.holds for check in checks)


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ()])
def test_exports_are_the_same_model(lab, base, tmp_path, targets) -> None:
    """PEFT's layout read as a foreign one, mlx-vlm's by its own loader, and the fused folder."""
    adapter = saved(lab, base, tmp_path / "adapter", targets=targets)
    untouched = agreement.probe_logits(base)
    expected = with_adapter(base, adapter.folder)
    assert largest(untouched["image"], expected["image"]) > 0.05
    for name in ("mlx", "peft", "fused"):
        (tmp_path / name).mkdir()
    export.export_mlx(adapter, tmp_path / "mlx")
    assert furthest(expected, export.logits_of_mlx(tmp_path / "mlx", base)) < 1e-4
    export.export_peft(adapter, tmp_path / "peft")
    assert furthest(expected, export.logits_of_peft(tmp_path / "peft", base)) < 1e-4
    fuse.write_published(tmp_path / "fused", base, spec=adapter.spec, tensors=adapter.tensors)
    found = export.logits_of_model(tmp_path / "fused", "float32")
    assert furthest(expected, found) < 1e-4


def test_fused_and_quantised(lab, base, tmp_path) -> None:
    """The tower's matrices are merged in floating point, as the base has them."""
    adapter = saved(lab, base, tmp_path / "adapter", vision=TOWER)
    fresh = lab.load()
    fuse.quantize_merged(fresh, adapter.spec, adapter.tensors)
    tower = fresh.model.vision_tower.blocks[0].attn.qkv
    assert isinstance(tower, nn.Linear)
    name = "vision_tower.blocks.0.attn.qkv"
    merged = fuse.merge(
        base.model.vision_tower.blocks[0].attn.qkv.weight,
        adapter.tensors[f"{name}.lora_a"],
        adapter.tensors[f"{name}.lora_b"],
        adapter.spec.scale,
    )
    assert largest(tower.weight, merged) < 1e-6
    (tmp_path / "out").mkdir()
    fuse.write_quantized(tmp_path / "out", fresh)
    expected = agreement.probe_logits(fresh)
    assert furthest(expected, export.logits_of_model(tmp_path / "out", "float32")) < 1e-4


def test_the_names_are_transformers(lab, base, tmp_path) -> None:
    """PEFT's key form, and a pattern that means these matrices and no others."""
    import re

    from safetensors.numpy import load_file

    adapter = saved(lab, base, tmp_path / "adapter", vision=("qkv",), layers=(1,))
    stored = load_file(adapter.folder / adapters.WEIGHTS)
    assert "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight" in stored
    pattern = json.loads((adapter.folder / adapters.CONFIG).read_text())["target_modules"]
    there = {
        fuse.to_published_name(name)
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    meant = {name for name in there if re.fullmatch(pattern, name)}
    asked = {
        name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        for name in stored
        if ".lora_" in name
    }
    assert meant == asked
    assert len(meant) == 7 + 2


def test_an_imported_one_with_holes_gets_zeros(lab, base, tmp_path) -> None:
    """One block's matrix is missing in the file: its update is zero, as in the decoder."""
    from safetensors.numpy import load_file, save_file

    adapter = saved(lab, base, tmp_path / "adapter", vision=("qkv",))
    exports = tmp_path / "peft"
    exports.mkdir()
    export.export_peft(adapter, exports)
    stored = load_file(exports / adapters.WEIGHTS)
    kept = {name: value for name, value in stored.items() if "visual.blocks.1." not in name}
    assert len(kept) == len(stored) - 2
    save_file(kept, exports / adapters.WEIGHTS)
    foreign.attach(base, imports.read_foreign(exports))
    found = lab.weights(base)
    assert not found["vision_tower.blocks.1.attn.qkv.lora_b"].any()
    assert np.array_equal(
        found["vision_tower.blocks.0.attn.qkv.lora_b"],
        np.array(adapter.tensors["vision_tower.blocks.0.attn.qkv.lora_b"]),
    )


def test_compared_and_averaged(lab, base, tmp_path) -> None:
    """The tower has its own line in a comparison, and its part in an average."""
    one = saved(lab, base, tmp_path / "one", seed=3)
    two = saved(lab, base, tmp_path / "two", seed=4, vision=("qkv",))
    found = combine.by_layer(combine.differences(one, two))
    assert [item["layer"] for item in found] == [0, 1, "vision", None]
    assert found[2]["difference"] > 0
    spec, tensors, _ = combine.average([one, two], [0.5, 0.5])
    lora.attach(base.model, spec, seed=0)
    assert set(tensors) <= set(lora.tensors(base.model))
    name = "vision_tower.blocks.1.attn.qkv"
    expected = sum(
        0.5 * a.spec.scale * np.array(a.tensors[f"{name}.lora_a"] @ a.tensors[f"{name}.lora_b"])
        for a in (one, two)
    )
    assert largest(tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"], expected) < 1e-5


def test_earlier_adapters_leave_the_tower_alone(lab, base, tmp_path) -> None:
    """A manifest that does not speak of the tower is one that does not train it."""
    adapter = saved(lab, base, tmp_path / "adapter", vision=())
    manifest = json.loads((adapter.folder / adapters.MANIFEST).read_text())
    del manifest["lora"]["vision"]
    (adapter.folder / adapters.MANIFEST).write_text(json.dumps(manifest))
    loaded = adapters.load(adapter.folder, base)
    assert loaded.spec.vision == ()
    assert not lora.reaches_tower(base.model)


def test_the_fused_model_is_a_base_like_any(lab, base, tmp_path) -> None:
    """Its tower is another one, and its cache finds nothing of the first's."""
    adapter = saved(lab, base, tmp_path / "adapter")
    (tmp_path / "fused").mkdir()
    fuse.write_published(tmp_path / "fused", base, spec=adapter.spec, tensors=adapter.tensors)
    again = load_base(tmp_path / "fused")
    caches = [FeatureCache(tmp_path, one.backbone, pixels="p") for one in (base, again)]
    assert caches[0].path("a", (1, 4, 4)) != caches[1].path("a", (1, 4, 4))
