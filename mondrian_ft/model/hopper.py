"""What a kernel for Hopper GPUs is made of, as CUDA text: products, tiles, barriers.

Groups of 128 threads multiply through ``wgmma``, 64 rows each, 16 deep at a time; it reads shared
memory by a way of its own, in tiles of 64 columns whose 128-byte rows are swizzled.
"""

from __future__ import annotations


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
// wgmma reads shared memory by another way than what writes there; this is between the two.
__device__ __forceinline__ void see() { asm volatile("fence.proxy.async;" ::: "memory"); }
// What was copied and stored so far can be read by every thread's wgmma.
template <int LEFT> __device__ __forceinline__ void meet() {
  asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
  see();
  __syncthreads();
}
// Barriers of 256 threads, of whom some wait and some only say that they have been there.
__device__ __forceinline__ void meet_at(int barrier) {
  asm volatile("bar.sync %0, 256;" :: "r"(barrier) : "memory");
}
__device__ __forceinline__ void come_to(int barrier) {
  asm volatile("bar.arrive %0, 256;" :: "r"(barrier) : "memory");
}
// Barriers in shared memory, for any number of arrivals; `parity` is of the round one waits for.
__device__ __forceinline__ void expect(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// Arrives when this thread's copies so far have.
__device__ __forceinline__ void arrive_copied(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_for(unsigned barrier, int parity) {
  asm volatile("{ .reg .pred p; AGAIN%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; "
      "@!p bra AGAIN%=; }" :: "r"(barrier), "r"(parity) : "memory");
}
// Where eight columns of a row of a tile are; ROWS to a half of 64 columns.
template <int ROWS> __device__ __forceinline__ unsigned place(int row, int eight) {
  return eight / 8 * (ROWS * 128) + row * 128 + ((eight % 8) ^ (row % 8)) * 16;
}
// ROWS rows of 128 numbers, by THREADS threads.
template <int ROWS, int THREADS> __device__ __forceinline__ void fetch(
    unsigned to, const half_t* from, int pitch) {
  constexpr int STEP = THREADS / 16;
  const int eight = threadIdx.x % 16, first = threadIdx.x % THREADS / 16;
  const half_t* source = from + first * pitch + eight * 8;
  const unsigned target = to + place<ROWS>(first, eight);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i) {
    copy16(target + i * STEP * 128, source);
    source += STEP * pitch;
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
"""

PIECES = _TYPES + _PRODUCTS + _PARTS
"""All of it, in a namespace ``attention`` that is left open."""
