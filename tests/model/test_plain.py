"""Other architectures train through their own forward: a tiny Qwen2.5-VL and a tiny LLaVA."""

from __future__ import annotations

from typing import Any

import pytest

from mondrian_ft.errors import ModelError
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx, nn, number
from mondrian_ft.model.plain import Plain, PlainInputs
from mondrian_ft.training import optim
from mondrian_ft.training.step import UpdateStep

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
            model(row.tokens, row.pixels, mx.ones_like(row.tokens), **row.more).logits[0, where],
            wanted,
        ).sum()
        for row, where, wanted in parts
    )
    blind = [(PlainInputs(row.tokens, row.pixels * 0, row.more), *rest) for row, *rest in parts]
    losses = [number(step([parts], count).loss) for _ in range(8)]
    assert losses[0] == pytest.approx(number(expected) / count, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert number(step([blind], count).loss) != pytest.approx(losses[-1], rel=1e-4)


def test_recomputing_is_refused_where_it_cannot_be() -> None:
    """A flag that is silently ignored would run out of memory, hours later."""
    model, rows = llava()
    with pytest.raises(ModelError, match=r"trainer.grad_checkpoint=true .* leave it false"):
        Plain(model).hidden_at(rows[0], mx.array([0]), checkpoint=True)
