// Element by element: addition, SwiGLU, rotary embedding, fill. Each thread owns 16 bytes of every tensor, and reads them
// before it writes the same ones, so outputs may be their own inputs where kernels.h says so.
#include <cstring>
#include <limits>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/activations.h"
#include "kernels/device/elements.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kThreads = 256;

/// The grid of a kernel that calls `for_own_elements` over `count` elements of `size` bytes.
Grid grid_of(std::int64_t count, std::size_t size) {
  return {.x = ceil_div(count, kThreads * static_cast<std::int64_t>(16 / size)), .threads = kThreads};
}

/// Calls `body.template operator()<kWidth>(first)` for this thread's share of `count` elements: one pack of 16 bytes, or, at
/// the end and where tensors are not aligned, single elements.
template <class T, class Body>
ATTAMBA_DEVICE void for_own_elements(std::int64_t count, bool packed, const Body& body) {
  constexpr int kWidth = kPackWidth<T>;
  const std::int64_t first = (std::int64_t{block_x()} * kThreads + thread_index()) * kWidth;
  if (packed && first + kWidth <= count) {
    body.template operator()<kWidth>(first);
  } else {
    for (std::int64_t i = first; i < first + kWidth && i < count; ++i) {
      body.template operator()<1>(i);
    }
  }
}

template <class T>
ATTAMBA_KERNEL(kThreads, 4)
add_kernel(T* out, const T* a, const T* b, std::int64_t count, bool packed) {
  for_own_elements<T>(count, packed, [&]<int kWidth>(std::int64_t first) {
    using Own = Elements<T, kWidth>;
    Own left = Own::read(a + first);
    const Own right = Own::read(b + first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      left.value[i] += right.value[i];
    }
    left.write(out + first);
  });
}

template <class T>
ATTAMBA_KERNEL(kThreads, 4)
swiglu_kernel(T* out, const T* gate, const T* up, std::int64_t count, bool packed) {
  for_own_elements<T>(count, packed, [&]<int kWidth>(std::int64_t first) {
    using Own = Elements<T, kWidth>;
    Own g = Own::read(gate + first);
    const Own u = Own::read(up + first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      g.value[i] = g.value[i] * sigmoid<T>(g.value[i]) * u.value[i];
    }
    g.write(out + first);
  });
}

template <class T>
ATTAMBA_KERNEL(kThreads, 4)
swiglu_backward_kernel(T* dgate, T* dup, const T* dout, const T* gate, const T* up, std::int64_t count, bool packed) {
  for_own_elements<T>(count, packed, [&]<int kWidth>(std::int64_t first) {
    using Own = Elements<T, kWidth>;
    Own g = Own::read(gate + first), u = Own::read(up + first);
    const Own d = Own::read(dout + first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float s = sigmoid<T>(g.value[i]), activated = g.value[i] * s;
      g.value[i] = d.value[i] * u.value[i] * (s + activated * (1.0f - s));
      u.value[i] = d.value[i] * activated;
    }
    g.write(dgate + first);
    u.write(dup + first);
  });
}

struct RopeExtents {
  std::int64_t tokens, positions;  ///< T, and rows of the table
  int heads, width;                ///< H, d
  int token_threads;               ///< threads that share a token
};

/// A thread turns the same columns of all heads of a token, so the table's row is read once. `addend` may be null.
template <class T, class X, int kWidth>
ATTAMBA_KERNEL(kThreads, 4)
rope_kernel(T* out, const X* x, const T* addend, const float* table, const std::int32_t* positions, RopeExtents extents,
            float direction) {
  const int local = thread_index() / extents.token_threads;
  const std::int64_t token = std::int64_t{block_x()} * (kThreads / extents.token_threads) + local;
  if (local >= kThreads / extents.token_threads || token >= extents.tokens) {
    return;
  }
  const std::int32_t position = load(positions + token);
  const bool valid = position >= 0 && position < extents.positions;
  const int step = extents.token_threads * kWidth;
  for (int c = (thread_index() - local * extents.token_threads) * kWidth; c < extents.width; c += step) {
    Elements<float, kWidth> angles;
    angles.fill(std::numeric_limits<float>::quiet_NaN());
    if (valid) {
      angles = Elements<float, kWidth>::read(table + std::int64_t{position} * extents.width + c);
    }
    const std::int64_t first = token * extents.heads * extents.width + c;
    for (int head = 0; head < extents.heads; ++head) {
      const std::int64_t at = first + std::int64_t{head} * extents.width;
      const auto pairs = Elements<X, kWidth>::read(x + at);
      Elements<T, kWidth> turned;
      turned.fill(0.0f);
      if (addend != nullptr) {
        turned = Elements<T, kWidth>::read(addend + at);
      }
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const float cosine = angles.value[i], sine = direction * angles.value[i + 1];
        const float even = pairs.value[i] + turned.value[i], odd = pairs.value[i + 1] + turned.value[i + 1];
        turned.value[i] = even * cosine - odd * sine;
        turned.value[i + 1] = even * sine + odd * cosine;
      }
      turned.write(out + at);
    }
  }
}

/// `pattern` repeats one element of type T.
template <class T>
ATTAMBA_KERNEL(kThreads, 4)
fill_kernel(T* out, T value, Bytes16 pattern, std::int64_t count, bool packed) {
  for_own_elements<T>(count, packed, [&]<int kWidth>(std::int64_t first) {
    if constexpr (kWidth == 1) {
      store(out + first, value);
    } else {
      store(reinterpret_cast<Bytes16*>(out + first), pattern);
    }
  });
}

template <class T>
void fill_with(const Launch& launch, const Tensor& out, T value) {
  Bytes16 pattern;
  for (std::size_t i = 0; i < sizeof(pattern); i += sizeof(T)) {
    std::memcpy(reinterpret_cast<std::byte*>(&pattern) + i, &value, sizeof(T));
  }
  launch_kernel("fill", fill_kernel<T>, launch, grid_of(out.elements(), sizeof(T)), static_cast<T*>(out.data), value, pattern,
                out.elements(), aligned_16({out.data}));
}

}  // namespace

void add(const Launch& launch, const Tensor& out, const Tensor& a, const Tensor& b) {
  require_type(out, a.type, "add", "out");
  require_type(b, a.type, "add", "b");
  dispatch_compute(a.dtype(), "add", [&]<class T>() {
    launch_kernel("add", add_kernel<T>, launch, grid_of(a.elements(), sizeof(T)), elements_of<T>(out), elements_of<T>(a),
                  elements_of<T>(b), a.elements(), aligned_16({out.data, a.data, b.data}));
  });
}

void swiglu(const Launch& launch, const Tensor& out, const Tensor& gate, const Tensor& up) {
  require_type(out, gate.type, "swiglu", "out");
  require_type(up, gate.type, "swiglu", "up");
  dispatch_compute(gate.dtype(), "swiglu", [&]<class T>() {
    launch_kernel("swiglu", swiglu_kernel<T>, launch, grid_of(gate.elements(), sizeof(T)), elements_of<T>(out),
                  elements_of<T>(gate), elements_of<T>(up), gate.elements(), aligned_16({out.data, gate.data, up.data}));
  });
}

void swiglu_backward(const Launch& launch, const Tensor& dgate, const Tensor& dup, const Tensor& dout, const Tensor& gate,
                     const Tensor& up) {
  require_type(dgate, gate.type, "swiglu_backward", "dgate");
  require_type(dup, gate.type, "swiglu_backward", "dup");
  require_type(dout, gate.type, "swiglu_backward", "dout");
  require_type(up, gate.type, "swiglu_backward", "up");
  dispatch_compute(gate.dtype(), "swiglu_backward", [&]<class T>() {
    launch_kernel("swiglu_backward", swiglu_backward_kernel<T>, launch, grid_of(gate.elements(), sizeof(T)),
                  elements_of<T>(dgate), elements_of<T>(dup), elements_of<T>(dout), elements_of<T>(gate), elements_of<T>(up),
                  gate.elements(), aligned_16({dgate.data, dup.data, dout.data, gate.data, up.data}));
  });
}

void rope(const Launch& launch, const Tensor& out, const Tensor& x, const Tensor& addend, const Tensor& table,
          const Tensor& positions, bool inverse) {
  const Shape& shape = out.shape();
  require(shape.rank() == 3 && shape[2] % 2 == 0, "rope: out is ", out.type, ", expected [T, H, d] with an even d");
  require_type(x, {x.dtype() == out.dtype() ? out.dtype() : accumulator_of(out.dtype()), shape}, "rope", "x");
  if (addend) {
    require_type(addend, out.type, "rope", "addend");
  }
  require(table.shape().rank() == 2, "rope: table is ", table.type, ", expected [n, ", shape[2], "]");
  require_type(table, {accumulator_of(out.dtype()), Shape{table.shape()[0], shape[2]}}, "rope", "table");
  require_type(positions, {DType::int32, Shape{shape[0]}}, "rope", "positions");
  if (out.elements() == 0) {
    return;
  }
  dispatch_compute(out.dtype(), "rope", [&]<class T>() {
    const auto run = [&]<class X, int kWidth>() {
      const auto threads = static_cast<int>(std::min<std::int64_t>(kThreads, shape[2] / kWidth));
      const RopeExtents extents{.tokens = shape[0],
                                .positions = table.shape()[0],
                                .heads = static_cast<int>(shape[1]),
                                .width = static_cast<int>(shape[2]),
                                .token_threads = threads};
      launch_kernel("rope", rope_kernel<T, X, kWidth>, launch,
                    {.x = ceil_div(shape[0], kThreads / threads), .threads = kThreads}, elements_of<T>(out), elements_of<X>(x),
                    optional_elements_of<T>(addend), table.as<float>(), positions.as<std::int32_t>(), extents,
                    inverse ? -1.0f : 1.0f);
    };
    const bool packed = packed_rows<T>(shape[2], {out.data, x.data, addend.data, table.data});
    if (x.dtype() == out.dtype()) {
      packed ? run.template operator()<T, kPackWidth<T>>() : run.template operator()<T, 2>();
    } else {
      packed ? run.template operator()<float, kPackWidth<T>>() : run.template operator()<float, 2>();
    }
  });
}

void fill(const Launch& launch, const Tensor& out, double value) {
  switch (out.dtype()) {
    case DType::float32:
      return fill_with(launch, out, static_cast<float>(value));
    case DType::bfloat16:
      return fill_with(launch, out, bf16{bfloat16(static_cast<float>(value)).bits});
    case DType::float64:
      return fill_with(launch, out, value);
    case DType::int32:
      return fill_with(launch, out, static_cast<std::int32_t>(value));
    case DType::int64:
      return fill_with(launch, out, static_cast<std::int64_t>(value));
  }
}

}  // namespace attamba::kernels::cuda
