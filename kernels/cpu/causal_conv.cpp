// out = silu(y), y_t = sum_j weight[W-1-j] x_{t-j} within a chunk, column by column; and backwards
//
//   g_t = dout_t silu'(y_t);  dx_t = sum_j weight[W-1-j] g_{t+j};  dweight[W-1-j] = sum_t g_t x_{t-j}
//
// over the rows of t's chunk. A task owns kRows rows of kColumns columns; its taps lie row by row in the cache.
#include "kernels/causal_conv_checks.h"

#include <algorithm>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/vector_math.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

constexpr std::int64_t kColumns = 64, kRows = 128;

/// A task's place, and its columns of the taps: taps[j] belongs to j rows before.
template <class A>
struct Piece {
  std::int64_t begin, end, first, count;  ///< rows; columns
  A taps[kMostConvTaps][kColumns] = {};

  Piece(const Tensor& x, const Tensor& weight, std::int64_t task) {
    const std::int64_t columns = x.shape().columns(), pieces = (columns + kColumns - 1) / kColumns, w = weight.shape()[1];
    begin = task / pieces * kRows;
    end = std::min(x.shape().rows(), begin + kRows);
    first = task % pieces * kColumns;
    count = std::min(kColumns, columns - first);
    for (std::int64_t c = 0; c < count; ++c) {
      for (std::int64_t j = 0; j < w; ++j) {
        taps[j][c] = weight.as<A>()[(first + c) * w + w - 1 - j];
      }
    }
  }
};
std::int64_t row_pieces(std::int64_t rows) {
  return (rows + kRows - 1) / kRows;
}
std::int64_t tasks_of(const Shape& x) {
  return row_pieces(x.rows()) * ((x.columns() + kColumns - 1) / kColumns);
}

/// y_t of a piece's columns.
template <class T, class A>
void convolve_row(A (&y)[kColumns], const Piece<A>& p, const T* x, std::int64_t columns, std::int64_t t, std::int64_t taps) {
  std::fill_n(y, kColumns, A(0));
  for (std::int64_t j = 0; j < taps; ++j) {
    const T* from = x + (t - j) * columns + p.first;
#pragma omp simd
    for (std::int64_t c = 0; c < p.count; ++c) {
      y[c] += p.taps[j][c] * convert<A>(from[c]);
    }
  }
}

/// dx of the piece's rows, and its sums for dweight, [W, E] of which `sums` is this piece's part.
template <class T, class A>
void backward_piece(T* dx, A* sums, const Piece<A>& p, const T* dout, const T* x, const std::int32_t* starts,
                    std::int64_t columns, std::int64_t rows, std::int64_t w) {
  A gradient[kMostConvTaps][kColumns] = {}, of_taps[kMostConvTaps][kColumns] = {}, y[kColumns], sum[kColumns];
  // From the last row whose gradient reaches back into the piece; gradient[t mod W] is that of row t.
  for (std::int64_t t = std::min(rows, p.end + w - 1) - 1; t >= p.begin; --t) {
    const std::int64_t taps = std::min<std::int64_t>(w, t - starts[t] + 1);
    convolve_row(y, p, x, columns, t, taps);
    A* const own = gradient[t % w];
    const T* const from = dout + t * columns + p.first;
#pragma omp simd
    for (std::int64_t c = 0; c < p.count; ++c) {
      own[c] = convert<A>(from[c]) * silu_derivative(y[c]);
    }
    if (t >= p.end) {
      continue;
    }
    std::fill_n(sum, kColumns, A(0));
    for (std::int64_t j = 0; j < w && t + j < rows && starts[t + j] <= t; ++j) {
      const A *tap = p.taps[j], *later = gradient[(t + j) % w];
#pragma omp simd
      for (std::int64_t c = 0; c < p.count; ++c) {
        sum[c] += tap[c] * later[c];
      }
    }
    for (std::int64_t j = 0; j < taps; ++j) {
      const T* before = x + (t - j) * columns + p.first;
#pragma omp simd
      for (std::int64_t c = 0; c < p.count; ++c) {
        of_taps[j][c] += own[c] * convert<A>(before[c]);
      }
    }
    T* const to = dx + t * columns + p.first;
#pragma omp simd
    for (std::int64_t c = 0; c < p.count; ++c) {
      to[c] = convert<T>(sum[c]);
    }
  }
  for (std::int64_t j = 0; j < w; ++j) {
    std::copy_n(of_taps[j], p.count, sums + j * columns + p.first);
  }
}

}  // namespace

void causal_conv_silu(const Launch&, const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& starts) {
  check_causal_conv("causal_conv_silu", out, x, weight, starts);
  dispatch_floating(x.dtype(), "causal_conv_silu", [&]<class T>() {
    using A = Accumulator<T>;
    const std::int64_t columns = x.shape().columns(), w = weight.shape()[1];
    const std::int32_t* const from = starts.as<std::int32_t>();
    parallel_for(tasks_of(x.shape()), [&](std::int64_t task) {
      const Piece<A> p(x, weight, task);
      A y[kColumns];
      for (std::int64_t t = p.begin; t < p.end; ++t) {
        convolve_row(y, p, x.as<T>(), columns, t, std::min<std::int64_t>(w, t - from[t] + 1));
        T* const to = out.as<T>() + t * columns + p.first;
#pragma omp simd
        for (std::int64_t c = 0; c < p.count; ++c) {
          to[c] = convert<T>(silu(y[c]));
        }
      }
    });
  });
}

std::size_t causal_conv_silu_backward_workspace(const TensorType& x, const TensorType& weight) {
  const auto elements = static_cast<std::size_t>(row_pieces(x.shape.rows()) * weight.shape.elements());
  return ScratchAllocator::aligned_bytes<std::byte>(elements * size_of(weight.dtype));
}

void causal_conv_silu_backward(const Launch& launch, const Tensor& dx, const Tensor& dweight, const Tensor& dout,
                               const Tensor& x, const Tensor& weight, const Tensor& starts) {
  constexpr const char* kName = "causal_conv_silu_backward";
  check_causal_conv(kName, dx, x, weight, starts);
  require_type(dout, x.type, kName, "dout");
  require_type(dweight, weight.type, kName, "dweight");
  dispatch_floating(x.dtype(), kName, [&]<class T>() {
    using A = Accumulator<T>;
    const std::int64_t columns = x.shape().columns(), rows = x.shape().rows(), w = weight.shape()[1];
    A* const sums = ScratchAllocator(launch).take<A>(static_cast<std::size_t>(row_pieces(rows) * columns * w));
    parallel_for(tasks_of(x.shape()), [&](std::int64_t task) {
      const Piece<A> p(x, weight, task);
      backward_piece(dx.as<T>(), sums + p.begin / kRows * columns * w, p, dout.as<T>(), x.as<T>(), starts.as<std::int32_t>(),
                     columns, rows, w);
    });
    parallel_ranges(columns, kColumns, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = 0; j < w; ++j) {
        for (std::int64_t c = begin; c < end; ++c) {
          A sum = 0;
          for (std::int64_t piece = 0; piece < row_pieces(rows); ++piece) {
            sum += sums[(piece * w + j) * columns + c];
          }
          dweight.as<A>()[c * w + w - 1 - j] += sum;
        }
      }
    });
  });
}

}  // namespace attamba::kernels::cpu
