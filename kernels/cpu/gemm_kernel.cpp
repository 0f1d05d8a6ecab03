// The parts of gemm that touch every element: packing of operands and the product of packed blocks.
#include <algorithm>
#include <atomic>

#include "kernels/cpu/gemm.h"
#include "src/core/error.h"

#if defined(__x86_64__) && defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ATTAMBA_OWN_GEMM 1
#else
#define ATTAMBA_OWN_GEMM 0
#endif

namespace attamba::kernels::cpu {

namespace {

std::atomic<bool>& own_gemm() {
  static std::atomic<bool> own(ATTAMBA_OWN_GEMM);
  return own;
}

bool processor_has_avx512() {
#if ATTAMBA_OWN_GEMM
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

std::atomic<bool>& avx512() {
  static std::atomic<bool> used(processor_has_avx512());
  return used;
}

constexpr std::int64_t kMostDepth = 256;  ///< of a block: 16 KiB of b stay in the first-level cache

}  // namespace

bool has_own_gemm() {
  return own_gemm().load(std::memory_order_relaxed);
}

bool assume_own_gemm(bool own) {
  return own_gemm().exchange(own && ATTAMBA_OWN_GEMM, std::memory_order_relaxed);
}

bool gemm_uses_avx512() {
  return avx512().load(std::memory_order_relaxed);
}

bool assume_avx512(bool used) {
  return avx512().exchange(used && processor_has_avx512(), std::memory_order_relaxed);
}

GemmDepth::GemmDepth(std::int64_t depth) : k(depth) {
  const std::int64_t parts = std::max<std::int64_t>(1, (k + kMostDepth - 1) / kMostDepth);
  block = std::max<std::int64_t>(8, gemm_padded_depth((k + parts - 1) / parts));
  blocks = (k + block - 1) / block;
}

#if ATTAMBA_OWN_GEMM

namespace {

constexpr std::int64_t kTransposed = 8;    ///< elements of a row that are transposed at a time
constexpr std::int64_t kChains = 4;        ///< parts in which a deep sum is formed, each then added to the ones before
constexpr std::int64_t kLeastChain = 32;   ///< products in such a part, at least
constexpr std::int64_t kMostPanels = 2;    ///< of either operand that are multiplied at a time
constexpr std::int64_t kCopiedDepth = 16;  ///< rows whose panels are written together: few pages and cache lines at a time

__m256 load8(const float* in) {
  return _mm256_loadu_ps(in);
}
__m256 load8(const bfloat16* in) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/// `width` (6 or 8) floats of a vector.
template <int width>
void store(float* out, __m256 value) {
  if constexpr (width == 8) {
    _mm256_storeu_ps(out, value);
  } else {
    _mm_storeu_ps(out, _mm256_castps256_ps128(value));
    _mm_storel_pi(reinterpret_cast<__m64*>(out + 4), _mm256_extractf128_ps(value, 1));
  }
}

/// Rows 0 to 7 become columns: out[j * out_step + i] = row[i][j] for i < width.
template <int width>
void store_transposed(float* out, std::int64_t out_step, const __m256 (&row)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store<width>(out + i * out_step, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    store<width>(out + (i + 4) * out_step, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}

/// Any part of a panel, element by element: out [depth][width] = in(i, k), zeros where i >= extent or k >= real_depth.
template <int width, class T>
void pack_edge(float* out, const T* in, std::int64_t extent_step, std::int64_t depth_step, std::int64_t extent,
               std::int64_t real_depth, std::int64_t depth) {
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t i = 0; i < width; ++i) {
      out[k * width + i] = i < extent && k < real_depth ? static_cast<float>(in[i * extent_step + k * depth_step]) : 0.0f;
    }
  }
}

/// [extent, depth]: panels by transposition.
template <int width, class T>
void pack_transposed(float* out, const T* in, std::int64_t stride, std::int64_t extent, std::int64_t depth) {
  const std::int64_t padded = gemm_padded_depth(depth), whole = depth / kTransposed * kTransposed;
  constexpr int kGroup = width < 8 ? width : 8;
  for (std::int64_t i = 0; i < extent; i += width, out += width * padded) {
    const T* rows = in + i * stride;
    if (extent - i < width) {
      pack_edge<width>(out, rows, stride, 1, extent - i, depth, padded);
      continue;
    }
    for (std::int64_t k = 0; k < whole; k += kTransposed) {
      for (int group = 0; group < width; group += kGroup) {
        __m256 row[8];
        for (int r = 0; r < 8; ++r) {
          row[r] = r < kGroup ? load8(rows + (group + r) * stride + k) : _mm256_setzero_ps();
          if (r < kGroup) {  // rows are too short here for the processor to foresee the next panel's
            _mm_prefetch(rows + (width + group + r) * stride + k, _MM_HINT_T0);
          }
        }
        store_transposed<kGroup>(out + k * width + group, width, row);
      }
    }
    if (whole < padded) {
      pack_edge<width>(out + whole * width, rows + whole, stride, 1, width, depth - whole, padded - whole);
    }
  }
}

/// [depth, extent]: panels by copying.
template <int width, class T>
void pack_copied(float* out, const T* in, std::int64_t stride, std::int64_t extent, std::int64_t depth) {
  const std::int64_t padded = gemm_padded_depth(depth);
  constexpr int kGroup = width < 8 ? width : 8;
  for (std::int64_t begin = 0; begin < depth; begin += kCopiedDepth) {
    const std::int64_t end = std::min(depth, begin + kCopiedDepth);
    for (std::int64_t i = 0; i < extent; i += width) {
      float* panel = out + i * padded;
      if (extent - i < std::max(width, 8)) {  // vectors of 8 would be read past the row's end
        pack_edge<width>(panel + begin * width, in + begin * stride + i, 1, stride, extent - i, end - begin,
                         end == depth ? padded - begin : end - begin);
        continue;
      }
      for (std::int64_t k = begin; k < end; ++k) {
        _mm_prefetch(in + (k + kCopiedDepth) * stride + i, _MM_HINT_T0);
        for (int group = 0; group < width; group += kGroup) {
          store<kGroup>(panel + k * width + group, load8(in + k * stride + i + group));
        }
      }
      if (end == depth) {
        std::fill(panel + depth * width, panel + padded * width, 0.0f);
      }
    }
  }
}

template <int width>
void pack(float* out, const GemmOperand& operand, std::int64_t extent, std::int64_t depth) {
  const auto run = [&]<class T>(const T* in) {
    operand.depth_first ? pack_copied<width>(out, in, operand.stride, extent, depth)
                        : pack_transposed<width>(out, in, operand.stride, extent, depth);
  };
  operand.type == DType::bfloat16 ? run(static_cast<const bfloat16*>(operand.data))
                                  : run(static_cast<const float*>(operand.data));
}

// One step of depth: 16 elements of b in ymm12 and ymm13, times 6 elements of a, one after another in ymm14 and ymm15. As text,
// because GCC reorders the sums between registers, which costs 6 % of the rate.
#define ATTAMBA_GEMM_ROW(offset, register, left, right) \
  "vbroadcastss " #offset "(%[a]), %%" register "\n\t"  \
  "vfmadd231ps %%ymm12, %%" register ", " left "\n\t"   \
  "vfmadd231ps %%ymm13, %%" register ", " right "\n\t"
#define ATTAMBA_GEMM_STEP(b, a0, a1, a2, a3, a4, a5)                                                          \
  "vmovaps " #b                                                                                               \
  "(%[b]), %%ymm12\n\t"                                                                                       \
  "vmovaps 32+" #b "(%[b]), %%ymm13\n\t" ATTAMBA_GEMM_ROW(a0, "ymm14", "%[c00]", "%[c01]")                    \
      ATTAMBA_GEMM_ROW(a1, "ymm15", "%[c10]", "%[c11]") ATTAMBA_GEMM_ROW(a2, "ymm14", "%[c20]", "%[c21]")     \
          ATTAMBA_GEMM_ROW(a3, "ymm15", "%[c30]", "%[c31]") ATTAMBA_GEMM_ROW(a4, "ymm14", "%[c40]", "%[c41]") \
              ATTAMBA_GEMM_ROW(a5, "ymm15", "%[c50]", "%[c51]")

/// The sum over a depth is formed in parts that are then added up: its rounding error grows with the length of a part, not with
/// the depth.
std::int64_t chain_length(std::int64_t depth) {
  return std::max(kLeastChain, gemm_padded_depth(depth / kChains));
}

/// to [6][16] = a b + from over panels of a depth that is a multiple of 4 and not 0; `from` may be null.
void multiply_panels(std::int64_t depth, const float* a, const float* b, const float* from, std::int64_t from_stride, float* to,
                     std::int64_t to_stride) {
  const std::int64_t chain = chain_length(depth);
  alignas(32) float total[kGemmRows * kGemmColumns];
  for (std::int64_t first = 0; first < depth; first += chain) {
    __m256 c00 = _mm256_setzero_ps(), c01 = c00, c10 = c00, c11 = c00, c20 = c00, c21 = c00;
    __m256 c30 = c00, c31 = c00, c40 = c00, c41 = c00, c50 = c00, c51 = c00;
    std::int64_t turns = std::min(chain, depth - first) / 4;
    asm volatile(
        ".p2align 5\n"
        "1:\n\t"                                        //
        ATTAMBA_GEMM_STEP(0, 0, 4, 8, 12, 16, 20)       //
        ATTAMBA_GEMM_STEP(64, 24, 28, 32, 36, 40, 44)   //
        ATTAMBA_GEMM_STEP(128, 48, 52, 56, 60, 64, 68)  //
        ATTAMBA_GEMM_STEP(192, 72, 76, 80, 84, 88, 92)  //
        "add $256, %[b]\n\t"
        "add $96, %[a]\n\t"
        "dec %[turns]\n\t"
        "jnz 1b\n\t"
        : [c00] "+x"(c00), [c01] "+x"(c01), [c10] "+x"(c10), [c11] "+x"(c11), [c20] "+x"(c20), [c21] "+x"(c21), [c30] "+x"(c30),
          [c31] "+x"(c31), [c40] "+x"(c40), [c41] "+x"(c41), [c50] "+x"(c50), [c51] "+x"(c51), [a] "+r"(a), [b] "+r"(b),
          [turns] "+r"(turns)
        :
        : "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
    const bool last = first + chain >= depth;
    const auto finish = [&](int row, __m256 left, __m256 right) {
      float* sums = total + row * kGemmColumns;
      if (first > 0) {
        left = _mm256_add_ps(left, _mm256_load_ps(sums));
        right = _mm256_add_ps(right, _mm256_load_ps(sums + 8));
      }
      if (last && from != nullptr) {
        left = _mm256_add_ps(left, _mm256_loadu_ps(from + row * from_stride));
        right = _mm256_add_ps(right, _mm256_loadu_ps(from + row * from_stride + 8));
      }
      float* out = last ? to + row * to_stride : sums;
      _mm256_storeu_ps(out, left);
      _mm256_storeu_ps(out + 8, right);
    };
    finish(0, c00, c01);
    finish(1, c10, c11);
    finish(2, c20, c21);
    finish(3, c30, c31);
    finish(4, c40, c41);
    finish(5, c50, c51);
  }
}

#undef ATTAMBA_GEMM_ROW
#undef ATTAMBA_GEMM_STEP

/// The same, bit for bit, for `kTall` panels of a by `kWide` of b: to [6 kTall][16 kWide].
template <int kTall, int kWide>
__attribute__((target("avx512f"))) void multiply_wide_panels(std::int64_t depth, const float* a, const float* b,
                                                             const float* from, std::int64_t from_stride, float* to,
                                                             std::int64_t to_stride) {
  constexpr int kRows = kTall * static_cast<int>(kGemmRows);
  const std::int64_t chain = chain_length(depth);
  alignas(64) float total[kRows * kWide * kGemmColumns];
  for (std::int64_t first = 0; first < depth; first += chain) {
    const std::int64_t end = std::min(depth, first + chain);
    __m512 sums[kRows][kWide];
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kWide; ++j) {
        sums[i][j] = _mm512_setzero_ps();
      }
    }
    for (std::int64_t k = first; k < end; ++k) {
      __m512 right[kWide];
#pragma GCC unroll 2
      for (int j = 0; j < kWide; ++j) {
        right[j] = _mm512_load_ps(b + j * depth * kGemmColumns + k * kGemmColumns);
      }
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const __m512 left = _mm512_set1_ps(a[i / kGemmRows * (depth * kGemmRows) + k * kGemmRows + i % kGemmRows]);
#pragma GCC unroll 2
        for (int j = 0; j < kWide; ++j) {
          sums[i][j] = _mm512_fmadd_ps(left, right[j], sums[i][j]);
        }
      }
    }
    const bool last = end == depth;
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kWide; ++j) {
        float* part = total + (i * kWide + j) * kGemmColumns;
        __m512 sum = sums[i][j];
        if (first > 0) {
          sum = _mm512_add_ps(sum, _mm512_load_ps(part));
        }
        if (last && from != nullptr) {
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i * from_stride + j * kGemmColumns));
        }
        _mm512_storeu_ps(last ? to + i * to_stride + j * kGemmColumns : part, sum);
      }
    }
  }
}

/// Adds what the sums begin with and stores them, at edges and in bfloat16: the same arithmetic as above.
template <class From, class To>
void finish_tile(const float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns, const GemmSums& from,
                 const GemmSums& to) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* sums = tile + i * stride;
    auto* out = static_cast<To*>(to.data) + i * to.stride;
    if (from.data == nullptr) {
      for (std::int64_t j = 0; j < columns; ++j) {
        out[j] = static_cast<To>(sums[j]);
      }
      continue;
    }
    const auto* add = static_cast<const From*>(from.data) + i * from.stride;
    for (std::int64_t j = 0; j < columns; ++j) {
      out[j] = static_cast<To>(sums[j] + static_cast<float>(add[j]));
    }
  }
}

void finish_tile(const float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns, const GemmSums& from,
                 const GemmSums& to) {
  const bool read_short = from.type == DType::bfloat16, write_short = to.type == DType::bfloat16;
  const auto finish = read_short ? (write_short ? finish_tile<bfloat16, bfloat16> : finish_tile<bfloat16, float>)
                                 : (write_short ? finish_tile<float, bfloat16> : finish_tile<float, float>);
  finish(tile, stride, rows, columns, from, to);
}

/// Of float32 sums.
void prefetch_rows(const GemmSums& to, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = static_cast<const float*>(to.data) + i * to.stride;
    for (std::int64_t j = 0; j < columns; j += 16) {
      _mm_prefetch(row + j, _MM_HINT_T0);
    }
    _mm_prefetch(row + columns - 1, _MM_HINT_T0);
  }
}

/// How many panels of a and of b a product takes, and what makes it.
struct PanelProduct {
  int tall, wide;
  void (*run)(std::int64_t depth, const float* a, const float* b, const float* from, std::int64_t from_stride, float* to,
              std::int64_t to_stride);
};

/// The largest one with at most so many panels of each.
PanelProduct panel_product(std::int64_t tall, std::int64_t wide) {
  if (!gemm_uses_avx512()) {
    return {1, 1, multiply_panels};
  }
  if (tall > 1) {
    return wide > 1 ? PanelProduct{2, 2, multiply_wide_panels<2, 2>} : PanelProduct{2, 1, multiply_wide_panels<2, 1>};
  }
  return wide > 1 ? PanelProduct{1, 2, multiply_wide_panels<1, 2>} : PanelProduct{1, 1, multiply_wide_panels<1, 1>};
}

}  // namespace

void gemm_pack_left(float* out, const GemmOperand& a, std::int64_t rows, std::int64_t depth) {
  pack<kGemmRows>(out, a, rows, depth);
}

void gemm_pack_right(float* out, const GemmOperand& b, std::int64_t columns, std::int64_t depth) {
  pack<kGemmColumns>(out, b, columns, depth);
}

void gemm_multiply(std::int64_t rows, std::int64_t columns, std::int64_t depth, const float* a, const float* b,
                   const GemmSums& from, const GemmSums& to) {
  const std::int64_t padded = gemm_padded_depth(depth), panel = padded * kGemmColumns;
  const std::int64_t row_panels = (rows + kGemmRows - 1) / kGemmRows,
                     column_panels = (columns + kGemmColumns - 1) / kGemmColumns;
  const bool plain = to.type == DType::float32 && (from.data == nullptr || from.type == DType::float32);
  alignas(64) float tile[kMostPanels * kGemmRows * kMostPanels * kGemmColumns];
  for (std::int64_t right = 0; right < column_panels;) {
    const int wide = panel_product(row_panels, column_panels - right).wide;
    const float* b_panels = b + right * panel;
    // While some panels of b are in use the next ones, if there are any, come in from the cache that all cores share.
    const std::int64_t next = std::min<std::int64_t>(wide, column_panels - right - wide) * panel / 16;
    const std::int64_t lines_at_a_time = (next + row_panels - 1) / row_panels;
    for (std::int64_t left = 0; left < row_panels;) {
      const PanelProduct product = panel_product(row_panels - left, column_panels - right);
      const std::int64_t last = std::min(next, (left + product.tall) * lines_at_a_time);
      for (std::int64_t line = left * lines_at_a_time; line < last; ++line) {
        _mm_prefetch(b_panels + wide * panel + line * 16, _MM_HINT_T1);
      }
      const std::int64_t i = left * kGemmRows, j = right * kGemmColumns;
      const std::int64_t tall_rows = product.tall * kGemmRows, wide_columns = wide * kGemmColumns;
      const GemmSums source = from.from(i, j), target = to.from(i, j);
      if (plain && rows - i >= tall_rows && columns - j >= wide_columns) {
        prefetch_rows(target, tall_rows, wide_columns);
        product.run(padded, a + i * padded, b_panels, static_cast<const float*>(source.data), source.stride,
                    static_cast<float*>(target.data), target.stride);
      } else {
        product.run(padded, a + i * padded, b_panels, nullptr, 0, tile, wide_columns);
        finish_tile(tile, wide_columns, std::min(tall_rows, rows - i), std::min(wide_columns, columns - j), source, target);
      }
      left += product.tall;
    }
    right += wide;
  }
}

#else

void gemm_pack_left(float*, const GemmOperand&, std::int64_t, std::int64_t) {
  throw Error("gemm: not built for this processor");
}
void gemm_pack_right(float*, const GemmOperand&, std::int64_t, std::int64_t) {
  throw Error("gemm: not built for this processor");
}
void gemm_multiply(std::int64_t, std::int64_t, std::int64_t, const float*, const float*, const GemmSums&, const GemmSums&) {
  throw Error("gemm: not built for this processor");
}

#endif

}  // namespace attamba::kernels::cpu
