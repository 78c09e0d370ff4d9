"""Kernels for products that lie side by side (see ``joined``); ``cuda_train`` has those for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import cuda_train
from .backend import mx

# Gate and up of a row side by side.
_GATED_PAIR = """
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= (size_t)pair_shape[0] * WIDTH) return;
  const __nv_bfloat16* from = pair + i + i / WIDTH * WIDTH;
  gate8(from, from + WIDTH, made + i);
"""

_GATED_PAIR_BACK = """
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= (size_t)pair_shape[0] * WIDTH) return;
  const size_t at = i + i / WIDTH * WIDTH;
  gate8_back(pair + at, pair + at + WIDTH, above + i, of_pair + at, of_pair + at + WIDTH);
"""

# Queries, keys and values of a row side by side; values stay as they are.
_TURNED_ALL = """
  const int number = (int)(((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32);
  if (number >= x_shape[0] * (Q + KV)) return;
  const int head = number % (Q + KV), at = threadIdx.x % 32 * 4;
  const size_t row = number / (Q + KV), turn = row * 128 + at;
  const __nv_bfloat16* from = x + (row * (Q + 2 * KV) + head) * 128 + at;
  if (head < Q) {
    turn4(from, q_weight + at, cosine + turn, sine + turn, EPSILON,
          queries + (row * Q + head) * 128 + at);
  } else {
    turn4(from, k_weight + at, cosine + turn, sine + turn, EPSILON,
          keys + (row * KV + head - Q) * 128 + at);
  }
"""

_TURNED_ALL_BACK = """
  const int number = (int)(((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32);
  if (number >= x_shape[0] * (Q + 2 * KV)) return;
  const int head = number % (Q + 2 * KV), at = threadIdx.x % 32 * 4;
  const size_t row = number / (Q + 2 * KV), turn = row * 128 + at;
  const size_t here = (size_t)number * 128 + at;
  if (head < Q) {
    turn4_back(x + here, q_weight + at, cosine + turn, sine + turn,
               of_queries + (row * Q + head) * 128 + at, EPSILON, of_x + here);
  } else if (head < Q + KV) {
    turn4_back(x + here, k_weight + at, cosine + turn, sine + turn,
               of_keys + (row * KV + head - Q) * 128 + at, EPSILON, of_x + here);
  } else {
    *(uint2*)(of_x + here) = *(const uint2*)(of_values + (row * KV + head - Q - KV) * 128 + at);
  }
"""

# The first matrices side by side, then the second ones on the diagonal of a matrix of zeros.
_PACKED = """
  constexpr int COLUMNS = COUNT * RANK, WIDE = N0 + N1 + N2;
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  const size_t firsts = (size_t)INNER * COLUMNS;
  if (i < firsts) {
    const int column = i % COLUMNS, which = column / RANK;
    const __nv_bfloat16* from = which == 0 ? a0 : which == 1 ? a1 : a2;
    *(uint4*)(a + i) = *(const uint4*)(from + i / COLUMNS * RANK + column % RANK);
  } else if (i < firsts + (size_t)COLUMNS * WIDE) {
    const size_t j = i - firsts;
    const int row = j / WIDE, which = row / RANK;
    const int at = (int)(j % WIDE) - (which == 0 ? 0 : which == 1 ? N0 : N0 + N1);
    const int width = which == 0 ? N0 : which == 1 ? N1 : N2;
    const __nv_bfloat16* from = which == 0 ? b0 : which == 1 ? b1 : b2;
    uint4 v = {0, 0, 0, 0};
    if (at >= 0 && at < width) v = *(const uint4*)(from + (size_t)(row % RANK) * width + at);
    *(uint4*)(b + j) = v;
  }
"""


@mx.custom_function
def gated_pair(pair: mx.array) -> mx.array:
    """silu(gate) · up (T, N) of the two side by side, (T, 2 N)."""
    rows, width = pair.shape[0], pair.shape[1] // 2
    return _over(pair, "gated_pair", "pair", "made", _GATED_PAIR, [pair], (rows, width))


@gated_pair.vjp
def _gated_pair_back(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    (pair,) = primals if isinstance(primals, tuple | list) else (primals,)
    given = [pair, cotangent]
    return _over(
        pair, "gated_pair_back", "pair above", "of_pair", _GATED_PAIR_BACK, given, pair.shape
    )


def _over(
    pair: mx.array, name: str, inputs: str, made: str, source: str, arrays: Any, shape: Any
) -> mx.array:
    rows, width = pair.shape[0], pair.shape[1] // 2
    (result,) = cuda_train.kernel(name, inputs, made, source)(
        inputs=arrays,
        template=[("WIDTH", width)],
        grid=(-(-rows * width // cuda_train.EACH // cuda_train.THREADS) * cuda_train.THREADS, 1, 1),
        threadgroup=(cuda_train.THREADS, 1, 1),
        output_shapes=[tuple(shape)],
        output_dtypes=[mx.bfloat16],
    )
    return result


def turned_all(
    x: mx.array, norms: tuple[Any, Any], turn: tuple[mx.array, mx.array], heads: tuple[int, int]
) -> tuple[mx.array, mx.array, mx.array]:
    """:func:`cuda_train.turned` of queries and keys that are side by side with the values.

    Args:
        x: (T, (Q + 2 KV) · 128), one product of all three.
        norms: of queries and of keys, ``nn.RMSNorm`` of the same epsilon, frozen.
        turn: see :func:`cuda_train.turned`.
        heads: Q and KV.

    Returns:
        Queries (T, Q · 128), keys and values (T, KV · 128); the values are a view of x.
    """
    q, kv = heads
    weights = [norm.weight for norm in norms]
    cos, sin = (one.astype(mx.bfloat16) for one in turn)

    def run(
        name: str, inputs: str, made: str, source: str, arrays: Any, warps: int, widths: Any
    ) -> Any:
        rows = arrays[0].shape[0]
        return cuda_train.kernel(name, inputs, made, source, norms[0].eps)(
            inputs=arrays,
            template=[("Q", q), ("KV", kv)],
            grid=(-(-rows * warps * 32 // cuda_train.THREADS) * cuda_train.THREADS, 1, 1),
            threadgroup=(cuda_train.THREADS, 1, 1),
            output_shapes=[(rows, width * cuda_train.HEAD_SIZE) for width in widths],
            output_dtypes=[mx.bfloat16] * len(widths),
        )

    told = "x q_weight k_weight cosine sine"

    @mx.custom_function
    def forward(x: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        given = [x, *weights, cos, sin]
        made = run("turned_all", told, "queries keys", _TURNED_ALL, given, q + kv, (q, kv))
        return made[0], made[1], x[:, (q + kv) * cuda_train.HEAD_SIZE :]

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, cos, sin = primals
        inputs = f"{told} of_queries of_keys of_values"
        given = [x, *weights, cos, sin, *cotangents]
        every = q + 2 * kv
        (back,) = run("turned_all_back", inputs, "of_x", _TURNED_ALL_BACK, given, every, (every,))
        return back, mx.zeros_like(cos), mx.zeros_like(sin)

    made: Any = forward(x, cos, sin)
    return made[0], made[1], made[2]


def packed(firsts: Sequence[mx.array], seconds: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """Two or three adapters of one input as one.

    Args:
        firsts: each (K, r), r a multiple of 8.
        seconds: each (r, N), N a multiple of 8.

    Returns:
        (K, n r) with the first matrices side by side, and (n r, sum of N) with the second ones on
        the diagonal, zeros elsewhere.
    """
    inner, rank = firsts[0].shape
    sizes = [b.shape[1] for b in seconds]
    count, wide = len(firsts), sum(sizes)
    columns = count * rank
    # A kernel's inputs are always all there; what it does not use is the first.
    a, b = ([*some, some[0]][:3] for some in (firsts, seconds))
    threads = (inner * columns + columns * wide) // cuda_train.EACH
    first, second = cuda_train.kernel("packed", "a0 a1 a2 b0 b1 b2", "a b", _PACKED)(
        inputs=[*a, *b],
        template=[("COUNT", count), ("RANK", rank), ("INNER", inner)]
        + [(f"N{n}", size) for n, size in enumerate((*sizes, 0)[:3])],
        grid=(-(-threads // cuda_train.THREADS) * cuda_train.THREADS, 1, 1),
        threadgroup=(cuda_train.THREADS, 1, 1),
        output_shapes=[(inner, columns), (columns, wide)],
        output_dtypes=[mx.bfloat16] * 2,
    )
    return first, second
