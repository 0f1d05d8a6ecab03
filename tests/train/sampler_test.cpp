#include "src/train/sampler.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>

#include "comm/single_process.h"
#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {
namespace {

TEST(DrawToken, TemperatureZeroTakesTheLikeliest) {
  const std::array<double, 4> logits{0.1, 3, -1, 2.9};
  EXPECT_EQ(draw_token(logits, {.temperature = 0, .top_k = 0}, 0.999), 1);
}

TEST(DrawToken, FollowsTheSoftmaxAtItsTemperature) {
  const std::array<double, 3> logits{1, 0, -1};
  const SamplingOptions options{.temperature = 0.5, .top_k = 0};
  std::map<std::int32_t, int> counts;
  RandomStream random(11);
  constexpr int kDraws = 40000;
  for (int i = 0; i < kDraws; ++i) {
    ++counts[draw_token(logits, options, random.uniform())];
  }
  const double total = std::exp(2.0) + 1 + std::exp(-2.0);
  const std::array<double, 3> expected{std::exp(2.0) / total, 1 / total, std::exp(-2.0) / total};
  for (std::int32_t token = 0; token < 3; ++token) {
    const double p = expected[static_cast<std::size_t>(token)];
    EXPECT_NEAR(counts[token] / static_cast<double>(kDraws), p, 5 * std::sqrt(p * (1 - p) / kDraws)) << token;
  }
}

TEST(DrawToken, TopKLeavesOutTheRest) {
  const std::array<double, 5> logits{0, 5, 4.9, -3, 4.8};
  for (int i = 0; i < 200; ++i) {
    const std::int32_t token = draw_token(logits, {.temperature = 5, .top_k = 2}, (i + 0.5) / 200);
    EXPECT_TRUE(token == 1 || token == 2) << token;
  }
}

/// Greedy continuation must be what the training forward says of the same prefix, also beyond one window.
TEST(Sample, GreedyTextIsTheForwardsArgmaxAndGoesOnBeyondAWindow) {
  constexpr std::int64_t kLength = 12;
  ModelConfig model;
  model.vocab_size = 37;
  model.dim = 16;
  model.n_layers = 2;
  model.n_heads = 2;
  model.ffn_dim = 24;
  model.ssm = {.hidden = 8, .state = 4, .heads = 2};
  model.chunking = {.strategy = "cyclic", .size = 3, .leading_tokens = 2};
  const auto chunking = make_model_chunking(model, kLength);
  SingleProcess communicator;
  ModelPrograms programs(
      {.model = model, .chunking = chunking.get(), .micro_batch = {1, kLength}, .training = false, .logits = true},
      communicator);
  programs.initialize(3);
  std::vector<std::int32_t> text{1, 20, 5};
  sample(programs, kLength, text, {.tokens = 20, .temperature = 0}, [&](std::int32_t token) { text.push_back(token); });
  ASSERT_EQ(text.size(), 23u);
  for (std::size_t used = 3; used < static_cast<std::size_t>(kLength); ++used) {
    // Other tokens behind the prefix must not matter.
    std::vector<std::int32_t> window(kLength + 1, 30);
    std::copy_n(text.begin(), used, window.begin());
    programs.inputs().write(window, {}, {}, 0, 0);
    const auto logits = programs.logits().span<float>();
    const auto row = logits.subspan((used - 1) * 37, 37);
    EXPECT_EQ(text[used], std::max_element(row.begin(), row.end()) - row.begin()) << "after " << used << " tokens";
  }
  EXPECT_THROW(sample(programs, kLength, {}, {}, [](std::int32_t) {}), UsageError);
}

}  // namespace
}  // namespace attamba
