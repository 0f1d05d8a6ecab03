// The dense building blocks of attention: small products kept in registers, and tiles of keys with their staircase masks.
//
// A score tile is stored transposed, [keys, rows], where a row is one (token, query head) pair of a block: its rows lie in SIMD
// lanes, so softmax runs down the keys without horizontal sums, and every product has one operand that is broadcast from where
// it lies and one that is read in whole vectors. Keys are never transposed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/vector_math.h"
#include "src/core/dtype.h"

namespace attamba::kernels::cpu::tiles {

#if defined(__AVX512F__)
inline constexpr std::int64_t kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr std::int64_t kVectorBytes = 32;
#else
inline constexpr std::int64_t kVectorBytes = 16;
#endif

inline constexpr std::int64_t kMaxRows = 64;   ///< rows of a block
inline constexpr std::int64_t kMaxKeys = 128;  ///< keys of a tile
inline constexpr std::int64_t kStripRows = 6;  ///< rows of a register tile: 6 x 2 vectors and 3 operands fit 16 registers

/// Columns of a register tile.
template <class A>
inline constexpr std::int64_t kPanel = 2 * kVectorBytes / std::int64_t{sizeof(A)};

/// `count` rounded up to whole panels.
template <class A>
constexpr std::int64_t padded(std::int64_t count) {
  return (count + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

/// Distance of a scratch matrix's rows: one cache line more than they are long, because powers of two would map a panel's rows
/// to a few sets of the first-level cache.
template <class A>
constexpr std::int64_t row_distance(std::int64_t columns) {
  return padded<A>(columns) + 64 / std::int64_t{sizeof(A)};
}
template <class A>
inline constexpr std::int64_t kScoreDistance = row_distance<A>(kMaxRows);

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};

/// c[i][l] (+)= sum_j x[i * row_step + j * inner_step] y[j * y_distance + l] for i < kRows and l < kPanel.
template <int kRows, bool kAccumulate, class A>
[[gnu::always_inline]] inline void register_tile(A* c, std::int64_t c_distance, const A* x, std::int64_t row_step,
                                                 std::int64_t inner_step, const A* y, std::int64_t y_distance,
                                                 std::int64_t inner) {
  using Vector = typename VectorOf<A>::type;
  constexpr std::int64_t kLanes = kPanel<A> / 2;
  Vector sum[kRows][2];
  // Unrolled: the sums stay in registers only when every index is a constant.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kAccumulate) {
      std::memcpy(&sum[i][0], c + i * c_distance, sizeof(Vector));
      std::memcpy(&sum[i][1], c + i * c_distance + kLanes, sizeof(Vector));
    } else {
      sum[i][0] = sum[i][1] = Vector{};
    }
  }
  for (std::int64_t j = 0; j < inner; ++j) {
    Vector y0, y1;
    std::memcpy(&y0, y, sizeof(Vector));
    std::memcpy(&y1, y + kLanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const A factor = x[i * row_step];
      sum[i][0] += factor * y0;
      sum[i][1] += factor * y1;
    }
    x += inner_step;
    y += y_distance;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    std::memcpy(c + i * c_distance, &sum[i][0], sizeof(Vector));
    std::memcpy(c + i * c_distance + kLanes, &sum[i][1], sizeof(Vector));
  }
}

/// register_tile for 1 <= rows <= kStripRows. x holds (i, j) at [j][i] when kRowsAdjacent, else at [i][j].
template <bool kAccumulate, bool kRowsAdjacent, class A>
void strip_product(std::int64_t rows, A* c, std::int64_t c_distance, const A* x, std::int64_t x_distance, const A* y,
                   std::int64_t y_distance, std::int64_t inner) {
  const auto run = [&]<int kRows>() {
    if constexpr (kRowsAdjacent) {
      register_tile<kRows, kAccumulate>(c, c_distance, x, 1, x_distance, y, y_distance, inner);
    } else {
      register_tile<kRows, kAccumulate>(c, c_distance, x, x_distance, 1, y, y_distance, inner);
    }
  };
  switch (rows) {
    case 6:
      return run.template operator()<6>();
    case 5:
      return run.template operator()<5>();
    case 4:
      return run.template operator()<4>();
    case 3:
      return run.template operator()<3>();
    case 2:
      return run.template operator()<2>();
    default:
      return run.template operator()<1>();
  }
}

/// How many of `rest` rows the next strip takes: never leaves a strip too thin to hide the latency of additions.
constexpr std::int64_t strip_rows(std::int64_t rest) {
  return rest == 7 || rest == 8 ? 4 : std::min(rest, kStripRows);
}

/// Output rows [row, row + rows) and the inner indices [from, to) that reach them.
struct Strip {
  std::int64_t row, rows, from, to;
};

/// Cuts [0, count) into strips; range(first, last) gives the inner indices that rows first..last need. Empty strips are left
/// out.
struct Strips {
  std::array<Strip, (kMaxKeys > kMaxRows ? kMaxKeys : kMaxRows) / 3> list;
  std::int64_t count = 0;

  template <class Range>
  void cut(std::int64_t rows, const Range& range) {
    count = 0;
    for (std::int64_t row = 0; row < rows;) {
      const std::int64_t taken = strip_rows(rows - row);
      const auto [from, to] = range(row, row + taken - 1);
      if (from < to) {
        list[static_cast<std::size_t>(count++)] = {row, taken, from, to};
      }
      row += taken;
    }
  }
};

/// c[i][0..columns) += sum_j x(i, j) y[j][0..columns) over the strips' rows i and inner indices j.
template <bool kRowsAdjacent, class A>
void add_products(const Strips& strips, std::int64_t columns, A* c, std::int64_t c_distance, const A* x,
                  std::int64_t x_distance, const A* y, std::int64_t y_distance) {
  for (std::int64_t column = 0; column < columns; column += kPanel<A>) {
    for (std::int64_t s = 0; s < strips.count; ++s) {
      const Strip& strip = strips.list[static_cast<std::size_t>(s)];
      const A* from = kRowsAdjacent ? x + strip.from * x_distance + strip.row : x + strip.row * x_distance + strip.from;
      strip_product<true, kRowsAdjacent>(strip.rows, c + strip.row * c_distance + column, c_distance, from, x_distance,
                                         y + strip.from * y_distance + column, y_distance, strip.to - strip.from);
    }
  }
}

/// c[i][0..kPanel) = sum_{j < inner} x[i][j] y[j][0..kPanel) for i in [begin, end).
template <class A>
void panel_product(std::int64_t begin, std::int64_t end, A* c, std::int64_t c_distance, const A* x, std::int64_t x_distance,
                   const A* y, std::int64_t inner) {
  for (std::int64_t row = begin; row < end;) {
    const std::int64_t taken = strip_rows(end - row);
    strip_product<false, false>(taken, c + row * c_distance, c_distance, x + row * x_distance, x_distance, y, kPanel<A>, inner);
    row += taken;
  }
}

template <bool kToWrite, class T>
void prefetch_row(const T* row, std::int64_t columns) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (std::int64_t b = 0; b < columns * std::int64_t{sizeof(T)}; b += 64) {
    __builtin_prefetch(bytes + b, kToWrite);
  }
}

/// Converts one row of `columns` elements and pads it with zeros to whole panels.
template <class T, class A>
void load_row(A* to, const T* from, std::int64_t columns, A factor) {
  for (std::int64_t c = 0; c < columns; ++c) {
    to[c] = convert<A>(from[c]) * factor;
  }
  for (std::int64_t c = columns; c < padded<A>(columns); ++c) {
    to[c] = A(0);
  }
}

/// panels[g][c][l] = rows[g * kPanel + l][c]: each panel of rows transposed. Rows beyond `count`, up to whole panels, must be
/// readable.
template <class A>
void transpose_panels(A* panels, const A* rows, std::int64_t distance, std::int64_t count, std::int64_t columns) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
  for (std::int64_t row = 0; row < padded<A>(count); row += 4) {
    A* panel = panels + row / kPanel<A> * kPanel<A> * columns + row % kPanel<A>;
    std::int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      Four in[4];
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&in[i], rows + (row + i) * distance + c, sizeof(Four));
      }
      const Four low01 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5),
                 low23 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
      const Four high01 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7),
                 high23 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
      const Four out[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                           __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                           __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) {
        std::memcpy(panel + (c + i) * kPanel<A>, &out[i], sizeof(Four));
      }
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < 4; ++i) {
        panel[c * kPanel<A> + i] = rows[(row + i) * distance + c];
      }
    }
  }
}

/// Half-open range of keys, relative to a tile.
struct KeyRange {
  std::int64_t from, to;
};

/// The keys [begin[r], end[r]) of one kind, compact or local, that each row r of a block sees; both never decrease with r.
struct RowKeys {
  std::array<std::int32_t, kMaxRows> begin, end;
};

/// Keys [first, first + count) against the rows of a block. Key i is seen by rows [row_from[i], row_to[i]).
struct KeyTile {
  const RowKeys* keys = nullptr;
  std::int64_t first = 0, count = 0;
  std::array<std::int32_t, kMaxKeys> row_from, row_to;

  void set(const RowKeys& row_keys, std::int64_t rows, std::int64_t first_key, std::int64_t key_count) {
    keys = &row_keys;
    first = first_key;
    count = key_count;
    std::int32_t from = 0, to = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      while (from < rows && keys->end[from] <= first + i) {
        ++from;
      }
      while (to < rows && keys->begin[to] <= first + i) {
        ++to;
      }
      row_from[i] = from;
      row_to[i] = to;
    }
  }
  /// Keys of this tile that any of the rows first_row..last_row sees.
  KeyRange keys_of(std::int64_t first_row, std::int64_t last_row) const {
    const std::int64_t from = std::max(keys->begin[first_row] - first, std::int64_t{0});
    return {from, std::max(from, std::min(keys->end[last_row] - first, count))};
  }
  /// Rows that any of the keys first_key..last_key is seen by.
  KeyRange rows_of(std::int64_t first_key, std::int64_t last_key) const { return {row_from[first_key], row_to[last_key]}; }
  /// Whether key i is seen by all rows [row, row + rows).
  bool full(std::int64_t i, std::int64_t row, std::int64_t rows) const { return row_from[i] <= row && row_to[i] >= row + rows; }
};

}  // namespace attamba::kernels::cpu::tiles
