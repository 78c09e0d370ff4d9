"""The fast step is exact: whatever it leaves out, divides or fills up changes no loss and no
gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.data.rooms import Rooms
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx, nn, number
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.training import optim
from mondrian_ft.training.loss import (
    chunked_cross_entropy,
    device_batch,
    device_parts,
    token_losses,
)
from mondrian_ft.training.step import UpdateStep


def gradient(base: Any, loss: Any) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the LoRA tensors."""
    from mlx.utils import tree_flatten

    parameters = base.model.trainable_parameters()

    def of(values: Any) -> Any:
        base.model.update(values)
        return loss()

    value, grads = mx.value_and_grad(of)(parameters)
    mx.eval(value, grads)
    base.model.update(parameters)
    found: dict[str, Any] = dict(tree_flatten(grads))  # pyright: ignore
    return number(value), {name: np.array(one) for name, one in found.items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.abs(value - b[name]).max() <= tolerance * np.abs(value).max() + 1e-7, name


def stock(base: Any, examples: list[Any]) -> Any:
    """mlx-vlm's own forward, each row alone with its pixels: vision tower, positions, full
    logits."""

    def loss() -> Any:
        total = mx.array(0.0)
        for one in examples:
            tokens = mx.array(one.tokens[None])
            logits = base.model(
                tokens,
                mx.array(one.pixels.patches),
                mx.ones_like(tokens),
                image_grid_thw=mx.array([one.pixels.grid]),
            ).logits[0, one.prompt_length - 1 : -1]
            wanted = mx.array(one.tokens[one.prompt_length :])
            total = total + nn.losses.cross_entropy(logits.astype(mx.float32), wanted).sum()
        return total / sum(one.supervised for one in examples)

    return loss


def ours(base: Any, examples: list[Any], *, room: Any = None, checkpoint: bool = False) -> Any:
    batch = collate(examples, range(len(examples)), base.pad_token)
    ready = device_batch(batch, base.backbone, FeatureStore(base.backbone), room)
    return lambda: (
        token_losses(base.backbone, *ready, checkpoint=checkpoint).sum() / batch.supervised
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_loss_and_gradients_are_the_stock_forwards(lab, base, method, checkpoint) -> None:
    """Seven photographs of seven sizes in one batch, each row alone through mlx-vlm's forward."""
    lab.attach(base, method=method)
    base.model.train()
    examples = lab.examples(7)
    assert len({one.pixels.grid for one in examples}) >= 5
    loss, grads = gradient(base, ours(base, examples, checkpoint=checkpoint))
    expected, stocks = gradient(base, stock(base, examples))
    assert loss == pytest.approx(expected, rel=1e-5)
    equal(stocks, grads)
    assert all(np.abs(value).max() > 0 for value in grads.values())


def test_the_gradient_is_the_losss(lab, base) -> None:
    """Central differences in a direction: custom backward passes are not taken at their word."""
    from mlx.utils import tree_flatten, tree_unflatten

    lab.attach(base)
    loss = ours(base, lab.examples(3))
    _, grads = gradient(base, loss)
    flat: Any = tree_flatten(base.model.trainable_parameters())
    random = np.random.default_rng(0)
    directions = {name: random.standard_normal(value.shape) for name, value in flat}

    def moved(by: float) -> float:
        values = [
            (name, value + mx.array((by * directions[name]).astype(np.float32)))
            for name, value in flat
        ]
        base.model.update(tree_unflatten(values))
        return number(loss())

    step = 2e-3
    slope = (moved(step) - moved(-step)) / (2 * step)
    base.model.update(tree_unflatten(flat))
    assert slope == pytest.approx(
        sum((grads[name] * directions[name]).sum() for name in grads), rel=0.02
    )


@pytest.mark.parametrize("count", [1, 3, 5])
def test_filling_up_changes_nothing(lab, base, count) -> None:
    """Longer rows, empty rows, more trained and image tokens than there are."""
    lab.attach(base)
    examples = lab.examples(5)
    rooms = Rooms(examples, batch_size=6)
    some = examples[:count]
    room = rooms.of(collate(some, range(count), base.pad_token))
    assert (room.rows, room.length % 128, room.trained % 128, room.images % 128) == (6, 0, 0, 0)
    plain = gradient(base, ours(base, some))
    filled = gradient(base, ours(base, some, room=room))
    assert filled[0] == pytest.approx(plain[0], rel=1e-6)
    equal(plain[1], filled[1])


def test_rows_one_by_one_are_the_batch(lab, base) -> None:
    """On a CPU rows are computed alone."""
    lab.attach(base)
    examples = lab.examples(5)
    batch = collate(examples, range(5), base.pad_token)
    store = FeatureStore(base.backbone)
    whole = np.array(token_losses(base.backbone, *device_batch(batch, base.backbone, store)))
    parts = device_parts(batch, base.backbone, store)
    assert len(parts) == 5
    rows = [np.array(token_losses(base.backbone, *part)) for part in parts]
    assert np.allclose(np.concatenate(rows), whole, atol=2e-5)


def step_of(base: Any, **options: Any) -> UpdateStep:
    schedule = optim.learning_rate(5e-3, warmup=2, total=6, schedule="cosine")
    optimizer = optim.adamw(schedule, weight_decay=0.01)
    optimizer.init(base.model.trainable_parameters())
    return UpdateStep(base.backbone, optimizer, **options)


def test_an_update_that_is_not_finite_changes_nothing(lab, base) -> None:
    """Neither weights nor moments nor the count of updates, without anybody asking the device."""
    from mlx.utils import tree_flatten

    lab.attach(base)
    batch = collate(lab.examples(2), range(2), base.pad_token)
    parts = device_parts(batch, base.backbone, FeatureStore(base.backbone))
    step = step_of(base)
    assert bool(step([parts], batch.supervised).applied.item())

    def everything() -> dict[str, np.ndarray]:
        state: Any = tree_flatten(step.optimizer.state)
        return {**lab.weights(base), **{name: np.array(value) for name, value in state}}

    before = everything()
    layer = next(iter(lora.lora_layers(base.model).values()))
    kept = layer.linear.weight
    layer.linear.weight = kept * float("nan")
    done = step([parts], batch.supervised)
    layer.linear.weight = kept
    assert not bool(done.applied.item())
    assert not np.isfinite(number(done.loss))
    after = everything()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert bool(step([parts], batch.supervised).applied.item())
    assert any(not np.array_equal(before[name], one) for name, one in everything().items())


def test_a_layer_left_in_evaluation_is_trained_with_dropout(lab, base) -> None:
    """One that was out of the model while the others were put back to training."""
    lab.attach(base, dropout=0.5)
    batch = collate(lab.examples(1), range(1), base.pad_token)
    parts = device_parts(batch, base.backbone, FeatureStore(base.backbone))
    step = step_of(base)
    step([parts], batch.supervised)
    layers = lora.lora_layers(base.model)
    assert all(one.training for one in layers.values())
    next(iter(layers.values())).eval()
    step([parts], batch.supervised)
    assert all(one.training for one in layers.values())


def test_weights_put_in_from_outside_are_what_is_trained(lab, base) -> None:
    """A restored checkpoint, say: the step's own vectors are then out of date."""
    lab.attach(base, live=False)
    batch = collate(lab.examples(2), range(2), base.pad_token)
    parts = device_parts(batch, base.backbone, FeatureStore(base.backbone))
    step = step_of(base)
    first = number(step([parts], batch.supervised).loss)
    step([parts], batch.supervised)
    lora.set_tensors(
        base.model,
        {
            name: value * 0 if name.endswith("lora_b") else value
            for name, value in lora.tensors(base.model).items()
        },
    )
    assert number(step([parts], batch.supervised).loss) == pytest.approx(first, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_steps_are_the_eager_ones(lab, base, checkpoint) -> None:
    """Three updates, the second after another shape; compiled by a C++ compiler here."""
    lab.attach(base)
    examples = lab.examples(4)
    start = lora.tensors(base.model)
    store = FeatureStore(base.backbone)
    batches = [collate(examples, rows, base.pad_token) for rows in ((0, 1), (2, 3), (0, 1))]
    results = []
    try:
        mx.enable_compile()
        for compiled in (False, True):
            lora.set_tensors(base.model, start)
            step = step_of(base, compiled=compiled, checkpoint=checkpoint)
            losses = [
                number(step([[device_batch(one, base.backbone, store)]], one.supervised).loss)
                for one in batches
            ]
            results.append((losses, lab.weights(base)))
    finally:
        mx.disable_compile()
    (eager, weights), (compiled, others) = results
    assert compiled == pytest.approx(eager, rel=1e-5)
    equal(weights, others, 1e-4)


def test_logits_by_chunks(lab, base) -> None:
    """However many rows a chunk has: losses, and gradients for any weights of the losses."""
    h = mx.random.normal((150, 64))
    wanted = mx.array(np.random.default_rng(1).integers(-1, 1024, 150).astype(np.int32))
    weights = mx.random.normal((150,))

    def plain(h: Any) -> Any:
        logits = base.backbone.head(h)
        losses = nn.losses.cross_entropy(logits, mx.maximum(wanted, 0))
        return (mx.where(wanted >= 0, losses, 0) * weights).sum()

    expected, slope = mx.value_and_grad(plain)(h)
    for rows in (1, 64, 100, 1000):
        size = rows * base.backbone.vocabulary * 4
        value, found = mx.value_and_grad(
            lambda h, size=size: (
                chunked_cross_entropy(base.backbone, h, wanted, chunk_bytes=size)[0] * weights
            ).sum()
        )(h)
        assert number(value) == pytest.approx(number(expected), rel=1e-5, abs=1e-3)
        assert np.allclose(np.array(found), np.array(slope), atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_gives_its_own_loss_and_gradients(lab, bits) -> None:
    """The same as mlx-vlm's forward over the same quantised matrices."""
    base = lab.load(quantize_bits=bits)
    lab.attach(base)
    base.model.train()
    examples = lab.examples(3, base=base)
    loss, grads = gradient(base, ours(base, examples, checkpoint=True))
    expected, stocks = gradient(base, stock(base, examples))
    assert loss == pytest.approx(expected, rel=1e-5)
    equal(stocks, grads, 1e-4)


def test_checkpointing_leaves_nothing_behind(lab, base) -> None:
    """Elsewhere it patches the layer's class, for every model of the process."""
    lab.attach(base)
    kind = type(base.backbone.text.layers[0])
    before = kind.__call__
    own = dict(vars(kind))
    gradient(base, ours(base, lab.examples(1), checkpoint=True))
    assert kind.__call__ is before
    assert dict(vars(kind)) == own


@pytest.mark.slow
def test_a_compiled_step_does_not_hold_the_expanded_model() -> None:
    """A compiler that makes equal expressions once would expand a quantised matrix for the forward
    pass and hold it for the backward pass: 12.9 GB for a 4-bit base of 3.8 GB, on a GPU."""
    from mondrian_ft.model.lora_layers import LoRALayer, project

    count, size = 24, 768
    layers = [
        LoRALayer.from_base(
            nn.QuantizedLinear.from_linear(nn.Linear(size, size, bias=False), 64, 4), r=4
        )
        for _ in range(count)
    ]
    adapters = [(layer.lora_a, layer.lora_b) for layer in layers]
    x = mx.random.normal((64, size))
    mx.eval(x, adapters, [layer.parameters() for layer in layers])

    def loss(adapters: Any, x: Any) -> Any:
        for layer, (a, b) in zip(layers, adapters, strict=True):
            layer.lora_a, layer.lora_b = a, b
            (x,) = project((layer,), x)
        return x.sum()

    try:
        mx.enable_compile()
        step = mx.compile(mx.value_and_grad(loss))
        mx.eval(step(adapters, x))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(adapters, x))
    finally:
        mx.disable_compile()
    assert mx.get_peak_memory() - before < count * size * size * 4 / 2


@pytest.mark.parametrize("name", ["AdamW", "Muon", "Adafactor"])
def test_the_step_is_the_optimizers_own(lab, base, name) -> None:
    """Three updates as MLX's optimizer makes them on the model's arrays; Muon and Adafactor look at
    whole matrices, which one vector of all numbers would hide."""
    import mlx.optimizers

    lab.attach(base)
    examples = lab.examples(2)
    batch = collate(examples, range(2), base.pad_token)
    parts = device_parts(batch, base.backbone, FeatureStore(base.backbone))
    start = lora.tensors(base.model)
    kind = getattr(mlx.optimizers, name)
    reference = kind(learning_rate=1e-2)
    for _ in range(3):
        parameters = base.model.trainable_parameters()

        def loss(values: Any) -> Any:
            base.model.update(values)
            sums = [token_losses(base.backbone, *part).sum() for part in parts]
            return sum(sums[1:], sums[0]) / batch.supervised

        grads = mx.value_and_grad(loss)(parameters)[1]
        base.model.update(parameters)
        reference.update(base.model, grads)
    expected = lab.weights(base)
    lora.set_tensors(base.model, start)
    optimizer = kind(learning_rate=1e-2)
    optimizer.init(base.model.trainable_parameters())
    step = UpdateStep(base.backbone, optimizer, max_grad_norm=0)
    for _ in range(3):
        step([parts], batch.supervised)
    equal(expected, lab.weights(base), 2e-3)
