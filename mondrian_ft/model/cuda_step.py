"""A decoding step in few CUDA kernels of our own.

With MLX's own operations a step waits for the host, which queues some thousand kernels and asks
cuBLAS anew how to do each of 250 products: 11 of 13 ms with 16 rows (benchmarks/LOG.md). And a
cache that a compiled function updates is copied whole. Here a layer is two norms and five kernels,
with an adapter nine:

- :func:`product`: x Wᵀ for few rows x. A block takes 16 rows of W, its warps share the inner
  dimension, and W is read once. What follows a product is done where it is at hand: the residual,
  SwiGLU, an adapter's second matrix.
- :func:`attention`: norm, rotation, scores, softmax and values of a row and key head in one block,
  over the columns that are filled and no others.

Sums are float32 and roundings to bfloat16 stand where MLX's are, except that attention keeps
float32 from the scores to its result: other last bits than MLX's, as with another batch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from .backend import mx, nn

MOST_ROWS = 64
"""From here on MLX's operations are as fast: each 16 rows read W again (benchmarks/LOG.md)."""
TILE = 16
"""Rows of W and rows of x that a block multiplies at a time, as the tensor cores take them."""
WARPS = 8
HEAD_SIZE = 128
"""The one size of heads that the attention is written for."""
EACH = 4
"""Columns that a half-warp of the attention has under way."""

Arrays = list[mx.array]

_HEADER = """
#include <cuda_bf16.h>

__device__ inline uint4 stream_in(const void* from) {
  // Weights are read once a step; they need no place in the first cache.
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ inline void multiply_add(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline float rounded(float v) { return __bfloat162float(__float2bfloat16(v)); }

// Every lane gets the sum over its warp.
__device__ inline float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
"""

# The order of the inner dimension is free in a product, so each thread reads 8 neighbours of a
# row (16 bytes) and hands them to the tensor cores as if they were pairs 8 apart.
_PRODUCT = """
  __shared__ float parts[WARPS][16][17];
  __shared__ float sums[16][17];
  const int rows = x_shape[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int tile = blockIdx.x * (PAIRED ? 8 : 16);
  const int first = blockIdx.y * 16;
  const __nv_bfloat16 *w0, *w1;
  if (PAIRED) {
    w0 = wa + (size_t)(tile + g) * K;
    w1 = wb + (size_t)(tile + g) * K;
  } else {
    const __nv_bfloat16* w = tile < NA ? wa + (size_t)tile * K
        : tile < NA + NB ? wb + (size_t)(tile - NA) * K : wc + (size_t)(tile - NA - NB) * K;
    w0 = w + (size_t)g * K;
    w1 = w0 + (size_t)8 * K;
  }
  const __nv_bfloat16* x0 = x + (size_t)min(first + g, rows - 1) * K;
  const __nv_bfloat16* x1 = x + (size_t)min(first + g + 8, rows - 1) * K;
  const bool more = rows - first > 8;
  float c[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
  for (int k = warp * 32 + t * 8; k < K; k += WARPS * 32) {
    const uint4 a = stream_in(w0 + k), b = stream_in(w1 + k);
    const uint4 u = *(const uint4*)(x0 + k);
    multiply_add(c, a.x, b.x, a.y, b.y, u.x, u.y);
    multiply_add(c, a.z, b.z, a.w, b.w, u.z, u.w);
    if (more) {
      const uint4 v = *(const uint4*)(x1 + k);
      multiply_add(c + 4, a.x, b.x, a.y, b.y, v.x, v.y);
      multiply_add(c + 4, a.z, b.z, a.w, b.w, v.z, v.w);
    }
  }
  for (int i = 0; i < 8; ++i) {
    parts[warp][t * 2 + i % 2 + i / 4 * 8][g + i / 2 % 2 * 8] = c[i];
  }
  __syncthreads();
  const int n = threadIdx.x % 16, m = threadIdx.x / 16;
  float v = 0;
  for (int i = 0; i < WARPS; ++i) v += parts[i][m][n];
  const int row = min(first + m, rows - 1);
  const bool real = first + m < rows;
  if (RANK > 0) {
    // The adapter's part: z = x A comes in two halves, A's upper bits and its lower bits.
    const int part = PAIRED ? n / 8 : (tile >= NA) + (tile >= NA + NB);
    const int column = PAIRED ? part * NA + tile + n % 8 : tile + n;
    const auto* one = z + (size_t)row * 2 * ROOM + part * RANK;
    float added = 0;
    for (int r = 0; r < RANK; ++r) {
      added += ((float)one[r] + (float)one[ROOM + r]) * (float)b[(size_t)r * WIDE + column];
    }
    v = rounded(v) + rounded(added);
  }
  if (PAIRED) {
    sums[m][n] = rounded(v);
    __syncthreads();
    if (n < 8 && real) {
      const float gate = sums[m][n], up = sums[m][n + 8];
      y[(size_t)row * NA + tile + n] = (TO)(rounded(gate / (1.0f + __expf(-gate))) * up);
    }
  } else if (real) {
    const size_t place = (size_t)row * WIDE + tile + n;
    if (ADDING) v = rounded(v) + (float)before[place];
    y[place] = (TO)v;
  }
"""

# A half-warp shares a column, 8 of its 128 numbers a lane; several columns at a time hide
# the memory's delay. Every half-warp has a softmax of its own, and they are merged at the end.
_ATTENTION = """
  constexpr int D = 128, GROUPS = WARPS * 2;
  __shared__ float queries[G][D];
  __shared__ __align__(16) __nv_bfloat16 key[D];
  __shared__ float tops[WARPS][G], totals[WARPS][G];
  __shared__ float results[WARPS][G][D];
  const int row = blockIdx.x / H, head = blockIdx.x % H;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const __nv_bfloat16* mine = qkv + (size_t)row * (G + 2) * H * D;
  const __nv_bfloat16* value = mine + (G + 1) * H * D + head * D;
  for (int i = warp; i <= G; i += WARPS) {
    const __nv_bfloat16* from = mine + (i < G ? (head * G + i) * D : G * H * D + head * D);
    float v[4], squares = 0;
    for (int j = 0; j < 4; ++j) {
      v[j] = (float)from[lane + 32 * j];
      squares += v[j] * v[j];
    }
    const float scale = rsqrtf(warp_sum(squares) / D + EPSILON);
    for (int j = 0; j < 4; ++j) {
      const int d = lane + 32 * j;
      v[j] = rounded(v[j] * scale * (float)(i < G ? q_weight[d] : k_weight[d]));
    }
    for (int j = 0; j < 4; ++j) {
      const int d = lane + 32 * j;
      const float other = j < 2 ? -v[j + 2] : v[j - 2];
      const float turned = rounded(
          v[j] * (float)cosine[row * D + d] + other * (float)sine[row * D + d]);
      if (i < G) queries[i][d] = turned * SCALE;
      else key[d] = __float2bfloat16(turned);
    }
  }
  __syncthreads();
  const int group = threadIdx.x / 16, eighth = threadIdx.x % 16 * 8;
  float q[G][8], sum[G][8], top[G], total[G];
  for (int i = 0; i < G; ++i) {
    top[i] = -1e30f;
    total[i] = 0;
    for (int d = 0; d < 8; ++d) {
      q[i][d] = queries[i][eighth + d];
      sum[i][d] = 0;
    }
  }
  // Columns in their order: the row's prompt, what was written since and joined it, the block of
  // new ones, and the token of this step.
  const int prompt = lengths[row], joined = start[0] - width[0], recent = column[0] - start[0];
  const int count = prompt + joined + recent + 1;
  const size_t capacity = old_keys_shape[2];
  const __nv_bfloat16* old_k = old_keys + (size_t)blockIdx.x * capacity * D;
  const __nv_bfloat16* old_v = old_values + (size_t)blockIdx.x * capacity * D;
  const __nv_bfloat16* new_k = new_keys + (size_t)blockIdx.x * BLOCK * D;
  const __nv_bfloat16* new_v = new_values + (size_t)blockIdx.x * BLOCK * D;
  // All lanes go round equally often: they exchange numbers.
  for (int base = 0; base < count; base += GROUPS * EACH) {
    uint4 k[EACH], v[EACH];
    for (int i = 0; i < EACH; ++i) {
      const int j = min(base + i * GROUPS + group, count - 1);
      const __nv_bfloat16 *from_k, *from_v;
      if (j < prompt + joined) {
        const size_t c = (size_t)(j < prompt ? j : width[0] + j - prompt) * D;
        from_k = old_k + c;
        from_v = old_v + c;
      } else if (j < count - 1) {
        const size_t c = (size_t)(j - prompt - joined) * D;
        from_k = new_k + c;
        from_v = new_v + c;
      } else {
        from_k = key;
        from_v = value;
      }
      k[i] = *(const uint4*)(from_k + eighth);
      v[i] = *(const uint4*)(from_v + eighth);
    }
    float s[EACH][G];
    for (int i = 0; i < EACH; ++i) {
      const float f[8] = {low(k[i].x), high(k[i].x), low(k[i].y), high(k[i].y),
                          low(k[i].z), high(k[i].z), low(k[i].w), high(k[i].w)};
      for (int n = 0; n < G; ++n) {
        float a = 0;
        for (int d = 0; d < 8; ++d) a += q[n][d] * f[d];
        for (int step = 8; step > 0; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
        s[i][n] = a;
      }
    }
    for (int n = 0; n < G; ++n) {
      float most = top[n];
      for (int i = 0; i < EACH; ++i) {
        if (base + i * GROUPS + group < count) most = fmaxf(most, s[i][n]);
      }
      const float less = __expf(top[n] - most);
      top[n] = most;
      total[n] *= less;
      for (int d = 0; d < 8; ++d) sum[n][d] *= less;
      for (int i = 0; i < EACH; ++i) {
        s[i][n] = base + i * GROUPS + group < count ? __expf(s[i][n] - most) : 0.0f;
        total[n] += s[i][n];
      }
    }
    for (int i = 0; i < EACH; ++i) {
      const float f[8] = {low(v[i].x), high(v[i].x), low(v[i].y), high(v[i].y),
                          low(v[i].z), high(v[i].z), low(v[i].w), high(v[i].w)};
      for (int n = 0; n < G; ++n) {
        for (int d = 0; d < 8; ++d) sum[n][d] += s[i][n] * f[d];
      }
    }
  }
  for (int n = 0; n < G; ++n) {
    const float other = __shfl_xor_sync(0xffffffffu, top[n], 16);
    const float most = fmaxf(top[n], other);
    const float mine_part = __expf(top[n] - most);
    total[n] *= mine_part;
    total[n] += __shfl_xor_sync(0xffffffffu, total[n], 16);
    for (int d = 0; d < 8; ++d) {
      sum[n][d] *= mine_part;
      sum[n][d] += __shfl_xor_sync(0xffffffffu, sum[n][d], 16);
    }
    if (lane < 16) {
      for (int d = 0; d < 8; ++d) results[warp][n][eighth + d] = sum[n][d];
    }
    if (lane == 0) {
      tops[warp][n] = most;
      totals[warp][n] = total[n];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * D; i += WARPS * 32) {
    const int n = i / D, d = i % D;
    float most = tops[0][n];
    for (int w = 1; w < WARPS; ++w) most = fmaxf(most, tops[w][n]);
    float above = 0, below = 0;
    for (int w = 0; w < WARPS; ++w) {
      const float weight = __expf(tops[w][n] - most);
      above += weight * results[w][n][d];
      below += weight * totals[w][n];
    }
    attended[((size_t)row * H * G + head * G + n) * D + d] = __float2bfloat16(above / below);
  }
  // The block with this step's column in it; columns after it are not read before they are
  // written, and get zeros.
  for (int i = threadIdx.x; i < BLOCK * D / 8; i += WARPS * 32) {
    const int c = i / (D / 8), d = i % (D / 8) * 8;
    const size_t to = ((size_t)blockIdx.x * BLOCK + c) * D + d;
    uint4 k = {0, 0, 0, 0}, v = {0, 0, 0, 0};
    if (c < recent) {
      k = *(const uint4*)(new_k + c * D + d);
      v = *(const uint4*)(new_v + c * D + d);
    } else if (c == recent) {
      k = *(const uint4*)(key + d);
      v = *(const uint4*)(value + d);
    }
    *(uint4*)(out_keys + to) = k;
    *(uint4*)(out_values + to) = v;
  }
"""


@cache
def _product_kernel() -> Any:
    return mx.fast.cuda_kernel(
        "mondrian_product",
        ["x", "wa", "wb", "wc", "before", "z", "b"],
        ["y"],
        _PRODUCT,
        header=_HEADER,
    )


@cache
def _attention_kernel(epsilon: float) -> Any:
    # MLX finds a kernel it has compiled by its name, so the name has to say what it was made with.
    name = float(epsilon).hex().translate(str.maketrans(".+-", "___"))
    inputs = (
        "qkv q_weight k_weight cosine sine old_keys old_values new_keys new_values lengths width "
        "start column"
    )
    return mx.fast.cuda_kernel(
        f"mondrian_attention_{name}",
        inputs.split(),
        ["attended", "out_keys", "out_values"],
        _ATTENTION,
        header=f"{_HEADER}constexpr float EPSILON = {epsilon!r}f;\n"
        f"constexpr float SCALE = {HEAD_SIZE**-0.5!r}f;\n",
    )


@dataclass(frozen=True)
class Matrices:
    """One to three matrices that take the same input, their rows one below the other.

    Attributes:
        weights: each (N, K), bfloat16.
        a: (2 · room, K) bfloat16, an adapter's first matrices, one below the other, padded to
            room: their upper bits, then their lower bits. None without an adapter.
        b: (rank, sum of N) float32, their second matrices side by side, times the scale.
    """

    weights: tuple[mx.array, ...]
    a: mx.array | None = None
    b: mx.array | None = None


def product(
    x: mx.array,
    matrices: Matrices,
    *,
    before: mx.array | None = None,
    paired: bool = False,
    dtype: mx.Dtype = mx.bfloat16,
) -> mx.array:
    """x (B, K) times the matrices' transposes, (B, sum of N).

    Args:
        before: (B, sum of N), added to the result.
        paired: silu(first) · second of two matrices of N rows each, (B, N).
    """
    sizes = [one.shape[0] for one in matrices.weights]
    rows, inner = x.shape
    rank, room, z = 0, 0, x
    if matrices.a is not None and matrices.b is not None:
        z = product(x, Matrices((matrices.a,)), dtype=mx.float32)
        rank, room = matrices.b.shape[0], matrices.a.shape[0] // 2
    # A kernel's inputs are always all there; what one does not use is x.
    weights = [*matrices.weights, x, x][:3]
    (result,) = _product_kernel()(
        inputs=[
            x,
            *weights,
            x if before is None else before,
            z,
            x if matrices.b is None else matrices.b,
        ],
        template=[
            ("TO", dtype),
            ("K", inner),
            ("NA", sizes[0]),
            ("NB", sizes[1] if len(sizes) > 1 else 0),
            ("WIDE", sum(sizes)),
            ("RANK", rank),
            ("ROOM", room),
            ("WARPS", WARPS),
            ("PAIRED", paired),
            ("ADDING", before is not None),
        ],
        grid=(sum(sizes) // TILE * WARPS * 32, -(-rows // TILE), 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(rows, sizes[0] if paired else sum(sizes))],
        output_dtypes=[dtype],
    )
    return result


def attention(
    qkv: mx.array,
    norms: tuple[Any, Any],
    rotary: tuple[mx.array, mx.array],
    old: tuple[mx.array, mx.array],
    new: tuple[mx.array, mx.array],
    places: tuple[mx.array, ...],
) -> tuple[mx.array, mx.array, mx.array]:
    """One token a row over everything before it.

    Args:
        qkv: (B, (G + 2) · H · D), the products of queries, keys and values; D = 128.
        norms: of queries and keys.
        rotary: cosine and sine, each (B, D).
        old: keys and values (B, H, C, D) that stay as they are.
        new: the block of W columns that comes after them.
        places: lengths (B,), width, start, column (1,), int32; see `decode.Decoding`.

    Returns:
        Attended (B, G · H · D), and the block's keys and values with this token's in it.
    """
    rows, heads, block, size = new[0].shape
    groups = qkv.shape[1] // (heads * size) - 2
    q_norm, k_norm = norms
    return _attention_kernel(q_norm.eps)(
        inputs=[qkv, q_norm.weight, k_norm.weight, *rotary, *old, *new, *places],
        template=[("H", heads), ("G", groups), ("BLOCK", block), ("WARPS", WARPS), ("EACH", EACH)],
        grid=(rows * heads * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(rows, groups * heads * size), new[0].shape, new[1].shape],
        output_dtypes=[mx.bfloat16] * 3,
    )


@dataclass(frozen=True)
class _Layer:
    norms: tuple[Any, Any]
    head_norms: tuple[Any, Any]
    qkv: Matrices
    out: Matrices
    gate_up: Matrices
    down: Matrices


class CudaStep:
    """The step of one model; make it with :func:`cuda_step`."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.layers: list[_Layer] = []
        for layer in backbone.text.layers:
            attn, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                _Layer(
                    (layer.input_layernorm, layer.post_attention_layernorm),
                    (attn.q_norm, attn.k_norm),
                    _matrices(attn.q_proj, attn.k_proj, attn.v_proj),
                    _matrices(attn.o_proj),
                    _matrices(mlp.gate_proj, mlp.up_proj),
                    _matrices(mlp.down_proj),
                )
            )
        self.head = Matrices((_head(backbone).weight,))
        # Made now, not once in every trace.
        mx.eval(
            [
                [one for one in (group.a, group.b) if one is not None]
                for layer in self.layers
                for group in (layer.qkv, layer.out, layer.gate_up, layer.down)
            ]
        )

    def logits(
        self,
        token: mx.array,
        position: mx.array,
        places: tuple[mx.array, ...],
        old: tuple[Arrays, Arrays],
        new: tuple[Arrays, Arrays],
    ) -> tuple[mx.array, Arrays, Arrays]:
        """Logits (B, V) after ``token`` (B,), and the updated blocks."""
        text = self.backbone.text
        h = text.embed_tokens(token)
        cos, sin = text.layers[0].self_attn.rotary_emb(h[:, None], position[:, None])
        rotary = (cos[:, 0], sin[:, 0])
        keys, values = [], []
        for number, layer in enumerate(self.layers):
            qkv = product(layer.norms[0](h), layer.qkv)
            attended, k, v = attention(
                qkv,
                layer.head_norms,
                rotary,
                (old[0][number], old[1][number]),
                (new[0][number], new[1][number]),
                places,
            )
            keys.append(k)
            values.append(v)
            h = product(attended, layer.out, before=h)
            inner = product(layer.norms[1](h), layer.gate_up, paired=True)
            h = product(inner, layer.down, before=h)
        return product(text.norm(h), self.head), keys, values


def cuda_step(backbone: Any) -> CudaStep | None:
    """The step for a model whose weights these kernels take; None for any other.

    They take bfloat16 matrices without biases (or LoRA over them), heads of 128, and sizes that are
    multiples of 32, on a CUDA device.
    """
    if not mx.cuda.is_available() or mx.default_device().type == mx.DeviceType.cpu:
        return None
    return CudaStep(backbone) if _fits(backbone) else None


def _fits(backbone: Any) -> bool:
    text = backbone.text
    matrices, norms = [text.embed_tokens, _head(backbone)], [text.norm]
    for layer in text.layers:
        attn, mlp = layer.self_attn, layer.mlp
        groups = attn.n_heads // attn.n_kv_heads
        if attn.head_dim != HEAD_SIZE or groups > 8 or attn.q_norm.eps != attn.k_norm.eps:
            return False
        matrices += [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
        matrices += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms += [layer.input_layernorm, layer.post_attention_layernorm, attn.q_norm, attn.k_norm]
    return all(_plain(one) for one in matrices) and all(
        one.weight.dtype == mx.bfloat16 for one in norms
    )


def _plain(module: Any) -> bool:
    from mlx_vlm.trainer.peft.lora_layers import LoRALinear

    from .lora_layers import LoRALayer

    if type(module) in (LoRALinear, LoRALayer):
        module = module.linear
    if type(module) not in (nn.Linear, nn.Embedding) or "bias" in module:
        return False
    return module.weight.dtype == mx.bfloat16 and not any(n % 32 for n in module.weight.shape)


def _head(backbone: Any) -> Any:
    if backbone.model.language_model.args.tie_word_embeddings:
        return backbone.text.embed_tokens
    return backbone.model.language_model.lm_head


def _matrices(*modules: Any) -> Matrices:
    """What :func:`product` takes, of linear layers with or without an adapter."""
    weights = tuple((one.linear if "lora_a" in one else one).weight for one in modules)
    rank = max((one.lora_a.shape[1] for one in modules if "lora_a" in one), default=0)
    if rank == 0:
        return Matrices(weights)
    firsts, seconds = [], []
    for module, weight in zip(modules, weights, strict=True):
        outer, inner = weight.shape
        a, b = mx.zeros((rank, inner)), mx.zeros((rank, outer))
        if "lora_a" in module:
            own = module.lora_a.shape[1]
            a[:own] = module.lora_a.T
            b[:own] = module.scale * module.lora_b
        firsts.append(a)
        seconds.append(b)
    a = mx.concatenate(firsts)
    a = mx.pad(a, [(0, -a.shape[0] % TILE), (0, 0)])
    # The tensor cores take bfloat16: a number is its upper bits and, as another, what they leave.
    upper = a.astype(mx.bfloat16)
    lower = (a - upper.astype(mx.float32)).astype(mx.bfloat16)
    return Matrices(weights, mx.concatenate([upper, lower]), mx.concatenate(seconds, axis=1))
