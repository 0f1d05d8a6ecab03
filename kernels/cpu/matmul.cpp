// Products of matrices: the output is cut into tiles that depend on its shape alone; each is one one-threaded library call.
#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/matmul_tile.h"
#include "kernels/kernels.h"

namespace attamba::kernels {
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

/// How an output is cut: rows x columns per tile, the last ones smaller.
struct Grid {
  std::int64_t rows, columns;  ///< extents of a tile
  std::int64_t down, across;   ///< number of tiles

  explicit Grid(const Problem& problem) {
    rows = std::min<std::int64_t>(problem.m, 128);
    columns = std::min<std::int64_t>(problem.n, 256);
    down = (problem.m + rows - 1) / rows;
    across = (problem.n + columns - 1) / columns;
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

}  // namespace

std::size_t matmul_workspace(const TensorType& out, const TensorType& a, const TensorType& b, bool transpose_a,
                             bool transpose_b) {
  const Problem problem = make_problem(out, a, b, transpose_a, transpose_b);
  if (problem.m == 0 || problem.n == 0 || problem.k == 0) {
    return 0;
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

}  // namespace attamba::kernels
