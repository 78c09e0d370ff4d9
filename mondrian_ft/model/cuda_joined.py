"""Kernels for products that lie side by side (see ``joined``); ``cuda_train`` has those for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import cuda_attention, cuda_train
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
  float d[4];
  if (head < Q) {
    open4(of_queries + (row * Q + head) * 128 + at, d);
    turn4_back(x + here, q_weight + at, cosine + turn, sine + turn, d, EPSILON, of_x + here);
  } else if (head < Q + KV) {
    open4(of_keys + (row * KV + head - Q) * 128 + at, d);
    turn4_back(x + here, k_weight + at, cosine + turn, sine + turn, d, EPSILON, of_x + here);
  } else {
    *(uint2*)(of_x + here) = *(const uint2*)(of_values + (row * KV + head - Q - KV) * 128 + at);
  }
"""

# The same from gradients as `cuda_attention.attend_back` leaves them. A warp has two rows of a
# head, 8 apart, as `sums` has them.
_TURNED_GATHERED_BACK = """
  const size_t number = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (number >= (size_t)x_shape[0] / 2 * (Q + 2 * KV)) return;
  const int head = number % (Q + 2 * KV), at = threadIdx.x % 32 * 4;
  const size_t pair = number / (Q + 2 * KV), first = pair / 8 * 16 + pair % 8;
  float d[2][4];
  if (head < Q) {
    const size_t row = first / LENGTH, inside = first % LENGTH;
    const size_t tile = (row * Q + head) * (LENGTH / 64) + inside / 64;
    const float4* from = (const float4*)sums + ((tile * 2 + at / 64) * 8 + at % 64 / 8) * 128
        + inside % 64 / 16 * 32 + inside % 8 * 4 + at % 8 / 2;
    const float4 a = from[0], b = from[1];
    d[0][0] = a.x; d[0][1] = a.y; d[0][2] = b.x; d[0][3] = b.y;
    d[1][0] = a.z; d[1][1] = a.w; d[1][2] = b.z; d[1][3] = b.w;
    for (int j = 0; j < 8; ++j) d[j / 4][j % 4] *= plain_scale[0];
  } else {
    const bool key = head < Q + KV;
    const __nv_bfloat16* parts = key ? k_parts : v_parts;
    const int other = head - Q - (key ? 0 : KV);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) d[i][j] = 0;
      for (int part = 0; part < PARTS; ++part) {
        float v[4];
        open4(parts + (((first + 8 * i) * KV + other) * PARTS + part) * 128 + at, v);
        for (int j = 0; j < 4; ++j) d[i][j] += v[j];
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const size_t row = first + 8 * i, here = (row * (Q + 2 * KV) + head) * 128 + at;
    if (head < Q + KV) {
      turn4_back(x + here, (head < Q ? q_weight : k_weight) + at, cosine + row * 128 + at,
          sine + row * 128 + at, d[i], EPSILON, of_x + here);
    } else {
      close4(of_x + here, d[i]);
    }
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
    cos, sin = (one.astype(mx.bfloat16) for one in turn)

    @mx.custom_function
    def forward(x: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        queries, keys = _turn_all(x, norms, (cos, sin), heads)
        return queries, keys, x[:, (q + kv) * cuda_train.HEAD_SIZE :]

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, cos, sin = primals
        told = "x q_weight k_weight cosine sine of_queries of_keys of_values"
        run = cuda_train.kernel("turned_all_back", told, "of_x", _TURNED_ALL_BACK, norms[0].eps)
        given = [x, *(norm.weight for norm in norms), cos, sin, *cotangents]
        (back,) = _by_warps(run, given, heads, x.shape[0] * (q + 2 * kv), [x.shape])
        return back, mx.zeros_like(cos), mx.zeros_like(sin)

    made: Any = forward(x, cos, sin)
    return made[0], made[1], made[2]


def _turn_all(x: mx.array, norms: Any, turn: Any, heads: tuple[int, int]) -> list[mx.array]:
    q, kv = heads
    told = ("turned_all", "x q_weight k_weight cosine sine", "queries keys", _TURNED_ALL)
    run = cuda_train.kernel(*told, norms[0].eps)
    shapes = [(x.shape[0], many * cuda_train.HEAD_SIZE) for many in heads]
    given = [x, *(norm.weight for norm in norms), *turn]
    return _by_warps(run, given, heads, x.shape[0] * (q + kv), shapes)


def _by_warps(
    run: Any, arrays: list[mx.array], heads: tuple[int, int], warps: int, shapes: Any, **sizes: int
) -> list[mx.array]:
    return run(
        inputs=arrays,
        template=[("Q", heads[0]), ("KV", heads[1]), *sizes.items()],
        grid=(-(-warps * 32 // cuda_train.THREADS) * cuda_train.THREADS, 1, 1),
        threadgroup=(cuda_train.THREADS, 1, 1),
        output_shapes=shapes,
        output_dtypes=[mx.bfloat16] * len(shapes),
    )


def turned_attention(
    x: mx.array,
    norms: tuple[Any, Any],
    turn: tuple[mx.array, mx.array],
    heads: tuple[int, int],
    length: int,
    scale: float,
) -> mx.array:
    """Attention of queries, keys and values that are side by side: heads normalised and turned.

    Args:
        x: (T, (Q + 2 KV) · 128), one product of all three; T a multiple of ``length``.
        norms: see :func:`turned_all`, as ``turn`` and ``heads``.
        turn: cos and sin.
        heads: Q and KV.
        length: of a row, a multiple of 128.
        scale: of the scores.

    Returns:
        (T, Q · 128).
    """
    q_heads, kv_heads = heads
    shape = (x.shape[0] // length, length, -1, cuda_train.HEAD_SIZE)
    factor = mx.array(scale, mx.float32)

    def values(x: mx.array) -> mx.array:
        return x[:, (q_heads + kv_heads) * cuda_train.HEAD_SIZE :].reshape(shape)

    @mx.custom_function
    def forward(x: mx.array, cos: mx.array, sin: mx.array) -> Any:
        q, k = (one.reshape(shape) for one in _turn_all(x, norms, (cos, sin), heads))
        return [*cuda_attention.attend(q, k, values(x), factor), q, k]

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, cos, sin = primals
        out, lse, q, k = outputs
        above = cotangents[0]
        raw = cuda_attention.attend_back(q, k, values(x), factor, out, lse, above)
        told = "x q_weight k_weight cosine sine sums k_parts v_parts plain_scale"
        source = _TURNED_GATHERED_BACK
        run = cuda_train.kernel("turned_gathered_back", told, "of_x", source, norms[0].eps)
        given = [x, *(norm.weight for norm in norms), cos, sin, *raw, factor]
        warps = x.shape[0] // 2 * (q_heads + 2 * kv_heads)
        sizes = {"PARTS": raw[1].shape[2] // kv_heads, "LENGTH": length}
        (back,) = _by_warps(run, given, heads, warps, [x.shape], **sizes)
        return back, mx.zeros_like(cos), mx.zeros_like(sin)

    cos, sin = (one.astype(mx.bfloat16) for one in turn)
    made: Any = forward(x, cos, sin)
    return made[0].reshape(x.shape[0], -1)


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
