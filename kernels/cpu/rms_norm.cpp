// RMS normalisation over the last dimension, alone and fused with the residual addition.
//   r = 1 / sqrt(mean(x^2) + eps);  out = x r w
//   dx = r (w dout - x r^2 mean(w dout x));  dw = sum over rows of dout x r
// A row is read from memory once; further passes over it hit the first-level cache.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

/// The backward's partial sums of dweight: at most this many rows of scratch, whatever the batch.
constexpr std::int64_t kMaxPartials = 256;
constexpr std::int64_t kMinPartialRows = 16;

std::int64_t partial_rows(std::int64_t rows) {
  return std::max(kMinPartialRows, (rows + kMaxPartials - 1) / kMaxPartials);
}

std::int64_t partial_count(std::int64_t rows) {
  return (rows + partial_rows(rows) - 1) / partial_rows(rows);
}

template <class A>
A inverse_root(A square_sum, std::int64_t columns, double eps) {
  return A(1) / std::sqrt(square_sum / static_cast<A>(columns) + static_cast<A>(eps));
}

template <class A, class T>
A row_square_sum(const T* x, std::int64_t columns) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < columns; ++i) {
    const A value = convert<A>(x[i]);
    sum += value * value;
  }
  return sum;
}

template <class A, class T>
void scale_row(T* out, const T* x, const A* weight, A scale, std::int64_t columns) {
#pragma omp simd
  for (std::int64_t i = 0; i < columns; ++i) {
    out[i] = convert<T>(convert<A>(x[i]) * scale * weight[i]);
  }
}

/// sum = a + b, rounded; returns the sum of squares of the rounded values.
template <class A, class T>
A add_row(T* sum, const T* a, const T* b, std::int64_t columns) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t i = 0; i < columns; ++i) {
    // Rounded as a number, not kept as a T: a loop that copies bfloat16 objects is not vectorised.
    const A value = convert<A>(convert<T>(convert<A>(a[i]) + convert<A>(b[i])));
    sum[i] = convert<T>(value);
    squares += value * value;
  }
  return squares;
}

/// One row of the backward; `dweight` is this range's partial sum.
template <class A, class T>
void backward_row(T* dx, A* dweight, const T* dout, const T* x, const A* weight, const T* addend, std::int64_t columns,
                  double eps) {
  A squares = 0, products = 0;
#pragma omp simd reduction(+ : squares, products)
  for (std::int64_t i = 0; i < columns; ++i) {
    const A value = convert<A>(x[i]);
    squares += value * value;
    products += value * convert<A>(dout[i]) * weight[i];
  }
  const A scale = inverse_root(squares, columns, eps);
  const A pull = products * scale * scale * scale / static_cast<A>(columns);
  const auto apply = [&](auto with_addend) {
#pragma omp simd
    for (std::int64_t i = 0; i < columns; ++i) {
      const A value = convert<A>(x[i]), gradient = convert<A>(dout[i]);
      dweight[i] += gradient * value * scale;
      A result = gradient * weight[i] * scale - value * pull;
      if constexpr (with_addend) {
        result += convert<A>(addend[i]);
      }
      dx[i] = convert<T>(result);
    }
  };
  if (addend != nullptr) {
    apply(std::true_type{});
  } else {
    apply(std::false_type{});
  }
}

TensorType weight_type(const TensorType& x) {
  return {accumulator_of(x.dtype), Shape{x.shape.columns()}};
}

}  // namespace

void rms_norm(const Launch&, const Tensor& out, const Tensor& x, const Tensor& weight, double eps) {
  require_type(out, x.type, "rms_norm", "out");
  require_type(weight, weight_type(x.type), "rms_norm", "weight");
  dispatch_floating(x.dtype(), "rms_norm", [&]<class T>() {
    using A = Accumulator<T>;
    const std::int64_t columns = x.shape().columns();
    T* const to = out.as<T>();
    const T* const from = x.as<T>();
    const A* const scales = weight.as<A>();
    parallel_ranges(x.shape().rows(), row_grain(columns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin * columns; row < end * columns; row += columns) {
        const A scale = inverse_root(row_square_sum<A>(from + row, columns), columns, eps);
        scale_row(to + row, from + row, scales, scale, columns);
      }
    });
  });
}

void add_rms_norm(const Launch&, const Tensor& sum, const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& weight,
                  double eps) {
  require_type(sum, a.type, "add_rms_norm", "sum");
  require_type(out, a.type, "add_rms_norm", "out");
  require_type(b, a.type, "add_rms_norm", "b");
  require_type(weight, weight_type(a.type), "add_rms_norm", "weight");
  dispatch_floating(a.dtype(), "add_rms_norm", [&]<class T>() {
    using A = Accumulator<T>;
    const std::int64_t columns = a.shape().columns();
    T *const total = sum.as<T>(), *const to = out.as<T>();
    const T *const left = a.as<T>(), *const right = b.as<T>();
    const A* const scales = weight.as<A>();
    parallel_ranges(a.shape().rows(), row_grain(columns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin * columns; row < end * columns; row += columns) {
        const A squares = add_row<A>(total + row, left + row, right + row, columns);
        scale_row(to + row, total + row, scales, inverse_root(squares, columns, eps), columns);
      }
    });
  });
}

std::size_t rms_norm_backward_workspace(const TensorType& x) {
  const auto elements = static_cast<std::size_t>(partial_count(x.shape.rows()) * x.shape.columns());
  return ScratchAllocator::aligned_bytes<std::byte>(elements * size_of(accumulator_of(x.dtype)));
}

void rms_norm_backward(const Launch& launch, const Tensor& dx, const Tensor& dweight, const Tensor& dout, const Tensor& x,
                       const Tensor& weight, const Tensor& addend, double eps) {
  require_type(dx, x.type, "rms_norm_backward", "dx");
  require_type(dout, x.type, "rms_norm_backward", "dout");
  require_type(weight, weight_type(x.type), "rms_norm_backward", "weight");
  require_type(dweight, weight.type, "rms_norm_backward", "dweight");
  if (addend) {
    require_type(addend, x.type, "rms_norm_backward", "addend");
  }
  dispatch_floating(x.dtype(), "rms_norm_backward", [&]<class T>() {
    using A = Accumulator<T>;
    const std::int64_t columns = x.shape().columns(), rows = x.shape().rows();
    const std::int64_t grain = partial_rows(rows), partials = partial_count(rows);
    A* const partial = ScratchAllocator(launch).take<A>(static_cast<std::size_t>(partials * columns));
    T* const dx_data = dx.as<T>();
    const T *const dout_data = dout.as<T>(), *const x_data = x.as<T>();
    const T* const addend_data = addend ? addend.as<T>() : nullptr;
    const A* const weight_data = weight.as<A>();
    parallel_ranges(rows, grain, [&](std::int64_t begin, std::int64_t end) {
      A* const mine = partial + begin / grain * columns;
      std::fill(mine, mine + columns, A(0));
      for (std::int64_t row = begin * columns; row < end * columns; row += columns) {
        backward_row(dx_data + row, mine, dout_data + row, x_data + row, weight_data,
                     addend_data == nullptr ? nullptr : addend_data + row, columns, eps);
      }
    });
    A* const dweight_data = dweight.as<A>();
    parallel_ranges(columns, std::max<std::int64_t>(64, kElementGrain / std::max<std::int64_t>(1, partials) / 64 * 64),
                    [&](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t p = 1; p < partials; ++p) {
                        const A* const from = partial + p * columns;
#pragma omp simd
                        for (std::int64_t i = begin; i < end; ++i) {
                          partial[i] += from[i];
                        }
                      }
                      for (std::int64_t i = begin; i < end && partials > 0; ++i) {
                        dweight_data[i] += partial[i];
                      }
                    });
  });
}

}  // namespace attamba::kernels::cpu
