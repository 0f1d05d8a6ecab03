#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/matmul_tile.h"
#include "kernels/kernels.h"
#include "src/core/random.h"
#include "tests/kernels/assumed.h"

namespace attamba::kernels::cpu {
namespace {

template <class T>
double value_of(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<float>(value);
  } else {
    return static_cast<double>(value);
  }
}

template <class T>
std::vector<T> random_values(std::int64_t count, std::uint64_t seed, double deviation = 1) {
  RandomStream random(seed);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (auto& value : values) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      value = bfloat16(static_cast<float>(deviation * random.normal()));
    } else {
      value = static_cast<T>(deviation * random.normal());
    }
  }
  return values;
}

template <class T>
Tensor view(std::vector<T>& values, Shape shape) {
  return {values.data(), {kDTypeOf<T>, shape}};
}

std::vector<std::int32_t> random_targets(std::int64_t count, std::int64_t vocabulary, bool with_ignored) {
  RandomStream random(9);
  std::vector<std::int32_t> targets(static_cast<std::size_t>(count));
  for (auto& target : targets) {
    target = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(vocabulary)));
  }
  for (std::size_t t = 0; with_ignored && t < targets.size(); t += 5) {
    targets[t] = -1;
  }
  targets.back() = static_cast<std::int32_t>(vocabulary - 1);
  return targets;
}

template <class T>
struct Result {
  std::vector<Accumulator<T>> losses, dweight;
  std::vector<T> dhidden;
};

struct Problem {
  std::int64_t tokens, width, vocabulary;
  double scale = 1;
  bool gradient = true;
};

template <class T>
Result<T> run_loss(const Problem& p, std::vector<T>& hidden, std::vector<T>& weight, std::vector<std::int32_t>& targets,
                   double dweight_start = 0) {
  using A = Accumulator<T>;
  Result<T> result{std::vector<A>(p.tokens, A(-1)), std::vector<A>(p.vocabulary * p.width, A(dweight_start)),
                   std::vector<T>(p.tokens * p.width, T(-1))};
  const Tensor h = view(hidden, {p.tokens, p.width}), w = view(weight, {p.vocabulary, p.width});
  const std::size_t bytes = (linear_cross_entropy_workspace(h.type, w.type, p.gradient) + 63) / 64 * 64;
  const std::unique_ptr<std::byte, decltype(&std::free)> memory(static_cast<std::byte*>(std::aligned_alloc(64, bytes)),
                                                                &std::free);
  std::memset(memory.get(), 0xff, bytes);  // scratch holds NaN: nothing in it may count before it is written
  const Launch launch{.scratch = {memory.get(), bytes}};
  if (p.gradient) {
    linear_cross_entropy_with_gradient(launch, view(result.losses, {p.tokens}), view(result.dhidden, {p.tokens, p.width}),
                                       view(result.dweight, {p.vocabulary, p.width}), h, w, view(targets, {p.tokens}), p.scale);
  } else {
    linear_cross_entropy(launch, view(result.losses, {p.tokens}), h, w, view(targets, {p.tokens}));
  }
  return result;
}

/// The definition, in float64.
template <class T>
Result<double> reference(const Problem& p, const std::vector<T>& hidden, const std::vector<T>& weight,
                         const std::vector<std::int32_t>& targets) {
  Result<double> result{std::vector<double>(p.tokens), std::vector<double>(p.vocabulary * p.width),
                        std::vector<double>(p.tokens * p.width)};
  std::vector<double> logits(p.vocabulary);
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    if (targets[t] < 0) {
      continue;
    }
    double sum = 0;
    for (std::int64_t v = 0; v < p.vocabulary; ++v) {
      logits[v] = 0;
      for (std::int64_t i = 0; i < p.width; ++i) {
        logits[v] += value_of(hidden[t * p.width + i]) * value_of(weight[v * p.width + i]);
      }
      sum += std::exp(logits[v]);
    }
    result.losses[t] = std::log(sum) - logits[targets[t]];
    for (std::int64_t v = 0; p.gradient && v < p.vocabulary; ++v) {
      const double gradient = p.scale * (std::exp(logits[v]) / sum - (v == targets[t] ? 1 : 0));
      for (std::int64_t i = 0; i < p.width; ++i) {
        result.dhidden[t * p.width + i] += gradient * value_of(weight[v * p.width + i]);
        result.dweight[v * p.width + i] += gradient * value_of(hidden[t * p.width + i]);
      }
    }
  }
  return result;
}

template <class X, class Y>
double relative_distance(const std::vector<X>& x, const std::vector<Y>& y) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    difference += std::pow(value_of(x[i]) - value_of(y[i]), 2);
    size += std::pow(value_of(y[i]), 2);
  }
  return std::sqrt(difference / size);
}

template <class T>
void expect_loss(const Problem& p, double loss_tolerance, double gradient_tolerance) {
  SCOPED_TRACE(concat(name_of(kDTypeOf<T>), " T ", p.tokens, " D ", p.width, " V ", p.vocabulary));
  auto hidden = random_values<T>(p.tokens * p.width, 1);
  auto weight = random_values<T>(p.vocabulary * p.width, 2, 1.5 / std::sqrt(static_cast<double>(p.width)));
  auto targets = random_targets(p.tokens, p.vocabulary, true);
  const auto got = run_loss(p, hidden, weight, targets);
  const auto expected = reference(p, hidden, weight, targets);
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    ASSERT_NEAR(value_of(got.losses[t]), expected.losses[t], loss_tolerance) << "token " << t << " target " << targets[t];
  }
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    for (std::int64_t i = 0; targets[t] < 0 && i < p.width; ++i) {
      ASSERT_EQ(value_of(got.dhidden[t * p.width + i]), 0) << "ignored token " << t;
    }
  }
  EXPECT_LT(relative_distance(got.dhidden, expected.dhidden), gradient_tolerance);
  EXPECT_LT(relative_distance(got.dweight, expected.dweight), gradient_tolerance);
}

TEST(Embedding, CopiesRows) {
  auto table = random_values<bfloat16>(7 * 5, 1);
  std::vector<bfloat16> out(100 * 5);
  auto tokens = random_targets(100, 7, false);
  embedding({}, view(out, {4, 25, 5}), view(table, {7, 5}), view(tokens, {4, 25}));
  for (int t = 0; t < 100; ++t) {
    EXPECT_EQ(std::memcmp(&out[t * 5], &table[tokens[t] * 5], 10), 0) << "token " << t;
  }
}

TEST(Embedding, NamesTheTokenOutside) {
  std::vector<float> table(7 * 5), out(3 * 5);
  for (const std::int32_t bad : {7, -1}) {
    std::vector<std::int32_t> tokens{0, 6, bad};
    try {
      embedding({}, view(out, {3, 5}), view(table, {7, 5}), view(tokens, {3}));
      FAIL() << "accepted " << bad;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(concat("tokens[2] = ", bad)), std::string::npos) << error.what();
    }
    EXPECT_THROW(embedding_backward({}, view(table, {7, 5}), view(out, {3, 5}), view(tokens, {3})), Error);
  }
}

TEST(Embedding, BackwardAddsByTokenForAnyThreads) {
  constexpr std::int64_t kTokens = 500, kWidth = 70, kVocabulary = 11;
  auto dout = random_values<float>(kTokens * kWidth, 1);
  auto tokens = random_targets(kTokens, kVocabulary, false);
  std::vector<double> expected(kVocabulary * kWidth, 2.0);
  for (std::int64_t i = 0; i < kTokens * kWidth; ++i) {
    expected[tokens[i / kWidth] * kWidth + i % kWidth] += dout[i];
  }
  std::vector<float> first;
  const int before = omp_get_max_threads();
  for (const int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    std::vector<float> dtable(kVocabulary * kWidth, 2.0f);
    embedding_backward({}, view(dtable, {kVocabulary, kWidth}), view(dout, {kTokens, kWidth}), view(tokens, {kTokens}));
    first = first.empty() ? dtable : first;
    EXPECT_EQ(dtable, first) << threads << " threads";
  }
  omp_set_num_threads(before);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(first[i], expected[i], 1e-4);
  }
}

TEST(LinearCrossEntropy, MatchesDefinition) {
  // Around the tile of 256 words, one and several groups of tiles, one and several chunks of tokens, uneven ones too.
  for (const Problem& p : {Problem{1, 1, 1},
                           {3, 8, 5, 0.25},
                           {33, 16, 256, 0.5},
                           {40, 24, 257},
                           {600, 8, 300, 0.125},
                           {1030, 4, 70},
                           {20, 12, 5000}}) {
    if (p.vocabulary > 1) {
      expect_loss<float>(p, 1e-5, 1e-5);
      expect_loss<double>(p, 1e-12, 1e-12);
      // The gradients' own rounding: dhidden to bfloat16, and where the processor multiplies bfloat16, dlogits too.
      expect_loss<bfloat16>(p, 1e-5, 6e-3);
    } else {
      std::vector<float> hidden{2}, weight{3};
      std::vector<std::int32_t> targets{0};
      EXPECT_EQ(run_loss(p, hidden, weight, targets).losses[0], 0);
    }
  }
}

TEST(LinearCrossEntropy, Bfloat16TheOtherWay) {
  // Dlogits packed as bfloat16 where they are float32 otherwise, or the reverse.
  const Assumed other(assume_native_bfloat16, !has_native_bfloat16());
  for (const Problem& p : {Problem{33, 16, 256, 0.5}, {40, 24, 257}, {600, 8, 300, 0.125}, {20, 12, 5000}}) {
    expect_loss<bfloat16>(p, 1e-5, 6e-3);
  }
}

TEST(LinearCrossEntropy, LossAloneIsTheSameLoss) {
  Problem p{700, 8, 600};
  auto hidden = random_values<float>(p.tokens * p.width, 1), weight = random_values<float>(p.vocabulary * p.width, 2);
  auto targets = random_targets(p.tokens, p.vocabulary, true);
  const auto with_gradient = run_loss(p, hidden, weight, targets);
  p.gradient = false;
  EXPECT_EQ(run_loss(p, hidden, weight, targets).losses, with_gradient.losses);
}

TEST(LinearCrossEntropy, GradientIsTheDerivative) {
  const Problem p{9, 6, 300, 0.7};
  auto hidden = random_values<double>(p.tokens * p.width, 1), weight = random_values<double>(p.vocabulary * p.width, 2);
  auto targets = random_targets(p.tokens, p.vocabulary, true);
  const auto result = run_loss(p, hidden, weight, targets);
  const auto total = [&] {
    double sum = 0;
    for (const double loss : run_loss(p, hidden, weight, targets).losses) {
      sum += p.scale * loss;
    }
    return sum;
  };
  const auto difference = [&](double& parameter) {
    const double start = parameter;
    parameter = start + 1e-5;
    const double above = total();
    parameter = start - 1e-5;
    const double below = total();
    parameter = start;
    return (above - below) / 2e-5;
  };
  for (std::size_t i = 0; i < hidden.size(); ++i) {
    EXPECT_NEAR(result.dhidden[i], difference(hidden[i]), 1e-8) << "hidden " << i;
  }
  for (std::size_t i = 0; i < weight.size(); i += 7) {
    EXPECT_NEAR(result.dweight[i], difference(weight[i]), 1e-8) << "weight " << i;
  }
}

TEST(LinearCrossEntropy, AccumulatesWeightGradient) {
  const Problem p{600, 4, 300};
  auto hidden = random_values<float>(p.tokens * p.width, 1), weight = random_values<float>(p.vocabulary * p.width, 2);
  auto targets = random_targets(p.tokens, p.vocabulary, false);
  const auto zero = run_loss(p, hidden, weight, targets), ten = run_loss(p, hidden, weight, targets, 10.0);
  for (std::size_t i = 0; i < zero.dweight.size(); ++i) {
    ASSERT_NEAR(ten.dweight[i] - 10.0f, zero.dweight[i], 2e-5) << "at " << i;
  }
}

TEST(LinearCrossEntropy, LargeLogitsStayFinite) {
  const Problem p{4, 2, 400};
  std::vector<float> hidden{100, 0, -100, 0, 0, 100, 50, 50}, weight(p.vocabulary * p.width);
  for (std::size_t i = 0; i < weight.size(); ++i) {
    weight[i] = static_cast<float>(i % 7) - 3.0f;
  }
  auto targets = random_targets(p.tokens, p.vocabulary, false);
  const auto got = run_loss(p, hidden, weight, targets);
  const auto expected = reference(p, hidden, weight, targets);  // e^600 fits a double
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    EXPECT_NEAR(got.losses[t], expected.losses[t], 1e-4);
  }
  EXPECT_LT(relative_distance(got.dhidden, expected.dhidden), 1e-5);
}

template <class T>
void expect_same_for_all_threads() {
  const Problem p{530, 40, 5200, 1.0 / 530};
  auto hidden = random_values<T>(p.tokens * p.width, 1), weight = random_values<T>(p.vocabulary * p.width, 2, 0.2);
  auto targets = random_targets(p.tokens, p.vocabulary, true);
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto one = run_loss(p, hidden, weight, targets);
  for (const int threads : {2, 3}) {
    omp_set_num_threads(threads);
    const auto more = run_loss(p, hidden, weight, targets);
    EXPECT_EQ(one.losses, more.losses) << threads << " threads";
    EXPECT_EQ(one.dweight, more.dweight) << threads << " threads";
    EXPECT_EQ(std::memcmp(one.dhidden.data(), more.dhidden.data(), one.dhidden.size() * sizeof(T)), 0) << threads << " threads";
  }
  omp_set_num_threads(before);
}

TEST(LinearCrossEntropy, DoesNotDependOnThreads) {
  expect_same_for_all_threads<float>();
  expect_same_for_all_threads<bfloat16>();
}

TEST(LinearCrossEntropy, NamesTheTargetOutside) {
  const Problem p{3, 2, 10};
  std::vector<float> hidden(6), weight(20);
  std::vector<std::int32_t> targets{0, 10, 3};
  try {
    run_loss(p, hidden, weight, targets);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("targets[1] = 10"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace attamba::kernels::cpu
