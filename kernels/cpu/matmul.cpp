// Products of matrices: our own gemm where it is the fastest, otherwise the output is cut into tiles that depend on its shape
// alone, each one one-threaded library call.
#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/matmul_tile.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cpu {
namespace {

/// The extents of one product, checked.
struct Problem {
  std::int64_t m = 0, n = 0, k = 0;
  TileProduct tile;  ///< strides, types and transpositions; extents to be filled in
};

Problem make_problem(const TensorType& out, const TensorType& a, const TensorType& b, bool transpose_a, bool transpose_b) {
  const auto extents = [](const TensorType& type, bool transpose) {
    const std::int64_t columns = type.shape.columns();
    std::int64_t rows = 1;  // Shape::rows() knows none without columns
    for (std::size_t i = 0; i + 1 < type.shape.rank(); ++i) {
      rows *= type.shape[static_cast<int>(i)];
    }
    return transpose ? std::array{columns, rows} : std::array{rows, columns};
  };
  const auto [m, k] = extents(a, transpose_a);
  const auto [depth, n] = extents(b, transpose_b);
  const char* mark_a = transpose_a ? "^T" : "";
  const char* mark_b = transpose_b ? "^T" : "";
  require(a.dtype == b.dtype, "matmul: operands differ in type: ", a, " and ", b);
  require(k == depth, "matmul: inner extents differ: ", a, mark_a, " times ", b, mark_b);
  require(out.shape.elements() == m * n && (m * n == 0 || out.shape.columns() == n), "matmul: ", a, mark_a, " times ", b,
          mark_b, " is [", m, ", ", n, "], not ", out);
  require(out.dtype == a.dtype || out.dtype == accumulator_of(a.dtype), "matmul: output ", out,
          " does not fit operands of type ", name_of(a.dtype));
  require(std::max({m, n, k}) < (std::int64_t{1} << 31), "matmul: extents of ", a, " times ", b, " exceed 2^31");
  return {m,
          n,
          k,
          {.a_stride = a.shape.columns(),
           .b_stride = b.shape.columns(),
           .c_stride = n,
           .transpose_a = transpose_a,
           .transpose_b = transpose_b,
           .input = a.dtype,
           .output = out.dtype}};
}

constexpr std::int64_t kTileExtents[] = {64, 96, 128, 192, 256, 384, 512};
constexpr std::int64_t kSerialProducts = 1 << 18;  ///< below this many multiplications a second thread does not pay

/// How an output is cut: rows x columns per tile, the last ones smaller. Small tiles keep many threads busy, large ones repeat
/// less packing; the choice weighs both, for every number of threads at once, as it must not depend on their number.
struct Grid {
  std::int64_t rows, columns;         ///< extents of a tile
  std::int64_t down = 1, across = 1;  ///< number of tiles

  explicit Grid(const Problem& problem) : rows(problem.m), columns(problem.n) {
    if (problem.m * problem.n * problem.k <= kSerialProducts) {
      return;
    }
    const double packing = problem.tile.input == DType::bfloat16 && has_native_bfloat16() ? kNativePacking : kPacking;
    double best = 0;
    for (const std::int64_t most_rows : kTileExtents) {
      for (const std::int64_t most_columns : kTileExtents) {
        const std::int64_t r = even_extent(problem.m, most_rows, 8), c = even_extent(problem.n, most_columns, 16);
        const std::int64_t d = (problem.m + r - 1) / r, a = (problem.n + c - 1) / c;
        const double score = balance(d * a) / (1 + packing * (1.0 / static_cast<double>(r) + 1.0 / static_cast<double>(c)));
        if (score > best) {
          best = score;
          rows = r, columns = c, down = d, across = a;
        }
      }
    }
  }

 private:
  /// Time of packing a row or column of an operand in units of multiplying it by one: measured with OpenBLAS (Zen 3, float32),
  /// where tiles of 64 x 64 reach 74 % and 256 x 256 94 % of the whole product's rate; estimated for AMX.
  static constexpr double kPacking = 13, kNativePacking = 40;

  /// `extent` in equal parts of at most `most`, rounded up to what the libraries' inner kernels work in.
  static std::int64_t even_extent(std::int64_t extent, std::int64_t most, std::int64_t unit) {
    const std::int64_t parts = (extent + most - 1) / most;
    return std::min(extent, ((extent + parts - 1) / parts + unit - 1) / unit * unit);
  }

  /// The part of their time that threads are busy with `tiles` equal tiles, on average over numbers of threads.
  static double balance(std::int64_t tiles) {
    double sum = 0;
    for (const std::int64_t threads : {1, 2, 4, 8, 12, 16}) {
      const std::int64_t rounds = (tiles + threads - 1) / threads;
      sum += static_cast<double>(tiles) / static_cast<double>(rounds * threads);
    }
    return sum;
  }
};

TileProduct tile_of(const Problem& problem, std::int64_t rows, std::int64_t columns, bool accumulate) {
  TileProduct tile = problem.tile;
  tile.m = rows;
  tile.n = columns;
  tile.k = problem.k;
  tile.accumulate = accumulate;
  return tile;
}

std::size_t worker_scratch(const Problem& problem) {
  if (problem.tile.input != DType::bfloat16) {
    return 0;
  }
  const Grid grid(problem);
  std::size_t bytes = 0;
  for (const std::int64_t rows : {grid.rows, problem.m - (grid.down - 1) * grid.rows}) {
    for (const std::int64_t columns : {grid.columns, problem.n - (grid.across - 1) * grid.columns}) {
      for (const bool accumulate : {false, true}) {
        bytes = std::max(bytes, tile_scratch_bytes(tile_of(problem, rows, columns, accumulate)));
      }
    }
  }
  return (bytes + 63) / 64 * 64;
}

void copy_rows(std::byte* out, const std::byte* in, std::int64_t stride, std::int64_t rows, std::size_t row_bytes) {
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(out + i * stride, in + i * stride, row_bytes);
  }
}

void write_empty_sum(const Tensor& out, const Tensor& addend) {
  if (!addend) {
    std::memset(out.data, 0, out.bytes());
  } else if (addend.data != out.data) {
    std::memcpy(out.data, addend.data, out.bytes());
  }
}

GemmProblem gemm_of(const Problem& problem, const void* a, const void* b, void* out, void* addend) {
  return {problem.m,
          problem.n,
          problem.k,
          {a, problem.tile.a_stride, problem.tile.transpose_a, problem.tile.input},
          {b, problem.tile.b_stride, !problem.tile.transpose_b, problem.tile.input},
          {out, problem.n, problem.tile.output},
          {addend, problem.n, problem.tile.output}};
}

}  // namespace

std::size_t matmul_workspace(const TensorType& out, const TensorType& a, const TensorType& b, bool transpose_a,
                             bool transpose_b) {
  const Problem problem = make_problem(out, a, b, transpose_a, transpose_b);
  if (problem.m == 0 || problem.n == 0 || problem.k == 0) {
    return 0;
  }
  if (runs_in_gemm(tile_of(problem, problem.m, problem.n, false))) {
    return gemm_scratch_bytes(gemm_of(problem, nullptr, nullptr, nullptr, nullptr), thread_count());
  }
  const Grid grid(problem);
  return worker_scratch(problem) * std::min<std::size_t>(thread_count(), static_cast<std::size_t>(grid.down * grid.across));
}

void matmul(const Launch& launch, const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
            const Tensor& addend) {
  const Problem problem = make_problem(out.type, a.type, b.type, transpose_a, transpose_b);
  require(!addend || (addend.dtype() == out.dtype() && addend.elements() == out.elements()), "matmul: addend ", addend.type,
          " does not match output ", out.type);
  if (problem.m == 0 || problem.n == 0) {
    return;
  }
  if (problem.k == 0) {
    write_empty_sum(out, addend);
    return;
  }
  if (runs_in_gemm(tile_of(problem, problem.m, problem.n, false))) {
    gemm(gemm_of(problem, a.data, b.data, out.data, addend.data), launch.scratch.data(), launch.scratch.size(), thread_count());
    return;
  }
  const Grid grid(problem);
  const std::size_t per_worker = worker_scratch(problem);
  require(launch.scratch.size() >= per_worker, "matmul: need ", per_worker, " bytes of scratch for ", a.type, " times ", b.type,
          ", have ", launch.scratch.size());
  const std::int64_t size_in = static_cast<std::int64_t>(size_of(a.dtype()));
  const std::int64_t size_out = static_cast<std::int64_t>(size_of(out.dtype()));
  const std::int64_t a_step = (transpose_a ? 1 : problem.tile.a_stride) * size_in;
  const std::int64_t b_step = (transpose_b ? problem.tile.b_stride : 1) * size_in;

  parallel_workers(grid.down * grid.across, worker_count(launch.scratch.size(), per_worker), [&](std::int64_t i, int worker) {
    const std::int64_t row = i / grid.across * grid.rows, column = i % grid.across * grid.columns;
    const std::int64_t rows = std::min(grid.rows, problem.m - row), columns = std::min(grid.columns, problem.n - column);
    const std::int64_t offset = (row * problem.n + column) * size_out;
    auto* c = static_cast<std::byte*>(out.data) + offset;
    if (addend && addend.data != out.data) {
      copy_rows(c, static_cast<const std::byte*>(addend.data) + offset, problem.n * size_out, rows,
                static_cast<std::size_t>(columns * size_out));
    }
    run_tile(tile_of(problem, rows, columns, static_cast<bool>(addend)), c,
             static_cast<const std::byte*>(a.data) + row * a_step, static_cast<const std::byte*>(b.data) + column * b_step,
             launch.scratch.data() + static_cast<std::size_t>(worker) * per_worker);
  });
}

}  // namespace attamba::kernels::cpu
