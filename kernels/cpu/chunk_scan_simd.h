// Small dense products and transposes on 32-byte vectors: the building blocks of the scan's dual form. Matrices are row-major
// pieces of scratch; where a product's columns are named `n` they are a multiple of kLanes, padding included.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/vector_math.h"

namespace attamba::kernels::cpu::scan {

template <class A>
struct Simd {
  static constexpr std::int64_t kLanes = 32 / sizeof(A);
  typedef A Vector __attribute__((vector_size(32)));
};
template <class A>
inline constexpr std::int64_t kLanes = Simd<A>::kLanes;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// log(1 + e^x), accurate in both tails: max(x, 0) + log1p(u), u = e^-|x|, with log1p(u) = 2 atanh(u / (2 + u)) as a series
/// in w = u / (2 + u) <= 1/3; the first dropped term is below 2^-28 of the sum.
inline float fast_softplus(float x) {
  const float u = fast_exp(-std::abs(x));
  const float w = u / (2.0f + u);
  const float q = w * w;
  float p = 2.0f / 17;
  p = p * q + 2.0f / 15;
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return (x > 0.0f ? x : (x == x ? 0.0f : x)) + w * p;
}
inline double fast_softplus(double x) {
  return (x > 0 ? x : (x == x ? 0.0 : x)) + std::log1p(std::exp(-std::abs(x)));
}

/// A matrix operand that is read one element at a time: element (r, k) is data[r * row + k * column].
template <class A>
struct Strided {
  const A* data;
  std::int64_t row, column;
};

/// Rows of a product that are computed together; row r of a triangular product uses columns up to the end of r's tile.
inline constexpr std::int64_t kTile = 4;

namespace detail {

template <int R, int V, class A>
[[gnu::always_inline]] inline void tile(std::int64_t k_begin, std::int64_t k_end, const Strided<A>& a, const A* b,
                                        std::int64_t ldb, A* c, std::int64_t ldc, bool add) {
  using Vector = typename Simd<A>::Vector;
  Vector sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      if (add) {
        std::memcpy(&sum[r][v], c + r * ldc + v * kLanes<A>, sizeof(Vector));
      } else {
        sum[r][v] = Vector{};
      }
    }
  }
  for (std::int64_t k = k_begin; k < k_end; ++k) {
    Vector row[V];
    for (int v = 0; v < V; ++v) {
      std::memcpy(&row[v], b + k * ldb + v * kLanes<A>, sizeof(Vector));
    }
    for (int r = 0; r < R; ++r) {
      const A factor = a.data[r * a.row + k * a.column];
      for (int v = 0; v < V; ++v) {
        sum[r][v] += factor * row[v];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      std::memcpy(c + r * ldc + v * kLanes<A>, &sum[r][v], sizeof(Vector));
    }
  }
}

template <int R, class A>
void row_tile(std::int64_t n, std::int64_t k_begin, std::int64_t k_end, const Strided<A>& a, const A* b, std::int64_t ldb, A* c,
              std::int64_t ldc, bool add) {
  std::int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    tile<R, 2>(k_begin, k_end, a, b + j, ldb, c + j, ldc, add);
  }
  for (; j < n; j += kLanes<A>) {
    tile<R, 1>(k_begin, k_end, a, b + j, ldb, c + j, ldc, add);
  }
}

/// One tile of up to kTile rows, starting at row r0 of m.
template <class A>
void rows(std::int64_t r0, std::int64_t m, std::int64_t n, std::int64_t k_begin, std::int64_t k_end, const Strided<A>& a,
          const A* b, std::int64_t ldb, A* c, std::int64_t ldc, bool add) {
  const Strided<A> part{a.data + r0 * a.row, a.row, a.column};
  A* out = c + r0 * ldc;
  switch (std::min(kTile, m - r0)) {
    case 1:
      return row_tile<1>(n, k_begin, k_end, part, b, ldb, out, ldc, add);
    case 2:
      return row_tile<2>(n, k_begin, k_end, part, b, ldb, out, ldc, add);
    case 3:
      return row_tile<3>(n, k_begin, k_end, part, b, ldb, out, ldc, add);
    default:
      return row_tile<4>(n, k_begin, k_end, part, b, ldb, out, ldc, add);
  }
}

}  // namespace detail

/// c [m, n] = a [m, k] b [k, n], or += with `add`.
template <class A>
void product(std::int64_t m, std::int64_t n, std::int64_t k, const Strided<A>& a, const A* b, std::int64_t ldb, A* c,
             std::int64_t ldc, bool add) {
  for (std::int64_t r = 0; r < m; r += kTile) {
    detail::rows(r, m, n, 0, k, a, b, ldb, c, ldc, add);
  }
}

/// The same with a [m, m] lower triangular; a must hold zeros above its diagonal inside each tile of rows.
template <class A>
void product_lower(std::int64_t m, std::int64_t n, const Strided<A>& a, const A* b, std::int64_t ldb, A* c, std::int64_t ldc,
                   bool add) {
  for (std::int64_t r = 0; r < m; r += kTile) {
    detail::rows(r, m, n, 0, std::min(m, r + kTile), a, b, ldb, c, ldc, add);
  }
}

/// The same with a [m, m] upper triangular; a must hold zeros below its diagonal inside each tile of rows.
template <class A>
void product_upper(std::int64_t m, std::int64_t n, const Strided<A>& a, const A* b, std::int64_t ldb, A* c, std::int64_t ldc,
                   bool add) {
  for (std::int64_t r = 0; r < m; r += kTile) {
    detail::rows(r, m, n, r, m, a, b, ldb, c, ldc, add);
  }
}

/// Columns of row t of a lower triangular [m, padded m] matrix that triangular products touch.
template <class A>
std::int64_t lower_columns(std::int64_t t) {
  return round_up(t / kTile * kTile + kTile, kLanes<A>);
}

/// Lower triangle of c [m, padded m] = a [m, k] b [k, padded m]: row t up to lower_columns(t).
template <class A>
void product_to_lower(std::int64_t m, std::int64_t k, const Strided<A>& a, const A* b, std::int64_t ldb, A* c,
                      std::int64_t ldc) {
  for (std::int64_t r = 0; r < m; r += kTile) {
    detail::rows(r, m, lower_columns<A>(r), 0, k, a, b, ldb, c, ldc, false);
  }
}

/// to [columns, ldt] = from [rows, columns] transposed. columns is a multiple of kLanes; `to` gets zeros in columns from rows
/// up to its next multiple of kLanes.
template <class A>
void transpose(std::int64_t rows, std::int64_t columns, const A* from, std::int64_t ldf, A* to, std::int64_t ldt) {
  using Vector = typename Simd<A>::Vector;
  constexpr int V = static_cast<int>(kLanes<A>);
  using Index = std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>;
  typedef Index Mask __attribute__((vector_size(32)));
  Mask low, high;
  for (int i = 0; i < V; ++i) {
    low[i] = i / 2 + (i % 2) * V;
    high[i] = low[i] + V / 2;
  }
  for (std::int64_t r0 = 0; r0 < rows; r0 += V) {
    const std::int64_t count = std::min<std::int64_t>(V, rows - r0);
    for (std::int64_t c0 = 0; c0 < columns; c0 += V) {
      Vector x[V], y[V];
      for (int r = 0; r < V; ++r) {
        x[r] = Vector{};
        if (r < count) {
          std::memcpy(&x[r], from + (r0 + r) * ldf + c0, sizeof(Vector));
        }
      }
      for (int step = 1; step < V; step *= 2) {  // a perfect shuffle of rows per step; log2(V) of them transpose
        for (int r = 0; r < V / 2; ++r) {
          y[2 * r] = __builtin_shuffle(x[r], x[r + V / 2], low);
          y[2 * r + 1] = __builtin_shuffle(x[r], x[r + V / 2], high);
        }
        for (int r = 0; r < V; ++r) {
          x[r] = y[r];
        }
      }
      for (int r = 0; r < V; ++r) {
        std::memcpy(to + (c0 + r) * ldt + r0, &x[r], sizeof(Vector));
      }
    }
  }
}

}  // namespace attamba::kernels::cpu::scan
