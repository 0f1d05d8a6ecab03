// Element by element: addition, SwiGLU, rotary embedding, fill. Every loop reads an element before it writes the same index,
// so outputs may be their own inputs where kernels.h says so.
#include <algorithm>
#include <span>
#include <type_traits>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

void require_positions(const Tensor& positions, std::int64_t limit) {
  std::int32_t lowest = 0, highest = -1;
  const std::span<const std::int32_t> all = positions.span<std::int32_t>();
  for (const std::int32_t position : all) {
    lowest = std::min(lowest, position);
    highest = std::max(highest, position);
  }
  require(lowest >= 0 && highest < limit, "rope: position ", lowest < 0 ? lowest : highest, " is outside the table of ", limit,
          " positions");
}

/// Turns the pairs of one head's d elements, x + addend where there is one, by the angles of `table`.
template <bool kAddend, class A, class T, class X>
void rotate_head(T* out, const X* x, const T* addend, const A* table, A direction, std::int64_t width) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; i += 2) {
    const A cosine = table[i], sine = direction * table[i + 1];
    A even = convert<A>(x[i]), odd = convert<A>(x[i + 1]);
    if constexpr (kAddend) {
      even += convert<A>(addend[i]);
      odd += convert<A>(addend[i + 1]);
    }
    out[i] = convert<T>(even * cosine - odd * sine);
    out[i + 1] = convert<T>(even * sine + odd * cosine);
  }
}

template <class T, class X>
void rotate(const Tensor& out, const Tensor& x, const Tensor& addend, const Tensor& table, const Tensor& positions,
            bool inverse) {
  using A = Accumulator<T>;
  const Shape& shape = x.shape();
  const std::int64_t width = shape[2], row = shape[1] * width;
  T* const to = out.as<T>();
  const X* const from = x.as<X>();
  const T* const added = addend ? addend.as<T>() : nullptr;
  const A *const angles = table.as<A>(), direction = inverse ? A(-1) : A(1);
  const std::int32_t* const position = positions.as<std::int32_t>();
  parallel_ranges(shape[0], row_grain(row), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t head = t * row; head < (t + 1) * row; head += width) {
        const A* const turn = angles + position[t] * width;
        if (added != nullptr) {
          rotate_head<true>(to + head, from + head, added + head, turn, direction, width);
        } else {
          rotate_head<false>(to + head, from + head, added, turn, direction, width);
        }
      }
    }
  });
}

template <class T>
void fill_with(const Tensor& out, T value) {
  T* const to = out.as<T>();
  parallel_ranges(out.elements(), kElementGrain, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        to[i].bits = value.bits;  // copies of the object itself are not vectorised
      } else {
        to[i] = value;
      }
    }
  });
}

}  // namespace

void add(const Launch&, const Tensor& out, const Tensor& a, const Tensor& b) {
  require_type(out, a.type, "add", "out");
  require_type(b, a.type, "add", "b");
  dispatch_floating(a.dtype(), "add", [&]<class T>() {
    using A = Accumulator<T>;
    T* const to = out.as<T>();
    const T *const left = a.as<T>(), *const right = b.as<T>();
    parallel_ranges(a.elements(), kElementGrain, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        to[i] = convert<T>(convert<A>(left[i]) + convert<A>(right[i]));
      }
    });
  });
}

void swiglu(const Launch&, const Tensor& out, const Tensor& gate, const Tensor& up) {
  require_type(out, gate.type, "swiglu", "out");
  require_type(up, gate.type, "swiglu", "up");
  dispatch_floating(gate.dtype(), "swiglu", [&]<class T>() {
    using A = Accumulator<T>;
    T* const to = out.as<T>();
    const T *const gates = gate.as<T>(), *const ups = up.as<T>();
    parallel_ranges(gate.elements(), kElementGrain, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        to[i] = convert<T>(silu(convert<A>(gates[i])) * convert<A>(ups[i]));
      }
    });
  });
}

void swiglu_backward(const Launch&, const Tensor& dgate, const Tensor& dup, const Tensor& dout, const Tensor& gate,
                     const Tensor& up) {
  require_type(dgate, gate.type, "swiglu_backward", "dgate");
  require_type(dup, gate.type, "swiglu_backward", "dup");
  require_type(dout, gate.type, "swiglu_backward", "dout");
  require_type(up, gate.type, "swiglu_backward", "up");
  dispatch_floating(gate.dtype(), "swiglu_backward", [&]<class T>() {
    using A = Accumulator<T>;
    T *const dgates = dgate.as<T>(), *const dups = dup.as<T>();
    const T *const douts = dout.as<T>(), *const gates = gate.as<T>(), *const ups = up.as<T>();
    parallel_ranges(gate.elements(), kElementGrain, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        const A g = convert<A>(gates[i]), u = convert<A>(ups[i]), d = convert<A>(douts[i]);
        const A s = sigmoid(g), activated = g * s;
        dgates[i] = convert<T>(d * u * (s + activated * (A(1) - s)));
        dups[i] = convert<T>(d * activated);
      }
    });
  });
}

void rope(const Launch&, const Tensor& out, const Tensor& x, const Tensor& addend, const Tensor& table, const Tensor& positions,
          bool inverse) {
  const Shape& shape = x.shape();
  require(shape.rank() == 3 && shape[2] % 2 == 0, "rope: x is ", x.type, ", expected [T, H, d] with an even d");
  require_type(out, {out.dtype(), shape}, "rope", "out");
  require(x.dtype() == out.dtype() || x.dtype() == accumulator_of(out.dtype()), "rope: x is ", x.type,
          ", expected the type of ", out.type, " or its accumulator's");
  if (addend) {
    require_type(addend, out.type, "rope", "addend");
  }
  require(table.shape().rank() == 2, "rope: table is ", table.type, ", expected [n, ", shape[2], "]");
  require_type(table, {accumulator_of(x.dtype()), Shape{table.shape()[0], shape[2]}}, "rope", "table");
  require_type(positions, {DType::int32, Shape{shape[0]}}, "rope", "positions");
  require_positions(positions, table.shape()[0]);
  dispatch_floating(out.dtype(), "rope", [&]<class T>() {
    if (x.dtype() == out.dtype()) {
      rotate<T, T>(out, x, addend, table, positions, inverse);
    } else {
      rotate<T, Accumulator<T>>(out, x, addend, table, positions, inverse);
    }
  });
}

void fill(const Launch&, const Tensor& out, double value) {
  switch (out.dtype()) {
    case DType::float32:
      return fill_with(out, static_cast<float>(value));
    case DType::bfloat16:
      return fill_with(out, bfloat16(static_cast<float>(value)));
    case DType::float64:
      return fill_with(out, value);
    case DType::int32:
      return fill_with(out, static_cast<std::int32_t>(value));
    case DType::int64:
      return fill_with(out, static_cast<std::int64_t>(value));
  }
}

}  // namespace attamba::kernels::cpu
