// RMS normalisation over the last dimension, alone and fused with the residual addition.
//   r = 1 / sqrt(mean(x^2) + eps);  out = x r w
//   dx = r (w dout - x r^2 mean(w dout x));  dw = sum over rows of dout x r
// A row belongs to a group of threads, a warp or a block, which keeps it in registers, so it is read once; so do its weights,
// for all rows of the group. Rows of more than kMostColumns are read twice. Which rows a block owns follows from the shape
// alone, and its sum of dweight is one of the partial sums that are added up in order at the end.
#include <algorithm>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kItems = 16;   ///< elements of a row that a thread keeps
constexpr int kLongRow = 0;  ///< the "group" of rows that do not fit in registers
constexpr int kMostGroup = 512;
constexpr std::int64_t kMostColumns = kItems * kMostGroup;

/// Threads of a block whose rows belong to groups of `group` threads.
constexpr int block_size(int group) {
  return group == kWarp ? 256 : group == kLongRow ? kMostGroup : group;
}
constexpr int groups_per_block(int group) {
  return group == kLongRow ? 1 : block_size(group) / group;
}

constexpr int group_of(std::int64_t columns) {
  return columns <= kItems * kWarp ? kWarp : columns <= kItems * 128 ? 128 : columns <= kMostColumns ? kMostGroup : kLongRow;
}

/// Groups of the forward pass: enough to fill a large GPU, and a few rows for each weight that is read.
constexpr std::int64_t kMostGroups = 4096;
/// Of the backward pass, each of which leaves a row of partial sums of dweight.
constexpr std::int64_t kMostPartials = 512;
constexpr std::int64_t kMinPartialRows = 8;

std::int64_t partial_rows(std::int64_t rows) {
  return std::max(kMinPartialRows, ceil_div(rows, kMostPartials));
}
std::int64_t partial_count(std::int64_t rows) {
  return ceil_div(rows, partial_rows(rows));
}

struct Rows {
  std::int64_t count;
  int columns;
  std::int64_t per_block;
  float eps;
};

template <class T>
struct Forward {
  T *sum, *out;  ///< sum is null without an addition
  const T *a, *b;
  const float* weight;
  Rows rows;
};

template <class T>
struct Backward {
  T* dx;
  float* partial;  ///< [blocks, columns]
  const T *dout, *x;
  const float* weight;
  const T* addend;  ///< may be null
  Rows rows;
};

ATTAMBA_DEVICE float inverse_root(float square_sum, const Rows& rows) {
  return rsqrt(square_sum / static_cast<float>(rows.columns) + rows.eps);
}

template <int kGroup>
ATTAMBA_DEVICE float group_sum(float value, float* warps) {
  if constexpr (kGroup == kWarp) {
    return warp_sum(value);
  } else {
    return block_sum(value, warps);
  }
}

/// A thread's place in its block: it owns elements first_column + p kStride .. + kWidth, for every p < kPacks for which
/// they exist, of rows first, first + kGroups, ... before last.
template <int kWidth, int kGroup>
struct Place {
  static constexpr int kGroups = groups_per_block(kGroup);
  static constexpr int kPacks = kItems / kWidth;
  static constexpr int kStride = kGroup * kWidth;
  int first_column = thread_index() % kGroup * kWidth;
  int columns;
  std::int64_t first, last;

  ATTAMBA_DEVICE explicit Place(const Rows& rows) : columns(rows.columns) {
    const std::int64_t begin = block_x() * rows.per_block;
    first = begin + thread_index() / kGroup;
    last = begin + rows.per_block < rows.count ? begin + rows.per_block : rows.count;
  }
  ATTAMBA_DEVICE bool owns(int pack) const { return first_column + pack * kStride < columns; }
};

/// The thread's elements of a row, 0 where it has none. `row` is the address of the thread's first one.
template <class T, int kWidth, int kGroup>
ATTAMBA_DEVICE void read_row(Elements<T, kWidth> (&own)[kItems / kWidth], const T* row, const Place<kWidth, kGroup>& place) {
#pragma unroll
  for (int p = 0; p < place.kPacks; ++p) {
    own[p].fill(0);
    if (place.owns(p)) {
      own[p] = Elements<T, kWidth>::read(row + p * place.kStride);
    }
  }
}

template <class T, int kWidth, int kGroup>
ATTAMBA_DEVICE void write_row(T* row, const Elements<T, kWidth> (&own)[kItems / kWidth], const Place<kWidth, kGroup>& place) {
#pragma unroll
  for (int p = 0; p < place.kPacks; ++p) {
    if (place.owns(p)) {
      own[p].write(row + p * place.kStride);
    }
  }
}

// ------------------------------------------------------------------------------------------------ forward

template <class T, int kWidth, int kGroup>
ATTAMBA_KERNEL(block_size(kGroup), kWidth == 1 ? 1 : 2)
norm_rows(Forward<T> f) {
  constexpr int kPacks = kItems / kWidth;
  float* const warps = SharedMemory().take<float>(kMostGroup / kWarp);
  const Place<kWidth, kGroup> place(f.rows);
  Elements<float, kWidth> weight[kPacks];
  read_row(weight, f.weight + place.first_column, place);
  for (std::int64_t row = place.first; row < place.last; row += place.kGroups) {
    const std::int64_t at = row * place.columns + place.first_column;
    Elements<T, kWidth> x[kPacks];
    read_row(x, f.a + at, place);
    if (f.sum != nullptr) {
      Elements<T, kWidth> other[kPacks];
      read_row(other, f.b + at, place);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          x[p].value[i] = to_float(from_float<T>(x[p].value[i] + other[p].value[i]));
        }
      }
      write_row(f.sum + at, x, place);
    }
    float squares = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        squares += x[p].value[i] * x[p].value[i];
      }
    }
    const float scale = inverse_root(group_sum<kGroup>(squares, warps), f.rows);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        x[p].value[i] *= scale * weight[p].value[i];
      }
    }
    write_row(f.out + at, x, place);
  }
}

/// Rows that do not fit in registers: a sweep for the sum of squares, one for the result.
template <class T, int kWidth>
ATTAMBA_KERNEL(kMostGroup, 2)
norm_long_rows(Forward<T> f) {
  using Own = Elements<T, kWidth>;
  float* const warps = SharedMemory().take<float>(kMostGroup / kWarp);
  const std::int64_t at = std::int64_t{block_x()} * f.rows.columns;
  const T* const x = f.sum != nullptr ? f.sum : f.a;
  float squares = 0;
  for (int c = thread_index() * kWidth; c < f.rows.columns; c += kMostGroup * kWidth) {
    Own own = Own::read(f.a + at + c);
    if (f.sum != nullptr) {
      const Own other = Own::read(f.b + at + c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        own.value[i] = to_float(from_float<T>(own.value[i] + other.value[i]));
      }
      own.write(f.sum + at + c);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      squares += own.value[i] * own.value[i];
    }
  }
  const float scale = inverse_root(block_sum(squares, warps), f.rows);
  for (int c = thread_index() * kWidth; c < f.rows.columns; c += kMostGroup * kWidth) {
    Own own = Own::read(x + at + c);
    const auto weight = Elements<float, kWidth>::read(f.weight + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      own.value[i] *= scale * weight.value[i];
    }
    own.write(f.out + at + c);
  }
}

// ------------------------------------------------------------------------------------------------ backward

/// The block's sums of dweight, from those of its groups.
template <int kWidth, int kGroup>
ATTAMBA_DEVICE void write_partial(float* partial, const Elements<float, kWidth> (&dweight)[kItems / kWidth],
                                  const Place<kWidth, kGroup>& place, float* shared) {
  if constexpr (place.kGroups == 1) {
    write_row(partial + place.first_column, dweight, place);
  } else {
    write_row(shared + thread_index() / kGroup * place.columns + place.first_column, dweight, place);
    sync_block();
    for (int c = thread_index(); c < place.columns; c += block_size(kGroup)) {
      float sum = 0;
      for (int group = 0; group < place.kGroups; ++group) {
        sum += load(shared + group * place.columns + c);
      }
      store(partial + c, sum);
    }
  }
}

template <class T, int kWidth, int kGroup>
ATTAMBA_KERNEL(block_size(kGroup), kWidth == 1 || kGroup == kMostGroup ? 1 : 2)
norm_rows_backward(Backward<T> b) {
  constexpr int kPacks = kItems / kWidth;
  SharedMemory memory;
  float* const warps = memory.take<float>(kMostGroup / kWarp);
  float* const shared = memory.take<float>(0);
  const Place<kWidth, kGroup> place(b.rows);
  Elements<float, kWidth> weight[kPacks], dweight[kPacks];
  read_row(weight, b.weight + place.first_column, place);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    dweight[p].fill(0);
  }
  for (std::int64_t row = place.first; row < place.last; row += place.kGroups) {
    const std::int64_t at = row * place.columns + place.first_column;
    Elements<T, kWidth> x[kPacks], gradient[kPacks], addend[kPacks];
    read_row(x, b.x + at, place);
    read_row(gradient, b.dout + at, place);
    if (b.addend != nullptr) {
      read_row(addend, b.addend + at, place);
    } else {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        addend[p].fill(0);
      }
    }
    float squares = 0, products = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = x[p].value[i];
        squares += value * value;
        products += value * gradient[p].value[i] * weight[p].value[i];
      }
    }
    const float scale = inverse_root(group_sum<kGroup>(squares, warps), b.rows);
    const float pull = group_sum<kGroup>(products, warps) * scale * scale * scale / static_cast<float>(b.rows.columns);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = x[p].value[i], slope = gradient[p].value[i] * scale;
        dweight[p].value[i] += slope * value;
        addend[p].value[i] += slope * weight[p].value[i] - value * pull;
      }
    }
    write_row(b.dx + at, addend, place);
  }
  write_partial(b.partial + std::int64_t{block_x()} * place.columns, dweight, place, shared);
}

/// Rows that do not fit in registers: a sweep for the two sums, one for the result. Sums of dweight are kept in the block's
/// own partial sums, each element of which belongs to one thread.
template <class T, int kWidth>
ATTAMBA_KERNEL(kMostGroup, 1)
norm_long_rows_backward(Backward<T> b) {
  using Own = Elements<T, kWidth>;
  using Sums = Elements<float, kWidth>;
  float* const warps = SharedMemory().take<float>(kMostGroup / kWarp);
  float* const partial = b.partial + std::int64_t{block_x()} * b.rows.columns;
  const std::int64_t begin = block_x() * b.rows.per_block;
  const std::int64_t end = begin + b.rows.per_block < b.rows.count ? begin + b.rows.per_block : b.rows.count;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t at = row * b.rows.columns;
    float squares = 0, products = 0;
    for (int c = thread_index() * kWidth; c < b.rows.columns; c += kMostGroup * kWidth) {
      const Own x = Own::read(b.x + at + c), gradient = Own::read(b.dout + at + c);
      const Sums weight = Sums::read(b.weight + c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        squares += x.value[i] * x.value[i];
        products += x.value[i] * gradient.value[i] * weight.value[i];
      }
    }
    const float scale = inverse_root(block_sum(squares, warps), b.rows);
    const float pull = block_sum(products, warps) * scale * scale * scale / static_cast<float>(b.rows.columns);
    for (int c = thread_index() * kWidth; c < b.rows.columns; c += kMostGroup * kWidth) {
      const Own x = Own::read(b.x + at + c), gradient = Own::read(b.dout + at + c);
      const Sums weight = Sums::read(b.weight + c);
      Sums dweight;
      dweight.fill(0);
      if (row != begin) {
        dweight = Sums::read(partial + c);
      }
      Own result;
      result.fill(0);
      if (b.addend != nullptr) {
        result = Own::read(b.addend + at + c);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float slope = gradient.value[i] * scale;
        dweight.value[i] += slope * x.value[i];
        result.value[i] += slope * weight.value[i] - x.value[i] * pull;
      }
      dweight.write(partial + c);
      result.write(b.dx + at + c);
    }
  }
}

constexpr int kReduceWarps = 16;

/// dweight += the sum of the blocks' partial sums.
ATTAMBA_KERNEL(kReduceWarps* kWarp, 2)
add_partials(float* dweight, const float* partial, std::int64_t partials, std::int64_t columns) {
  const std::int64_t column = std::int64_t{block_x()} * kWarp + lane_index();
  const float sum =
      column_sum<kReduceWarps>(partial, partials, columns, column, SharedMemory().take<float>(kReduceWarps * kWarp));
  if (warp_index() == 0 && column < columns) {
    store(dweight + column, load(dweight + column) + sum);
  }
}

// ------------------------------------------------------------------------------------------------ host

/// Calls `body.template operator()<kWidth, kGroup>()` with how rows of `columns` elements are computed.
template <class T, class Body>
void dispatch_rows(std::int64_t columns, bool packed, const Body& body) {
  const auto with_width = [&]<int kWidth>() {
    switch (group_of(columns)) {
      case kWarp:
        return body.template operator()<kWidth, kWarp>();
      case 128:
        return body.template operator()<kWidth, 128>();
      case kMostGroup:
        return body.template operator()<kWidth, kMostGroup>();
      default:
        return body.template operator()<kWidth, kLongRow>();
    }
  };
  if (packed) {
    with_width.template operator()<kPackWidth<T>>();
  } else {
    with_width.template operator()<1>();
  }
}

TensorType weight_type(const TensorType& x) {
  return {accumulator_of(x.dtype), Shape{x.shape.columns()}};
}

std::size_t warps_bytes() {
  return SharedMemory::bytes_of<float>(kMostGroup / kWarp);
}

template <class T>
void run_forward(const char* name, const Launch& launch, Forward<T> f, const Shape& shape, double eps) {
  if (shape.rows() == 0) {
    return;
  }
  f.rows = {
      .count = shape.rows(), .columns = static_cast<int>(shape.columns()), .per_block = 1, .eps = static_cast<float>(eps)};
  const bool packed = packed_rows<T>(f.rows.columns, {f.sum, f.out, f.a, f.b, f.weight});
  dispatch_rows<T>(f.rows.columns, packed, [&]<int kWidth, int kGroup>() {
    Grid grid{.threads = block_size(kGroup), .shared_bytes = warps_bytes()};
    if constexpr (kGroup == kLongRow) {
      grid.x = f.rows.count;
      launch_kernel(name, norm_long_rows<T, kWidth>, launch, grid, f);
    } else {
      f.rows.per_block = groups_per_block(kGroup) * ceil_div(f.rows.count, kMostGroups);
      grid.x = ceil_div(f.rows.count, f.rows.per_block);
      launch_kernel(name, norm_rows<T, kWidth, kGroup>, launch, grid, f);
    }
  });
}

}  // namespace

void rms_norm(const Launch& launch, const Tensor& out, const Tensor& x, const Tensor& weight, double eps) {
  require_type(out, x.type, "rms_norm", "out");
  require_type(weight, weight_type(x.type), "rms_norm", "weight");
  dispatch_compute(x.dtype(), "rms_norm", [&]<class T>() {
    const Forward<T> f{.sum = nullptr,
                       .out = elements_of<T>(out),
                       .a = elements_of<T>(x),
                       .b = nullptr,
                       .weight = weight.as<float>(),
                       .rows = {}};
    run_forward("rms_norm", launch, f, x.shape(), eps);
  });
}

void add_rms_norm(const Launch& launch, const Tensor& sum, const Tensor& out, const Tensor& a, const Tensor& b,
                  const Tensor& weight, double eps) {
  require_type(sum, a.type, "add_rms_norm", "sum");
  require_type(out, a.type, "add_rms_norm", "out");
  require_type(b, a.type, "add_rms_norm", "b");
  require_type(weight, weight_type(a.type), "add_rms_norm", "weight");
  dispatch_compute(a.dtype(), "add_rms_norm", [&]<class T>() {
    const Forward<T> f{.sum = elements_of<T>(sum),
                       .out = elements_of<T>(out),
                       .a = elements_of<T>(a),
                       .b = elements_of<T>(b),
                       .weight = weight.as<float>(),
                       .rows = {}};
    run_forward("add_rms_norm", launch, f, a.shape(), eps);
  });
}

std::size_t rms_norm_backward_workspace(const TensorType& x) {
  return ScratchAllocator::aligned_bytes<float>(static_cast<std::size_t>(partial_count(x.shape.rows()) * x.shape.columns()));
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
  dispatch_compute(x.dtype(), "rms_norm_backward", [&]<class T>() {
    const std::int64_t columns = x.shape().columns(), rows = x.shape().rows(), partials = partial_count(rows);
    if (rows == 0) {
      return;
    }
    const Backward<T> b{.dx = elements_of<T>(dx),
                        .partial = ScratchAllocator(launch).take<float>(static_cast<std::size_t>(partials * columns)),
                        .dout = elements_of<T>(dout),
                        .x = elements_of<T>(x),
                        .weight = weight.as<float>(),
                        .addend = optional_elements_of<T>(addend),
                        .rows = {.count = rows,
                                 .columns = static_cast<int>(columns),
                                 .per_block = partial_rows(rows),
                                 .eps = static_cast<float>(eps)}};
    const bool packed = packed_rows<T>(columns, {b.dx, b.partial, b.dout, b.x, b.weight, b.addend});
    dispatch_rows<T>(columns, packed, [&]<int kWidth, int kGroup>() {
      Grid grid{.x = partials, .threads = block_size(kGroup), .shared_bytes = warps_bytes()};
      if constexpr (kGroup == kLongRow) {
        launch_kernel("rms_norm_backward", norm_long_rows_backward<T, kWidth>, launch, grid, b);
      } else {
        grid.shared_bytes +=
            kGroup == kWarp ? SharedMemory::bytes_of<float>(static_cast<int>(groups_per_block(kGroup) * columns)) : 0;
        launch_kernel("rms_norm_backward", norm_rows_backward<T, kWidth, kGroup>, launch, grid, b);
      }
    });
    launch_kernel("rms_norm_backward", add_partials, launch,
                  {.x = ceil_div(columns, kWarp),
                   .threads = kReduceWarps * kWarp,
                   .shared_bytes = SharedMemory::bytes_of<float>(kReduceWarps * kWarp)},
                  dweight.as<float>(), b.partial, partials, columns);
  });
}

}  // namespace attamba::kernels::cuda
