"""Our attention says what plain arithmetic in float32 says, forward and backward.

It needs a Hopper GPU; elsewhere these tests are skipped.
"""

from __future__ import annotations

import pytest

from mondrian_ft.model import cuda_attention, cuda_joined, decoder
from mondrian_ft.model.backend import mx, nn

pytestmark = pytest.mark.skipif(
    not cuda_attention.on_hopper(), reason="kernels for Hopper, and there is no such device"
)

SCALE = 128**-0.5


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16)


def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """By the definition."""
    times, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (mx.repeat(one, times, axis=2).transpose(0, 2, 1, 3) for one in (k, v))
    # Sums of products by hand: the GPU's float32 products have 10 bits (TF32).
    scores = (q.transpose(0, 2, 1, 3)[:, :, :, None] * k[:, :, None]).sum(-1) * SCALE
    hidden = mx.arange(length)[None, :] > mx.arange(length)[:, None]
    shares = mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1, precise=True)
    return (shares[..., None] * v[:, :, None]).sum(-2).transpose(0, 2, 1, 3)


def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return cuda_attention.attention(q, k, v, SCALE)


def close(found: mx.array, wanted: mx.array, what: str) -> None:
    """As close as rounding of scores' shares and of results to 8 bits allows."""
    assert found.shape == wanted.shape
    off = found.astype(mx.float32) - wanted
    share = float(mx.sqrt((off * off).sum()) / mx.sqrt((wanted * wanted).sum()))
    assert share < 0.005, (what, share)


@pytest.mark.parametrize(
    ("rows", "length", "heads", "shared"),
    [(1, 128, 1, 1), (1, 384, 4, 4), (2, 256, 6, 3), (3, 128, 10, 5), (2, 384, 4, 1)],
)
def test_it_is_attention(rows: int, length: int, heads: int, shared: int) -> None:
    others = heads // shared
    q, above = (drawn(rows, length, heads, 128, seed=n) for n in range(2))
    k, v = (drawn(rows, length, others, 128, seed=n) for n in (2, 3))
    assert cuda_attention.fits(q.dtype, length, heads, others, 128)

    made, back = mx.vjp(ours, [q, k, v], [above])
    wide = [one.astype(mx.float32) for one in (q, k, v, above)]
    wanted, slopes = mx.vjp(plain, wide[:3], wide[3:])
    close(made[0], wanted[0], "result")
    for name, one, other in zip("qkv", back, slopes, strict=True):
        close(one, other, name)


def test_slices_of_one_product_do_as_well() -> None:
    whole = drawn(2 * 256, (4 + 2 + 2) * 128, seed=7)

    def through(whole: mx.array) -> mx.array:
        q, k, v = mx.split(whole, [512, 768], axis=1)
        q, k, v = (one.reshape(2, 256, -1, 128) for one in (q, k, v))
        return cuda_attention.attention(q, k, v, SCALE)

    def by_definition(whole: mx.array) -> mx.array:
        q, k, v = mx.split(whole, [512, 768], axis=1)
        return plain(*(one.reshape(2, 256, -1, 128) for one in (q, k, v)))

    above = drawn(2, 256, 4, 128, seed=8)
    made, back = mx.vjp(through, [whole], [above])
    wanted, slopes = mx.vjp(by_definition, [whole.astype(mx.float32)], [above.astype(mx.float32)])
    close(made[0], wanted[0], "result")
    close(back[0], slopes[0], "gradient")


@pytest.mark.parametrize(("rows", "heads"), [(1, (4, 2)), (3, (6, 2)), (2, (8, 1))])
def test_turned_within_it_is_turned_before_it(rows: int, heads: tuple[int, int]) -> None:
    """One way through the kernels against three ways one after the other."""
    tokens, (q_heads, kv_heads) = rows * 256, heads
    x = drawn(tokens, (q_heads + 2 * kv_heads) * 128, seed=11)
    above = drawn(tokens, q_heads * 128, seed=12)
    angles = mx.random.uniform(0, 6, (rows, 256, 64), key=mx.random.key(5))
    cos, sin = (mx.concatenate([f(angles)] * 2, axis=-1) for f in (mx.cos, mx.sin))
    turn = decoder.rotary(cos.astype(mx.bfloat16), sin.astype(mx.bfloat16))
    norms = []
    for seed in (13, 14):
        norms.append(nn.RMSNorm(128, eps=1e-6))
        norms[-1].weight = 1 + 0.2 * drawn(128, seed=seed)

    def at_once(x: mx.array) -> mx.array:
        return cuda_joined.turned_attention(x, (norms[0], norms[1]), turn, heads, 256, SCALE)

    def in_turn(x: mx.array) -> mx.array:
        found = cuda_joined.turned_all(x, (norms[0], norms[1]), turn, heads)
        q, k, v = (one.reshape(rows, 256, -1, 128) for one in found)
        return ours(q, k, v).reshape(tokens, -1)

    made, back = mx.vjp(at_once, [x], [above])
    wanted, slopes = mx.vjp(in_turn, [x], [above])
    assert mx.array_equal(made[0], wanted[0]).item()
    close(back[0], slopes[0].astype(mx.float32), "gradient")


def test_what_is_hidden_has_no_part_in_it() -> None:
    """Not even what is no number: padding may hold anything."""
    q, k, v = (drawn(1, 256, 2, 128, seed=n) for n in range(3))
    spoilt = mx.where(mx.arange(256)[None, :, None, None] < 128, v, float("nan"))
    made = cuda_attention.attention(q, k, v, SCALE)[:, :128]
    assert mx.array_equal(made, cuda_attention.attention(q, k, spoilt, SCALE)[:, :128]).item()


def test_long_rows_agree_with_cudnn() -> None:
    """20 blocks of keys a head, as many as make every way through the kernels."""
    q, above = (drawn(2, 2560, 8, 128, seed=n) for n in range(2))
    k, v = (drawn(2, 2560, 2, 128, seed=n) for n in (2, 3))

    def cudnn(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        turned = (one.transpose(0, 2, 1, 3) for one in (q, k, v))
        made = mx.fast.scaled_dot_product_attention(*turned, scale=SCALE, mask="causal")
        return made.transpose(0, 2, 1, 3)

    made, back = mx.vjp(ours, [q, k, v], [above])
    wanted, slopes = mx.vjp(cudnn, [q, k, v], [above])
    close(made[0], wanted[0].astype(mx.float32), "result")
    for name, one, other in zip("qkv", back, slopes, strict=True):
        close(one, other.astype(mx.float32), name)


def test_a_last_axis_that_is_not_contiguous_makes_no_number() -> None:
    q, k, v = (drawn(1, 128, 1, 128, seed=n) for n in range(3))
    assert not mx.isnan(cuda_attention.attention(q, k, v, SCALE)).any().item()
    apart = drawn(1, 128, 128, 2, seed=5)[..., :1].transpose(0, 1, 3, 2)
    assert mx.isnan(cuda_attention.attention(apart, k, v, SCALE)).all().item()


@pytest.mark.parametrize(
    ("length", "heads", "others", "size", "kind"),
    [
        (130, 4, 2, 128, mx.bfloat16),
        (128, 4, 3, 128, mx.bfloat16),
        (128, 4, 2, 64, mx.bfloat16),
        (128, 4, 2, 128, mx.float32),
    ],
)
def test_what_it_is_not_made_for(
    length: int, heads: int, others: int, size: int, kind: mx.Dtype
) -> None:
    assert not cuda_attention.fits(kind, length, heads, others, size)
