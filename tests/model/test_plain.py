"""Other architectures train through their own forward: a tiny Qwen2.5-VL and a tiny LLaVA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import architectures
import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.data.critique import strict_format_error
from mondrian_ft.data.pixels import to_photograph, to_pixels
from mondrian_ft.errors import AdapterError, ModelError, TrainingError
from mondrian_ft.evaluation import constrain
from mondrian_ft.evaluation.constrain import Constraint
from mondrian_ft.evaluation.generate import Request, generate
from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import agreement, export, lora
from mondrian_ft.model.backend import mx, nn, number
from mondrian_ft.model.base import load_base
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.model.plain import Plain, PlainInputs, _Recomputed, unfit
from mondrian_ft.training import optim, preflight
from mondrian_ft.training.loss import device_batch, token_losses
from mondrian_ft.training.step import UpdateStep

from .test_qwen3_vl import flat

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
}
TARGETS = ("q_proj", "v_proj", "down_proj")


def qwen2_5_vl() -> tuple[Any, list[PlainInputs]]:
    """Pictures of two sizes: 4 and 6 image tokens."""
    from mlx_vlm.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.models.qwen2_5_vl.qwen2_5_vl import Model

    text = TextConfig(
        model_type="qwen2_5_vl",
        rope_scaling={"type": "default", "mrope_section": [2, 3, 3]},  # pyright: ignore
        **TEXT,
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=64,
        num_heads=2,
        fullatt_block_indexes=[1],
    )
    config = ModelConfig(
        text_config=text,
        vision_config=vision,
        model_type="qwen2_5_vl",
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
    )
    rows = []
    for grid in ((1, 4, 4), (1, 4, 6)):
        count = grid[1] * grid[2]
        tokens = [292, *[290] * (count // 4), *range(5, 20)]
        patches = mx.random.normal((count, 3 * 2 * 14 * 14))
        rows.append(PlainInputs(mx.array([tokens]), patches, {"image_grid_thw": mx.array([grid])}))
    return Model(config), rows


def llava() -> tuple[Any, list[PlainInputs]]:
    """A square picture of 4 patches, and another tower, projector and decoder."""
    from mlx_vlm.models.llava.config import ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.models.llava.llava import Model

    vision = VisionConfig(
        model_type="clip_vision_model",
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        image_size=28,
    )
    config = ModelConfig(
        text_config=TextConfig(model_type="llama", **TEXT),
        vision_config=vision,
        model_type="llava",
        image_token_index=290,
    )
    rows = [
        PlainInputs(
            mx.array([[1, *[290] * 4, *range(5, 15 + 3 * n)]]), mx.random.normal((1, 3, 28, 28))
        )
        for n in range(2)
    ]
    return Model(config), rows


@pytest.mark.parametrize("make", [qwen2_5_vl, llava])
def test_other_architectures_train(make) -> None:
    """The loss is that of full logits, the pictures matter, and training lowers it."""
    mx.random.seed(0)
    model, rows = make()
    model.set_dtype(mx.float32)
    lora.attach(model, lora.LoraSpec(4, 8.0, 0.0, TARGETS), seed=0)
    assert len(lora.tensors(model)) == 2 * 2 * len(TARGETS)
    backbone = Plain(model)
    parts = []
    for row in rows:
        where = mx.arange(row.tokens.shape[1] - 8, row.tokens.shape[1] - 1)
        parts.append((row, where, row.tokens[0][where + 1]))
    count = sum(part[1].size for part in parts)
    optimizer = optim.adamw(lambda step: mx.array(2e-2), weight_decay=0.0)
    optimizer.init(model.trainable_parameters())
    step = UpdateStep(backbone, optimizer, max_grad_norm=0)
    expected: Any = sum(
        nn.losses.cross_entropy(
            model(row.tokens, row.pixels, None, **row.more).logits[0, where],
            wanted,
        ).sum()
        for row, where, wanted in parts
    )
    blind = [(PlainInputs(row.tokens, row.pixels * 0, row.more), *rest) for row, *rest in parts]
    losses = [number(step([parts], count).loss) for _ in range(8)]
    assert losses[0] == pytest.approx(number(expected) / count, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert number(step([blind], count).loss) != pytest.approx(losses[-1], rel=1e-4)


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "llava"])
def other(request, tmp_path_factory) -> Any:
    """A base of another architecture, from a folder; without an adapter."""
    folder = tmp_path_factory.mktemp("other") / request.param
    return load_base(getattr(architectures, request.param)(folder), name=request.param)


@pytest.fixture
def plain(other) -> Iterator[Any]:
    """The same, and it is again afterwards."""
    yield other
    lora.detach(other.model)
    other.model.freeze()
    other.model.eval()


def device(lab: Any, base: Any, count: int = 3) -> Any:
    batch = collate(lab.examples(count, base=base), range(count), base.pad_token)
    return batch, device_batch(batch, base.backbone, FeatureStore(base.backbone))


def stock(base: Any, tokens: mx.array, pixels: Any, more: Any) -> mx.array:
    """Logits (L, V) of mlx-vlm's own call, by itself and without a mask of ours."""
    base.backbone.forget()
    return base.model(tokens, pixels, None, **more).logits[0]


def test_no_token_sees_what_comes_after(lab, plain, monkeypatch) -> None:
    """LLaVA's own call takes the mask it asks for in place of the causal one: given ones, every
    token saw the answer that it was to predict, and the loss looked splendid."""
    batch, (inputs, _, _) = device(lab, plain, 1)
    features = FeatureStore(plain.backbone)
    preflight._looks_back_only(plain, batch.examples[0], features)
    if plain.identity.name != "llava":
        return
    tokens = inputs.tokens
    pixels, more = plain.backbone.arguments(inputs.unseen[0])
    seeing = plain.model(tokens, pixels, mx.ones_like(tokens), **more).logits
    assert float(mx.abs(seeing - plain.backbone.hidden(inputs)).max()) > 0.1
    monkeypatch.setattr(
        plain.backbone,
        "_logits",
        lambda row, _: plain.model(row.tokens, row.pixels, mx.ones_like(row.tokens)).logits[0],
    )
    with pytest.raises(TrainingError, match=r"a llava, lets tokens see what comes after them"):
        preflight._looks_back_only(plain, batch.examples[0], features)


def test_a_folder_gives_what_the_stock_forward_gives(lab, plain) -> None:
    """A padded batch of several picture sizes: each row's logits are those of the row alone, and of
    mlx-vlm's processor and forward."""
    batch, (inputs, _, _) = device(lab, plain)
    assert plain.plain
    found = plain.backbone.hidden(inputs)
    for row, example in enumerate(batch.examples):
        size = len(example.tokens)
        pixels, more = plain.backbone.arguments(
            plain.backbone.encode(example.pixels.patches, example.pixels.grid)[0]
        )
        tokens = mx.array(example.tokens)[None]
        expected = stock(plain, tokens, pixels, more)
        assert float(mx.abs(found[row, :size] - expected).max()) < 1e-4
        # The picture matters: another one gives other logits.
        blank = stock(plain, tokens, pixels * 0, more)
        assert float(mx.abs(expected - blank).max()) > 1e-3


def test_a_text_after_a_picture_is_a_text(lab, plain) -> None:
    """mlx-vlm keeps a picture's positions for the next call, and a text was read by them once: the
    base's logits in an adapter's proof were 0.37 off the second time."""
    words: list[int] = plain.tokenizer.encode("The low light falls on a far ridge.")
    tokens = mx.array([words])
    fresh = plain.backbone.hidden(PlainInputs(tokens))
    (_, (inputs, _, _)) = device(lab, plain)
    mx.eval(plain.backbone.hidden(inputs))
    again = plain.backbone.hidden(PlainInputs(tokens))
    assert np.array_equal(np.array(fresh), np.array(again))
    generate(plain, [Request(words, None, None)], max_tokens=3, batch_size=1)
    mx.eval(plain.backbone.hidden(inputs))
    said = [
        generate(plain, [Request(words, None, None)], max_tokens=5, batch_size=1) for _ in range(2)
    ]
    assert said[0][0].text == said[1][0].text


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_trainer_trains_it(lab, plain, tmp_path, checkpoint) -> None:
    """The loop of Qwen3-VL: batches, validation, checkpoints; recomputed or not, and resumable."""
    lab.attach(plain, live=False)
    trainer = lab.trainer(
        plain,
        lab.examples(4, base=plain),
        tmp_path,
        validation=lab.examples(2, "val", base=plain),
        grad_checkpoint=checkpoint,
    )
    before = trainer.validation_loss()
    trainer.fit()
    assert trainer.state.val_loss < before
    straight = lab.weights(plain)
    lora.detach(plain.model)
    lab.attach(plain, live=False)
    again = lab.trainer(plain, lab.examples(4, base=plain), tmp_path, grad_checkpoint=checkpoint)
    again.checkpointer.restore(again, tmp_path / "checkpoints" / "step_000004")
    again.fit()
    found = lab.weights(plain)
    assert all(np.array_equal(found[name], value) for name, value in straight.items())


def test_recomputed_gradients_are_the_same(lab, plain) -> None:
    """And afterwards the model's layers are its own again."""
    lab.attach(plain)
    _, (inputs, where, wanted) = device(lab, plain)
    layers = list(plain.model.language_model.model.layers)

    def gradients(checkpoint: bool) -> dict[str, Any]:
        def loss(_: Any) -> mx.array:
            return token_losses(plain.backbone, inputs, where, wanted, checkpoint=checkpoint).mean()

        _, grads = nn.value_and_grad(plain.model, loss)(plain.model)
        return flat(grads)

    one, two = gradients(False), gradients(True)
    assert sorted(one) == sorted(two) == sorted(lora.tensors(plain.model))
    for name, value in one.items():
        assert float(mx.abs(value - two[name]).max()) < 1e-5 * max(1, float(mx.abs(value).max()))
    now = plain.model.language_model.model.layers
    assert all(a is b for a, b in zip(layers, now, strict=True))


class Pair(nn.Module):
    """A layer that gives more than hidden states."""

    def __call__(self, h: Any) -> Any:
        return h, h


def test_layers_that_give_more_than_an_array_are_not_recomputed() -> None:
    """A flag that cannot be obeyed is refused, and not found out hours later."""
    with pytest.raises(ModelError, match=r"grad_checkpoint=true needs layers that give one array"):
        _Recomputed(Pair())(mx.zeros((1, 2)))


def test_it_answers_what_it_would_say_next(lab, plain) -> None:
    """Greedy answers, with and without an adapter: each token is the likeliest after those before
    it by the whole forward, so mlx-vlm's caches and positions hold."""
    lab.attach(plain)
    for enter in (nullcontext, lambda: lora.without_adapter(plain.model)):
        with enter():
            examples = lab.examples(2, base=plain)
            requests = [
                Request(
                    one.tokens[: one.prompt_length].tolist(),
                    plain.backbone.encode(one.pixels.patches, one.pixels.grid)[0],
                    one.pixels.grid,
                )
                for one in examples
            ]
            outputs = generate(plain, requests, max_tokens=6, batch_size=2)
            for request, output in zip(requests, outputs, strict=True):
                tokens, said = list(request.tokens), []
                for _ in range(6):
                    pixels, more = plain.backbone.arguments(request.features)
                    whole = mx.array([tokens])
                    logits = stock(plain, whole, pixels, more)
                    said.append(int(number(mx.argmax(logits[-1]))))
                    tokens.append(said[-1])
                    if said[-1] in plain.end_tokens:
                        break
                finished = said[-1] in plain.end_tokens
                assert output.text == plain.text(said[:-1] if finished else said)
                assert output.tokens == len(said)


def test_a_constrained_answer_keeps_to_the_schema(lab, plain, monkeypatch) -> None:
    """Where every token is masked by what may come next; draws repeat with their seed."""
    short = constrain.Lengths(30, 20, 20, 30, 20, 1)
    monkeypatch.setattr(constrain, "Lengths", lambda: short)
    constraint = Constraint.critique(plain, ("Light", "Focus"), decimals=True)
    (one,) = lab.examples(1, base=plain)
    picture = plain.backbone.encode(one.pixels.patches, one.pixels.grid)[0]
    request = Request(one.tokens[: one.prompt_length].tolist(), picture, one.pixels.grid)
    options: dict[str, Any] = {"max_tokens": 900, "batch_size": 1, "constraint": constraint}
    (answer,) = generate(plain, [request], **options)
    assert answer.finished
    assert strict_format_error(answer.text) is None
    options = {"max_tokens": 8, "batch_size": 1, "temperature": 1.0}
    drawn = [generate(plain, [request], **options, seed=seed)[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_its_adapters_prove_themselves(lab, plain, tmp_path) -> None:
    """Saved, verified and loaded like any; read back by mlx-vlm's own loader."""
    spec = lab.attach(plain)
    probe = probe_inputs(plain, lab.settings)
    adapter = adapters.save(
        tmp_path / "adapter",
        plain,
        spec,
        pixels={"min_pixels": 1024, "max_pixels": 16384, "fingerprint": probe.pixels},
        prompts=[],
        data_lock="d",
        facts={},
        probe=probe,
    )
    expected = agreement.probe_logits(plain)
    lora.detach(plain.model)
    checks = adapters.examine(adapter.folder, plain, probe)
    assert [check.refusal for check in checks if not check.holds] == []
    (tmp_path / "mlx").mkdir()
    export.export_mlx(adapter, tmp_path / "mlx")
    found = export.logits_of_mlx(tmp_path / "mlx", plain)
    assert all(np.abs(found[name] - expected[name]).max() < 1e-4 for name in expected)


def test_nothing_of_its_pictures_is_kept(lab, plain) -> None:
    """There is no tower of ours that could be asked once."""
    (one,) = lab.examples(1, base=plain)
    store = FeatureStore(plain.backbone)
    picture: Any = store.get([("a", one.pixels)])[0]
    assert np.array_equal(np.array(picture.patches), one.pixels.patches)
    assert not store.has("a", one.pixels.grid)


def test_what_the_model_is_shown_can_be_looked_at(lab, plain) -> None:
    """The picture put together again from what enters the model, for task=inspect."""
    (one,) = lab.examples(1, base=plain)
    shown = to_photograph(one.pixels, plain.image_processor)
    assert min(shown.size) >= 56
    again = to_pixels(shown, plain.image_processor, lab.settings)
    assert np.abs(again.patches - one.pixels.patches).mean() < 0.05


def test_the_tower_of_another_architecture_is_not_trained(lab, plain) -> None:
    """Refused with the architecture's name."""
    with pytest.raises(AdapterError, match=r"lora.vision=.* of qwen3_vl alone, and this is a "):
        lora.attach(plain.model, lab.spec(vision=("qkv",)), seed=0)


def test_a_model_without_pictures_is_refused(tmp_path) -> None:
    """A language model alone, or one whose pictures come in pieces of several sizes."""
    assert "no language model" in unfit(nn.Linear(2, 2), [])

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = nn.Linear(2, 2)

    assert "another build" in unfit(Half(), [])
    folder = architectures.llava(tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is a llava model, which takes no pictures"):
        load_base(folder)
