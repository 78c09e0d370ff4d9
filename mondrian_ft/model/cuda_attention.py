"""Causal attention for training on Hopper, forward and backward, in CUDA kernels of our own.

MLX asks cuDNN for a mask at the bottom right, and cuDNN's backward pass then takes as long as with
no mask at all. Here what the mask hides is not computed. The method is FlashAttention's (Dao 2023,
arXiv:2307.08691; products under way during the softmax as in Shah et al. 2024, arXiv:2407.08608):
scores live in registers, the forward pass keeps a logarithm a row, the backward pass computes the
scores again.

Blocks of 256 threads, two warpgroups that multiply through ``wgmma``; tiles come by ``cp.async``
into shared memory in the 128-byte swizzle that ``wgmma`` reads. The gradient of queries is added up
in float32 by whoever has a part of it, so its last bits depend on the order, as cuDNN's do.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .backend import ON_CPU, mx

HEAD_SIZE = 128
"""The one size of heads that the kernels are written for."""
TILE = 128
"""Queries of a block of the forward pass, and keys of a block of the backward pass."""
THREADS = 256
FORWARD_BYTES = 160 * 1024 + 1024
BACKWARD_BYTES = 193 * 1024 + 1024 + 512


def _registers(first: int, count: int) -> str:
    return ", ".join(f"%{number}" for number in range(first, first + count))


def _product(width: int, from_registers: bool, turned: tuple[int, int], adding: bool) -> str:
    """A function around one ``wgmma`` of 64 rows, 16 deep, and ``width`` columns.

    Args:
        width: columns of the result.
        from_registers: whether the first operand is held in registers.
        turned: for each operand, whether its inner dimension is the one that is not contiguous.
        adding: to what the result holds; otherwise the result need hold nothing before.
    """
    count = width // 2
    name = f"{'add' if adding else 'set'}{width}" + ("_held" if from_registers else "")
    name += "".join("_t" if one else "_n" for one in turned[from_registers:])
    held = "unsigned a0, unsigned a1, unsigned a2, unsigned a3"
    given = held if from_registers else "tile_t a"
    first = f"{{{_registers(count, 4)}}}" if from_registers else f"%{count}"
    after = count + (4 if from_registers else 1)
    flags = ", ".join(str(one) for one in (int(adding), 1, 1, *turned[from_registers:]))
    takes = '"r"(a0), "r"(a1), "r"(a2), "r"(a3)' if from_registers else '"l"(a)'
    outs = ", ".join(f'"{"+" if adding else "="}f"(d[{number}])' for number in range(count))
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {given}, tile_t b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 "
      "{{{_registers(0, count)}}}, {first}, %{after}, {flags};"
      : {outs} : {takes}, "l"(b));
}}
"""


_PRODUCTS = "".join(
    _product(*each)
    for each in (
        (128, False, (0, 0), False),
        (128, False, (0, 0), True),
        (64, False, (0, 0), False),
        (64, False, (0, 0), True),
        (64, False, (1, 1), False),
        (64, False, (1, 1), True),
        (128, True, (0, 1), True),
    )
)

_TYPES = """
#include <cuda_bf16.h>

namespace attention {

typedef __nv_bfloat16 half_t;
typedef unsigned long long tile_t;
"""

_PARTS = """
__device__ __forceinline__ unsigned both(float a, float b) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *(const unsigned*)&v;
}
__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A tile in the 128-byte swizzle, for wgmma. The inner dimension is the contiguous one, or the
// other one ("turned"); then `aside` is from 64 columns to the next 64. 8 rows are 1024 bytes.
__device__ __forceinline__ tile_t tile_at(unsigned address, unsigned aside = 16) {
  return (tile_t)((address & 0x3ffff) >> 4) | (tile_t)(aside >> 4) << 16 | (tile_t)64 << 32
      | (tile_t)1 << 62;
}
__device__ __forceinline__ void start() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void finish() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
// Nothing that reads or writes these registers may move across.
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}
template <int N> __device__ __forceinline__ void hold(unsigned (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i]) :: "memory");
}
__device__ __forceinline__ void copy16(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_end() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// What was copied and stored so far can be read by every thread's wgmma.
template <int LEFT> __device__ __forceinline__ void meet() {
  asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
}
// Where eight columns of a row of a tile are; ROWS to a half of 64 columns.
template <int ROWS> __device__ __forceinline__ unsigned place(int row, int eight) {
  return eight / 8 * (ROWS * 128) + row * 128 + ((eight % 8) ^ (row % 8)) * 16;
}
// ROWS rows of 128 numbers.
template <int ROWS> __device__ __forceinline__ void fetch(
    unsigned to, const half_t* from, int pitch) {
  const int eight = threadIdx.x % 16, first = threadIdx.x / 16;
  const half_t* source = from + first * pitch + eight * 8;
  const unsigned target = to + place<ROWS>(first, eight);
#pragma unroll
  for (int i = 0; i < ROWS / 16; ++i) {
    copy16(target + i * 16 * 128, source);
    source += 16 * pitch;
  }
}
__device__ __forceinline__ void store_matrices(
    unsigned to, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
      :: "r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// A warp's 16 of 64 rows of a result (64, 128) go through shared memory to where they belong.
__device__ __forceinline__ void write_rows(
    const float (&d)[64], float factor0, float factor1, unsigned room, half_t* to,
    int pitch) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    store_matrices(room + place<128>(first + lane % 16, 2 * j + lane / 16),
        both(d[8 * j] * factor0, d[8 * j + 1] * factor0),
        both(d[8 * j + 2] * factor1, d[8 * j + 3] * factor1),
        both(d[8 * j + 4] * factor0, d[8 * j + 5] * factor0),
        both(d[8 * j + 6] * factor1, d[8 * j + 7] * factor1));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = first + 2 * i + lane / 16;
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "r"(room + place<128>(row, lane % 16)));
    *(uint4*)(to + row * pitch + lane % 16 * 8) = v;
  }
}
__device__ __forceinline__ float quad_most(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ unsigned shared_room() {
  extern __shared__ unsigned char room[];
  return ((unsigned)__cvta_generic_to_shared(room) + 1023) & ~1023u;
}

// d (64, 128) = 64 rows of A times 128 rows of B, inner dimension 128.
__device__ __forceinline__ void scores128(float (&d)[64], unsigned a, unsigned b) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const unsigned at = i / 4 * 128 * 128 + i % 4 * 32;
    if (i == 0) set128_n_n(d, tile_at(a), tile_at(b));
    else add128_n_n(d, tile_at(a + at), tile_at(b + at));
  }
}
// d (64, 64) = 64 rows of A, of a tile of 128, times 64 rows of B.
__device__ __forceinline__ void scores64(float (&d)[32], unsigned a, unsigned b) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const unsigned at = i % 4 * 32;
    if (i == 0) set64_n_n(d, tile_at(a), tile_at(b));
    else add64_n_n(d, tile_at(a + i / 4 * 128 * 128 + at), tile_at(b + i / 4 * 64 * 128 + at));
  }
}
// d (64, 128) += P (64, 16 N / 4) in registers times the rows of a tile of ROWS.
template <int ROWS, int N> __device__ __forceinline__ void values(
    float (&d)[64], const unsigned (&p)[N], unsigned b) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    add128_held_t(d, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3],
        tile_at(b + i * 16 * 128, ROWS * 128));
  }
}

// One block: 128 queries of a head. What is before them is gone through from its end.
__device__ __forceinline__ void forward(
    const half_t* q, const half_t* k, const half_t* v, half_t* out, float* lse,
    int q_pitch, int k_pitch, int v_pitch, int out_pitch, int last, float scale) {
  const unsigned base = shared_room();
  const unsigned queries = base, keys = base + 32768, contents = base + 3 * 32768;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int row0 = threadIdx.x / 32 * 16 + lane / 4;
  fetch<128>(queries, q + (long long)last * 128 * q_pitch, q_pitch);
  fetch<128>(keys, k + (long long)last * 128 * k_pitch, k_pitch);
  copies_end();
  fetch<128>(contents, v + (long long)last * 128 * v_pitch, v_pitch);
  copies_end();
  meet<1>();
  if (last > 0) fetch<128>(keys + 32768, k + (long long)(last - 1) * 128 * k_pitch, k_pitch);
  copies_end();
  float s[64], o[64];
  unsigned p[32];
  start();
  scores128(s, queries + group * 64 * 128, keys);
  commit();
#pragma unroll
  for (int i = 0; i < 64; ++i) o[i] = 0;
  finish<0>();
  hold(s);
  float most0 = -1e30f, most1 = -1e30f, total0 = 0, total1 = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (column > row0 + i / 2 % 2 * 8) s[i] = -1e30f;
    if (i / 2 % 2 == 0) most0 = fmaxf(most0, s[i]); else most1 = fmaxf(most1, s[i]);
  }
  most0 = quad_most(most0);
  most1 = quad_most(most1);
  {
    const float least0 = most0 * scale, least1 = most1 * scale;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      s[i] = power(s[i] * scale - (i / 2 % 2 == 0 ? least0 : least1));
      if (i / 2 % 2 == 0) total0 += s[i]; else total1 += s[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = both(s[2 * i], s[2 * i + 1]);
  for (int j = 1; j <= last; ++j) {
    meet<0>();
    if (j < last) {
      fetch<128>(keys + (j + 1) % 2 * 32768, k + (long long)(last - j - 1) * 128 * k_pitch,
          k_pitch);
    }
    fetch<128>(contents + j % 2 * 32768, v + (long long)(last - j) * 128 * v_pitch, v_pitch);
    copies_end();
    hold(o);
    hold(p);
    start();
    scores128(s, queries + group * 64 * 128, keys + j % 2 * 32768);
    commit();
    values<128>(o, p, contents + (j - 1) % 2 * 32768);
    commit();
    finish<1>();
    hold(s);
    float more0 = most0, more1 = most1;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (i / 2 % 2 == 0) more0 = fmaxf(more0, s[i]); else more1 = fmaxf(more1, s[i]);
    }
    more0 = quad_most(more0);
    more1 = quad_most(more1);
    const float less0 = power((most0 - more0) * scale), less1 = power((most1 - more1) * scale);
    most0 = more0;
    most1 = more1;
    total0 *= less0;
    total1 *= less1;
    const float least0 = most0 * scale, least1 = most1 * scale;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      s[i] = power(s[i] * scale - (i / 2 % 2 == 0 ? least0 : least1));
      if (i / 2 % 2 == 0) total0 += s[i]; else total1 += s[i];
    }
    finish<0>();
    hold(o);
    hold(p);
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] *= i / 2 % 2 == 0 ? less0 : less1;
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = both(s[2 * i], s[2 * i + 1]);
  }
  meet<0>();
  hold(o);
  hold(p);
  start();
  values<128>(o, p, contents + last % 2 * 32768);
  commit();
  total0 = quad_sum(total0);
  total1 = quad_sum(total1);
  if (lane % 4 == 0) {
    lse[last * 128 + row0] = most0 * scale + __log2f(total0);
    lse[last * 128 + row0 + 8] = most1 * scale + __log2f(total1);
  }
  finish<0>();
  hold(o);
  write_rows(o, 1.0f / total0, 1.0f / total1, queries,
      out + (long long)last * 128 * out_pitch, out_pitch);
}

// One block: 128 keys and all queries that see them, of HEADS heads that share them.
// Scores are held with keys as rows, so that P and dS are the first operands of dV and dK.
template <int HEADS> __device__ __forceinline__ void backward(
    const half_t* q, const half_t* k, const half_t* v, const half_t* above, const float* lse,
    const float* delta, float* of_q, half_t* of_k, half_t* of_v,
    int q_pitch, int k_pitch, int v_pitch, int above_pitch, int out_pitch, int q_head,
    int above_head, int length, int number, float scale, float plain_scale) {
  const unsigned base = shared_room();
  const unsigned keys = base, contents = base + 32768, stages = base + 65536;
  const unsigned slopes = stages + 3 * 32768, numbers = slopes + 32768;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = length / 64, first_block = 2 * number;
  const int total = HEADS * (blocks - first_block);
  const int row0 = warp * 16 + lane / 4;

  // The next step that is fetched, and where it is; each head begins at the diagonal.
  int coming = 0, coming_block = first_block, coming_stage = 0;
  const half_t* coming_q = q + (long long)first_block * 64 * q_pitch;
  const half_t* coming_above = above + (long long)first_block * 64 * above_pitch;
  const float* coming_number = (threadIdx.x < 16 ? lse : delta) + first_block * 64
      + threadIdx.x % 16 * 4;
  auto fetch_next = [&]() {
    if (coming < total) {
      const unsigned to = stages + coming_stage * 32768;
      fetch<64>(to, coming_q, q_pitch);
      fetch<64>(to + 16384, coming_above, above_pitch);
      if (threadIdx.x < 32) copy16(numbers + coming_stage * 512 + threadIdx.x * 16, coming_number);
      int rows = 64;
      if (++coming_block == blocks) {
        coming_block = first_block;
        rows -= (blocks - first_block) * 64;
        coming_q += q_head;
        coming_above += above_head;
        coming_number += length;
      }
      coming_q += (long long)rows * q_pitch;
      coming_above += (long long)rows * above_pitch;
      coming_number += rows;
      coming_stage = coming_stage == 2 ? 0 : coming_stage + 1;
      ++coming;
    }
    copies_end();
  };

  fetch<128>(keys, k + (long long)number * 128 * k_pitch, k_pitch);
  fetch<128>(contents, v + (long long)number * 128 * v_pitch, v_pitch);
  fetch_next();
  fetch_next();
  float dk[64], dv[64], s[32], dp[32], dq[32];
  unsigned p[16], ds[16];
#pragma unroll
  for (int i = 0; i < 64; ++i) dk[i] = dv[i] = 0;
  meet<1>();
  const unsigned own_keys = keys + group * 64 * 128, own_contents = contents + group * 64 * 128;
  hold(dk);
  hold(dv);
  start();
  scores64(s, own_keys, stages);
  commit();
  float* to = of_q + (first_block * 2 + group) * 4096 + threadIdx.x % 128 * 4;
  int at = 0, away = 0;
  for (int step = 0; step < total; ++step) {
    const unsigned stage = stages + at * 32768;
    finish<0>();
    hold(s);
    hold(dk);
    hold(ds);
    start();
    scores64(dp, own_contents, stage + 16384);
    commit();
    const unsigned mine = numbers + at * 512 + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float l0, l1;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(l0), "=f"(l1) : "r"(mine + j * 32));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float one = power(s[4 * j + i] * scale - (i % 2 == 0 ? l0 : l1));
        const int query = away * 64 + j * 8 + lane % 4 * 2 + i % 2;
        if (away < 2 && row0 + i / 2 * 8 > query) one = 0;
        s[4 * j + i] = one;
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = both(s[2 * i], s[2 * i + 1]);
    hold(p);
    hold(dv);
    start();
    values<64>(dv, p, stage + 16384);
    commit();
    finish<1>();
    hold(dp);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float d0, d1;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
          : "=f"(d0), "=f"(d1) : "r"(mine + 256 + j * 32));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ds[2 * j + i] = both(s[4 * j + 2 * i] * (dp[4 * j + 2 * i] - d0),
            s[4 * j + 2 * i + 1] * (dp[4 * j + 2 * i + 1] - d1));
      }
    }
    // dS (keys, queries), a row of 64 queries being 128 bytes.
    const unsigned slope = slopes + step % 2 * 16384;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      store_matrices(slope + place<128>(warp * 16 + lane % 16, 2 * j + lane / 16),
          ds[4 * j], ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3]);
    }
    meet<0>();
    fetch_next();
    hold(ds);
    hold(dk);
    start();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const tile_t a = tile_at(slope + i * 16 * 128);
      const tile_t b = tile_at(keys + group * 128 * 128 + i * 16 * 128);
      if (i == 0) set64_t_t(dq, a, b); else add64_t_t(dq, a, b);
    }
    commit();
    values<64>(dk, ds, stage);
    at = at == 2 ? 0 : at + 1;
    // After the last step nobody reads these, and their stage may hold anything.
    scores64(s, own_keys, stages + at * 32768);
    commit();
    finish<1>();
    hold(dv);
    hold(dq);
    hold(p);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
          :: "l"(to + j * 512), "f"(dq[4 * j]), "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]),
          "f"(dq[4 * j + 3]) : "memory");
    }
    to += 8192;
    if (++away == blocks - first_block) {
      away = 0;
      to += first_block * 8192;
    }
  }
  finish<0>();
  // Everybody is done with keys and values, so their room is free.
  __syncthreads();
  write_rows(dk, plain_scale, plain_scale, keys,
      of_k + (long long)number * 128 * out_pitch, out_pitch);
  write_rows(dv, 1.0f, 1.0f, contents, of_v + (long long)number * 128 * out_pitch, out_pitch);
}

// What a block does: `number` of `blocks` pieces of one of `many` heads. Eight heads are gone
// through at a time, so that what they read stays in the cache; pieces go from 0 up.
struct Piece { int which, number; };
__device__ __forceinline__ Piece piece_of(int id, int blocks, int many) {
  const int round = id / (8 * blocks), inside = id % (8 * blocks);
  const int heads = min(8, many - 8 * round);
  return {8 * round + inside % heads, inside / heads};
}

}  // namespace attention
"""

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

# How much of a gradient goes the way of the whole row.
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
      of_q + rows * 128, of_k + to, of_v + to, q_strides[1], k_strides[1], v_strides[1],
      heads * 128, parts * 128, q_strides[2], 128, length, piece.number,
      plain_scale[0] * 1.4426950408889634f, plain_scale[0]);
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


def fits(q: mx.array, k: mx.array) -> bool:
    """Whether :func:`attention` takes these; shapes as there."""
    return (
        q.dtype == k.dtype == mx.bfloat16
        and q.shape[-1] == HEAD_SIZE
        and q.shape[1] == k.shape[1]
        and q.shape[1] % TILE == 0
        and q.shape[2] % k.shape[2] == 0
        and on_hopper()
    )


@cache
def _kernel(name: str, inputs: str, outputs: str, source: str, room: int = 0) -> Any:
    return mx.fast.cuda_kernel(
        f"mondrian_{name}",
        inputs.split(),
        outputs.split(),
        source,
        header=_TYPES + _PRODUCTS + _PARTS,
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
    made: Any = _attend(q, k, v, mx.array(scale, mx.float32))
    return made[0]


@mx.custom_function
def _attend(q: mx.array, k: mx.array, v: mx.array, scale: mx.array) -> Any:
    batch, length, heads, _ = q.shape
    out, lse = _kernel("attend", "q k v plain_scale", "out lse", _FORWARD, FORWARD_BYTES)(
        inputs=[q, k, v, scale],
        grid=(batch * heads * length // TILE * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[q.shape, (batch, heads, length)],
        output_dtypes=[mx.bfloat16, mx.float32],
    )
    return out, lse


@_attend.vjp
def _attend_back(primals: Any, cotangents: Any, outputs: Any) -> Any:
    q, k, v, scale = primals
    out, lse = outputs
    above = mx.contiguous(cotangents[0])
    batch, length, heads, size = q.shape
    shared = heads // k.shape[2]
    each = 2 if shared % 2 == 0 else 1
    parts = heads // each
    (along,) = _kernel("attend_along", "out above", "along", _ALONG)(
        inputs=[out, above],
        grid=(batch * length * heads * 32, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[lse.shape],
        output_dtypes=[mx.float32],
    )
    inputs = "q k v above lse along plain_scale"
    sums, k_parts, v_parts = _kernel(
        "attend_back", inputs, "of_q of_k of_v", _BACKWARD, BACKWARD_BYTES
    )(
        inputs=[q, k, v, above, lse, along, scale],
        template=[("EACH", each)],
        grid=(batch * parts * length // TILE * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(batch, heads, length, size)] + [(batch, length, parts, size)] * 2,
        output_dtypes=[mx.float32, mx.bfloat16, mx.bfloat16],
        init_value=0,
    )
    of_q, of_k, of_v = _kernel(
        "attend_gathered", "sums k_parts v_parts plain_scale", "of_q of_k of_v", _GATHERED
    )(
        inputs=[sums, k_parts, v_parts, scale],
        template=[("PARTS", shared // each)],
        grid=(batch * length * (heads * 8 + 2 * k.shape[2] * 16), 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[q.shape, k.shape, k.shape],
        output_dtypes=[mx.bfloat16] * 3,
    )
    return of_q, of_k, of_v, mx.zeros_like(scale)
