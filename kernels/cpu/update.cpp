// What happens to losses and gradients after the backward, besides the global norm (square_sum.cpp): exact fixed-point sums,
// AdamW.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cpu/block_list.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/kernels.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

constexpr double kTwo32 = 0x1p32, kTwo52 = 0x1p52, kTwo63 = 0x1p63;
constexpr double kIntegerBias = 0x1.8p52;  // adding it leaves an integer in a double's low bits

/// The integer `value` (|value| < 2^63, integral) as straight-line arithmetic: AVX2 has no conversion to 64 bits.
inline std::int64_t to_int64(double value) {
  const double high = std::floor(value * (1 / kTwo32));
  const double low = value - high * kTwo32;
  const auto bits = [](double part) { return std::bit_cast<std::uint64_t>(part + kIntegerBias); };
  // Both sums carry the bias' own bits; they cancel below 2^64 once shifted and subtracted.
  constexpr std::uint64_t kBias = std::bit_cast<std::uint64_t>(kIntegerBias);
  return static_cast<std::int64_t>(((bits(high) - kBias) << 32) + (bits(low) - kBias));
}

/// The nearest double, rounded once.
inline double to_double(std::int64_t value) {
  const auto word = static_cast<std::uint64_t>(value) ^ (std::uint64_t{1} << 63);  // value + 2^63, unsigned
  constexpr std::uint64_t kExponent = std::bit_cast<std::uint64_t>(kTwo52);
  const double high = std::bit_cast<double>((word >> 32) | kExponent) - kTwo52;
  const double low = std::bit_cast<double>((word & 0xffffffffu) | kExponent) - kTwo52;
  return (high * kTwo32 - kTwo63) + low;
}

/// The scalars of one step in the parameters' own precision.
template <class A>
struct AdamWScalars {
  A gradient_scale, beta1, beta2, rest1, rest2, rate, decay, inverse_bias1, inverse_bias2, epsilon;
};

template <class A>
AdamWScalars<A> adamw_scalars(const double* step, double norm, const AdamWSettings& settings) {
  const bool clipped = settings.clip > 0 && norm > settings.clip;
  return {.gradient_scale = static_cast<A>(clipped ? settings.clip / (norm + 1e-6) : 1.0),
          .beta1 = static_cast<A>(settings.beta1),
          .beta2 = static_cast<A>(settings.beta2),
          .rest1 = static_cast<A>(1 - settings.beta1),
          .rest2 = static_cast<A>(1 - settings.beta2),
          .rate = static_cast<A>(step[kStepLearningRate]),
          .decay = static_cast<A>(step[kStepLearningRate] * settings.weight_decay),
          .inverse_bias1 = static_cast<A>(1 / step[kStepBias1]),
          .inverse_bias2 = static_cast<A>(1 / step[kStepBias2]),
          .epsilon = static_cast<A>(settings.epsilon)};
}

/// `compute` may be null: the model then reads the master itself.
template <class A, class C>
void adamw_block(const AdamWParameter& parameter, C* compute, const AdamWScalars<A>& s, std::int64_t begin, std::int64_t end) {
  A* const weights = parameter.master.as<A>();
  A *const moments1 = parameter.moment1.as<A>(), *const moments2 = parameter.moment2.as<A>();
  A* const gradients = parameter.gradient.as<A>();
  const auto apply = [&](auto with_copy) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) {
      const A gradient = gradients[i] * s.gradient_scale;
      const A m = s.beta1 * moments1[i] + s.rest1 * gradient;
      const A v = s.beta2 * moments2[i] + s.rest2 * gradient * gradient;
      const A update = m * s.inverse_bias1 / (std::sqrt(v * s.inverse_bias2) + s.epsilon);
      const A weight = weights[i] - s.decay * weights[i] - s.rate * update;
      moments1[i] = m;
      moments2[i] = v;
      weights[i] = weight;
      gradients[i] = 0;
      if constexpr (with_copy) {
        compute[i] = convert<C>(weight);
      }
    }
  };
  if (compute != nullptr) {
    apply(std::true_type{});
  } else {
    apply(std::false_type{});
  }
}

void require_adamw(const AdamWParameter& parameter) {
  const TensorType& type = parameter.master.type;
  require(type.dtype == DType::float32 || type.dtype == DType::float64, "adamw: master is ", type,
          ", expected float32 or float64");
  require_type(parameter.moment1, type, "adamw", "moment1");
  require_type(parameter.moment2, type, "adamw", "moment2");
  require_type(parameter.gradient, type, "adamw", "gradient");
  if (parameter.compute) {
    const DType compute = parameter.compute.dtype();
    require_type(parameter.compute, {compute, type.shape}, "adamw", "compute");
    require(compute == type.dtype || (compute == DType::bfloat16 && type.dtype == DType::float32), "adamw: compute is ",
            parameter.compute.type, ", not a compute type of master ", type);
  }
}

void zero_block(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  const auto width = static_cast<std::int64_t>(size_of(tensor.dtype()));
  auto* const bytes = static_cast<std::byte*>(tensor.data);
  std::fill(bytes + begin * width, bytes + end * width, std::byte{0});
}

}  // namespace

void accumulate_loss(const Launch&, const Tensor& totals, const Tensor& losses) {
  require_type(totals, {DType::int64, Shape{2}}, "accumulate_loss", "totals");
  std::uint64_t sum = 0;  // wraps, so that only the final total has to fit
  std::int64_t bad = 0;
  const auto accumulate = [&](const auto* values) {
    for (std::int64_t i = 0; i < losses.elements(); ++i) {
      const double scaled = std::rint(static_cast<double>(values[i]) * kLossOne);
      if (std::abs(scaled) < kTwo63) {
        sum += static_cast<std::uint64_t>(static_cast<std::int64_t>(scaled));
      } else {
        ++bad;  // also a finite loss of 2^31 nats or more, which no fixed-point number holds
      }
    }
  };
  if (losses.dtype() == DType::float64) {
    accumulate(losses.as<double>());
  } else {
    accumulate(losses.as<float>());
  }
  std::int64_t* const total = totals.as<std::int64_t>();
  total[0] = static_cast<std::int64_t>(static_cast<std::uint64_t>(total[0]) + sum);
  total[1] += bad;
}

void add_to_fixed_point(const Launch&, const Tensor& accumulator, const Tensor& poisoned, const Tensor& gradient,
                        double limit) {
  require_type(accumulator, {DType::int64, gradient.shape()}, "add_to_fixed_point", "accumulator");
  require_type(poisoned, {DType::int64, Shape{1}}, "add_to_fixed_point", "poisoned");
  std::int64_t* const sums = accumulator.as<std::int64_t>();
  std::atomic<std::int64_t> bad = 0;  // an integer: the order of additions does not matter
  const auto accumulate = [&](auto* values) {
    parallel_ranges(gradient.elements(), kElementGrain, [&](std::int64_t begin, std::int64_t end) {
      std::int64_t unfit = 0;
#pragma omp simd reduction(+ : unfit)
      for (std::int64_t i = begin; i < end; ++i) {
        const auto value = static_cast<double>(values[i]);
        const bool fits = std::abs(value) <= limit;  // false for NaN
        sums[i] += to_int64(fits ? std::rint(value * kGradientOne) : 0.0);
        unfit += fits ? 0 : 1;
        values[i] = 0;
      }
      bad += unfit;
    });
  };
  if (gradient.dtype() == DType::float64) {
    accumulate(gradient.as<double>());
  } else {
    accumulate(gradient.as<float>());
  }
  poisoned.as<std::int64_t>()[0] += bad;
}

void fixed_point_to_float(const Launch&, const Tensor& gradient, const Tensor& accumulator, const Tensor& poisoned) {
  require_type(accumulator, {DType::int64, gradient.shape()}, "fixed_point_to_float", "accumulator");
  require_type(poisoned, {DType::int64, Shape{1}}, "fixed_point_to_float", "poisoned");
  std::int64_t* const sums = accumulator.as<std::int64_t>();
  const double unit =
      poisoned.as<std::int64_t>()[0] == 0 ? 1 / kGradientOne : std::numeric_limits<double>::quiet_NaN();  // NaN times anything
  const auto convert_all = [&]<class A>(A* values) {
    parallel_ranges(gradient.elements(), kElementGrain, [&](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        values[i] = static_cast<A>(to_double(sums[i]) * unit);
        sums[i] = 0;
      }
    });
  };
  if (gradient.dtype() == DType::float64) {
    convert_all(gradient.as<double>());
  } else {
    convert_all(gradient.as<float>());
  }
}

void adamw(const Launch&, const Tensor& step, std::span<const AdamWParameter> parameters, const Tensor& norm_squared,
           const AdamWSettings& settings) {
  require_type(step, {DType::float64, Shape{kStepFields}}, "adamw", "step");
  require_type(norm_squared, {DType::float64, Shape{1}}, "adamw", "norm_squared");
  for (const AdamWParameter& parameter : parameters) {
    require_adamw(parameter);
  }
  double* const fields = step.as<double>();
  const double norm = std::sqrt(norm_squared.as<double>()[0]);
  const double limit = fields[kStepNormLimit];
  const bool skipped = !std::isfinite(norm) || (limit > 0 && norm > limit);
  fields[kStepGradientNorm] = norm;
  fields[kStepSkipped] = skipped ? 1 : 0;
  const auto single = adamw_scalars<float>(fields, norm, settings);
  const auto twofold = adamw_scalars<double>(fields, norm, settings);
  const BlockList blocks(parameters.size(), [&](std::size_t i) { return parameters[i].master.elements(); });
  parallel_for(blocks.count(), [&](std::int64_t block) {
    const std::size_t index = blocks.tensor(block);
    const AdamWParameter& parameter = parameters[index];
    const std::int64_t begin = blocks.begin(block, index);
    const std::int64_t end = std::min(begin + kElementGrain, parameter.master.elements());
    if (skipped) {
      zero_block(parameter.gradient, begin, end);
    } else if (parameter.master.dtype() == DType::float64) {
      adamw_block(parameter, parameter.compute ? parameter.compute.as<double>() : nullptr, twofold, begin, end);
    } else if (parameter.compute && parameter.compute.dtype() == DType::bfloat16) {
      adamw_block(parameter, parameter.compute.as<bfloat16>(), single, begin, end);
    } else {
      adamw_block(parameter, parameter.compute ? parameter.compute.as<float>() : nullptr, single, begin, end);
    }
  });
}

}  // namespace attamba::kernels::cpu
