// What happens to losses and gradients after the backward, besides the global norm (square_sum.cu): exact fixed-point sums,
// AdamW. The host never waits for the norm.
#include <algorithm>
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

constexpr double kTwo63 = 0x1p63;

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

// ------------------------------------------------------------------------------------------------ AdamW

enum class Copy : std::uint8_t { none, float32, bfloat16 };

struct AdamWEntry {
  Extent extent;
  float *weight, *moment1, *moment2, *gradient;
  void* compute;
  Copy copy;
};

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
