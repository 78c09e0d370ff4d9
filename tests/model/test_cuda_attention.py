"""Attention by groups of queries is attention."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mondrian_ft.model import cuda_attention
from mondrian_ft.model.backend import ON_CPU, mx

CUDA = not ON_CPU and mx.cuda.is_available()


def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return cuda_attention.by_groups(q, k, v, 0.1, [q.shape[1]])


@pytest.mark.parametrize("ends", [(3, 10), (1, 2, 5, 10), (2, 4, 6, 8, 10)])
def test_groups_of_queries_attend_to_all_before_them(ends: Sequence[int]) -> None:
    """Result and the three gradients, float32, with fewer heads for keys than for queries."""
    q, k, v, above = (
        mx.random.normal((2, 10, heads, 16), key=mx.random.key(n))
        for n, heads in enumerate((4, 2, 2, 4))
    )
    made, back = mx.vjp(
        lambda q, k, v: cuda_attention.by_groups(q, k, v, 0.1, ends), [q, k, v], [above]
    )
    wanted, slopes = mx.vjp(whole, [q, k, v], [above])
    for one, other in zip([*made, *back], [*wanted, *slopes], strict=True):
        assert float(mx.abs(one - other).max()) < 1e-5


@pytest.mark.parametrize(
    ("length", "ends"),
    [
        (128, (128,)),
        (896, (896,)),
        (1024, (512, 1024)),
        (1100, (1100,)),
        (1664, (512, 1024, 1664)),
        (2560, (640, 1280, 1920, 2560)),
        (4736, (1152, 2304, 3456, 4736)),
    ],
)
def test_where_groups_end(length: int, ends: tuple[int, ...]) -> None:
    """At multiples of 128, or cuDNN's backward pass is not fused; short rows are one group."""
    assert cuda_attention.groups(length) == ends


@pytest.mark.skipif(not CUDA, reason="kernels for CUDA, and there is no such device")
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_cuda_device(rows: int) -> None:
    """bfloat16 beside float32, keys as a view of something wider."""
    length = 1664
    q, k, v, above = (
        mx.random.normal((rows, length, heads, 128), key=mx.random.key(n)).astype(mx.bfloat16)
        for n, heads in enumerate((8, 2, 2, 8))
    )
    wide = mx.concatenate([k, v], axis=2)
    k, v = wide[:, :, :2], wide[:, :, 2:]
    made, back = mx.vjp(lambda q, k, v: cuda_attention.attention(q, k, v, 0.09), [q, k, v], [above])
    exact = [one.astype(mx.float32) for one in (q, k, v, above)]
    wanted, slopes = mx.vjp(
        lambda q, k, v: cuda_attention.by_groups(q, k, v, 0.09, [length]), exact[:3], exact[3:]
    )
    for one, other in zip([*made, *back], [*wanted, *slopes], strict=True):
        off = mx.abs(one.astype(mx.float32) - other)
        assert float(off.max()) < 0.02 * float(mx.abs(other).max())
        assert float(mx.sqrt(mx.square(off).sum() / mx.square(other).sum())) < 0.01


@pytest.mark.skipif(not CUDA, reason="kernels for CUDA, and there is no such device")
def test_gradients_of_prefixes_are_summed() -> None:
    ends = (128, 640, 1024)
    x = mx.random.normal((2, 1024, 2, 8)).astype(mx.bfloat16)
    above = [mx.random.normal((2, end, 2, 8)).astype(mx.bfloat16) for end in ends]
    (back,) = mx.vjp(lambda x: cuda_attention.prefixes(x, ends), [x], above)[1]
    exact = sum(
        mx.pad(one.astype(mx.float32), [(0, 0), (0, 1024 - end), (0, 0), (0, 0)])
        for one, end in zip(above, ends, strict=True)
    )
    assert float(mx.abs(back.astype(mx.float32) - exact).max()) < 0.02
