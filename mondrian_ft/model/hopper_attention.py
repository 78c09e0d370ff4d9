"""Causal attention on Hopper: what a block of threads does, forward and backward, as CUDA text.

The method is FlashAttention's (Dao 2023, arXiv:2307.08691; products under way during the softmax
and groups that take turns as in Shah et al. 2024, arXiv:2407.08608): scores live in registers, the
forward pass keeps a logarithm a row, the backward pass computes the scores again. The gradient of
queries is added up in float32 by whoever has a part of it, so its last bits depend on the order, as
cuDNN's do.
"""

from __future__ import annotations

from .hopper import PIECES

FORWARD_BYTES = 160 * 1024 + 1024 + 64
"""Shared memory of ``forward``: queries, two tiles of keys and of values, and their barriers."""
BACKWARD_BYTES = 192 * 1024 + 1024 + 3 * 512
"""Of ``backward``: keys, values, three tiles of queries and of their gradients, two of dS."""

_BLOCKS = """
// One block: 128 queries of a head. What is before them is gone through from its end. The third
// group of 128 threads fetches keys and values, two tiles of each ahead of the other two groups.
__device__ __forceinline__ void forward(
    const half_t* q, const half_t* k, const half_t* v, half_t* out, float* lse,
    int q_pitch, int k_pitch, int v_pitch, int out_pitch, int last, float scale) {
  const unsigned base = shared_room();
  const unsigned queries = base, keys = base + 32768, contents = base + 3 * 32768;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int row0 = threadIdx.x / 32 * 16 + lane / 4;
  const unsigned came_k = base + 5 * 32768, came_v = came_k + 16;
  const unsigned free_k = came_k + 32, free_v = came_k + 48;
  if (threadIdx.x < 2) {
    expect(came_k + 8 * threadIdx.x, 128);
    expect(came_v + 8 * threadIdx.x, 128);
    expect(free_k + 8 * threadIdx.x, 8);
    expect(free_v + 8 * threadIdx.x, 8);
  }
  __syncthreads();
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    for (int j = 0; j <= last; ++j) {
      const int stage = j & 1, turn = (j >> 1) & 1;
      if (j > 1) wait_for(free_k + 8 * stage, turn ^ 1);
      fetch<128, 128>(keys + stage * 32768, k + (long long)(last - j) * 128 * k_pitch, k_pitch);
      arrive_copied(came_k + 8 * stage);
      if (j > 1) wait_for(free_v + 8 * stage, turn ^ 1);
      fetch<128, 128>(contents + stage * 32768, v + (long long)(last - j) * 128 * v_pitch, v_pitch);
      arrive_copied(came_v + 8 * stage);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  fetch<128, 256>(queries, q + (long long)last * 128 * q_pitch, q_pitch);
  asm volatile("cp.async.wait_all;" ::: "memory");
  see();
  meet_at(3);
  wait_for(came_k, 0);
  see();
  float s[64], o[64];
  unsigned p[32];
  start();
  scores128(s, queries + group * 64 * 128, keys);
  commit();
#pragma unroll
  for (int i = 0; i < 64; ++i) o[i] = 0;
  finish<0>();
  hold(s);
  if (lane == 0) arrive(free_k);
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
  // The two take turns at multiplying, so that one has its softmax while the other multiplies.
  if (group == 1) come_to(1);
  for (int j = 1; j <= last; ++j) {
    wait_for(came_k + 8 * (j & 1), (j >> 1) & 1);
    see();
    hold(o);
    hold(p);
    meet_at(1 + group);
    start();
    scores128(s, queries + group * 64 * 128, keys + j % 2 * 32768);
    commit();
    wait_for(came_v + 8 * ((j - 1) & 1), ((j - 1) >> 1) & 1);
    see();
    values<128>(o, p, contents + (j - 1) % 2 * 32768);
    commit();
    come_to(2 - group);
    finish<1>();
    hold(s);
    if (lane == 0) arrive(free_k + 8 * (j & 1));
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
    if (lane == 0) arrive(free_v + 8 * ((j - 1) & 1));
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] *= i / 2 % 2 == 0 ? less0 : less1;
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = both(s[2 * i], s[2 * i + 1]);
  }
  if (group == 0) meet_at(1);
  wait_for(came_v + 8 * (last & 1), (last >> 1) & 1);
  see();
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
      fetch<64, 256>(to, coming_q, q_pitch);
      fetch<64, 256>(to + 16384, coming_above, above_pitch);
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

  fetch<128, 256>(keys, k + (long long)number * 128 * k_pitch, k_pitch);
  fetch<128, 256>(contents, v + (long long)number * 128 * v_pitch, v_pitch);
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

SOURCE = PIECES + _BLOCKS
"""``forward``, ``backward`` and ``piece_of``, in the namespace ``attention``."""
