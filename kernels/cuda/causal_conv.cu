// The causal convolution with SiLU, and its gradient (kernels/cpu/causal_conv.cpp has the equations). A thread owns kWidth
// columns of a strip of rows and slides along it, the rows that taps reach in registers.
#include "kernels/causal_conv_checks.h"

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/activations.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kThreads = 128, kStrip = 32;
constexpr int kTaps = static_cast<int>(kMostConvTaps);

struct Extents {
  int rows, columns, taps, packs;
};

/// A thread's columns and rows.
struct Place {
  int column, first;
  bool exists;

  ATTAMBA_DEVICE Place(const Extents& e, int width) {
    const int item = block_x() * kThreads + thread_index();
    column = item % e.packs * width;
    first = item / e.packs * kStrip;
    exists = first < e.rows;
  }
  ATTAMBA_DEVICE std::int64_t element(const Extents& e, int t) const {
    return static_cast<std::int64_t>(t) * e.columns + column;
  }
};

/// Values of the last rows: [0] is the newest one's.
template <int kWidth>
struct Window {
  float row[kTaps][kWidth] = {};

  ATTAMBA_DEVICE void shift() {
#pragma unroll
    for (int j = kTaps - 1; j > 0; --j) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        row[j][c] = row[j - 1][c];
      }
    }
  }
};

/// Taps, row[j] for j rows before.
template <int kWidth>
ATTAMBA_DEVICE void load_taps(Window<kWidth>& taps, const float* weight, const Extents& e, int column) {
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    if (j < e.taps) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        taps.row[j][c] = load(weight + (column + c) * e.taps + e.taps - 1 - j);
      }
    }
  }
}

/// Reads the rows before `first` that its chunk has.
template <int kWidth, class T>
ATTAMBA_DEVICE void load_history(Window<kWidth>& x, const T* from, const std::int32_t* starts, const Extents& e,
                                 const Place& place) {
  const int start = load(starts + place.first);
  for (int t = place.first - e.taps + 1; t < place.first; ++t) {
    if (t >= start) {
      const auto row = Elements<T, kWidth>::read(from + place.element(e, t));
      x.shift();
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        x.row[0][c] = row.value[c];
      }
    }
  }
}

template <int kWidth>
ATTAMBA_DEVICE float convolve(const Window<kWidth>& taps, const Window<kWidth>& x, int reach, int c) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    sum += j < reach ? taps.row[j][c] * x.row[j][c] : 0.0f;
  }
  return sum;
}

template <class T, int kWidth>
ATTAMBA_KERNEL(kThreads, 4)
causal_conv_kernel(T* out, const T* from, const float* weight, const std::int32_t* starts, Extents e) {
  const Place place(e, kWidth);
  if (!place.exists) {
    return;
  }
  Window<kWidth> taps, x;
  load_taps(taps, weight, e, place.column);
  load_history(x, from, starts, e, place);
  for (int t = place.first; t < place.first + kStrip && t < e.rows; ++t) {
    auto row = Elements<T, kWidth>::read(from + place.element(e, t));
    x.shift();
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      x.row[0][c] = row.value[c];
    }
    const int known = t - load(starts + t) + 1, reach = known < e.taps ? known : e.taps;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float y = convolve(taps, x, reach, c);
      row.value[c] = y * sigmoid<T>(y);
    }
    row.write(out + place.element(e, t));
  }
}

/// `sums` [strips, W, E]: the strips' parts of dweight, tap j for j rows before.
template <class T, int kWidth>
ATTAMBA_KERNEL(kThreads, 3)
causal_conv_backward_kernel(T* dx, float* sums, const T* dout, const T* from, const float* weight, const std::int32_t* starts,
                            Extents e) {
  using Own = Elements<T, kWidth>;
  const Place place(e, kWidth);
  if (!place.exists) {
    return;
  }
  Window<kWidth> taps, x, gradient, of_taps;  // gradient.row[j]: dx of j rows before, complete from j = W - 1 on
  load_taps(taps, weight, e, place.column);
  load_history(x, from, starts, e, place);
  const int end = place.first + kStrip < e.rows ? place.first + kStrip : e.rows;
  for (int t = place.first; t < end + kTaps - 1; ++t) {
    const bool exists = t < e.rows && t < end + e.taps - 1;
    const int start = exists ? load(starts + t) : t, known = t - start + 1, reach = known < e.taps ? known : e.taps;
    x.shift();
    gradient.shift();
    Own row, d;
    row.fill(0);
    d.fill(0);
    if (exists && (t < end || start < end)) {
      row = Own::read(from + place.element(e, t));
      d = Own::read(dout + place.element(e, t));
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      x.row[0][c] = row.value[c];
      gradient.row[0][c] = 0;
      const float y = convolve(taps, x, reach, c), open = sigmoid<T>(y);
      const float g = d.value[c] * open * (1.0f + y * (1.0f - open));
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        gradient.row[j][c] += j < reach ? taps.row[j][c] * g : 0.0f;
        of_taps.row[j][c] += j < reach && t < end ? g * x.row[j][c] : 0.0f;
      }
    }
    const int done = t - kTaps + 1;
    if (done >= place.first) {
      Own result;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        result.value[c] = gradient.row[kTaps - 1][c];
      }
      result.write(dx + place.element(e, done));
    }
  }
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    if (j < e.taps) {
      Elements<float, kWidth> row;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        row.value[c] = of_taps.row[j][c];
      }
      row.write(sums + (static_cast<std::int64_t>(place.first / kStrip) * e.taps + j) * e.columns + place.column);
    }
  }
}

constexpr int kReduceWarps = 16;

/// dweight [columns, taps] += the sums of the strips [strips, taps, columns], taps counted from the row itself.
ATTAMBA_KERNEL(kReduceWarps* kWarp, 2)
causal_conv_taps_kernel(float* dweight, const float* sums, int strips, Extents e) {
  const int i = block_x() * kWarp + lane_index(), size = e.taps * e.columns;
  const float sum = column_sum<kReduceWarps>(sums, strips, size, i, SharedMemory().take<float>(kReduceWarps * kWarp));
  if (warp_index() == 0 && i < size) {
    float* const to = dweight + i % e.columns * e.taps + e.taps - 1 - i / e.columns;
    store(to, load(to) + sum);
  }
}

/// Calls body.operator()<T, kWidth>(extents, grid) with the width that the tensors' alignment allows.
template <class Body>
void dispatch_columns(const char* name, const Tensor& x, const Tensor& weight, std::initializer_list<const void*> addresses,
                      const Body& body) {
  const std::int64_t columns = x.shape().columns(), strips = ceil_div(x.shape().rows(), kStrip);
  const bool packed = columns % 4 == 0 && aligned_16(addresses);
  const int packs = static_cast<int>(packed ? columns / 4 : columns);
  const Extents e{.rows = static_cast<int>(x.shape().rows()),
                  .columns = static_cast<int>(columns),
                  .taps = static_cast<int>(weight.shape()[1]),
                  .packs = packs};
  const Grid grid{.x = ceil_div(strips * packs, kThreads), .threads = kThreads};
  dispatch_compute(x.dtype(), name, [&]<class T>() {
    packed ? body.template operator()<T, 4>(e, grid) : body.template operator()<T, 1>(e, grid);
  });
}

}  // namespace

void causal_conv_silu(const Launch& launch, const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor& starts) {
  constexpr const char* kName = "causal_conv_silu";
  check_causal_conv(kName, out, x, weight, starts);
  dispatch_columns(kName, x, weight, {out.data, x.data}, [&]<class T, int kWidth>(const Extents& e, const Grid& grid) {
    launch_kernel(kName, causal_conv_kernel<T, kWidth>, launch, grid, elements_of<T>(out), elements_of<T>(x),
                  weight.as<float>(), starts.as<std::int32_t>(), e);
  });
}

std::size_t causal_conv_silu_backward_workspace(const TensorType& x, const TensorType& weight) {
  return ScratchAllocator::aligned_bytes<float>(
      static_cast<std::size_t>(ceil_div(x.shape.rows(), kStrip) * weight.shape.elements()));
}

void causal_conv_silu_backward(const Launch& launch, const Tensor& dx, const Tensor& dweight, const Tensor& dout,
                               const Tensor& x, const Tensor& weight, const Tensor& starts) {
  constexpr const char* kName = "causal_conv_silu_backward";
  check_causal_conv(kName, dx, x, weight, starts);
  require_type(dout, x.type, kName, "dout");
  require_type(dweight, weight.type, kName, "dweight");
  const auto strips = static_cast<int>(ceil_div(x.shape().rows(), kStrip));
  auto* const sums = ScratchAllocator(launch).take<float>(static_cast<std::size_t>(strips * weight.elements()));
  dispatch_columns(kName, x, weight, {dx.data, dout.data, x.data},
                   [&]<class T, int kWidth>(const Extents& e, const Grid& grid) {
                     launch_kernel(kName, causal_conv_backward_kernel<T, kWidth>, launch, grid, elements_of<T>(dx), sums,
                                   elements_of<T>(dout), elements_of<T>(x), weight.as<float>(), starts.as<std::int32_t>(), e);
                     launch_kernel("causal_conv_silu_backward: taps", causal_conv_taps_kernel, launch,
                                   {.x = ceil_div(weight.elements(), kWarp),
                                    .threads = kReduceWarps * kWarp,
                                    .shared_bytes = SharedMemory::bytes_of<float>(kReduceWarps * kWarp)},
                                   dweight.as<float>(), sums, strips, e);
                   });
}

}  // namespace attamba::kernels::cuda
