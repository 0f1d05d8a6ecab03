// Private to the CPU kernels: our own products of float32 matrices, and of bfloat16 ones that the processor does not multiply,
// which become float32 while they are packed. For processors with AVX2 and FMA: the inner kernel keeps 6 x 16 sums in
// registers, with AVX-512 four times as many, and all threads share one packed copy of the right operand. OpenBLAS, whose tiles
// AVX2 is faster than, knows processors by their numbers, and takes those made after it for the oldest.
//
// Each element of a result is a sum over blocks of depth, block after block, and within a block over up to four chains of fused
// multiply-adds, which keeps rounding errors small. Where blocks and chains begin depends on the depth alone, so no result
// depends on how the output is cut, on threads, or on which of the two instruction sets runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/core/dtype.h"

namespace attamba::kernels::cpu {

/// Whether this processor's products of float32 (and of bfloat16 without native products) run here.
bool has_own_gemm();
/// For tests and benchmarks: OpenBLAS instead, or back. Returns what it was; true has no effect on processors without AVX2.
/// Scratch that was asked for before does not fit afterwards.
bool assume_own_gemm(bool own);
/// Whether it runs on AVX-512.
bool gemm_uses_avx512();
/// For tests and benchmarks: AVX2 instead, or back. Returns what it was; true has no effect on processors without AVX-512.
bool assume_avx512(bool avx512);

/// One operand as it lies in memory: [extent, depth], or [depth, extent] when `depth_first`; float32 or bfloat16.
struct GemmOperand {
  const void* data = nullptr;
  std::int64_t stride = 0;  ///< between rows, in elements
  bool depth_first = false;
  DType type = DType::float32;

  /// The part that begins there.
  GemmOperand from(std::int64_t extent, std::int64_t depth) const {
    const std::int64_t offset = depth_first ? depth * stride + extent : extent * stride + depth;
    return {static_cast<const std::byte*>(data) + offset * static_cast<std::int64_t>(size_of(type)), stride, depth_first, type};
  }
};

/// A row-major matrix of sums, float32 or bfloat16; without data: zeros, to be read only.
struct GemmSums {
  void* data = nullptr;
  std::int64_t stride = 0;
  DType type = DType::float32;

  GemmSums from(std::int64_t row, std::int64_t column) const {
    return data == nullptr
               ? *this
               : GemmSums{static_cast<std::byte*>(data) + (row * stride + column) * static_cast<std::int64_t>(size_of(type)),
                          stride, type};
  }
};

/// out [m, n] = a [m, k] b [k, n] + addend. out and addend are of one type and either the same memory or apart.
struct GemmProblem {
  std::int64_t m = 0, n = 0, k = 0;
  GemmOperand a, b;
  GemmSums out, addend;
};

/// Scratch of `gemm` with that many workers; looks at extents and types only. Aligned to 64 bytes.
std::size_t gemm_scratch_bytes(const GemmProblem& problem, int workers);
/// Runs with as many of `workers` threads as the scratch serves: one inside a parallel region.
void gemm(const GemmProblem& problem, std::byte* scratch, std::size_t scratch_bytes, int workers);

// ------------------------------------------------------------------------------------------------- parts, for the loss
inline constexpr std::int64_t kGemmRows = 6, kGemmColumns = 16;  ///< of the sums that registers hold
inline constexpr std::int64_t kGemmRowBlock = 192;               ///< rows of a that stay in the second-level cache

/// The depths of the blocks that a depth of k is summed in: `block` each (a multiple of 8), the last one smaller.
struct GemmDepth {
  std::int64_t k, block, blocks;

  explicit GemmDepth(std::int64_t depth);
  std::int64_t begin(std::int64_t index) const { return index * block; }
  std::int64_t size(std::int64_t index) const { return index + 1 < blocks ? block : k - begin(index); }
};

/// What packing pads depths to.
constexpr std::int64_t gemm_padded_depth(std::int64_t depth) {
  return (depth + 7) / 8 * 8;
}
/// Elements of an operand packed in panels of `width` (kGemmRows for a, kGemmColumns for b).
constexpr std::int64_t gemm_packed_elements(std::int64_t extent, std::int64_t depth, std::int64_t width) {
  return (extent + width - 1) / width * width * gemm_padded_depth(depth);
}

/// One block of depth of the left or the right operand in panels: panel by panel [padded depth][width], padded with zeros.
void gemm_pack_left(float* out, const GemmOperand& a, std::int64_t rows, std::int64_t depth);
void gemm_pack_right(float* out, const GemmOperand& b, std::int64_t columns, std::int64_t depth);
/// to [rows, columns] = a b + from, with operands of that (unpadded) depth as packed above.
void gemm_multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, const float* a, const float* b,
                   const GemmSums& from, const GemmSums& to);

}  // namespace attamba::kernels::cpu
