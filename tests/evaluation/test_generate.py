"""Batched greedy decoding gives what decoding one by one gives, here and in mlx-vlm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mondrian_ft.errors import ModelError
from mondrian_ft.evaluation.generate import Request, generate
from mondrian_ft.model.features import FeatureStore


def requests(lab: Any, base: Any, count: int, prompts: tuple[str, ...] = ("Judge it.",)) -> list:
    """Pictures of several sizes, prompts of several lengths."""
    examples = lab.examples(count, base=base)
    pictures = FeatureStore(base.backbone).get([(e.row.image_sha256, e.pixels) for e in examples])
    return [
        Request(
            base.prompt_tokens(prompts[n % len(prompts)], e.pixels.tokens), picture, e.pixels.grid
        )
        for n, (e, picture) in enumerate(zip(examples, pictures, strict=True))
    ]


def answers(base: Any, some: list, **options: Any) -> list[tuple[str, int, bool]]:
    options = {"max_tokens": 12, "batch_size": 16, **options}
    return [(one.text, one.tokens, one.finished) for one in generate(base, some, **options)]


def tokens_of(
    base: Any, some: list, max_tokens: int, *, block: int = 0, **options: Any
) -> list[list[int]]:
    """Token ids of the answers to one batch."""
    from mondrian_ft.evaluation import generate as module
    from mondrian_ft.model.decode import Decoding, Steps

    prompts = module.read_prompts(base, some)
    decoding = Decoding(Steps(base.backbone), prompts, capacity=max_tokens, block=block)
    return module._decode(base, decoding, max_tokens, None, **options)[0]


def test_batched_equals_one_by_one(lab, base) -> None:
    """Prompts of different lengths share a batch, token for token, in the order they came."""
    lab.attach(base)
    some = requests(lab, base, 7, ("Judge it.", "Judge this photograph at length, please.", "?"))
    assert len({len(one.tokens) for one in some}) >= 5
    alone = answers(base, some, batch_size=1)
    assert len(set(alone)) >= 5
    assert answers(base, some) == alone
    assert answers(base, some, batch_size=3) == alone


@pytest.mark.parametrize(("block", "method"), [(0, "lora"), (3, "lora"), (3, "dora")])
def test_decoding_equals_the_whole_forward(lab, base, monkeypatch, block, method) -> None:
    """With the cache, and without it: each token is the most likely after all before it."""
    from mondrian_ft.model import decode
    from mondrian_ft.model.backend import mx, number
    from mondrian_ft.model.qwen3_vl import assemble

    monkeypatch.setattr(decode.Steps, "block", lambda self, rows: block)
    lab.attach(base, method=method)
    some = requests(lab, base, 2)
    for request in some:
        tokens = list(request.tokens)
        for _ in range(8):
            inputs, _ = assemble(
                np.array([tokens], np.int32),
                [len(tokens)],
                [request.features],
                [request.grid],
                image_token=base.backbone.image_token,
                merge=base.backbone.merge,
            )
            logits = base.backbone.head(base.backbone.hidden(inputs)[:, -1])
            tokens.append(int(number(mx.argmax(logits, axis=-1))))
        (found,) = generate(base, [request], max_tokens=8, batch_size=1)
        assert found.text == base.text(tokens[len(request.tokens) :])
        assert found.prompt_tokens == len(request.tokens)


def test_rows_that_ended_are_dropped_without_a_trace(lab, base, monkeypatch) -> None:
    """Going on with the open rows alone, again and again, gives what all rows together give."""
    from mondrian_ft.model.decode import Decoding

    some = requests(lab, base, 7, ("Judge it.", "Judge this photograph at length, please.", "?"))
    raw = tokens_of(base, some, 40)
    # Ends that most rows meet early and some late, so that rows are dropped more than once.
    ends = frozenset({row[4] for row in raw[:3]} | {row[15] for row in raw[3:5]})
    monkeypatch.setitem(base.encoder.__dict__, "end_tokens", ends)
    sizes: list[int] = []
    plain = Decoding.keep

    def counted(self: Decoding, rows: list[int]) -> None:
        plain(self, rows)
        sizes.append(self.rows)

    monkeypatch.setattr(Decoding, "keep", counted)
    whole = tokens_of(base, some, 40, compact=False)
    assert not sizes
    assert tokens_of(base, some, 40, compact=True) == whole
    assert sizes
    assert sizes == sorted(set(sizes), reverse=True)
    assert len({len(row) for row in whole}) > 1
    # Each is what the row gives without any end, up to its own.
    for row, free in zip(whole, raw, strict=True):
        assert row == free[: len(row)]
        assert len(row) == 40 or row[-1] in ends


LONG = "Judge this photograph at length, please."


@pytest.mark.parametrize("block", [1, 7, 40])
def test_blocks_of_new_columns_change_nothing(lab, base, block) -> None:
    """Prompts of unequal lengths, many borders and none, rows dropped in the midst of a block."""
    lab.attach(base)
    some = requests(lab, base, 6, ("Judge it.", LONG, "?"))
    whole = tokens_of(base, some, 30)
    assert len({len(one.tokens) for one in some}) >= 5
    assert tokens_of(base, some, 30, block=block) == whole
    assert [tokens_of(base, [one], 30, block=block)[0] for one in some[:2]] == whole[:2]


def test_rows_are_dropped_in_the_midst_of_a_block(lab, base, monkeypatch) -> None:
    """The old columns and the block keep the same rows."""
    some = requests(lab, base, 6, ("Judge it.", LONG, "?"))
    raw = tokens_of(base, some, 30)
    ends = frozenset({row[4] for row in raw[:2]} | {row[11] for row in raw[2:4]})
    monkeypatch.setitem(base.encoder.__dict__, "end_tokens", ends)
    whole = tokens_of(base, some, 30, compact=False)
    assert len({len(row) for row in whole}) > 1
    for block in (4, 8):
        assert tokens_of(base, some, 30, block=block, compact=True) == whole


def test_blocks_serve_a_constraint_and_leave_the_prompts_alone(lab, base, monkeypatch) -> None:
    """A step that only gives logits goes the same way, and no decoding sees another's tokens."""
    from mondrian_ft.evaluation.constrain import Constraint
    from mondrian_ft.evaluation.generate import generate_each
    from mondrian_ft.model import decode

    some = requests(lab, base, 3, ("Judge it.", LONG, "?"))
    constraint = Constraint.critique(base, ("Light",))

    def texts() -> list[list[str]]:
        found = generate_each(
            base, some, [None, constraint, None], max_tokens=40, batch_size=3, temperature=0.7
        )
        return [[one.text for one in outputs] for outputs in found]

    whole = texts()
    assert whole[0] == whole[2] != whole[1]
    monkeypatch.setattr(decode.Steps, "block", lambda self, rows: 6)
    assert texts() == whole


@pytest.mark.parametrize("many", [2, 4])
def test_a_step_never_changes_its_shapes_on_a_gpu(lab, base, monkeypatch, many) -> None:
    """One trace for a batch: else a GPU compiles anew, which costs more than the whole answer."""
    from mlx.utils import tree_flatten

    from mondrian_ft.model import decode

    some = requests(lab, base, 3)
    expected = answers(base, some, max_tokens=80)
    monkeypatch.setattr(decode, "ON_CPU", False)
    monkeypatch.setattr(decode, "MANY_ROWS", many)
    monkeypatch.setattr(decode, "NEW_COLUMNS", 16)
    seen: list[Any] = []
    plain = decode.Steps._token_step

    def watched(self: Any, *arrays: Any) -> Any:
        flat: Any = tree_flatten(arrays)
        seen.append([(name, tuple(one.shape), one.dtype) for name, one in flat])
        return plain(self, *arrays)

    monkeypatch.setattr(decode.Steps, "_token_step", watched)
    assert answers(base, some, max_tokens=80) == expected
    assert len(seen) == 79
    assert all(one == seen[0] for one in seen)
    columns = [shape[2] for _, shape, _ in seen[0] if len(shape) == 4]
    assert columns == ([256] * 4 if many == 4 else [256] * 4 + [16] * 4)


def test_one_prefill_serves_several_decodings(lab, base, monkeypatch) -> None:
    """Prompts are read once, whatever comes after; and no decoding sees another's tokens."""
    from mondrian_ft.evaluation import generate as module

    some = requests(lab, base, 5)
    expected = answers(base, some)
    read: list[int] = []
    plain = module.prefill
    monkeypatch.setattr(module, "prefill", lambda *a: read.append(1) or plain(*a))
    first, second = module.generate_each(base, some, [None, None], max_tokens=12, batch_size=3)
    assert len(read) == 2
    for outputs in (first, second):
        assert [(one.text, one.tokens, one.finished) for one in outputs] == expected


def test_times_are_told_apart(lab, base) -> None:
    """The prefill is a part of the whole, and the first token comes after it."""
    found = generate(base, requests(lab, base, 4), max_tokens=20, batch_size=4)
    for one in found:
        assert one.prefill_seconds is not None
        assert one.first_token_seconds is not None
        assert 0 < one.prefill_seconds < one.seconds
        assert 4 * one.prefill_seconds <= one.first_token_seconds < 4 * one.seconds


def test_an_answer_that_is_cut_is_not_finished(lab, base) -> None:
    """A random model never ends; the limit is obeyed and reported."""
    found = generate(base, requests(lab, base, 3), max_tokens=5, batch_size=2)
    assert [(one.tokens, one.finished) for one in found] == [(5, False)] * 3
    assert all(one.seconds > 0 for one in found)


def test_each_row_ends_at_its_own_end(lab, base, monkeypatch) -> None:
    """Either end token stops its row alone, counts as a token, and is no part of the text."""
    some = requests(lab, base, 3)
    # The token that row 0 writes third now ends an answer.
    raw = tokens_of(base, some, 10)
    end = raw[0][2]
    monkeypatch.setitem(base.encoder.__dict__, "end_tokens", frozenset({end}))
    found = generate(base, some, max_tokens=10, batch_size=3)
    for row, one in enumerate(found):
        where = raw[row].index(end) + 1 if end in raw[row] else None
        assert one.finished is (where is not None)
        assert one.tokens == (where or 10)
        assert one.text == base.text(raw[row][: where - 1] if where else raw[row])
    assert found[0].finished
    assert found[0].tokens <= 3


def test_dropout_is_off_whatever_mode_the_model_was_in(lab, base) -> None:
    """Right after an update the model is in training mode."""
    lab.attach(base, dropout=0.5)
    some = requests(lab, base, 2)
    base.model.eval()
    expected = answers(base, some)
    base.model.train()
    assert answers(base, some) == expected
    assert base.model.training is False


def test_temperature_draws_by_seed(lab, base) -> None:
    """Equal seeds, equal draws; another seed, others; 0 is greedy."""
    some = requests(lab, base, 2)
    first = answers(base, some, temperature=1.0, seed=1)
    assert answers(base, some, temperature=1.0, seed=1) == first
    assert answers(base, some, temperature=1.0, seed=2) != first
    assert answers(base, some, temperature=1e-4) == answers(base, some)
    # A row's draws are its own, whoever its neighbours are.
    assert answers(base, some, temperature=1.0, seed=1, batch_size=1) == first


def test_progress_counts_answers(lab, base) -> None:
    """Once per batch."""
    done: list[int] = []
    generate(base, requests(lab, base, 5), max_tokens=1, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]
    assert generate(base, [], max_tokens=1, batch_size=2) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(lab, value) -> None:
    """Argmax over NaN is a token like any other, so nothing else would notice."""
    broken = lab.load()
    norm = broken.backbone.text.norm
    norm.weight = norm.weight * value
    some = requests(lab, lab.base, 1)
    with pytest.raises(ModelError, match="logits that are not finite"):
        generate(broken, some, max_tokens=3, batch_size=1)


@pytest.mark.filterwarnings("ignore")
def test_greedy_text_equals_mlx_vlms_own_generate(lab, tmp_path) -> None:
    """The sample base with an exported adapter: our text is `mlx_vlm.generate`'s text."""
    from mlx_vlm.generate import generate as stock_generate
    from mlx_vlm.utils import load

    from mondrian_ft.data.batches import encode
    from mondrian_ft.data.pixels import PixelSettings
    from mondrian_ft.data.rows import Row
    from mondrian_ft.model import adapter as adapters
    from mondrian_ft.model import export
    from mondrian_ft.model.backend import mx
    from mondrian_ft.model.base import load_base
    from mondrian_ft.model.lora import lora_layers
    from mondrian_ft.sample import model_dir

    folder = Path(shutil.copytree(model_dir(), tmp_path / "model"))
    base = load_base(folder, name="sample")
    spec = lab.attach(base)
    for layer in lora_layers(base.model).values():
        layer["lora_b"] = 0.02 * mx.random.normal(layer["lora_b"].shape)
    written = adapters.save(
        tmp_path / "adapter", base, spec, pixels={}, prompts=[], data_lock="", facts={}
    )
    export.export_mlx(written, tmp_path / "mlx")
    stock: Any
    processor: Any
    stock, processor = load(str(folder), adapter_path=str(tmp_path / "mlx"))
    size = json.loads((folder / "preprocessor_config.json").read_text())["size"]
    bounds = PixelSettings(size["shortest_edge"], size["longest_edge"])
    prompt = "Analyze the provided image."
    for number, (width, height) in enumerate([(160, 128), (96, 144)]):
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        values = np.stack([x, y, 255 - (x if number else y)], axis=-1).astype(np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(values).save(path)
        row = Row("a", "ansel", path, prompt, "{}", str(number))
        example = encode(row, base, base.image_processor, bounds, base.backbone.image_token)
        store = FeatureStore(base.backbone)
        (features,) = store.get([(str(number), example.pixels)])
        tokens = base.prompt_tokens(prompt, example.pixels.tokens)
        (ours,) = generate(
            base, [Request(tokens, features, example.pixels.grid)], max_tokens=60, batch_size=1
        )
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        theirs: Any = stock_generate(
            stock, processor, text, image=str(path), max_tokens=60, temperature=0.0
        )
        assert ours.text.strip() == theirs.text.strip()
        assert len(ours.text) > 40
        assert theirs.prompt_tokens == ours.prompt_tokens
