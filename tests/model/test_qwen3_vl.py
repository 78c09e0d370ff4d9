"""Our dense forward gives what mlx-vlm's own forward gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.errors import ModelError
from mondrian_ft.model import decoder, lora
from mondrian_ft.model.backend import mx, nn
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.model.qwen3_vl import assemble, positions_of
from mondrian_ft.training.loss import device_batch, token_losses


def flat(tree: Any) -> dict[str, Any]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))  # pyright: ignore


def stock_logits(model: Any, batch: Any) -> mx.array:
    """mlx-vlm's own forward, pixels and all."""
    return model(
        mx.array(batch.tokens),
        pixel_values=mx.array(np.concatenate([one.pixels.patches for one in batch.examples])),
        image_grid_thw=mx.array([one.pixels.grid for one in batch.examples]),
    ).logits


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


@pytest.fixture
def batch(lab, base) -> Any:
    """Five rows, four picture sizes, right-padded."""
    return collate(lab.examples(5), range(5), base.pad_token)


def test_logits_equal_the_stock_forward(lab, base, batch) -> None:
    """Mixed picture sizes, deepstack, LoRA and right padding: every real position agrees."""
    lab.attach(base)
    inputs, _, _ = device_batch(batch, base.backbone, FeatureStore(base.backbone))
    ours = base.backbone.head(base.backbone.hidden(inputs))
    stock = stock_logits(base.model, batch)
    assert len({one.pixels.grid for one in batch.examples}) >= 4
    for row, example in enumerate(batch.examples):
        size = len(example.tokens)
        assert largest(ours[row, :size], stock[row, :size]) < 2e-5
    assert float(mx.abs(stock).max()) > 1  # on a scale where 2e-5 says something


def test_lora_gradients_equal_those_of_the_stock_forward(lab, base, batch) -> None:
    """Not only the numbers but what training does with them; and all of them are trained."""
    lab.attach(base)
    inputs, where, wanted = device_batch(batch, base.backbone, FeatureStore(base.backbone))

    def ours(_: Any) -> mx.array:
        return token_losses(base.backbone, inputs, where, wanted).sum()

    def stock(model: Any) -> mx.array:
        logits = stock_logits(model, batch).reshape(-1, 1024)[where]
        return nn.losses.cross_entropy(logits, wanted).sum()

    loss, grads = nn.value_and_grad(base.model, ours)(base.model)
    other, wanted_grads = nn.value_and_grad(base.model, stock)(base.model)
    mx.eval(loss, grads, other, wanted_grads)
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    mine, theirs = flat(grads), flat(wanted_grads)
    assert sorted(mine) == sorted(theirs) == sorted(lora.tensors(base.model))
    for name, value in theirs.items():
        scale = float(mx.abs(value).max())
        assert scale > 0, name
        assert largest(mine[name], value) < 1e-4 * scale, name


@pytest.mark.parametrize("size", [(64, 96), (128, 64), (352, 224)])
def test_tower_equals_the_stock_tower(lab, base, size) -> None:
    """Features and each deepstack level, also where the learned positions are interpolated."""
    grid = (1, size[1] // 16, size[0] // 16)
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(grid[1] * grid[2], 3 * 2 * 16 * 16)).astype(np.float32)
    (ours,) = base.backbone.encode(patches, grid)
    features, deepstack = base.model.vision_tower(mx.array(patches), mx.array([grid]))
    assert len(ours.deepstack) == len(deepstack) == 1
    assert largest(ours.features, features) < 2e-5
    assert largest(ours.deepstack[0], deepstack[0]) < 2e-5


def test_pictures_of_one_size_are_encoded_together_as_alone(lab, base) -> None:
    """A batch of pictures never looks at its neighbours."""
    rng = np.random.default_rng(1)
    patches = rng.normal(size=(3, 24, 1536)).astype(np.float32)
    together = base.backbone.encode(patches, (1, 4, 6))
    for picture, one in zip(patches, together, strict=True):
        (alone,) = base.backbone.encode(picture, (1, 4, 6))
        assert largest(one.features, alone.features) < 1e-5


def test_positions_equal_mlx_vlms(lab, base, batch) -> None:
    """MRoPE positions, token for token, for several picture sizes at once."""
    lengths = [len(one.tokens) for one in batch.examples]
    attended = (np.arange(batch.tokens.shape[1])[None] < np.array(lengths)[:, None]).astype(int)
    grids = mx.array([one.pixels.grid for one in batch.examples])
    theirs, _ = base.model.language_model.get_rope_index(
        mx.array(batch.tokens), grids, None, mx.array(attended)
    )
    inputs, following = assemble(
        batch.tokens,
        lengths,
        FeatureStore(base.backbone).get([(str(i), e.pixels) for i, e in enumerate(batch.examples)]),
        [one.pixels.grid for one in batch.examples],
        image_token=base.backbone.image_token,
        merge=base.backbone.merge,
    )
    for row, length in enumerate(lengths):
        assert np.array_equal(
            np.array(theirs)[:, row, :length], np.array(inputs.positions)[:, row, :length]
        )
        assert following[row] == np.array(theirs)[:, row, :length].max() + 1
    assert np.array_equal(positions_of(4, None, (1, 2, 2)), [[0, 1, 2, 3]] * 3)


def test_padding_and_neighbours_change_nothing(lab, base, batch) -> None:
    """A row in a batch of mixed sizes has the losses it has alone."""
    lab.attach(base)
    store = FeatureStore(base.backbone)
    examples = list(batch.examples)
    together = np.array(token_losses(base.backbone, *device_batch(batch, base.backbone, store)))
    alone = [
        np.array(
            token_losses(
                base.backbone,
                *device_batch(collate(examples, [row], base.pad_token), base.backbone, store),
            )
        )
        for row in range(len(examples))
    ]
    assert np.allclose(together, np.concatenate(alone), atol=2e-5)


def grads_of(base: Any, batch: Any, *, checkpoint: bool) -> tuple[float, dict[str, np.ndarray]]:
    inputs, where, wanted = device_batch(batch, base.backbone, FeatureStore(base.backbone))
    base.model.train()
    mx.random.seed(11)

    def loss(_: Any) -> mx.array:
        return token_losses(base.backbone, inputs, where, wanted, checkpoint=checkpoint).mean()

    value, grads = nn.value_and_grad(base.model, loss)(base.model)
    mx.eval(value, grads)
    return float(value.item()), {name: np.array(grad) for name, grad in flat(grads).items()}


def test_gradient_checkpointing_changes_no_number(lab, base, batch) -> None:
    """Memory is all it costs less of; the weights are untouched by the second run of a layer."""
    lab.attach(base)
    before = lab.weights(base)
    loss, grads = grads_of(base, batch, checkpoint=False)
    loss2, grads2 = grads_of(base, batch, checkpoint=True)
    assert loss == loss2
    for name, grad in grads.items():
        assert np.allclose(grad, grads2[name], rtol=1e-5, atol=1e-7), name
    assert all(np.array_equal(before[name], now) for name, now in lab.weights(base).items())


class NotRecomputed:
    """MLX without functions that have a backward pass of their own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    class custom_function:
        def __init__(self, function: Any) -> None:
            self.function = function

        def vjp(self, backward: Any) -> Any:
            return backward

        def __call__(self, *args: Any) -> Any:
            return self.function(*args)


@pytest.mark.parametrize(
    ("method", "vision"), [("lora", ()), ("lora", ("qkv", "linear_fc1")), ("dora", ())]
)
def test_gradient_checkpointing_draws_one_dropout_mask(
    lab, base, batch, monkeypatch, method, vision
) -> None:
    """The second run of a layer once drew another mask, so the gradient was not the loss's.

    It did so twice: this test once compared the recomputed gradient with itself, and did not see
    that the way through the layers had become another one.
    """
    lab.attach(base, dropout=0.4, method=method, vision=vision)
    loss, grads = grads_of(base, batch, checkpoint=True)
    again, _ = grads_of(base, batch, checkpoint=True)
    monkeypatch.setattr(decoder, "mx", NotRecomputed())
    plain_loss, plain = grads_of(base, batch, checkpoint=True)
    assert loss == plain_loss == again
    for name, grad in plain.items():
        assert np.allclose(grad, grads[name], rtol=1e-4, atol=1e-6), name
    # Layers and updates do not share a mask.
    monkeypatch.undo()
    mx.random.seed(12)
    store = FeatureStore(base.backbone)
    inputs, where, wanted = device_batch(batch, base.backbone, store)
    losses = [
        token_losses(base.backbone, inputs, where, wanted, checkpoint=True).mean().item()
        for _ in range(2)
    ]
    assert losses[0] != losses[1]


def test_gradient_checkpointing_leaks_to_no_other_model(lab, base, batch) -> None:
    """mlx-lm patches the layer's class, so the next job of a multirun recomputes too."""
    other = lab.load()
    method = type(other.backbone.text.layers[0]).__call__
    lab.attach(base)
    grads_of(base, batch, checkpoint=True)
    layer = other.backbone.text.layers[0]
    assert type(layer).__call__ is method
    assert "__call__" not in vars(layer)


@pytest.mark.parametrize("fault", ["too few", "none", "split"])
def test_image_tokens_that_do_not_match_the_picture_are_refused(lab, base, fault) -> None:
    """Dropped image tokens once trained on in silence elsewhere; here they stop the batch."""
    (example,) = lab.examples(1)
    tokens = example.tokens.copy()[None]
    start, count = example.image_start, example.pixels.tokens
    if fault == "too few":
        tokens[0, start + count - 1] = base.pad_token
    elif fault == "none":
        tokens[0, start : start + count] = base.pad_token
    else:
        tokens[0, start + count] = base.backbone.image_token
        tokens[0, start + 1] = base.pad_token
    features = FeatureStore(base.backbone).get([("a", example.pixels)])
    with pytest.raises(ModelError, match="image tokens for a picture of 6"):
        assemble(
            tokens,
            [tokens.shape[1]],
            features,
            [example.pixels.grid],
            image_token=base.backbone.image_token,
            merge=base.backbone.merge,
        )


def test_text_alone_equals_the_stock_forward(lab, base) -> None:
    """A row without a picture, alone and below one with a picture; image tokens are refused."""
    (example,) = lab.examples(1)
    (picture,) = FeatureStore(base.backbone).get([("a", example.pixels)])
    text = np.array(base.text_prompt_tokens("What is light?"), np.int32)
    width = len(example.tokens)
    tokens = np.full((2, width), base.pad_token, np.int32)
    tokens[0], tokens[1, : len(text)] = example.tokens, text
    settings = {"image_token": base.backbone.image_token, "merge": base.backbone.merge}
    both, following = assemble(
        tokens, [width, len(text)], [picture, None], [example.pixels.grid, None], **settings
    )
    alone, after = assemble(text[None], [len(text)], [None], [None], **settings)
    theirs = base.model(mx.array(text[None])).logits
    for inputs, row in ((both, 1), (alone, 0)):
        ours = base.backbone.head(base.backbone.hidden(inputs))[row, : len(text)]
        assert largest(ours, theirs[0]) < 1e-4
    assert following[1] == after[0] == len(text)
    with pytest.raises(ModelError, match="image tokens and no picture"):
        assemble(tokens, [width, len(text)], [None, None], [None, None], **settings)


def test_a_store_computes_each_photograph_once_within_its_bound(lab, base, monkeypatch) -> None:
    """Once per photograph; the least recently used goes first and is computed again."""
    examples = lab.examples(3)
    asked: list[int] = []
    encode = base.backbone.encode
    monkeypatch.setattr(
        base.backbone, "encode", lambda p, g: asked.append(len(p)) or encode(p, g), raising=False
    )
    store = FeatureStore(base.backbone)
    pictures = [(one.row.image_sha256, one.pixels) for one in examples]
    first = store.get([*pictures, pictures[0]])
    assert sum(asked) == 3
    assert first[3] is first[0]
    store.get(pictures)
    assert sum(asked) == 3
    small = FeatureStore(base.backbone, max_bytes=1)
    asked.clear()
    again = small.get(pictures)
    small.get(pictures[2:])
    assert sum(asked) == 3
    small.get(pictures[:1])
    assert sum(asked) == 4
    assert all(largest(a.features, b.features) == 0 for a, b in zip(first, again, strict=False))


def test_a_store_keeps_two_sizes_of_one_photograph_apart(lab, base) -> None:
    """It once knew a photograph by its hash alone, and gave the features of the other size."""
    small, large = lab.examples(2)
    store = FeatureStore(base.backbone)
    one, other = store.get([("same", small.pixels), ("same", large.pixels)])
    assert one.features.shape[0] == small.pixels.tokens
    assert other.features.shape[0] == large.pixels.tokens
    assert store.get([("same", small.pixels)])[0] is one
