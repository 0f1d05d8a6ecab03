// The squared norm of all gradients: a float64 sum, or an exact one in digits (docs/numerics.md). Each block sums up its own
// elements, then one block what the others found, in an order that the tensors' sizes fix.
#include <bit>
#include <functional>
#include <limits>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/cuda/tensor_table.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;
using namespace tensor_table;

struct SquareSumEntry {
  Extent extent;
  const void* data;
  bool wide;  ///< float32, not bfloat16
};

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

/// Each block makes one.
template <class Any, class TypeOf = std::identity>
std::int64_t count_partials(std::span<const Any> tensors, const TypeOf& type_of = {}) {
  std::int64_t blocks = 0;
  for (const Any& tensor : tensors) {
    blocks += ceil_div(std::invoke(type_of, tensor).shape.elements(), kBlockElements);
  }
  return blocks;
}

}  // namespace

std::size_t square_sum_workspace(std::span<const TensorType> tensors) {
  return ScratchAllocator::aligned_bytes<double>(static_cast<std::size_t>(count_partials(tensors)));
}

void square_sum(const Launch& launch, const Tensor& out, std::span<const Tensor> tensors) {
  require_type(out, {DType::float64, Shape{1}}, "square_sum", "out");
  for (const Tensor& tensor : tensors) {
    dispatch_compute(tensor.dtype(), "square_sum", [&]<class T>() {});
  }
  const std::int64_t partials = count_partials(tensors, &Tensor::type);
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
  return ScratchAllocator::aligned_bytes<std::int64_t>(static_cast<std::size_t>(count_partials(tensors) * kSquareDigits));
}

void square_digits(const Launch& launch, const Tensor& digits, std::span<const Tensor> tensors) {
  require_type(digits, {DType::int64, Shape{kSquareDigits}}, "square_digits", "digits");
  for (const Tensor& tensor : tensors) {
    require_float32(tensor, "square_digits");
  }
  const std::int64_t partials = count_partials(tensors, &Tensor::type);
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

}  // namespace attamba::kernels::cuda
