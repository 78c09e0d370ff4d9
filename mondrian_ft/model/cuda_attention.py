"""Causal attention for training on CUDA, by groups of queries.

cuDNN's backward pass for a causal mask computes the masked half as well: on an H200, with 2,560
tokens and 32 heads of 128, it takes 0.57 ms with the mask and 0.57 ms without (benchmarks/LOG.md).
A group of queries needs no key after its own last one, so with n groups over their own prefixes
(n + 1) / 2n of the square is computed. Nothing has to be merged: each query's softmax is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import cuda_train
from .backend import mx

UNIT = 128
"""cuDNN's backward pass is fused for lengths that are a multiple of this (facts of MLX 0.32)."""
MOST_GROUPS = 4
"""Each has kernels to start and its part of the keys' gradient to add; more did not pay."""
LEAST = 512
"""Queries of a group, at least."""

_SUMMED = """
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  constexpr size_t ROW = (size_t)LENGTH * WIDTH;
  if (i >= ROWS * ROW) return;
  const size_t batch = i / ROW, at = i % ROW;
  const int place = at / WIDTH;
  float y[8] = {};
  const __nv_bfloat16* from[4] = {g0, g1, g2, g3};
  constexpr int ends[4] = {E0, E1, E2, E3};
  for (int n = 0; n < 4; ++n) {
    if (place >= ends[n]) continue;
    float v[8];
    open8(from[n] + batch * ends[n] * WIDTH + at, v);
    for (int j = 0; j < 8; ++j) y[j] += v[j];
  }
  close8(sum + i, y);
"""


def groups(length: int) -> tuple[int, ...]:
    """Where groups of queries end, for rows of this length; one group if it is short."""
    units = length // UNIT
    count = min(MOST_GROUPS, length // LEAST) if length % UNIT == 0 else 1
    return (*(units * n // count * UNIT for n in range(1, count)), length)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, all (B, L, heads, head_dim); keys and values may have fewer heads."""
    return by_groups(q, k, v, scale, groups(q.shape[1]))


def by_groups(q: mx.array, k: mx.array, v: mx.array, scale: float, ends: Sequence[int]) -> mx.array:
    """:func:`attention` with groups of queries that end there, the last one at L."""
    queries = mx.split(q, list(ends[:-1]), axis=1) if len(ends) > 1 else [q]
    pairs = zip(prefixes(k, ends), prefixes(v, ends), strict=True)
    parts = [
        mx.fast.scaled_dot_product_attention(
            *(one.transpose(0, 2, 1, 3) for one in (part, key, value)), scale=scale, mask="causal"
        ).transpose(0, 2, 1, 3)
        for part, (key, value) in zip(queries, pairs, strict=True)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def prefixes(x: mx.array, ends: Sequence[int]) -> list[mx.array]:
    """x (B, L, heads, D) up to each end, views; their gradients are summed in one kernel."""
    if len(ends) == 1:
        return [x]
    width = x.shape[2] * x.shape[3]
    if len(ends) > MOST_GROUPS or not cuda_train.fits(x.dtype, width):
        return [x[:, :end] for end in ends]

    @mx.custom_function
    def forward(x: mx.array) -> list[mx.array]:
        return [x[:, :end] for end in ends]

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        # A kernel's inputs are always all there; none of what is past an end of 0 is read.
        given = [*cotangents, *[cotangents[0]] * MOST_GROUPS][:MOST_GROUPS]
        told = [*ends, *[0] * MOST_GROUPS][:MOST_GROUPS]
        size = x.size // cuda_train.EACH
        (made,) = cuda_train.kernel("summed", "g0 g1 g2 g3", "sum", _SUMMED)(
            inputs=given,
            template=[("ROWS", x.shape[0]), ("LENGTH", x.shape[1]), ("WIDTH", width)]
            + [(f"E{n}", end) for n, end in enumerate(told)],
            grid=(-(-size // cuda_train.THREADS) * cuda_train.THREADS, 1, 1),
            threadgroup=(cuda_train.THREADS, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[mx.bfloat16],
        )
        return made

    made: Any = forward(x)
    return list(made)
