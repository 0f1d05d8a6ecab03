// What a kernel may ask of the machine: its place in the grid, memory, shuffles, barriers, matrix products, asynchronous
// copies. Under nvcc each is an instruction or two. Under a host compiler they are only declared here, and the emulator of
// tests/simt defines them, so the same kernel source runs, checked, where there is no GPU.
//
// Rules for kernels, which the emulator enforces where it can:
// - Global and shared memory are touched through load, store, copy_async_16, load_matrix and the atomics only.
// - Shared memory is the block's dynamic one: `dynamic_shared()`, cut into pieces by SharedMemory (block.h).
// - Warp functions are called by all 32 lanes of a warp, block functions by all threads of a block, from the same call.
// - Blocks of one launch do not read what others write, except through the integer atomics.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define ATTAMBA_DEVICE __device__ __forceinline__
#define ATTAMBA_HOST_DEVICE __host__ __device__ __forceinline__
#define ATTAMBA_KERNEL(threads, blocks_per_multiprocessor) __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
/// A kernel's parameter that is a table: read where it arrives, not copied into each thread's local memory.
#define ATTAMBA_GRID_CONSTANT __grid_constant__
#else
#include <cmath>
#include <source_location>
#define ATTAMBA_DEVICE inline
#define ATTAMBA_HOST_DEVICE inline
#define ATTAMBA_KERNEL(threads, blocks_per_multiprocessor) void
#define ATTAMBA_GRID_CONSTANT
#endif

namespace attamba::device {

constexpr int kWarp = 32;

/// bfloat16 as kernels see it: attamba::bfloat16 and this have one layout.
struct bf16 {
  std::uint16_t bits;
};
/// 16 bytes, the widest load and store.
struct alignas(16) Bytes16 {
  std::uint32_t word[4];
};
struct alignas(8) Bytes8 {
  std::uint32_t word[2];
};

#ifdef __CUDACC__

// ------------------------------------------------------------------------------------------------ place in the grid
ATTAMBA_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
ATTAMBA_DEVICE int block_threads() {
  return static_cast<int>(blockDim.x);
}
ATTAMBA_DEVICE int block_x() {
  return static_cast<int>(blockIdx.x);
}
ATTAMBA_DEVICE int block_y() {
  return static_cast<int>(blockIdx.y);
}
ATTAMBA_DEVICE int block_z() {
  return static_cast<int>(blockIdx.z);
}
ATTAMBA_DEVICE int grid_x() {
  return static_cast<int>(gridDim.x);
}

/// x, which the compiler takes for something new: what is computed from it stays behind this place.
ATTAMBA_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ------------------------------------------------------------------------------------------------ memory
ATTAMBA_DEVICE std::byte* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char attamba_dynamic_shared[];
  return reinterpret_cast<std::byte*>(attamba_dynamic_shared);
}
/// *p, global or shared; T of 1, 2, 4, 8 or 16 bytes, p aligned to its size.
template <class T>
ATTAMBA_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
ATTAMBA_DEVICE void store(T* p, T value) {
  *p = value;
}
/// Returns the old value. Integer sums do not depend on their order, floating-point ones would.
ATTAMBA_DEVICE std::uint32_t atomic_add(std::uint32_t* p, std::uint32_t value) {
  return atomicAdd(p, value);
}
ATTAMBA_DEVICE std::int64_t atomic_add(std::int64_t* p, std::int64_t value) {
  return static_cast<std::int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value)));
}
/// Stores before it are seen by other blocks before stores after it.
ATTAMBA_DEVICE void fence_device() {
  __threadfence();
}

// ------------------------------------------------------------------------------------------------ warp and block
ATTAMBA_DEVICE float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
ATTAMBA_DEVICE std::uint32_t shuffle(std::uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
ATTAMBA_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
ATTAMBA_DEVICE std::uint32_t shuffle_xor(std::uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
/// Of the lane `delta` below; lanes below `delta` get their own value back.
ATTAMBA_DEVICE float shuffle_up(float value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
ATTAMBA_DEVICE float shuffle_down(float value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
/// One bit per lane.
ATTAMBA_DEVICE std::uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
ATTAMBA_DEVICE void sync_warp() {
  __syncwarp();
}
ATTAMBA_DEVICE void sync_block() {
  __syncthreads();
}

// ------------------------------------------------------------------------------------------------ asynchronous copies
/// 16 bytes from global to shared memory, both aligned to 16; zeros instead when !valid (then nothing is read). They are there
/// after commit, wait and a barrier.
ATTAMBA_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
/// Makes a group of the thread's copies since the last commit.
ATTAMBA_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most kPending of the thread's latest groups are in flight.
template <int kPending>
ATTAMBA_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------------------------ matrix products
/// Four 8x8 matrices of 16-bit elements from shared memory (PTX ldmatrix.x4): lane 8i + r gives the address of row r of matrix
/// i, aligned to 16; lane 4r + c gets elements 2c and 2c + 1 of row r of matrix i in r[i].
ATTAMBA_DEVICE void load_matrix_x4(std::uint32_t (&r)[4], const void* row) {
  const auto from = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
/// The same, each matrix transposed: lane 4r + c gets rows 2c and 2c + 1 of column r.
ATTAMBA_DEVICE void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
  const auto from = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
/// d += a b with a [16, 16] row-major and b [16, 8] column-major bfloat16, d [16, 8] float32 (PTX mma.m16n8k16). With g = lane
/// / 4 and q = lane % 4: a[0], a[1] hold columns 2q, 2q+1 of rows g, g+8; a[2], a[3] columns 2q+8, 2q+9 of the same rows; b[0]
/// rows 2q, 2q+1 and b[1] rows 2q+8, 2q+9 of column g; d[0], d[1] columns 2q, 2q+1 of row g, d[2], d[3] of row g+8.
ATTAMBA_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ------------------------------------------------------------------------------------------------ numbers
ATTAMBA_DEVICE float to_float(float x) {
  return x;
}
ATTAMBA_DEVICE float to_float(bf16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
/// Rounded to nearest even.
ATTAMBA_DEVICE bf16 to_bf16(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
/// Two elements in one register, `low` in the lower half.
ATTAMBA_DEVICE std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}
ATTAMBA_DEVICE float exp(float x) {
  return expf(x);
}
ATTAMBA_DEVICE float log(float x) {
  return logf(x);
}
ATTAMBA_DEVICE float expm1(float x) {
  return expm1f(x);
}
ATTAMBA_DEVICE float log1p(float x) {
  return log1pf(x);
}
/// 2^x to 2 units in the last place, the special function unit's.
ATTAMBA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTAMBA_DEVICE float rsqrt(float x) {
  return rsqrtf(x);
}
ATTAMBA_DEVICE float fused_multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
/// 1/x to 1 unit in the last place, subnormal numbers being 0.
ATTAMBA_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// Rounded correctly.
ATTAMBA_DEVICE float sqrt(float x) {
  return __fsqrt_rn(x);
}
ATTAMBA_DEVICE double sqrt(double x) {
  return __dsqrt_rn(x);
}
/// The nearest integer, halves to even; |x| < 2^63.
ATTAMBA_DEVICE std::int64_t round_to_int64(double x) {
  return __double2ll_rn(x);
}

#else

int thread_index();
int block_threads();
int block_x();
int block_y();
int block_z();
int grid_x();
inline int opaque(int x) {
  return x;
}

/// Where a kernel calls a function, for the emulator's messages and to tell calls apart.
using Site = std::source_location;

std::byte* dynamic_shared();
/// Checks the access and counts it; `bytes` is the size of one element.
void check_load(const void* p, std::size_t bytes, Site site);
void check_store(void* p, std::size_t bytes, Site site);
template <class T>
T load(const T* p, Site site = Site::current()) {
  check_load(p, sizeof(T), site);
  return *p;
}
template <class T>
void store(T* p, T value, Site site = Site::current()) {
  check_store(p, sizeof(T), site);
  *p = value;
}
std::uint32_t atomic_add(std::uint32_t* p, std::uint32_t value, Site site = Site::current());
std::int64_t atomic_add(std::int64_t* p, std::int64_t value, Site site = Site::current());
void fence_device();

float shuffle(float value, int lane, Site site = Site::current());
std::uint32_t shuffle(std::uint32_t value, int lane, Site site = Site::current());
float shuffle_xor(float value, int mask, Site site = Site::current());
std::uint32_t shuffle_xor(std::uint32_t value, int mask, Site site = Site::current());
float shuffle_up(float value, int delta, Site site = Site::current());
float shuffle_down(float value, int delta, Site site = Site::current());
std::uint32_t ballot(bool predicate, Site site = Site::current());
void sync_warp(Site site = Site::current());
void sync_block(Site site = Site::current());

void copy_async_16(void* shared, const void* global, bool valid, Site site = Site::current());
void copy_async_commit();
void wait_for_copies(int pending);
template <int kPending>
void copy_async_wait() {
  wait_for_copies(kPending);
}

void load_matrix_x4(std::uint32_t (&r)[4], const void* row, Site site = Site::current());
void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row, Site site = Site::current());
void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Site site = Site::current());

float to_float(bf16 x);
inline float to_float(float x) {
  return x;
}
bf16 to_bf16(float x);
std::uint32_t pack_bf16(float low, float high);
float exp(float x);
float log(float x);
float expm1(float x);
float log1p(float x);
float exp2_fast(float x);
float rsqrt(float x);
float fused_multiply_add(float a, float b, float c);
inline float reciprocal_fast(float x) {
  return 1 / x;
}
inline float sqrt(float x) {
  return std::sqrt(x);
}
inline double sqrt(double x) {
  return std::sqrt(x);
}
inline std::int64_t round_to_int64(double x) {
  return std::llrint(x);
}

#endif

/// 64 bits travel as two registers.
template <class T>
ATTAMBA_DEVICE T shuffle_xor_64(T value, int mask) {
  const auto bits = std::bit_cast<std::uint64_t>(value);
  const std::uint32_t low = shuffle_xor(static_cast<std::uint32_t>(bits), mask);
  const std::uint32_t high = shuffle_xor(static_cast<std::uint32_t>(bits >> 32), mask);
  return std::bit_cast<T>((static_cast<std::uint64_t>(high) << 32) | low);
}
ATTAMBA_DEVICE double shuffle_xor(double value, int mask) {
  return shuffle_xor_64(value, mask);
}
ATTAMBA_DEVICE std::uint64_t shuffle_xor(std::uint64_t value, int mask) {
  return shuffle_xor_64(value, mask);
}

/// A float rounded to an element type.
template <class T>
ATTAMBA_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 2) {
    return to_bf16(x);
  } else {
    return x;
  }
}

ATTAMBA_DEVICE int lane_index() {
  return static_cast<int>(static_cast<unsigned>(thread_index()) % kWarp);
}
ATTAMBA_DEVICE int warp_index() {
  return static_cast<int>(static_cast<unsigned>(thread_index()) / kWarp);
}

}  // namespace attamba::device
