"""What lies between the products of a training step, in CUDA kernels of our own.

The products themselves are cuBLAS's. Between them MLX's operations read and write the same arrays
several times; at 10,000 tokens of Qwen3-VL-4B that is a tenth of a step (benchmarks/LOG.md). Each
function here reads what it needs once and writes its result once, and its backward pass computes no
gradient of a frozen weight. Sums are float32, and what is written is rounded to bfloat16 once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .backend import ON_CPU, mx

HEAD_SIZE = 128
"""The one size of heads that :func:`turned` is written for: four numbers a lane."""
EACH = 8
"""Numbers that a thread reads at a time, 16 bytes."""
MOST_WIDE = 1024 * EACH
"""Widest row of :func:`normed`, which a block has to itself."""
THREADS = 256

_HEADER = """
#include <cuda_bf16.h>

__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline unsigned both(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *(const unsigned*)&v;
}
__device__ inline void open8(const __nv_bfloat16* from, float* v) {
  const uint4 raw = *(const uint4*)from;
  v[0] = low(raw.x); v[1] = high(raw.x); v[2] = low(raw.y); v[3] = high(raw.y);
  v[4] = low(raw.z); v[5] = high(raw.z); v[6] = low(raw.w); v[7] = high(raw.w);
}
__device__ inline void close8(__nv_bfloat16* to, const float* v) {
  *(uint4*)to = make_uint4(both(v[0], v[1]), both(v[2], v[3]), both(v[4], v[5]), both(v[6], v[7]));
}
__device__ inline void open4(const __nv_bfloat16* from, float* v) {
  const uint2 raw = *(const uint2*)from;
  v[0] = low(raw.x); v[1] = high(raw.x); v[2] = low(raw.y); v[3] = high(raw.y);
}
__device__ inline void close4(__nv_bfloat16* to, const float* v) {
  *(uint2*)to = make_uint2(both(v[0], v[1]), both(v[2], v[3]));
}
// Every lane gets the sum over its warp.
__device__ inline float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
// silu(gate) · up of eight numbers.
__device__ inline void gate8(
    const __nv_bfloat16* gate, const __nv_bfloat16* up, __nv_bfloat16* made) {
  float g[8], u[8], y[8];
  open8(gate, g);
  open8(up, u);
  for (int j = 0; j < 8; ++j) y[j] = g[j] / (1.0f + __expf(-g[j])) * u[j];
  close8(made, y);
}
__device__ inline void gate8_back(
    const __nv_bfloat16* gate, const __nv_bfloat16* up, const __nv_bfloat16* above,
    __nv_bfloat16* of_gate, __nv_bfloat16* of_up) {
  float g[8], u[8], d[8], a[8], b[8];
  open8(gate, g);
  open8(up, u);
  open8(above, d);
  for (int j = 0; j < 8; ++j) {
    const float s = 1.0f / (1.0f + __expf(-g[j]));
    const float silu = g[j] * s;
    a[j] = d[j] * u[j] * (s + silu * (1.0f - s));
    b[j] = d[j] * silu;
  }
  close8(of_gate, a);
  close8(of_up, b);
}
// A head of 128, normalised and turned by a warp, four neighbours a lane; the other half of a pair
// that is turned is 16 lanes away. Pointers are to a lane's four.
__device__ inline void turn4(
    const __nv_bfloat16* x, const __nv_bfloat16* weight, const __nv_bfloat16* cosine,
    const __nv_bfloat16* sine, float epsilon, __nv_bfloat16* made) {
  float v[4], w[4], c[4], s[4], y[4], squares = 0;
  open4(x, v);
  open4(weight, w);
  open4(cosine, c);
  open4(sine, s);
  for (int j = 0; j < 4; ++j) squares += v[j] * v[j];
  const float scale = rsqrtf(warp_sum(squares) / 128 + epsilon);
  for (int j = 0; j < 4; ++j) {
    const float n = v[j] * scale * w[j];
    y[j] = n * c[j] + __shfl_xor_sync(0xffffffffu, n, 16) * s[j];
  }
  close4(made, y);
}
__device__ inline void turn4_back(
    const __nv_bfloat16* x, const __nv_bfloat16* weight, const __nv_bfloat16* cosine,
    const __nv_bfloat16* sine, const float* d, float epsilon, __nv_bfloat16* of_x) {
  float v[4], w[4], c[4], s[4], y[4], squares = 0, dot = 0;
  open4(x, v);
  open4(weight, w);
  open4(cosine, c);
  open4(sine, s);
  // The transpose of a rotation is the rotation back.
  for (int j = 0; j < 4; ++j) {
    y[j] = (d[j] * c[j] - __shfl_xor_sync(0xffffffffu, d[j], 16) * s[j]) * w[j];
    squares += v[j] * v[j];
    dot += y[j] * v[j];
  }
  const float scale = rsqrtf(warp_sum(squares) / 128 + epsilon);
  const float along = scale * scale * scale * warp_sum(dot) / 128;
  for (int j = 0; j < 4; ++j) y[j] = scale * y[j] - along * v[j];
  close4(of_x, y);
}
"""

_GATED = """
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= (size_t)gate_shape[0] * WIDTH) return;
  gate8(gate + i, up + i, made + i);
"""

_GATED_BACK = """
  const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= (size_t)gate_shape[0] * WIDTH) return;
  gate8_back(gate + i, up + i, above + i, of_gate + i, of_up + i);
"""

_TURNED = """
  const int head = (int)(((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32);
  if (head >= x_shape[0] * HEADS) return;
  const int at = threadIdx.x % 32 * 4;
  const size_t here = (size_t)head * 128 + at, turn = (size_t)(head / HEADS) * 128 + at;
  turn4(x + here, weight + at, cosine + turn, sine + turn, EPSILON, made + here);
"""

_TURNED_BACK = """
  const int head = (int)(((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32);
  if (head >= x_shape[0] * HEADS) return;
  const int at = threadIdx.x % 32 * 4;
  const size_t here = (size_t)head * 128 + at, turn = (size_t)(head / HEADS) * 128 + at;
  float d[4];
  open4(above + here, d);
  turn4_back(x + here, weight + at, cosine + turn, sine + turn, d, EPSILON, of_x + here);
"""

_NORMED_BACK = """
  __shared__ float parts[2][32];
  const int at = threadIdx.x * 8, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const size_t row = (size_t)blockIdx.x * WIDTH;
  float v[8] = {}, g[8] = {}, squares = 0, dot = 0;
  if (at < WIDTH) {
    float w[8];
    open8(x + row + at, v);
    open8(above + row + at, g);
    open8(weight + at, w);
    for (int j = 0; j < 8; ++j) {
      g[j] *= w[j];
      squares += v[j] * v[j];
      dot += g[j] * v[j];
    }
  }
  squares = warp_sum(squares);
  dot = warp_sum(dot);
  if (lane == 0) {
    parts[0][warp] = squares;
    parts[1][warp] = dot;
  }
  __syncthreads();
  squares = 0;
  dot = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) {
    squares += parts[0][i];
    dot += parts[1][i];
  }
  const float scale = rsqrtf(squares / WIDTH + EPSILON);
  const float along = scale * scale * scale * dot / WIDTH;
  if (at < WIDTH) {
    float y[8];
    open8(beside + row + at, y);
    for (int j = 0; j < 8; ++j) y[j] += scale * g[j] - along * v[j];
    close8(of_x + row + at, y);
  }
"""

# A block has a position's logits to itself and goes over them twice; the second time they come from
# the cache.
_CROSS_ENTROPY = """
  __shared__ float tops[32], totals[32];
  __shared__ int places[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const size_t row = (size_t)blockIdx.x * WIDTH;
  const int target = wanted[blockIdx.x];
  float top = -1e30f, total = 0;
  int place = 0;
  bool sound = true;
  for (int at = threadIdx.x * 8; at < WIDTH; at += blockDim.x * 8) {
    float v[8];
    open8(logits + row + at, v);
    float most = top;
    for (int j = 0; j < 8; ++j) {
      sound = sound && fabsf(v[j]) < 3.4e38f;
      if (v[j] > most) {
        most = v[j];
        place = at + j;
      }
    }
    float sum = total * __expf(top - most);
    for (int j = 0; j < 8; ++j) sum += __expf(v[j] - most);
    top = most;
    total = sum;
  }
  if (!sound) total = __int_as_float(0x7fffffff);
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, top, step);
    const float more = __shfl_xor_sync(0xffffffffu, total, step);
    const int there = __shfl_xor_sync(0xffffffffu, place, step);
    const float most = fmaxf(top, other);
    total = total * __expf(top - most) + more * __expf(other - most);
    if (other > top || (other == top && there < place)) place = there;
    top = most;
  }
  if (lane == 0) {
    tops[warp] = top;
    totals[warp] = total;
    places[warp] = place;
  }
  __syncthreads();
  top = tops[0];
  place = places[0];
  for (int i = 1; i < blockDim.x / 32; ++i) {
    if (tops[i] > top || (tops[i] == top && places[i] < place)) place = places[i];
    top = fmaxf(top, tops[i]);
  }
  total = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) total += totals[i] * __expf(tops[i] - top);
  if (threadIdx.x == 0) {
    loss[blockIdx.x] = target < 0 ? 0.0f : logf(total) + top - (float)logits[row + target];
    hit[blockIdx.x] = target >= 0 && place == target;
  }
  const float share = target < 0 ? 0.0f : 1.0f / total;
  for (int at = threadIdx.x * 8; at < WIDTH; at += blockDim.x * 8) {
    float v[8];
    open8(logits + row + at, v);
    for (int j = 0; j < 8; ++j) v[j] = share * __expf(v[j] - top) - (at + j == target);
    close8(slope + row + at, v);
  }
"""


def fits(dtype: mx.Dtype, *widths: int) -> bool:
    """Whether rows of these widths and this type are what these kernels take, on this device."""
    if ON_CPU or dtype != mx.bfloat16 or not mx.cuda.is_available():
        return False
    return not any(width % EACH for width in widths)


@cache
def kernel(name: str, inputs: str, outputs: str, source: str, epsilon: float = 0.0) -> Any:
    """A kernel of this source, with the header of this module and ``EPSILON``."""
    # MLX finds a kernel it has compiled by its name, so the name has to say what it was made with.
    told = float(epsilon).hex().translate(str.maketrans(".+-", "___"))
    return mx.fast.cuda_kernel(
        f"mondrian_{name}_{told}",
        inputs.split(),
        outputs.split(),
        source,
        header=f"{_HEADER}constexpr float EPSILON = {float(epsilon)!r}f;\n",
    )


def _elementwise(run: Any, arrays: list[mx.array], results: int) -> list[mx.array]:
    rows, width = arrays[0].shape
    return run(
        inputs=arrays,
        template=[("WIDTH", width)],
        grid=(-(-rows * width // EACH // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, width)] * results,
        output_dtypes=[mx.bfloat16] * results,
    )


@mx.custom_function
def gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, each (T, N); the backward pass keeps the two and nothing else."""
    run = kernel("gated", "gate up", "made", _GATED)
    return _elementwise(run, [gate, up], 1)[0]


@gated.vjp
def _gated_back(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    run = kernel("gated_back", "gate up above", "of_gate of_up", _GATED_BACK)
    return tuple(_elementwise(run, [*primals, cotangent], 2))


def turned(x: mx.array, norm: Any, turn: tuple[mx.array, mx.array], heads: int) -> mx.array:
    """Heads normalised and turned to their rotary positions.

    Args:
        x: (T, heads · 128), queries or keys.
        norm: an ``nn.RMSNorm`` over a head, frozen.
        turn: cos and sin, T · 128 numbers each, the signs of a rotation in sin.
        heads: of a row.

    Returns:
        (T, heads · 128).
    """
    weight = norm.weight
    cos, sin = (one.astype(mx.bfloat16) for one in turn)

    def run(name: str, inputs: str, made: str, source: str, arrays: list[mx.array]) -> mx.array:
        rows = arrays[0].shape[0]
        (result,) = kernel(name, inputs, made, source, norm.eps)(
            inputs=arrays,
            template=[("HEADS", heads)],
            grid=(-(-rows * heads * 32 // THREADS) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(rows, heads * HEAD_SIZE)],
            output_dtypes=[mx.bfloat16],
        )
        return result

    @mx.custom_function
    def forward(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        return run("turned", "x weight cosine sine", "made", _TURNED, [x, weight, cos, sin])

    @forward.vjp
    def backward(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        x, cos, sin = primals
        back = run(
            "turned_back",
            "x weight cosine sine above",
            "of_x",
            _TURNED_BACK,
            [x, weight, cos, sin, cotangent],
        )
        return back, mx.zeros_like(cos), mx.zeros_like(sin)

    made: Any = forward(x, cos, sin)
    return made


def normed(h: mx.array, norm: Any) -> tuple[mx.array, mx.array]:
    """h (T, D) normalised, and h itself for the way around.

    Both ways meet again in the backward pass, in the kernel that computes the norm's gradient.

    Args:
        h: D a multiple of 8 and at most 8,192.
        norm: an ``nn.RMSNorm`` over D, frozen.
    """
    weight = norm.weight

    @mx.custom_function
    def forward(h: mx.array) -> tuple[mx.array, mx.array]:
        return mx.fast.rms_norm(h, weight, norm.eps), h

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (h,) = primals if isinstance(primals, tuple | list) else (primals,)
        rows, width = h.shape
        (back,) = kernel("normed_back", "x weight above beside", "of_x", _NORMED_BACK, norm.eps)(
            inputs=[h, weight, *cotangents],
            template=[("WIDTH", width)],
            grid=(rows * -(-width // EACH // 32) * 32, 1, 1),
            threadgroup=(-(-width // EACH // 32) * 32, 1, 1),
            output_shapes=[h.shape],
            output_dtypes=[mx.bfloat16],
        )
        return back

    made: Any = forward(h)
    return made[0], made[1]


def cross_entropy(logits: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Losses of logits (M, V) bfloat16, and their gradients.

    Args:
        logits: V a multiple of 8.
        wanted: (M,) int32; where negative, loss and gradient are 0.

    Returns:
        Cross-entropy (M,) float32 in nats, whether ``wanted`` was the likeliest (M,) int32, and
        the gradient (M, V) bfloat16 of the sum. Not finite where a logit of the row is not.
    """
    rows, width = logits.shape
    losses, hits, slope = kernel(
        "cross_entropy", "logits wanted", "loss hit slope", _CROSS_ENTROPY
    )(
        inputs=[logits, wanted],
        template=[("WIDTH", width)],
        grid=(rows * 512, 1, 1),
        threadgroup=(512, 1, 1),
        output_shapes=[(rows,), (rows,), logits.shape],
        output_dtypes=[mx.float32, mx.int32, mx.bfloat16],
    )
    return losses, hits, slope
