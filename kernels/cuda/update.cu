// What happens to losses and gradients after the backward: exact fixed-point sums, the global norm, AdamW. Lists of tensors
// travel in the kernels' parameters, so an update of all parameters is one launch, and the host never waits for the norm.
#include <algorithm>
#include <bit>
#include <limits>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kThreads = 256;
constexpr int kWidth = 4;  ///< elements that a thread handles at a time
constexpr double kTwo63 = 0x1p63;

// ------------------------------------------------------------------------------------------------ lists of tensors

/// Elements of a tensor that a block handles.
constexpr int kBlockElements = 8192;
/// A kernel's parameters may take 32,764 bytes (compute capability 7.0 and CUDA 12.1 on).
constexpr int kTableBytes = 28 << 10;

template <class Entry>
struct Table {
  static constexpr int kMost = kTableBytes / static_cast<int>(sizeof(Entry));
  int count = 0;
  int blocks = 0;
  Entry entry[kMost];
};

/// What all entries begin with.
struct Extent {
  std::int64_t elements;
  int first_block;  ///< of the launch
  bool packed;      ///< all of the entry's tensors are aligned to 16 bytes
};

struct SquareSumEntry {
  Extent extent;
  const void* data;
  bool wide;  ///< float32, not bfloat16
};

enum class Copy : std::uint8_t { none, float32, bfloat16 };

struct AdamWEntry {
  Extent extent;
  float *weight, *moment1, *moment2, *gradient;
  void* compute;
  Copy copy;
};

/// Cuts a list into tables and calls `run(table, first_block)` for each: first_block counts all blocks before the table's.
/// `entry_of(i)` makes the i-th entry; empty tensors get none.
template <class Entry, class EntryOf, class Run>
void for_each_table(std::size_t tensors, const EntryOf& entry_of, const Run& run) {
  Table<Entry> table;
  std::int64_t first_block = 0;
  const auto finish = [&] {
    run(table, first_block);
    first_block += table.blocks;
    table.count = table.blocks = 0;
  };
  for (std::size_t i = 0; i < tensors; ++i) {
    Entry entry = entry_of(i);
    if (entry.extent.elements == 0) {
      continue;
    }
    if (table.count == Table<Entry>::kMost) {
      finish();
    }
    entry.extent.first_block = table.blocks;
    table.entry[table.count++] = entry;
    table.blocks += static_cast<int>(ceil_div(entry.extent.elements, kBlockElements));
  }
  if (table.count > 0) {
    finish();
  }
}

/// The entry that this block works on.
template <class Entry>
ATTAMBA_DEVICE const Entry& entry_of_block(const Table<Entry>& table) {
  int low = 0, high = table.count;  // the last entry that begins at or before the block is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entry[middle].extent.first_block <= block_x() ? low : high) = middle;
  }
  return table.entry[low];
}

/// Calls `body.template operator()<width>(first)` for this thread's share of the block's elements.
template <class Body>
ATTAMBA_DEVICE void for_own_elements(const Extent& extent, const Body& body) {
  const std::int64_t begin = std::int64_t{block_x() - extent.first_block} * kBlockElements;
  const std::int64_t end = begin + kBlockElements < extent.elements ? begin + kBlockElements : extent.elements;
  if (extent.packed) {
    for (std::int64_t i = begin + thread_index() * kWidth; i + kWidth <= end; i += kThreads * kWidth) {
      body.template operator()<kWidth>(i);
    }
  }
  const std::int64_t single = extent.packed ? end - (end - begin) % kWidth : begin;
  for (std::int64_t i = single + thread_index(); i < end; i += kThreads) {
    body.template operator()<1>(i);
  }
}

// ------------------------------------------------------------------------------------------------ losses, fixed point

ATTAMBA_KERNEL(kThreads, 4)
accumulate_loss_kernel(std::int64_t* totals, const float* losses, std::int64_t count) {
  std::uint64_t sum = 0;  // wraps, so that only the final total has to fit
  std::uint32_t bad = 0;
  for (int k = 0; k < kWidth; ++k) {
    const std::int64_t i = (std::int64_t{block_x()} * kWidth + k) * kThreads + thread_index();
    if (i < count) {
      const double scaled = static_cast<double>(load(losses + i)) * kLossOne;
      if (scaled < kTwo63 && scaled > -kTwo63) {  // false for NaN
        sum += static_cast<std::uint64_t>(round_to_int64(scaled));
      } else {
        ++bad;
      }
    }
  }
  sum = warp_sum(sum);
  bad = warp_sum(bad);
  if (lane_index() == 0) {
    atomic_add(totals, static_cast<std::int64_t>(sum));
    if (bad > 0) {
      atomic_add(totals + 1, std::int64_t{bad});
    }
  }
}

/// Neighbouring 64-bit integers, which travel like Elements.
template <int kCount>
struct Integers {
  std::uint64_t value[kCount];

  ATTAMBA_DEVICE static Integers read(const std::int64_t* p) {
    Integers n;
    if constexpr (kCount == 1) {
      n.value[0] = static_cast<std::uint64_t>(load(p));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const Bytes16 bytes = load(reinterpret_cast<const Bytes16*>(p + i));
        n.value[i] = bytes.word[0] | static_cast<std::uint64_t>(bytes.word[1]) << 32;
        n.value[i + 1] = bytes.word[2] | static_cast<std::uint64_t>(bytes.word[3]) << 32;
      }
    }
    return n;
  }

  ATTAMBA_DEVICE void write(std::int64_t* p) const {
    if constexpr (kCount == 1) {
      store(p, static_cast<std::int64_t>(value[0]));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const Bytes16 bytes{{static_cast<std::uint32_t>(value[i]), static_cast<std::uint32_t>(value[i] >> 32),
                             static_cast<std::uint32_t>(value[i + 1]), static_cast<std::uint32_t>(value[i + 1] >> 32)}};
        store(reinterpret_cast<Bytes16*>(p + i), bytes);
      }
    }
  }
};

ATTAMBA_KERNEL(kThreads, 4)
add_to_fixed_point_kernel(std::int64_t* accumulator, std::int64_t* poisoned, float* gradient, Extent extent, double limit) {
  std::uint32_t unfit = 0;
  for_own_elements(extent, [&]<int kOwn>(std::int64_t first) {
    auto own = Elements<float, kOwn>::read(gradient + first);
    auto sums = Integers<kOwn>::read(accumulator + first);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const double value = own.value[i];
      const bool fits = value <= limit && value >= -limit;  // false for NaN
      sums.value[i] += static_cast<std::uint64_t>(round_to_int64(fits ? value * kGradientOne : 0.0));
      unfit += fits ? 0 : 1;
    }
    own.fill(0);
    own.write(gradient + first);
    sums.write(accumulator + first);
  });
  unfit = warp_sum(unfit);
  if (lane_index() == 0 && unfit > 0) {
    atomic_add(poisoned, std::int64_t{unfit});
  }
}

ATTAMBA_KERNEL(kThreads, 4)
fixed_point_to_float_kernel(float* gradient, std::int64_t* accumulator, const std::int64_t* poisoned, Extent extent) {
  const double unit = load(poisoned) == 0 ? 1 / kGradientOne : std::numeric_limits<double>::quiet_NaN();
  for_own_elements(extent, [&]<int kOwn>(std::int64_t first) {
    auto sums = Integers<kOwn>::read(accumulator + first);
    Elements<float, kOwn> own;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own.value[i] = static_cast<float>(static_cast<double>(static_cast<std::int64_t>(sums.value[i])) * unit);
      sums.value[i] = 0;
    }
    own.write(gradient + first);
    sums.write(accumulator + first);
  });
}

// ------------------------------------------------------------------------------------------------ norm

/// partial[block] = sum of squares of the block's elements.
ATTAMBA_KERNEL(kThreads, 4)
square_sum_kernel(double* partial, const ATTAMBA_GRID_CONSTANT Table<SquareSumEntry> table) {
  double* const warps = SharedMemory().take<double>(kThreads / kWarp);
  const SquareSumEntry& entry = entry_of_block(table);
  double sum = 0;
  const auto add = [&]<class T>(const T* data) {
    for_own_elements(entry.extent, [&]<int kOwn>(std::int64_t first) {
      const auto own = Elements<T, kOwn>::read(data + first);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const double value = own.value[i];
        sum += value * value;
      }
    });
  };
  if (entry.wide) {
    add(static_cast<const float*>(entry.data));
  } else {
    add(static_cast<const bf16*>(entry.data));
  }
  sum = block_sum(sum, warps);
  if (thread_index() == 0) {
    store(partial + block_x(), sum);
  }
}

/// One block; each thread adds every kThreads-th partial sum, in order.
ATTAMBA_KERNEL(kThreads, 4)
add_square_sums(double* out, const double* partial, std::int64_t partials) {
  double* const warps = SharedMemory().take<double>(kThreads / kWarp);
  double sum = 0;
#pragma unroll 4
  for (std::int64_t i = thread_index(); i < partials; i += kThreads) {
    sum += load(partial + i);
  }
  sum = block_sum(sum, warps);
  if (thread_index() == 0) {
    store(out, sum);
  }
}

/// Sums of the squares' digits in units of 2^-96: of a float m 2^(e - 150), m^2 2^(2 e - 204).
struct SquareDigits {
  std::uint64_t digit[kSquareDigits] = {};

  ATTAMBA_DEVICE void add_square(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
    if (bits >= kLargestSquared) {
      ++digit[4];
      return;
    }
    const std::uint32_t biased = bits >> 23;
    const std::uint64_t mantissa = (bits & 0x7fffffu) | (biased == 0 ? 0u : 0x800000u);
    const int shift = 2 * static_cast<int>(biased == 0 ? 1 : biased) - 204;  // less than 80: a square has at most 128 bits
    const std::uint64_t square = mantissa * mantissa;
    std::uint64_t low = 0, high = 0;
    if (shift <= 0) {
      low = shift > -64 ? square >> -shift : 0;
    } else if (shift < 64) {
      low = square << shift;
      high = square >> (64 - shift);
    } else {
      high = square << (shift - 64);
    }
    digit[0] += low & 0xffffffffu;
    digit[1] += low >> 32;
    digit[2] += high & 0xffffffffu;
    digit[3] += high >> 32;
  }

  /// The block's sum goes to `out`.
  ATTAMBA_DEVICE void add_up(std::int64_t* out, std::uint64_t* warps) {
#pragma unroll
    for (int i = 0; i < kSquareDigits; ++i) {
      const std::uint64_t sum = block_sum(digit[i], warps);
      if (thread_index() == 0) {
        store(out + i, static_cast<std::int64_t>(sum));
      }
    }
  }

  static constexpr std::uint32_t kLargestSquared = 0x47800000u;  ///< the bits of 2^16
};

/// partial[block] = digits of the sum of squares of the block's elements.
ATTAMBA_KERNEL(kThreads, 4)
square_digits_kernel(std::int64_t* partial, const ATTAMBA_GRID_CONSTANT Table<SquareSumEntry> table) {
  auto* const warps = SharedMemory().take<std::uint64_t>(kThreads / kWarp);
  const SquareSumEntry& entry = entry_of_block(table);
  const auto* const data = static_cast<const float*>(entry.data);
  SquareDigits digits;
  for_own_elements(entry.extent, [&]<int kOwn>(std::int64_t first) {
    const auto own = Elements<float, kOwn>::read(data + first);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      digits.add_square(own.value[i]);
    }
  });
  digits.add_up(partial + std::int64_t{block_x()} * kSquareDigits, warps);
}

/// One block.
ATTAMBA_KERNEL(kThreads, 4)
add_square_digits(std::int64_t* out, const std::int64_t* partial, std::int64_t partials) {
  auto* const warps = SharedMemory().take<std::uint64_t>(kThreads / kWarp);
  SquareDigits digits;
  for (std::int64_t block = thread_index(); block < partials; block += kThreads) {
#pragma unroll
    for (int i = 0; i < kSquareDigits; ++i) {
      digits.digit[i] += static_cast<std::uint64_t>(load(partial + block * kSquareDigits + i));
    }
  }
  digits.add_up(out, warps);
}

/// One thread.
ATTAMBA_KERNEL(kWarp, 1)
square_digits_to_float_kernel(double* out, const std::int64_t* digits) {
  if (thread_index() != 0) {
    return;
  }
  std::int64_t carry = 0;
  double sum = 0;
  for (int i = 0; i < 4; ++i) {  // products with powers of two are exact: only additions round
    const std::int64_t digit = load(digits + i) + carry;
    carry = i < 3 ? digit >> 32 : 0;
    sum = sum * 0x1p-32 + static_cast<double>(digit - (carry << 32));
  }
  store(out, load(digits + 4) == 0 ? sum : std::numeric_limits<double>::quiet_NaN());
}

// ------------------------------------------------------------------------------------------------ AdamW

/// The scalars of one step as float32, in shared memory: made by one thread of a block, as float64 is slow on many GPUs.
enum Scalar : int {
  kGradientScale,
  kRate,
  kDecay,
  kInverseBias1,
  kInverseBias2,
  kSkip,
  kScalars,
};

ATTAMBA_DEVICE void make_scalars(float* scalars, double* step, double norm_squared, const AdamWSettings& settings,
                                 bool writes) {
  const double norm = device::sqrt(norm_squared);
  const double limit = load(step + kStepNormLimit);
  const bool skipped = !(norm <= std::numeric_limits<double>::max()) || (limit > 0 && norm > limit);
  const bool clipped = settings.clip > 0 && norm > settings.clip;
  const double rate = load(step + kStepLearningRate);
  store(scalars + kGradientScale, static_cast<float>(clipped ? settings.clip / (norm + 1e-6) : 1.0));
  store(scalars + kRate, static_cast<float>(rate));
  store(scalars + kDecay, static_cast<float>(rate * settings.weight_decay));
  store(scalars + kInverseBias1, static_cast<float>(1 / load(step + kStepBias1)));
  store(scalars + kInverseBias2, static_cast<float>(1 / load(step + kStepBias2)));
  store(scalars + kSkip, skipped ? 1.0f : 0.0f);
  if (writes) {
    store(step + kStepGradientNorm, norm);
    store(step + kStepSkipped, skipped ? 1.0 : 0.0);
  }
}

/// `reports`: the launch's first block writes the norm and whether the step was skipped. With no entries that is all.
ATTAMBA_KERNEL(kThreads, 2)
adamw_kernel(double* step, const double* norm_squared, AdamWSettings settings, bool reports,
             const ATTAMBA_GRID_CONSTANT Table<AdamWEntry> table) {
  float* const scalars = SharedMemory().take<float>(kScalars);
  if (thread_index() == 0) {
    make_scalars(scalars, step, load(norm_squared), settings, reports && block_x() == 0);
  }
  sync_block();
  if (table.count == 0) {
    return;
  }
  const AdamWEntry& entry = entry_of_block(table);
  if (load(scalars + kSkip) != 0) {
    for_own_elements(entry.extent, [&]<int kOwn>(std::int64_t first) {
      Elements<float, kOwn> zero;
      zero.fill(0);
      zero.write(entry.gradient + first);
    });
    return;
  }
  const float gradient_scale = load(scalars + kGradientScale), rate = load(scalars + kRate), decay = load(scalars + kDecay);
  const float inverse_bias1 = load(scalars + kInverseBias1), inverse_bias2 = load(scalars + kInverseBias2);
  const auto beta1 = static_cast<float>(settings.beta1), beta2 = static_cast<float>(settings.beta2);
  const auto rest1 = static_cast<float>(1 - settings.beta1), rest2 = static_cast<float>(1 - settings.beta2);
  const auto epsilon = static_cast<float>(settings.epsilon);
  for_own_elements(entry.extent, [&]<int kOwn>(std::int64_t first) {
    using Own = Elements<float, kOwn>;
    Own gradient = Own::read(entry.gradient + first), weight = Own::read(entry.weight + first);
    Own m = Own::read(entry.moment1 + first), v = Own::read(entry.moment2 + first);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float g = gradient.value[i] * gradient_scale;
      m.value[i] = beta1 * m.value[i] + rest1 * g;
      v.value[i] = beta2 * v.value[i] + rest2 * g * g;
      const float update = m.value[i] * inverse_bias1 / (device::sqrt(v.value[i] * inverse_bias2) + epsilon);
      weight.value[i] = weight.value[i] - decay * weight.value[i] - rate * update;
    }
    m.write(entry.moment1 + first);
    v.write(entry.moment2 + first);
    weight.write(entry.weight + first);
    gradient.fill(0);
    gradient.write(entry.gradient + first);
    if (entry.copy == Copy::bfloat16) {
      Elements<bf16, kOwn> copy;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        copy.value[i] = weight.value[i];
      }
      copy.write(static_cast<bf16*>(entry.compute) + first);
    } else if (entry.copy == Copy::float32) {
      weight.write(static_cast<float*>(entry.compute) + first);
    }
  });
}

// ------------------------------------------------------------------------------------------------ host

/// Refuses what is not float32.
void require_float32(const Tensor& tensor, const char* operation) {
  dispatch_compute(tensor.dtype(), operation, [&]<class T>() {});
  require(tensor.dtype() == DType::float32, operation, ": expected a float32 tensor, got ", tensor.type);
}

/// Kernels over one tensor: its extent, and a grid for it.
Extent extent_of(std::int64_t elements, std::initializer_list<const void*> addresses) {
  return {.elements = elements, .first_block = 0, .packed = aligned_16(addresses)};
}

Grid grid_of(const Extent& extent) {
  return {.x = ceil_div(extent.elements, kBlockElements), .threads = kThreads};
}

AdamWEntry adamw_entry(const AdamWParameter& parameter) {
  const TensorType& type = parameter.master.type;
  require_float32(parameter.master, "adamw");
  require_type(parameter.moment1, type, "adamw", "moment1");
  require_type(parameter.moment2, type, "adamw", "moment2");
  require_type(parameter.gradient, type, "adamw", "gradient");
  Copy copy = Copy::none;
  if (parameter.compute) {
    copy = parameter.compute.dtype() == DType::bfloat16 ? Copy::bfloat16 : Copy::float32;
    require_type(parameter.compute, {copy == Copy::bfloat16 ? DType::bfloat16 : DType::float32, type.shape}, "adamw",
                 "compute");
  }
  return {.extent = extent_of(type.shape.elements(), {parameter.master.data, parameter.moment1.data, parameter.moment2.data,
                                                      parameter.gradient.data, parameter.compute.data}),
          .weight = parameter.master.as<float>(),
          .moment1 = parameter.moment1.as<float>(),
          .moment2 = parameter.moment2.as<float>(),
          .gradient = parameter.gradient.as<float>(),
          .compute = parameter.compute.data,
          .copy = copy};
}

}  // namespace

void accumulate_loss(const Launch& launch, const Tensor& totals, const Tensor& losses) {
  require_type(totals, {DType::int64, Shape{2}}, "accumulate_loss", "totals");
  require_float32(losses, "accumulate_loss");
  launch_kernel("accumulate_loss", accumulate_loss_kernel, launch,
                {.x = ceil_div(losses.elements(), kThreads * kWidth), .threads = kThreads}, totals.as<std::int64_t>(),
                losses.as<float>(), losses.elements());
}

void add_to_fixed_point(const Launch& launch, const Tensor& accumulator, const Tensor& poisoned, const Tensor& gradient,
                        double limit) {
  require_type(accumulator, {DType::int64, gradient.shape()}, "add_to_fixed_point", "accumulator");
  require_type(poisoned, {DType::int64, Shape{1}}, "add_to_fixed_point", "poisoned");
  require_float32(gradient, "add_to_fixed_point");
  const Extent extent = extent_of(gradient.elements(), {accumulator.data, gradient.data});
  launch_kernel("add_to_fixed_point", add_to_fixed_point_kernel, launch, grid_of(extent), accumulator.as<std::int64_t>(),
                poisoned.as<std::int64_t>(), gradient.as<float>(), extent, limit);
}

void fixed_point_to_float(const Launch& launch, const Tensor& gradient, const Tensor& accumulator, const Tensor& poisoned) {
  require_type(accumulator, {DType::int64, gradient.shape()}, "fixed_point_to_float", "accumulator");
  require_type(poisoned, {DType::int64, Shape{1}}, "fixed_point_to_float", "poisoned");
  require_float32(gradient, "fixed_point_to_float");
  const Extent extent = extent_of(gradient.elements(), {accumulator.data, gradient.data});
  launch_kernel("fixed_point_to_float", fixed_point_to_float_kernel, launch, grid_of(extent), gradient.as<float>(),
                accumulator.as<std::int64_t>(), poisoned.as<std::int64_t>(), extent);
}

std::size_t square_sum_workspace(std::span<const TensorType> tensors) {
  std::int64_t blocks = 0;
  for (const TensorType& tensor : tensors) {
    blocks += ceil_div(tensor.shape.elements(), kBlockElements);
  }
  return ScratchAllocator::aligned_bytes<double>(static_cast<std::size_t>(blocks));
}

void square_sum(const Launch& launch, const Tensor& out, std::span<const Tensor> tensors) {
  require_type(out, {DType::float64, Shape{1}}, "square_sum", "out");
  std::int64_t partials = 0;
  for (const Tensor& tensor : tensors) {
    dispatch_compute(tensor.dtype(), "square_sum", [&]<class T>() {});
    partials += ceil_div(tensor.elements(), kBlockElements);
  }
  double* const partial = ScratchAllocator(launch).take<double>(static_cast<std::size_t>(partials));
  const std::size_t shared = SharedMemory::bytes_of<double>(kThreads / kWarp);
  const auto entry_of = [&](std::size_t i) {
    return SquareSumEntry{.extent = extent_of(tensors[i].elements(), {tensors[i].data}),
                          .data = tensors[i].data,
                          .wide = tensors[i].dtype() == DType::float32};
  };
  for_each_table<SquareSumEntry>(tensors.size(), entry_of, [&](const auto& table, std::int64_t first_block) {
    launch_kernel("square_sum", square_sum_kernel, launch, {.x = table.blocks, .threads = kThreads, .shared_bytes = shared},
                  partial + first_block, table);
  });
  launch_kernel("square_sum", add_square_sums, launch, {.threads = kThreads, .shared_bytes = shared}, out.as<double>(), partial,
                partials);
}

std::size_t square_digits_workspace(std::span<const TensorType> tensors) {
  std::int64_t blocks = 0;
  for (const TensorType& tensor : tensors) {
    blocks += ceil_div(tensor.shape.elements(), kBlockElements);
  }
  return ScratchAllocator::aligned_bytes<std::int64_t>(static_cast<std::size_t>(blocks * kSquareDigits));
}

void square_digits(const Launch& launch, const Tensor& digits, std::span<const Tensor> tensors) {
  require_type(digits, {DType::int64, Shape{kSquareDigits}}, "square_digits", "digits");
  std::int64_t partials = 0;
  for (const Tensor& tensor : tensors) {
    require_float32(tensor, "square_digits");
    partials += ceil_div(tensor.elements(), kBlockElements);
  }
  auto* const partial = ScratchAllocator(launch).take<std::int64_t>(static_cast<std::size_t>(partials * kSquareDigits));
  const std::size_t shared = SharedMemory::bytes_of<std::uint64_t>(kThreads / kWarp);
  const auto entry_of = [&](std::size_t i) {
    return SquareSumEntry{.extent = extent_of(tensors[i].elements(), {tensors[i].data}), .data = tensors[i].data, .wide = true};
  };
  for_each_table<SquareSumEntry>(tensors.size(), entry_of, [&](const auto& table, std::int64_t first_block) {
    launch_kernel("square_digits", square_digits_kernel, launch,
                  {.x = table.blocks, .threads = kThreads, .shared_bytes = shared}, partial + first_block * kSquareDigits,
                  table);
  });
  launch_kernel("square_digits", add_square_digits, launch, {.threads = kThreads, .shared_bytes = shared},
                digits.as<std::int64_t>(), partial, partials);
}

void square_digits_to_float(const Launch& launch, const Tensor& out, const Tensor& digits) {
  require_type(out, {DType::float64, Shape{1}}, "square_digits_to_float", "out");
  require_type(digits, {DType::int64, Shape{kSquareDigits}}, "square_digits_to_float", "digits");
  launch_kernel("square_digits_to_float", square_digits_to_float_kernel, launch, {.threads = kWarp}, out.as<double>(),
                digits.as<std::int64_t>());
}

void adamw(const Launch& launch, const Tensor& step, std::span<const AdamWParameter> parameters, const Tensor& norm_squared,
           const AdamWSettings& settings) {
  require_type(step, {DType::float64, Shape{kStepFields}}, "adamw", "step");
  require_type(norm_squared, {DType::float64, Shape{1}}, "adamw", "norm_squared");
  const std::size_t shared = SharedMemory::bytes_of<float>(kScalars);
  bool reports = true;
  const auto run = [&](const Table<AdamWEntry>& table, std::int64_t) {
    launch_kernel("adamw", adamw_kernel, launch, {.x = std::max(1, table.blocks), .threads = kThreads, .shared_bytes = shared},
                  step.as<double>(), norm_squared.as<double>(), settings, reports, table);
    reports = false;
  };
  for_each_table<AdamWEntry>(
      parameters.size(), [&](std::size_t i) { return adamw_entry(parameters[i]); }, run);
  if (reports) {
    run({}, 0);
  }
}

}  // namespace attamba::kernels::cuda
