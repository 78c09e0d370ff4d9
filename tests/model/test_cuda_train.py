"""The kernels of the training step say what MLX's operations say, forward and backward.

They need a CUDA device; elsewhere these tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest

from mondrian_ft.model import cuda_joined, cuda_train, decoder
from mondrian_ft.model.backend import ON_CPU, mx, nn

pytestmark = pytest.mark.skipif(
    ON_CPU or not mx.cuda.is_available(), reason="kernels for CUDA, and there is no such device"
)


def drawn(*shape: int, seed: int, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(mx.bfloat16)


def norm(size: int, seed: int) -> Any:
    made = nn.RMSNorm(size, eps=1e-6)
    made.weight = 1 + drawn(size, seed=seed, scale=0.2)
    return made


def same(found: mx.array, wanted: mx.array, what: str) -> None:
    """Within what rounding to bfloat16 costs, of the largest number."""
    assert found.shape == wanted.shape
    off = mx.abs(found.astype(mx.float32) - wanted.astype(mx.float32)).max()
    assert float(off) <= 0.012 * float(mx.abs(wanted.astype(mx.float32)).max()) + 1e-6, what


def wide(*arrays: mx.array) -> list[mx.array]:
    return [one.astype(mx.float32) for one in arrays]


@pytest.mark.parametrize(("rows", "width"), [(5, 8), (300, 9728)])
def test_the_gate(rows: int, width: int) -> None:
    gate, up, above = (drawn(rows, width, seed=n, scale=3.0) for n in range(3))
    made, back = mx.vjp(cuda_train.gated, [gate, up], [above])
    wanted, slopes = mx.vjp(lambda g, u: nn.silu(g) * u, wide(gate, up), wide(above))
    same(made[0], wanted[0], "forward")
    for name, one, other in zip(("gate", "up"), back, slopes, strict=True):
        same(one, other, name)


@pytest.mark.parametrize(("heads", "rows", "length"), [(1, 1, 3), (32, 2, 130)])
def test_heads_normalised_and_turned(heads: int, rows: int, length: int) -> None:
    tokens = rows * length
    x, above = (drawn(tokens, heads * 128, seed=n) for n in range(2))
    angles = mx.random.uniform(0, 6, (rows, length, 64), key=mx.random.key(5))
    cos, sin = (mx.concatenate([f(angles)] * 2, axis=-1) for f in (mx.cos, mx.sin))
    turn = decoder.rotary(cos.astype(mx.bfloat16), sin.astype(mx.bfloat16))
    scale = norm(128, 9)

    def plain(x: mx.array) -> mx.array:
        split = mx.fast.rms_norm(
            x.reshape(tokens, heads, 128), scale.weight.astype(mx.float32), 1e-6
        )
        exact: Any = decoder._turned
        turned = exact(split.reshape(rows, length, heads, 128), *wide(*turn))
        return turned.reshape(tokens, -1)

    made, back = mx.vjp(lambda x: cuda_train.turned(x, scale, turn, heads), [x], [above])
    wanted, slopes = mx.vjp(plain, wide(x), wide(above))
    same(made[0], wanted[0], "forward")
    same(back[0], slopes[0], "backward")


@pytest.mark.parametrize(("rows", "width"), [(5, 8), (300, 9728)])
def test_the_gate_of_a_pair_side_by_side(rows: int, width: int) -> None:
    """Bit for bit what the two apart give."""
    gate, up, above = (drawn(rows, width, seed=n, scale=3.0) for n in range(3))
    made, back = mx.vjp(cuda_joined.gated_pair, [mx.concatenate([gate, up], axis=1)], [above])
    wanted, slopes = mx.vjp(cuda_train.gated, [gate, up], [above])
    assert mx.array_equal(made[0], wanted[0])
    assert mx.array_equal(back[0], mx.concatenate(slopes, axis=1))


@pytest.mark.parametrize(("q", "kv", "rows", "length"), [(1, 1, 1, 3), (32, 8, 2, 130)])
def test_queries_keys_and_values_side_by_side(q: int, kv: int, rows: int, length: int) -> None:
    """Bit for bit what each alone gives; values go through as they are, and so do their slopes."""
    tokens = rows * length
    parts = [drawn(tokens, heads * 128, seed=n) for n, heads in enumerate((q, kv, kv))]
    above = [drawn(tokens, heads * 128, seed=5 + n) for n, heads in enumerate((q, kv, kv))]
    angles = mx.random.uniform(0, 6, (rows, length, 64), key=mx.random.key(5))
    cos, sin = (mx.concatenate([f(angles)] * 2, axis=-1) for f in (mx.cos, mx.sin))
    turn = decoder.rotary(cos.astype(mx.bfloat16), sin.astype(mx.bfloat16))
    norms = norm(128, 9), norm(128, 10)
    x = mx.concatenate(parts, axis=1)
    made, back = mx.vjp(lambda x: cuda_joined.turned_all(x, norms, turn, (q, kv)), [x], above)
    wanted, slopes = [], []
    for part, given, scale, heads in zip(parts[:2], above, norms, (q, kv), strict=False):
        one, slope = mx.vjp(
            lambda x, scale=scale, heads=heads: cuda_train.turned(x, scale, turn, heads),
            [part],
            [given],
        )
        wanted += one
        slopes += slope
    for one, other in zip(made, [*wanted, parts[2]], strict=True):
        assert mx.array_equal(one, other)
    assert mx.array_equal(back[0], mx.concatenate([*slopes, above[2]], axis=1))


@pytest.mark.parametrize("sizes", [(4096, 1024, 1024), (9728, 9728), (8, 16, 8)])
def test_adapters_packed(sizes: tuple[int, ...]) -> None:
    """A side by side, B on the diagonal of zeros."""
    firsts = [drawn(2560, 16, seed=n) for n in range(len(sizes))]
    seconds = [drawn(16, size, seed=9 + n) for n, size in enumerate(sizes)]
    a, b = cuda_joined.packed(firsts, seconds)
    assert mx.array_equal(a, mx.concatenate(firsts, axis=1))
    start = 0
    for number, one in enumerate(seconds):
        rows = b[16 * number : 16 * (number + 1)]
        end = start + one.shape[1]
        assert mx.array_equal(rows[:, start:end], one)
        assert not rows[:, :start].any()
        assert not rows[:, end:].any()
        start = end


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_joined_products_train_what_products_apart_train(
    bits: int | None, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient norm of a layer's shape as in the large model, some updates long."""
    from benchmarks import training_4b

    shapes = training_4b.Shapes(layers=2, hidden=2560, side=8, text=150, trained=60)
    options = (("checkpoint", checkpoint), *((("bits", bits),) if bits else ()))
    party = training_4b.Party("ours", (2,), options)
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr("mondrian_ft.model.joined.join", lambda layers: None)
        ((_, one),) = training_4b._ours(party, shapes, 1)
        found.append(one["losses"])
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert found[0][-1] < found[0][0] - 0.05


@pytest.mark.parametrize("width", [8, 64, 2560, 8192])
def test_a_norm_and_the_way_around_it(width: int) -> None:
    h, above, beside = (drawn(37, width, seed=n, scale=2.0) for n in range(3))
    scale = norm(width, 4)
    made, back = mx.vjp(lambda h: cuda_train.normed(h, scale), [h], [above, beside])
    weight = scale.weight.astype(mx.float32)
    wanted, slopes = mx.vjp(
        lambda h: (mx.fast.rms_norm(h, weight, 1e-6), h), wide(h), wide(above, beside)
    )
    same(made[0], wanted[0], "forward")
    assert mx.array_equal(made[1], h)
    same(back[0], slopes[0], "backward")


@pytest.mark.parametrize(("rows", "width"), [(3, 8), (40, 151_936)])
def test_cross_entropy(rows: int, width: int) -> None:
    logits = drawn(rows, width, seed=1, scale=4.0)
    wanted = mx.random.randint(0, width, (rows,), key=mx.random.key(2)).astype(mx.int32)
    wanted[0] = -1
    wanted[1] = mx.argmax(logits[1].astype(mx.float32)).astype(mx.int32)
    losses, hits, slope = cuda_train.cross_entropy(logits, wanted)
    exact = logits.astype(mx.float32)
    told = nn.losses.cross_entropy(exact, mx.maximum(wanted, 0))
    same(losses, mx.where(wanted >= 0, told, 0), "losses")
    likeliest = (mx.argmax(exact, axis=-1) == wanted).astype(mx.int32)
    assert mx.array_equal(hits, likeliest)
    assert hits[1].item() == 1
    share = mx.softmax(exact, axis=-1) - (mx.arange(width)[None] == wanted[:, None])
    same(slope, mx.where(wanted[:, None] >= 0, share, 0), "gradient")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_no_number_is_not_hidden(bad: float) -> None:
    logits = drawn(2, 512, seed=1)
    logits[0, 77] = bad
    losses, _, slope = cuda_train.cross_entropy(logits, mx.array([3, 3], mx.int32))
    assert not mx.isfinite(losses[0]).item()
    assert mx.isfinite(losses[1]).item()
    assert mx.isfinite(slope[1]).all().item()
