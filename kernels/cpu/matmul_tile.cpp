#include "kernels/cpu/matmul_tile.h"

#include <cblas.h>

#include <atomic>
#include <string_view>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/matmul_onednn.h"
#include "src/core/launch.h"

namespace attamba::kernels::cpu {
namespace {

constexpr std::int64_t kConvertDepth = 512;  ///< depth of the operand blocks that are converted at a time

/// OpenBLAS runs one-threaded from the first product on: threads are ours.
void use_one_blas_thread() {
  [[maybe_unused]] static const bool done = [] {
    openblas_set_num_threads(1);
    return true;
  }();
}

/// AMX always does. AVX512-BF16 multiplies twice as many pairs as AVX-512 on AMD's processors, on Intel's just as many, and
/// there oneDNN stays behind our own products (2.6 on Emerald Rapids: 162 to 165 against 193 to 267 GFLOP/s on two cores).
bool native_bfloat16_pays() {
  const std::string_view isa = onednn_bfloat16_isa();
#ifdef __x86_64__
  return isa == "amx" || (isa == "avx512_bf16" && !(has_own_gemm() && __builtin_cpu_is("intel")));
#else
  return !isa.empty();
#endif
}

std::atomic<bool>& native_bfloat16() {
  static std::atomic<bool> native(native_bfloat16_pays());
  return native;
}

int to_blas(std::int64_t value) {
  return static_cast<int>(value);
}

template <class T>
void run_blas(const TileProduct& tile, T* c, const T* a, const T* b, std::int64_t k, bool accumulate, std::int64_t a_stride,
              std::int64_t b_stride, std::int64_t c_stride) {
  const auto order_a = tile.transpose_a ? CblasTrans : CblasNoTrans;
  const auto order_b = tile.transpose_b ? CblasTrans : CblasNoTrans;
  const T beta = accumulate ? T(1) : T(0);
  if (tile.m == 1) {  // one row, as in decoding: c^T = op(b)^T a^T, without packing b
    const int rows = to_blas(tile.transpose_b ? tile.n : k), columns = to_blas(tile.transpose_b ? k : tile.n);
    const auto order = tile.transpose_b ? CblasNoTrans : CblasTrans;
    const int step = to_blas(tile.transpose_a ? a_stride : 1);
    if constexpr (std::is_same_v<T, float>) {
      cblas_sgemv(CblasRowMajor, order, rows, columns, 1.0f, b, to_blas(b_stride), a, step, beta, c, 1);
    } else {
      cblas_dgemv(CblasRowMajor, order, rows, columns, 1.0, b, to_blas(b_stride), a, step, beta, c, 1);
    }
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    cblas_sgemm(CblasRowMajor, order_a, order_b, to_blas(tile.m), to_blas(tile.n), to_blas(k), 1.0f, a, to_blas(a_stride), b,
                to_blas(b_stride), beta, c, to_blas(c_stride));
  } else {
    cblas_dgemm(CblasRowMajor, order_a, order_b, to_blas(tile.m), to_blas(tile.n), to_blas(k), 1.0, a, to_blas(a_stride), b,
                to_blas(b_stride), beta, c, to_blas(c_stride));
  }
}

/// Sizes of the float32 copies that a bfloat16 tile without native products needs.
struct ConvertedSizes {
  std::int64_t depth;
  std::size_t a, b, c;

  explicit ConvertedSizes(const TileProduct& tile)
      : depth(std::min(tile.k, kConvertDepth)),
        a(ScratchAllocator::aligned_bytes<float>(static_cast<std::size_t>(tile.m * depth))),
        b(ScratchAllocator::aligned_bytes<float>(static_cast<std::size_t>(tile.n * depth))),
        c(tile.output == DType::bfloat16 ? ScratchAllocator::aligned_bytes<float>(static_cast<std::size_t>(tile.m * tile.n))
                                         : 0) {}
};

/// bfloat16 operands, block by block along k, as float32; the sum is kept in float32 and rounded once.
void run_converted(const TileProduct& tile, void* c, const bfloat16* a, const bfloat16* b, std::byte* scratch) {
  const ConvertedSizes sizes(tile);
  auto* block_a = reinterpret_cast<float*>(scratch);
  auto* block_b = reinterpret_cast<float*>(scratch + sizes.a);
  auto* sum = tile.output == DType::bfloat16 ? reinterpret_cast<float*>(scratch + sizes.a + sizes.b) : static_cast<float*>(c);
  const std::int64_t sum_stride = tile.output == DType::bfloat16 ? tile.n : tile.c_stride;
  if (tile.output == DType::bfloat16 && tile.accumulate) {
    convert_block(sum, sum_stride, static_cast<const bfloat16*>(c), tile.c_stride, tile.m, tile.n);
  }
  for (std::int64_t begin = 0; begin < tile.k; begin += sizes.depth) {
    const std::int64_t depth = std::min(sizes.depth, tile.k - begin);
    const auto convert = [&](float* block, const bfloat16* in, std::int64_t stride, std::int64_t extent, bool depth_first) {
      if (depth_first) {  // stored [k, extent]
        convert_block(block, extent, in + begin * stride, stride, depth, extent);
        return extent;
      }
      convert_block(block, depth, in + begin, stride, extent, depth);
      return depth;
    };
    const std::int64_t a_stride = convert(block_a, a, tile.a_stride, tile.m, tile.transpose_a);
    const std::int64_t b_stride = convert(block_b, b, tile.b_stride, tile.n, !tile.transpose_b);
    run_blas(tile, sum, block_a, block_b, depth, tile.accumulate || begin > 0, a_stride, b_stride, sum_stride);
  }
  if (tile.output == DType::bfloat16) {
    convert_block(static_cast<bfloat16*>(c), tile.c_stride, sum, sum_stride, tile.m, tile.n);
  }
}

GemmProblem gemm_of(const TileProduct& tile, void* c, const void* a, const void* b) {
  const GemmSums out{c, tile.c_stride, tile.output};
  return {tile.m,
          tile.n,
          tile.k,
          {a, tile.a_stride, tile.transpose_a, tile.input},
          {b, tile.b_stride, !tile.transpose_b, tile.input},
          out,
          tile.accumulate ? out : GemmSums{}};
}

}  // namespace

bool has_native_bfloat16() {
  return native_bfloat16().load(std::memory_order_relaxed);
}

bool assume_native_bfloat16(bool native) {
  return native_bfloat16().exchange(native, std::memory_order_relaxed);
}

bool runs_in_gemm(const TileProduct& tile) {
  return has_own_gemm() && tile.m != 1 &&
         (tile.input == DType::float32 || (tile.input == DType::bfloat16 && !has_native_bfloat16()));
}

std::size_t tile_scratch_bytes(const TileProduct& tile) {
  if (runs_in_gemm(tile)) {
    return gemm_scratch_bytes(gemm_of(tile, nullptr, nullptr, nullptr), 1);
  }
  if (tile.input != DType::bfloat16) {
    return 0;
  }
  const ConvertedSizes sizes(tile);
  const std::size_t converted = sizes.a + sizes.b + sizes.c;
  return has_native_bfloat16() ? std::max(converted, onednn_scratch_bytes(tile)) : converted;
}

void run_tile(const TileProduct& tile, void* c, const void* a, const void* b, std::byte* scratch) {
  if (runs_in_gemm(tile)) {
    gemm(gemm_of(tile, c, a, b), scratch, tile_scratch_bytes(tile), 1);
    return;
  }
  use_one_blas_thread();
  if (tile.input == DType::float32) {
    run_blas(tile, static_cast<float*>(c), static_cast<const float*>(a), static_cast<const float*>(b), tile.k, tile.accumulate,
             tile.a_stride, tile.b_stride, tile.c_stride);
  } else if (tile.input == DType::float64) {
    run_blas(tile, static_cast<double*>(c), static_cast<const double*>(a), static_cast<const double*>(b), tile.k,
             tile.accumulate, tile.a_stride, tile.b_stride, tile.c_stride);
  } else if (!has_native_bfloat16() || !run_onednn_tile(tile, c, a, b, scratch)) {
    run_converted(tile, c, static_cast<const bfloat16*>(a), static_cast<const bfloat16*>(b), scratch);
  }
}

void convert_block(float* out, std::int64_t out_stride, const bfloat16* in, std::int64_t in_stride, std::int64_t rows,
                   std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) {
    float* to = out + i * out_stride;
    const bfloat16* from = in + i * in_stride;
    for (std::int64_t j = 0; j < columns; ++j) {
      to[j] = static_cast<float>(from[j]);
    }
  }
}

void convert_block(bfloat16* out, std::int64_t out_stride, const float* in, std::int64_t in_stride, std::int64_t rows,
                   std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) {
    bfloat16* to = out + i * out_stride;
    const float* from = in + i * in_stride;
    for (std::int64_t j = 0; j < columns; ++j) {
      to[j] = bfloat16(from[j]);
    }
  }
}

}  // namespace attamba::kernels::cpu
