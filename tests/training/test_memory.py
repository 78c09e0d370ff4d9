"""Peak memory, predicted from a config and token counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mondrian_ft.errors import ModelError
from mondrian_ft.training import memory
from mondrian_ft.training.memory import COSTS, Row, Setting, Shape

QWEN_4B = Shape(
    hidden=2560,
    ffn=9728,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=151_936,
    tied=True,
    vision_hidden=1024,
    vision_ffn=4096,
    vision_depth=24,
    vision_heads=16,
    deepstack=3,
    patch=1536,
    places=2304,
    merge=2,
)
ROWS = [Row(2560, 1024, 800), Row(1800, 700, 600)]


def config_of(lab: Any) -> dict[str, Any]:
    return json.loads((lab.model_dir / "config.json").read_text())


def size_of(model: Any) -> int:
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(model.parameters())
    return sum(value.nbytes for _, value in flat)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_weights_and_adapter_are_counted_exactly(lab, bits) -> None:
    """Promise: what the config says is what the model has, quantised or not."""
    from mondrian_ft.model import lora

    base = lab.load(quantize_bits=bits)
    shape = Shape.of(config_of(lab))
    setting = Setting(1, checkpoint=False, itemsize=4, bits=bits, rank=4)
    before = size_of(base.model)
    assert memory.weights_size(shape, setting) == before
    for method in ("lora", "dora"):
        lora.attach(base.model, lab.spec(method=method), seed=0)
        counted = dataclasses.replace(setting, magnitudes=method == "dora")
        assert memory.adapter_size(shape, counted) * 4 == size_of(base.model) - before
        assert sorted(shape.names) == sorted(lora.lora_layers(base.model))
        lora.detach(base.model)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_towers_part_of_an_adapter_is_counted_exactly(lab, base, method) -> None:
    """Every matrix that ``lora.vision`` can name, by its name and size."""
    from mondrian_ft.model import lora

    shape = Shape.of(config_of(lab))
    before = size_of(base.model)
    lab.attach(base, vision=(".*",), method=method)
    tower = tuple(name for name in lora.lora_layers(base.model) if lora.in_tower(name))
    assert sorted(tower) == sorted(shape.tower_matrices)
    setting = Setting(
        1, checkpoint=False, itemsize=4, rank=4, magnitudes=method == "dora", vision=tower
    )
    assert memory.adapter_size(shape, setting) * 4 == size_of(base.model) - before


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_a_trained_tower_keeps_is_as_measured(lab, tmp_path, checkpoint) -> None:
    """Within 15 % on a CPU: a picture of 1,024 patches in a tower of four blocks."""
    from mondrian_ft.model import lora
    from mondrian_ft.model.backend import ON_CPU, mx, nn
    from mondrian_ft.model.processor import build_model
    from mondrian_ft.model.qwen3_vl import Qwen3VL

    if not ON_CPU:
        pytest.skip("the figures of a GPU are no others' business")
    folder = lab.write_model(tmp_path / "wide", seed=1)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": 128,
        "intermediate_size": 512,
        "depth": 4,
        "num_heads": 4,
        "deepstack_visual_indexes": [1],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape, model = Shape.of(config), build_model(folder)
    lora.attach(model, lab.spec(rank=8, targets=(), vision=(".*blocks.*",)), seed=0)
    backbone, patches = Qwen3VL(model), mx.random.normal((1, 1024, 1536))
    mx.eval(model.parameters(), patches)

    def loss(_: Any) -> mx.array:
        features, levels = backbone.tower_forward(patches, (1, 32, 32), checkpoint=checkpoint)
        return features.sum() + sum(level.sum() for level in levels)

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, loss)(model))
    measured = mx.get_peak_memory() - before
    setting = Setting(1, checkpoint=checkpoint, itemsize=4, rank=8, vision=("any",))
    predicted = sum(memory._tower_activations(shape, setting, COSTS["CPU"], [256]))
    assert abs(predicted / measured - 1) < 0.15, (predicted, measured)


def test_the_4b_model_has_its_known_size() -> None:
    """4.44 billion weights (the published checkpoint), 33 million in an adapter of rank 16."""
    setting = Setting(1, checkpoint=False, itemsize=2)
    assert memory.weights_size(QWEN_4B, setting) / 2 == pytest.approx(4.44e9, rel=0.005)
    assert memory.adapter_size(QWEN_4B, setting) == 33_030_144
    four = dataclasses.replace(setting, bits=4)
    assert memory.weights_size(QWEN_4B, four) < 0.45 * memory.weights_size(QWEN_4B, setting)


@pytest.mark.parametrize("kind", sorted(COSTS))
def test_what_should_lower_the_peak_does(kind) -> None:
    """Checkpointing, fewer rows, shorter rows, a quantised base; a larger rank raises it."""
    setting = Setting(4, checkpoint=False, itemsize=2)

    def peak(rows: list[Row] = ROWS * 2, **changes: Any) -> int:
        changed = dataclasses.replace(setting, **changes)
        return memory.predict(QWEN_4B, changed, rows, COSTS[kind]).total

    whole = peak()
    lower = [peak(checkpoint=True), peak(batch=1), peak(bits=4)]
    assert max(lower) < whole, lower
    assert peak([ROWS[1]] * 4) < whole < peak(rank=64)


def test_the_longest_rows_are_the_batch() -> None:
    """And on CUDA a length is padded to a multiple of 128, where attention is fused."""
    setting = Setting(2, checkpoint=False, itemsize=2)
    rows = [Row(100, 16, 50), Row(1000, 16, 50), Row(130, 16, 50)]
    found = memory.predict(QWEN_4B, setting, rows, COSTS["CUDA"])
    assert (found.rows, found.row_tokens) == (2, 1024)
    assert memory.predict(QWEN_4B, setting, rows, COSTS["CPU"]).row_tokens == 1000
    assert memory.predict(QWEN_4B, setting, rows[:1], COSTS["CPU"]).rows == 1


def test_changes_come_in_the_order_of_least_harm() -> None:
    """Pixel cap, checkpointing, batch, quantisation: each alone, and with those before it."""
    setting = Setting(2, checkpoint=False, itemsize=2)
    rows = ROWS * 2
    found = memory.changes(QWEN_4B, setting, rows, COSTS["CUDA"], accumulate=2, token_pixels=1024)
    assert [change.overrides for change in found] == [
        ("data.max_pixels=524288",),
        ("trainer.grad_checkpoint=true",),
        ("trainer.batch_size=1", "trainer.accumulate=4"),
        ("model.quantize_bits=4",),
    ]
    together = [change.together for change in found]
    assert together == sorted(together, reverse=True)
    assert found[0].alone == found[0].together
    everything = memory.changes(
        QWEN_4B,
        Setting(1, checkpoint=True, itemsize=2, bits=4),
        [Row(500, 0, 400)],
        COSTS["CUDA"],
        accumulate=1,
        token_pixels=1024,
    )
    assert everything == []


def test_the_cheapest_change_is_the_first_that_fits() -> None:
    """Alone if one does, else the first several together, else none."""
    changes = [
        memory.Change(("a=1",), 90, 90, ""),
        memory.Change(("b=1",), 60, 55, ""),
        memory.Change(("c=1", "d=1"), 80, 40, ""),
    ]
    assert memory.cheapest(changes, 95) == (("a=1",), 90)
    assert memory.cheapest(changes, 70) == (("b=1",), 60)
    assert memory.cheapest(changes, 57) == (("a=1", "b=1"), 55)
    assert memory.cheapest(changes, 41) == (("a=1", "b=1", "c=1", "d=1"), 40)
    assert memory.cheapest(changes, 39) is None


def test_another_architecture_is_not_guessed_at() -> None:
    """A config without these sizes is refused by name."""
    with pytest.raises(ModelError, match=r"no 'text_config'.*Qwen3-VL models only"):
        Shape.of({"model_type": "other", "hidden_size": 64})


@pytest.mark.parametrize(
    ("error", "spent"),
    [
        (MemoryError(), True),
        (RuntimeError("[malloc_or_wait] Unable to allocate 12 bytes."), True),
        (
            RuntimeError(
                "[metal::malloc] Attempting to allocate 9 bytes which is greater than the "
                "maximum allowed buffer size of 5 bytes."
            ),
            True,
        ),
        (RuntimeError("cudaMallocAsync(&p, n) failed: out of memory"), True),
        (
            RuntimeError(
                "[METAL] Command buffer execution failed: Insufficient Memory "
                "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
            ),
            True,
        ),
        (RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, spent) -> None:
    """In the words of each backend, and nothing else in its place."""
    assert memory.is_out_of_memory(error) is spent


@pytest.mark.slow
def test_a_measured_peak_is_as_predicted(tmp_path) -> None:
    """Promise: within 15 % on this machine, with and without checkpointing; see docs/memory.md."""
    from benchmarks import memory_fit

    for name in ("small", "batch 2, checkpointed"):
        found = memory_fit.measured(memory_fit.CASES[name])
        assert abs(found["predicted"] / found["measured"] - 1) <= 0.15, (name, found)
