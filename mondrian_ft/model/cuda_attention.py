"""Causal attention of a training step, in CUDA kernels of our own for Hopper GPUs.

MLX asks cuDNN for a mask at the bottom right, and cuDNN's backward pass then takes as long as with
no mask at all (benchmarks/LOG.md). Here what the mask hides is not computed; keys and values of
several query heads are summed after it. ``hopper_attention`` has the device's part.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import cuda_train
from .backend import ON_CPU, mx
from .hopper_attention import BACKWARD_BYTES, FORWARD_BYTES, SOURCE

TILE = 128
"""Queries of a block of the forward pass, and keys of a block of the backward pass."""
THREADS = 256
FORWARD_THREADS = 384
"""Of a block of the forward pass, of which a third only fetches."""

_FORWARD = """
  using namespace attention;
  const int length = q_shape[1], heads = q_shape[2], blocks = length / 128;
  const Piece piece = piece_of(blockIdx.x, blocks, q_shape[0] * heads);
  const bool sound = q_strides[3] == 1 && k_strides[3] == 1 && v_strides[3] == 1;
  const int row = piece.which / heads, head = piece.which % heads;
  const int other = head / (heads / k_shape[2]);
  // The last block of queries has the most before it, so it goes first.
  forward(q + row * q_strides[0] + head * q_strides[2],
      k + row * k_strides[0] + other * k_strides[2], v + row * v_strides[0] + other * v_strides[2],
      out + ((long long)row * length * heads + head) * 128, lse + (long long)piece.which * length,
      q_strides[1], k_strides[1], v_strides[1], heads * 128, blocks - 1 - piece.number,
      sound ? plain_scale[0] * 1.4426950408889634f : __int_as_float(0x7fffffff));
"""

# How much of a gradient goes the way of the whole row; and zeros, to which the next kernel adds.
_ALONG = """
  const size_t number = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int length = out_shape[1], heads = out_shape[2];
  if (number >= (size_t)out_shape[0] * length * heads) return;
  const size_t at = number * 128 + threadIdx.x % 32 * 4;
  const uint2 a = *(const uint2*)(out + at), b = *(const uint2*)(above + at);
  float sum = __uint_as_float(a.x << 16) * __uint_as_float(b.x << 16)
      + __uint_as_float(a.x & 0xffff0000u) * __uint_as_float(b.x & 0xffff0000u)
      + __uint_as_float(a.y << 16) * __uint_as_float(b.y << 16)
      + __uint_as_float(a.y & 0xffff0000u) * __uint_as_float(b.y & 0xffff0000u);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const size_t head = number % heads, token = number / heads;
  if (threadIdx.x % 32 == 0) {
    along[(token / length * heads + head) * length + token % length] = sum;
  }
  *(float4*)(sums + at) = make_float4(0, 0, 0, 0);
"""

_BACKWARD = """
  using namespace attention;
  const int length = q_shape[1], heads = q_shape[2], blocks = length / 128, parts = heads / EACH;
  const Piece piece = piece_of(blockIdx.x, blocks, q_shape[0] * parts);
  const int row = piece.which / parts, part = piece.which % parts, head = part * EACH;
  const int other = head / (heads / k_shape[2]);
  const long long rows = ((long long)row * heads + head) * length;
  const long long to = ((long long)row * length * parts + part) * 128;
  backward<EACH>(q + row * q_strides[0] + head * q_strides[2],
      k + row * k_strides[0] + other * k_strides[2], v + row * v_strides[0] + other * v_strides[2],
      above + ((long long)row * length * heads + head) * 128, lse + rows, along + rows,
      const_cast<float*>(sums) + rows * 128, of_k + to, of_v + to,
      q_strides[1], k_strides[1], v_strides[1], heads * 128, parts * 128, q_strides[2], 128,
      length, piece.number, plain_scale[0] * 1.4426950408889634f, plain_scale[0]);
"""

# The gradient of queries comes in the order of a warpgroup's registers, as two halves of 64
# columns: a float4 is two neighbours of a row and two of the row that is 8 further on.
_GATHERED = """
  using namespace attention;
  const size_t number = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int length = sums_shape[2], heads = sums_shape[1];
  const size_t queries = (size_t)sums_shape[0] * heads * length * 8;
  if (number < queries) {
    const int eight = number % 16, row = number / 16 % 8, warp = number / 128 % 4;
    const size_t block = number / 512, tile = block % (length / 64), which = block / (length / 64);
    const float4* from = (const float4*)sums
        + ((block * 2 + eight / 8) * 8 + eight % 8) * 128 + warp * 32 + row * 4;
    uint4 first, second;
    unsigned* one = (unsigned*)&first, *two = (unsigned*)&second;
    for (int i = 0; i < 4; ++i) {
      const float4 v = from[i];
      one[i] = both(v.x * plain_scale[0], v.y * plain_scale[0]);
      two[i] = both(v.z * plain_scale[0], v.w * plain_scale[0]);
    }
    const size_t token = which / heads * length + tile * 64 + warp * 16 + row;
    half_t* to = of_q + (token * heads + which % heads) * 128 + eight * 8;
    *(uint4*)to = first;
    *(uint4*)(to + (size_t)8 * heads * 128) = second;
    return;
  }
  const size_t many = (size_t)k_parts_shape[0] * length * k_parts_shape[2] / PARTS * 16;
  const size_t at = number - queries;
  if (at >= 2 * many) return;
  const size_t i = at % many;
  const half_t* from = (at < many ? k_parts : v_parts) + (i / 16 * PARTS * 16 + i % 16) * 8;
  float sum[8] = {};
  for (int part = 0; part < PARTS; ++part) {
    const uint4 v = *(const uint4*)(from + part * 128);
    const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
    for (int j = 0; j < 4; ++j) {
      sum[2 * j] += __uint_as_float(pairs[j] << 16);
      sum[2 * j + 1] += __uint_as_float(pairs[j] & 0xffff0000u);
    }
  }
  *(uint4*)((at < many ? of_k : of_v) + i * 8) = make_uint4(
      both(sum[0], sum[1]), both(sum[2], sum[3]), both(sum[4], sum[5]), both(sum[6], sum[7]));
"""


@cache
def on_hopper() -> bool:
    """Whether this is the kind of GPU that has ``wgmma``, and no later one."""
    if ON_CPU or not mx.cuda.is_available():
        return False
    facts = mx.device_info()
    return (facts.get("compute_capability_major"), facts.get("compute_capability_minor")) == (9, 0)


def fits(dtype: mx.Dtype, length: int, heads: int, others: int, size: int) -> bool:
    """Whether these kernels take heads of this type and size, rows of this length, on this device.

    Args:
        dtype: of queries, keys and values.
        length: of a row.
        heads: of queries.
        others: heads of keys and of values.
        size: numbers of a head.
    """
    return (
        dtype == mx.bfloat16
        and size == cuda_train.HEAD_SIZE
        and length % TILE == 0
        and heads % others == 0
        and on_hopper()
    )


@cache
def _kernel(
    name: str, inputs: str, outputs: str, source: str, room: int = 0, threads: int = THREADS
) -> Any:
    # How many registers a thread may have follows from how many threads a block has, and MLX
    # declares its kernels without saying it.
    bounded = "#undef __global__\n#define __global__ __attribute__((global)) __launch_bounds__"
    return mx.fast.cuda_kernel(
        f"mondrian_{name}",
        inputs.split(),
        outputs.split(),
        source,
        header=f"{SOURCE}{bounded}({threads})\n",
        ensure_row_contiguous=False,
        shared_memory=room,
    )


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention, without dropout.

    Args:
        q: (B, L, H, 128) bfloat16, L a multiple of 128.
        k: (B, L, H', 128), H a multiple of H'.
        v: like k. All three with a contiguous last axis, as slices of a product have it; with
            another one the result is not a number.
        scale: of the scores.

    Returns:
        (B, L, H, 128).
    """
    run: Any = _attention
    made: mx.array = run(q, k, v, mx.array(scale, mx.float32))[0]
    return made


@mx.custom_function
def _attention(q: mx.array, k: mx.array, v: mx.array, scale: mx.array) -> Any:
    return attend(q, k, v, scale)


@_attention.vjp
def _attention_back(primals: Any, cotangents: Any, outputs: Any) -> Any:
    q, k, v, scale = primals
    out, lse = outputs
    sums, k_parts, v_parts = attend_back(q, k, v, scale, out, lse, cotangents[0])
    batch, length, heads, _ = q.shape
    of_q, of_k, of_v = _kernel(
        "attend_gathered", "sums k_parts v_parts plain_scale", "of_q of_k of_v", _GATHERED
    )(
        inputs=[sums, k_parts, v_parts, scale],
        template=[("PARTS", k_parts.shape[2] // k.shape[2])],
        grid=(batch * length * (heads * 8 + 2 * k.shape[2] * 16), 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[q.shape, k.shape, k.shape],
        output_dtypes=[mx.bfloat16] * 3,
    )
    return of_q, of_k, of_v, mx.zeros_like(scale)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """See :func:`attention`; also each row's log2 of the sum of its scores' powers, (B, H, L)."""
    batch, length, heads, _ = q.shape
    told = ("attend", "q k v plain_scale", "out lse", _FORWARD, FORWARD_BYTES)
    out, lse = _kernel(*told, FORWARD_THREADS)(
        inputs=[q, k, v, scale],
        grid=(batch * heads * length // TILE * FORWARD_THREADS, 1, 1),
        threadgroup=(FORWARD_THREADS, 1, 1),
        output_shapes=[q.shape, (batch, heads, length)],
        output_dtypes=[mx.bfloat16, mx.float32],
    )
    return out, lse


def attend_back(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: mx.array,
    out: mx.array,
    lse: mx.array,
    above: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients as the kernel leaves them.

    Args:
        q: with k, v and scale what :func:`attend` took.
        out: with lse what it made.
        above: the gradient of out.

    Returns:
        Of the queries, float32, without the scale and in an order that ``_GATHERED`` describes. Of
        keys and of values (B, L, P, 128), of which P / H' are still to be summed for each head.
    """
    above = mx.contiguous(above)
    batch, length, heads, size = q.shape
    each = 2 if heads // k.shape[2] % 2 == 0 else 1
    parts = heads // each
    along, sums = _kernel("attend_along", "out above", "along sums", _ALONG)(
        inputs=[out, above],
        grid=(batch * length * heads * 32, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[lse.shape, (batch, heads, length, size)],
        output_dtypes=[mx.float32] * 2,
    )
    # This one adds to `sums`, an array that was given to it: filling an output with zeros first
    # would take a kernel for each output, and longer. Nobody else sees the array, and the kernel
    # that reads it waits for the other results of this one.
    told = ("attend_back", "q k v above lse along sums plain_scale", "of_k of_v", _BACKWARD)
    k_parts, v_parts = _kernel(*told, BACKWARD_BYTES)(
        inputs=[q, k, v, above, lse, along, sums, scale],
        template=[("EACH", each)],
        grid=(batch * parts * length // TILE * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(batch, length, parts, size)] * 2,
        output_dtypes=[mx.bfloat16] * 2,
    )
    return sums, k_parts, v_parts
