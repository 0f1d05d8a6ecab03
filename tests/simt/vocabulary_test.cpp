#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "kernels/kernels.h"
#include "src/core/random.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;

class Vocabulary : public testing::TestWithParam<DType> {
 protected:
  DType dtype() const { return GetParam(); }
  DeviceTensor random(const Shape& shape, std::uint32_t name, double deviation = 1) const {
    return DeviceTensor::random(dtype(), shape, name, deviation);
  }
};
INSTANTIATE_TEST_SUITE_P(Types, Vocabulary, testing::Values(DType::float32, DType::bfloat16),
                         [](const auto& test) { return std::string(name_of(test.param)); });

DeviceTensor tokens_of(const std::vector<double>& values) {
  return {DType::int32, {static_cast<std::int64_t>(values.size())}, values};
}

/// Few tokens are frequent and most are rare, as in text.
std::vector<double> text(std::int64_t count, std::int64_t vocabulary, std::uint32_t name) {
  RandomStream random(5, name);
  std::vector<double> tokens;
  for (std::int64_t t = 0; t < count; ++t) {
    const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random.below(static_cast<std::uint32_t>(n))); };
    tokens.push_back(static_cast<double>(below(below(below(vocabulary) + 1) + 1)));
  }
  return tokens;
}

// ------------------------------------------------------------------------------------------------ embedding

TEST_P(Vocabulary, EmbeddingCopiesRows) {
  for (const std::int64_t width : {1, 7, 64, 1000, 1001}) {
    for (const std::int64_t count : {1, 33, 200}) {
      const DeviceTensor table = random({50, width}, 1), tokens = tokens_of(text(count, 50, 2));
      DeviceTensor out(dtype(), {count, width}), expected(dtype(), {count, width});
      cuda::embedding(device_launch(), out, table, tokens);
      cpu::embedding({}, expected, table, tokens);
      EXPECT_TRUE(out.same_bits(expected)) << count << " x " << width;
    }
  }
}

TEST_P(Vocabulary, ATokenOutsideTheTableShows) {
  const DeviceTensor table = random({5, 9}, 3), tokens = tokens_of({4, -1, 0, 5});
  DeviceTensor out(dtype(), {4, 9}), dtable(DType::float32, {5, 9}, 1.0);
  cuda::embedding(device_launch(), out, table, tokens);
  for (std::size_t i = 0; i < out.size(); ++i) {
    EXPECT_EQ(std::isnan(out.values()[i]), i / 9 % 2 == 1) << i;
  }
  const DeviceTensor dout(dtype(), {4, 9}, 2.0);
  cuda::embedding_backward(device_launch(cuda::embedding_backward_workspace(dout.tensor().type)), dtable, dout, tokens);
  for (std::size_t i = 0; i < dtable.size(); ++i) {
    EXPECT_EQ(dtable.values()[i], i / 9 == 0 || i / 9 == 4 ? 3 : 1) << i;
  }
}

struct Gather {
  const char* what;
  std::vector<double> tokens;
  std::int64_t vocabulary;
};

std::vector<Gather> gathers() {
  std::vector<Gather> all;
  for (const std::int64_t count : {1, 31, 32, 33, 200, 513, 2100}) {
    all.push_back({"text", text(count, 1000, 4), 1000});
    all.push_back({"one word", std::vector<double>(static_cast<std::size_t>(count), 16.0), 17});
    Gather distinct{"distinct", {}, count};
    Gather runs{"runs of 64", {}, 1 + count / 64};
    for (std::int64_t t = 0; t < count; ++t) {
      distinct.tokens.push_back(static_cast<double>((t * 7919) % count));
      runs.tokens.push_back(static_cast<double>((t * 7919) % count / 64));
    }
    all.push_back(distinct);
    all.push_back(runs);
  }
  return all;
}

DeviceTensor embedding_gradient(const DeviceTensor& dout, const DeviceTensor& tokens, std::int64_t vocabulary) {
  DeviceTensor dtable(DType::float32, {vocabulary, dout.shape().columns()}, 0.5);
  cuda::embedding_backward(device_launch(cuda::embedding_backward_workspace(dout.tensor().type)), dtable, dout, tokens);
  return dtable;
}

TEST_P(Vocabulary, EmbeddingBackwardAddsRowsByToken) {
  for (const Gather& gather : gathers()) {
    for (const std::int64_t width : {1, 7, 64, 1032}) {
      const auto count = static_cast<std::int64_t>(gather.tokens.size());
      if (count > 513 && width > 64) {
        continue;
      }
      const DeviceTensor tokens = tokens_of(gather.tokens), dout = random({count, width}, 5);
      const DeviceTensor dtable = embedding_gradient(dout, tokens, gather.vocabulary);
      std::vector<double> expected(dtable.size(), 0.5), magnitude(dtable.size(), 0.5), added(dtable.size(), 1);
      const auto values = dout.values();
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t row = i / static_cast<std::size_t>(width), column = i % static_cast<std::size_t>(width);
        const std::size_t at = static_cast<std::size_t>(gather.tokens[row]) * static_cast<std::size_t>(width) + column;
        expected[at] += values[i];
        magnitude[at] += std::abs(values[i]);
        added[at] += 1;
      }
      EXPECT_TRUE(within(dtable, expected, 0, [&](std::size_t i) { return added[i] * 0x1p-24 * magnitude[i]; }))
          << gather.what << ", " << count << " x " << width;
    }
  }
}

TEST_P(Vocabulary, EmbeddingBackwardDoesNotDependOnTheOrderOfBlocks) {
  const DeviceTensor tokens = tokens_of(text(1500, 300, 6)), dout = random({1500, 24}, 7);
  expect_same_in_any_order([&] { return embedding_gradient(dout, tokens, 300); });
}

// Floors: a row in and a row out; a gradient's row once, and each row of the table that is touched in and out.
TEST_P(Vocabulary, EmbeddingTouchesEachByteOnce) {
  const std::int64_t count = 4096, width = 256, vocabulary = 4000;
  const std::vector<double> words = text(count, vocabulary, 8);
  const auto distinct = static_cast<double>(std::set<double>(words.begin(), words.end()).size());
  const DeviceTensor tokens = tokens_of(words), dout = random({count, width}, 9), table = random({vocabulary, width}, 10);
  const double row = static_cast<double>(size_of(dtype())) * width;
  reset_counters();
  cuda::embedding(device_launch(), dout, table, tokens);
  EXPECT_LT(bytes_of({"embedding"}), 1.13 * 2 * row * count);
  embedding_gradient(dout, tokens, vocabulary);
  // Sorting comes on top: it reads tokens only, again and again from the cache. Tiles of 512 are written with the rows that
  // they are from; merging them reads and writes both, and searches each other tile for each token.
  const double tiles = count / 512.0, steps = 10;
  EXPECT_EQ(bytes_of({"embedding_backward: sort_tiles"}), 12.0 * count);
  EXPECT_LE(bytes_of({"embedding_backward: merge_tiles"}), (16 + 4 * steps * (tiles - 1)) * count);
  EXPECT_LT(bytes_of({"embedding_backward: sum_runs", "embedding_backward: join_runs"}),
            1.15 * (row * count + 8.0 * width * distinct));
}

// ------------------------------------------------------------------------------------------------ cross-entropy

/// The definition, in float64, with bounds of what roundings of the logits and of their gradient do to each result.
struct Reference {
  std::vector<double> losses, dhidden, dweight, loss_error, dhidden_error, dweight_error;

  Reference(const DeviceTensor& hidden, const DeviceTensor& weight, const std::vector<double>& targets, double scale,
            DType logits_type, double dweight_before) {
    const auto h = hidden.values(), w = weight.values();
    const std::size_t tokens = targets.size(), width = h.size() / tokens, words = w.size() / width;
    dhidden.assign(h.size(), 0);
    dhidden_error.assign(h.size(), 0);
    dweight.assign(w.size(), dweight_before);
    dweight_error.assign(w.size(), 0x1p-24 * std::abs(dweight_before));
    const double dlogit_rounding = rounding(hidden.tensor().dtype());
    for (std::size_t t = 0; t < tokens; ++t) {
      std::vector<double> x(words);
      double highest = -1e300, sum = 0, wrong = 0;
      for (std::size_t v = 0; v < words; ++v) {
        double magnitude = 0;
        for (std::size_t d = 0; d < width; ++d) {
          x[v] += h[t * width + d] * w[v * width + d];
          magnitude += std::abs(h[t * width + d] * w[v * width + d]);
        }
        highest = std::max(highest, x[v]);
        const double product = static_cast<double>(width) * 0x1p-24 * magnitude;
        wrong = std::max(wrong, product + (logits_type == DType::bfloat16 ? 0x1p-8 * std::abs(x[v]) : 0));
      }
      for (const double value : x) {
        sum += std::exp(value - highest);
      }
      const double lse = highest + std::log(sum);
      const bool counts = targets[t] >= 0;
      losses.push_back(counts ? lse - x[static_cast<std::size_t>(targets[t])] : 0);
      // Of the float32 arithmetic: exponentials to 2 units and 1.5 |x - highest|, sums of a thread's, a warp's, a block's
      // terms.
      const double arithmetic = 160 * 0x1p-24;
      loss_error.push_back(counts ? 2 * wrong + arithmetic + 4 * 0x1p-24 * (std::abs(highest) + losses.back()) : 0);
      for (std::size_t v = 0; v < words && counts; ++v) {
        const double probability = std::exp(x[v] - lse), target = static_cast<double>(v) == targets[t] ? 1 : 0;
        const double gradient = scale * (probability - target);
        const double off = scale * probability * (std::expm1(2 * wrong) + arithmetic) + scale * target * 0x1p-23;
        const double error = off + (std::abs(gradient) + off) * dlogit_rounding;
        // Sums over words and tokens are float32's.
        const double sums = std::abs(gradient) * static_cast<double>(std::max(words, tokens)) * 0x1p-24;
        for (std::size_t d = 0; d < width; ++d) {
          dhidden[t * width + d] += gradient * w[v * width + d];
          dhidden_error[t * width + d] += (error + sums) * std::abs(w[v * width + d]);
          dweight[v * width + d] += gradient * h[t * width + d];
          dweight_error[v * width + d] += (error + sums) * std::abs(h[t * width + d]);
        }
      }
    }
  }
};

struct Loss {
  DeviceTensor losses, dhidden, dweight;
};

Loss loss_of(const DeviceTensor& hidden, const DeviceTensor& weight, const DeviceTensor& targets, double scale) {
  Loss loss{.losses = {DType::float32, {hidden.shape()[0]}},
            .dhidden = {hidden.tensor().dtype(), hidden.shape()},
            .dweight = {DType::float32, weight.shape(), 0.25}};
  const std::size_t scratch = cuda::linear_cross_entropy_workspace(hidden.tensor().type, weight.tensor().type, true);
  cuda::linear_cross_entropy_with_gradient(device_launch(scratch), loss.losses, loss.dhidden, loss.dweight, hidden, weight,
                                           targets, scale);
  return loss;
}

DeviceTensor losses_of(const DeviceTensor& hidden, const DeviceTensor& weight, const DeviceTensor& targets) {
  DeviceTensor losses(DType::float32, {hidden.shape()[0]});
  const std::size_t scratch = cuda::linear_cross_entropy_workspace(hidden.tensor().type, weight.tensor().type, false);
  cuda::linear_cross_entropy(device_launch(scratch), losses, hidden, weight, targets);
  return losses;
}

/// Every fifth target is negative: a token that does not count.
std::vector<double> some_targets(std::int64_t tokens, std::int64_t vocabulary) {
  std::vector<double> targets = text(tokens, vocabulary, 11);
  for (std::size_t t = 2; t < targets.size(); t += 5) {
    targets[t] = t % 2 == 0 ? -1 : -100;
  }
  targets.back() = static_cast<double>(vocabulary - 1);
  return targets;
}

TEST_P(Vocabulary, LossesAndGradientsAreTheDefinitions) {
  struct Extents {
    std::int64_t tokens, width, vocabulary;
  };
  for (const auto& [tokens, width, vocabulary] :
       {Extents{1, 7, 17}, Extents{33, 64, 17}, Extents{200, 7, 1000}, Extents{33, 64, 1001}, Extents{3, 64, 32000},
        Extents{2, 16, 50000}, Extents{2, 16, 50001}, Extents{4300, 7, 16}}) {
    const DeviceTensor hidden = random({tokens, width}, 12), weight = random({vocabulary, width}, 13, 0.5);
    const std::vector<double> targets = some_targets(tokens, vocabulary);
    const Reference r(hidden, weight, targets, 0.125, dtype(), 0.25);
    const Loss loss = loss_of(hidden, weight, tokens_of(targets), 0.125);
    const auto in = [](const std::vector<double>& errors) { return [&](std::size_t i) { return errors[i]; }; };
    EXPECT_TRUE(within(loss.losses, r.losses, 0, in(r.loss_error))) << vocabulary;
    EXPECT_TRUE(within(loss.dhidden, r.dhidden, rounding(dtype()), in(r.dhidden_error))) << vocabulary;
    EXPECT_TRUE(within(loss.dweight, r.dweight, 0x1p-23, in(r.dweight_error))) << vocabulary;
    // Without the gradient logits stay float32.
    const Reference exact(hidden, weight, targets, 0.125, DType::float32, 0.25);
    EXPECT_TRUE(within(losses_of(hidden, weight, tokens_of(targets)), exact.losses, 0, in(exact.loss_error))) << vocabulary;
  }
}

TEST_P(Vocabulary, TokensThatDoNotCountHaveNoGradient) {
  const DeviceTensor hidden = random({6, 8}, 14), weight = random({40, 8}, 15);
  const Loss loss = loss_of(hidden, weight, tokens_of({-1, -1, -7, -1, -1, -1}), 1);
  EXPECT_EQ(loss.losses.values(), std::vector<double>(6, 0.0));
  EXPECT_EQ(loss.dhidden.values(), std::vector<double>(48, 0.0));
  EXPECT_EQ(loss.dweight.values(), std::vector<double>(320, 0.25));
}

TEST_P(Vocabulary, ATargetOutsideTheVocabularyShows) {
  const DeviceTensor hidden = random({3, 8}, 16), weight = random({40, 8}, 17);
  const DeviceTensor targets = tokens_of({39, 40, 0});
  const Loss loss = loss_of(hidden, weight, targets, 1);
  const DeviceTensor alone = losses_of(hidden, weight, targets);
  for (std::size_t t = 0; t < 3; ++t) {
    EXPECT_EQ(std::isnan(loss.losses.values()[t]), t == 1) << t;
    EXPECT_EQ(std::isnan(alone.values()[t]), t == 1) << t;
    EXPECT_EQ(std::isnan(loss.dhidden.values()[8 * t]), t == 1) << t;
  }
}

TEST_P(Vocabulary, WhatIsNotANumberGivesNoLoss) {
  DeviceTensor hidden = random({3, 8}, 18);
  auto values = hidden.values();
  values[9] = NAN;
  values[17] = std::numeric_limits<double>::infinity();
  hidden.set(values);
  const Loss loss = loss_of(hidden, random({40, 8}, 19), tokens_of({1, 2, 3}), 1);
  EXPECT_TRUE(std::isfinite(loss.losses.values()[0]));
  EXPECT_FALSE(std::isfinite(loss.losses.values()[1]));
  EXPECT_FALSE(std::isfinite(loss.losses.values()[2]));
}

TEST_P(Vocabulary, LargeLogitsDoNotOverflow) {
  const DeviceTensor hidden(dtype(), {1, 1}, 1000.0);
  const DeviceTensor weight(dtype(), {4, 1}, std::vector<double>{1, -1, 0.5, 0.25});
  EXPECT_EQ(loss_of(hidden, weight, tokens_of({0}), 1).losses.values()[0], 0);
  EXPECT_EQ(loss_of(hidden, weight, tokens_of({1}), 1).losses.values()[0], 2000);
}

TEST_P(Vocabulary, ALargeLogitDoesNotOverflowWhicheverThreadHasIt) {
  const std::int64_t tokens = 32, vocabulary = 4096, apart = vocabulary / tokens;
  std::vector<double> hidden(static_cast<std::size_t>(tokens * tokens)), weight(static_cast<std::size_t>(vocabulary * tokens));
  std::vector<double> largest, others;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t place = t * apart + t;
    hidden[static_cast<std::size_t>(t * tokens + t)] = 1000;
    weight[static_cast<std::size_t>(place * tokens + t)] = 1;
    largest.push_back(static_cast<double>(place));
    others.push_back(static_cast<double>(place + 1));
  }
  const DeviceTensor h(dtype(), {tokens, tokens}, hidden), w(dtype(), {vocabulary, tokens}, weight);
  EXPECT_THAT(loss_of(h, w, tokens_of(largest), 1).losses.values(), testing::Each(0));
  EXPECT_THAT(loss_of(h, w, tokens_of(others), 1).losses.values(), testing::Each(1000));
}

TEST_P(Vocabulary, TheLossDoesNotDependOnTheOrderOfBlocks) {
  const DeviceTensor hidden = random({40, 16}, 20), weight = random({1000, 16}, 21);
  const DeviceTensor targets = tokens_of(some_targets(40, 1000));
  expect_same_in_any_order([&] { return loss_of(hidden, weight, targets, 1).losses; });
  expect_same_in_any_order([&] { return loss_of(hidden, weight, targets, 1).dweight; });
}

TEST_P(Vocabulary, ALogitIsReadAndWrittenOnce) {
  const std::int64_t tokens = 4, vocabulary = 24000;
  const DeviceTensor hidden = random({tokens, 8}, 22), weight = random({vocabulary, 8}, 23);
  const DeviceTensor targets = tokens_of({1, 2, 3, 4});
  const double logits = static_cast<double>(tokens * vocabulary);
  reset_counters();
  loss_of(hidden, weight, targets, 1);
  EXPECT_LT(bytes_of({"linear_cross_entropy"}), 1.03 * 2 * logits * static_cast<double>(size_of(dtype())));
  reset_counters();
  losses_of(hidden, weight, targets);
  EXPECT_LT(bytes_of({"linear_cross_entropy"}), 1.03 * 4 * logits);
}

TEST(VocabularyOnTheEmulator, ScratchIsBounded) {
  const TensorType hidden{DType::bfloat16, {1 << 20, 512}}, weight{DType::bfloat16, {128000, 512}};
  EXPECT_LT(cuda::linear_cross_entropy_workspace(hidden, weight, true), std::size_t{300} << 20);
  EXPECT_LT(cuda::linear_cross_entropy_workspace(hidden, weight, false), std::size_t{300} << 20);
}

TEST(VocabularyOnTheEmulator, Float64IsRefused) {
  const TensorType wide{DType::float64, {4, 4}};
  EXPECT_THROW(cuda::linear_cross_entropy_workspace(wide, wide, true), UsageError);
}

}  // namespace
}  // namespace attamba::simt
