// The programs of one rank: initial weights, steps, accumulation, recomputation.
#include "src/train/programs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "comm/single_process.h"
#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/models/tiny_config.h"

namespace attamba {
namespace {

/// A little wider, so that distributions show.
ModelConfig tiny(const std::string& kind) {
  ModelConfig c = testing_support::tiny_config(kind);
  c.vocab_size = 40;
  c.dim = 32;
  c.ffn_dim = 48;
  c.ssm = {.hidden = 16, .state = 4, .heads = 2, .dt_bias = true};
  c.chunking.leading_tokens = 2;
  c.hidden = 48;
  return c;
}

struct Rank {
  struct Options {
    DType dtype = DType::float32;
    bool deterministic = false, recompute = false, training = true;
    std::int64_t sequences = 2, global_batch = 2;
  };
  Rank(const ModelConfig& model, const Options& o)
      : chunking(make_model_chunking(model, 16)),
        programs({.model = model,
                  .chunking = chunking.get(),
                  .micro_batch = {o.sequences, 16},
                  .dtype = o.dtype,
                  .recompute = o.recompute,
                  .deterministic = o.deterministic,
                  .global_batch = o.global_batch,
                  .training = o.training},
                 communicator) {
    programs.initialize(5);
  }
  /// Sequences [first, first + count) of a fixed set.
  void write(std::int64_t first, std::int64_t count) {
    std::vector<std::int32_t> windows;
    for (std::int64_t s = first; s < first + count; ++s) {
      RandomStream random(9, static_cast<std::uint32_t>(s));
      for (int t = 0; t < 17; ++t) {
        windows.push_back(static_cast<std::int32_t>(random.below(40)));
      }
    }
    programs.inputs().write(windows, {}, {}, 0, 0);
  }
  std::vector<double> weights(const std::string& name) const {
    const Tensor tensor = programs.master(name);
    return dispatch_floating(tensor.dtype(), "test", [&]<class T>() {
      std::vector<double> values;
      for (const T x : tensor.span<T>()) {
        values.push_back(static_cast<double>(static_cast<Accumulator<T>>(x)));
      }
      return values;
    });
  }
  std::map<std::string, std::vector<double>> all_weights() const {
    std::map<std::string, std::vector<double>> all;
    for (const ParameterInfo& p : const_cast<ModelPrograms&>(programs).parameters()) {
      all[p.name] = weights(p.name);
    }
    return all;
  }

  SingleProcess communicator;
  std::unique_ptr<ChunkingStrategy> chunking;
  ModelPrograms programs;
};

// ---------------------------------------------------------------------------------------------- initial weights

TEST(ExplicitChunks, TrainLikeTheStrategyWhoseEndsTheyAre) {
  const std::filesystem::path file = std::filesystem::temp_directory_path() / concat("attamba-ends-", getpid(), ".txt");
  std::ofstream(file) << "3 7 11 15\n";
  ModelConfig uniform = tiny("attamba"), listed = tiny("attamba");
  uniform.chunking.strategy = "uniform";
  listed.chunking.strategy = "explicit";
  listed.chunking.ends_file = file.string();
  Rank a(uniform, {}), b(listed, {});
  for (std::int64_t step = 0; step < 3; ++step) {
    a.write(2 * step, 2);
    b.write(2 * step, 2);
    const StepResult expected = a.programs.finish_step(1e-2, step, false), result = b.programs.finish_step(1e-2, step, false);
    EXPECT_EQ(result.loss, expected.loss) << "step " << step;
    EXPECT_EQ(result.gradient_norm, expected.gradient_norm) << "step " << step;
  }
  EXPECT_EQ(a.all_weights(), b.all_weights());
  std::ofstream(file) << "3 7 11 15\n2 9 15\n";  // layers of their own
  Rank fresh(uniform, {}), other(listed, {});
  fresh.write(0, 2);
  other.write(0, 2);
  EXPECT_NE(fresh.programs.evaluate(), other.programs.evaluate());
  std::filesystem::remove(file);
}

TEST(Initialization, HasTheSpecifiedDistributions) {
  ModelConfig config = tiny("attamba");
  config.vocab_size = 500;
  config.ssm = {.hidden = 64, .state = 16, .heads = 64, .conv = 4, .dt_bias = true};
  Rank rank(config, {});
  // A normal cut at 3 sigma has standard deviation 0.98658 sigma.
  for (const auto& [name, columns] :
       std::vector<std::pair<std::string, double>>{{"tok_embeddings.weight", 32},
                                                   {"output.weight", 32},
                                                   {"layers.0.attention.wq.weight", 32},
                                                   {"layers.1.feed_forward.w2.weight", 48},
                                                   {"layers.0.attention.k_ssm.in_proj.weight", 32},
                                                   {"layers.0.attention.k_ssm.conv.weight", 4}}) {
    const std::vector<double> w = rank.weights(name);
    const double sigma = 1 / std::sqrt(columns), count = static_cast<double>(w.size());
    double sum = 0, squares = 0, largest = 0;
    for (const double x : w) {
      sum += x;
      squares += x * x;
      largest = std::max(largest, std::abs(x));
    }
    EXPECT_NEAR(sum / count, 0, 5 * sigma / std::sqrt(count)) << name;
    EXPECT_NEAR(std::sqrt(squares / count), 0.98658 * sigma, 5 * sigma / std::sqrt(2 * count)) << name;
    EXPECT_LE(largest, 3 * sigma * (1 + 1e-6)) << name;
    EXPECT_GT(largest, 1.9 * sigma) << name;
  }
  for (const char* ones : {"norm.weight", "layers.0.attention_norm.weight", "layers.1.attention.v_ssm.norm.weight",
                           "layers.1.attention.v_ssm.D"}) {
    EXPECT_THAT(rank.weights(ones), testing::Each(1.0)) << ones;
  }
  EXPECT_THAT(rank.weights("layers.0.attention.k_ssm.dt_bias"), testing::Each(0.0));
  double sum = 0;
  for (const char* name : {"layers.0.attention.k_ssm.A_log", "layers.0.attention.v_ssm.A_log", "layers.1.attention.k_ssm.A_log",
                           "layers.1.attention.v_ssm.A_log"}) {
    for (const double a_log : rank.weights(name)) {
      EXPECT_GE(std::exp(a_log), 0.01 * (1 - 1e-6));
      EXPECT_LE(std::exp(a_log), 2 * (1 + 1e-6));
      sum += std::exp(a_log);
    }
  }
  EXPECT_NEAR(sum / 256, 1.005, 5 * 1.99 / std::sqrt(12.0 * 256));
}

TEST(Initialization, IsTheSameInEveryComputeType) {
  const auto reference = Rank(tiny("attamba"), {.dtype = DType::float64}).all_weights();
  for (const bool training : {true, false}) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      Rank rank(tiny("attamba"), {.dtype = dtype, .training = training});
      for (const auto& [name, weights] : rank.all_weights()) {
        const bool narrow = rank.programs.master(name).dtype() == DType::bfloat16;
        for (std::size_t i = 0; i < weights.size(); ++i) {
          const auto single = static_cast<float>(reference.at(name)[i]);
          ASSERT_EQ(weights[i], narrow ? static_cast<double>(static_cast<float>(bfloat16(single))) : single) << name;
        }
      }
    }
  }
}

TEST(Initialization, OfAParameterDependsOnItsNameAndTheSeedAlone) {
  ModelConfig deeper = tiny("attamba");
  deeper.n_layers = 3;
  const auto shallow = Rank(tiny("attamba"), {}).all_weights(), deep = Rank(deeper, {}).all_weights();
  for (const auto& [name, weights] : shallow) {
    EXPECT_EQ(deep.at(name), weights) << name;
  }
  EXPECT_NE(shallow.at("layers.0.attention.wq.weight"), shallow.at("layers.1.attention.wq.weight"));
  Rank other(tiny("attamba"), {});
  other.programs.initialize(6);
  EXPECT_NE(other.weights("layers.0.attention.wq.weight"), shallow.at("layers.0.attention.wq.weight"));
}

// ---------------------------------------------------------------------------------------------- training

class EveryKind : public testing::TestWithParam<std::string> {};

TEST_P(EveryKind, OverfitsOneBatch) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    Rank rank(tiny(GetParam()), {.dtype = dtype});
    double loss = 0;
    for (std::int64_t step = 0; step < 250; ++step) {
      rank.write(0, 2);
      const StepResult result = rank.programs.finish_step(step < 10 ? 3e-4 * static_cast<double>(step) : 3e-3, step, false);
      ASSERT_FALSE(result.skipped);
      loss = result.loss;
      if (step == 0) {
        EXPECT_NEAR(loss, std::log(40.0), 1.5) << "random weights know nothing";
      }
    }
    EXPECT_LT(loss, 0.1) << name_of(dtype);
  }
}

TEST_P(EveryKind, MicroBatchesAddUpToTheBatch) {
  Rank whole(tiny(GetParam()), {.dtype = DType::float64, .sequences = 4, .global_batch = 4});
  Rank parts(tiny(GetParam()), {.dtype = DType::float64, .sequences = 1, .global_batch = 4});
  for (std::int64_t step = 0; step < 3; ++step) {
    whole.write(4 * step, 4);
    const StepResult expected = whole.programs.finish_step(1e-3, step, false);
    for (std::int64_t s = 0; s < 3; ++s) {
      parts.write(4 * step + s, 1);
      parts.programs.accumulate();
    }
    parts.write(4 * step + 3, 1);
    const StepResult result = parts.programs.finish_step(1e-3, step, false);
    EXPECT_NEAR(result.loss, expected.loss, 1e-9);  // losses are counted in steps of 2^-32
    EXPECT_NEAR(result.gradient_norm, expected.gradient_norm, 1e-11 * expected.gradient_norm);
  }
}

TEST_P(EveryKind, DeterministicStepsDoNotDependOnTheOrderOrTheSplit) {
  // As on two ranks that share a step differently: other order, and a closing replay without a batch.
  Rank first(tiny(GetParam()), {.deterministic = true, .sequences = 1, .global_batch = 3});
  Rank second(tiny(GetParam()), {.deterministic = true, .sequences = 1, .global_batch = 3});
  for (std::int64_t step = 0; step < 3; ++step) {
    for (const std::int64_t s : {0, 1}) {
      first.write(3 * step + s, 1);
      first.programs.accumulate();
    }
    first.write(3 * step + 2, 1);
    const StepResult a = first.programs.finish_step(1e-3, step, false);
    for (const std::int64_t s : {2, 0, 1}) {
      second.write(3 * step + s, 1);
      second.programs.accumulate();
    }
    const StepResult b = second.programs.finish_step(1e-3, step, true);
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_EQ(a.gradient_norm, b.gradient_norm);
  }
  EXPECT_EQ(first.all_weights(), second.all_weights());
}

TEST_P(EveryKind, RecomputationChangesNoBit) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    Rank kept(tiny(GetParam()), {.dtype = dtype}), recomputed(tiny(GetParam()), {.dtype = dtype, .recompute = true});
    for (std::int64_t step = 0; step < 3; ++step) {
      kept.write(2 * step, 2);
      recomputed.write(2 * step, 2);
      EXPECT_EQ(kept.programs.finish_step(1e-3, step, false).loss, recomputed.programs.finish_step(1e-3, step, false).loss);
    }
    EXPECT_EQ(kept.all_weights(), recomputed.all_weights());
    EXPECT_EQ(kept.programs.model_flops(), recomputed.programs.model_flops()) << "recomputation is not the model's work";
  }
}

INSTANTIATE_TEST_SUITE_P(Registry, EveryKind, testing::ValuesIn(testing_support::trainable_kinds()),
                         [](const auto& test) { return test.param; });

TEST(Steps, EvaluationLeavesTrainingAlone) {
  Rank plain(tiny("attamba"), {}), evaluated(tiny("attamba"), {});
  for (std::int64_t step = 0; step < 3; ++step) {
    for (Rank* rank : {&plain, &evaluated}) {
      rank->write(2 * step, 2);
      rank->programs.accumulate();
    }
    evaluated.write(50, 2);
    const double loss = evaluated.programs.evaluate();
    EXPECT_GT(loss / 32, 1.0);
    for (Rank* rank : {&plain, &evaluated}) {
      rank->programs.finish_step(1e-3, step, true);
    }
  }
  EXPECT_EQ(plain.all_weights(), evaluated.all_weights());
}

TEST(Steps, EvaluationIsTheTrainingLoss) {
  for (const DType dtype : {DType::float32, DType::float64}) {
    Rank rank(tiny("attamba"), {.dtype = dtype});
    rank.write(0, 2);
    const double evaluated = rank.programs.evaluate() / 32;
    EXPECT_NEAR(rank.programs.finish_step(0, 0, false).loss, evaluated, 1e-6);
  }
}

TEST(Steps, ANormThatIsNotFiniteSkipsTheUpdate) {
  for (const bool deterministic : {false, true}) {
    Rank rank(tiny("attamba"), {.deterministic = deterministic});
    rank.write(0, 2);
    rank.programs.finish_step(1e-3, 0, false);
    const auto before = rank.all_weights();
    rank.programs.gradient("norm.weight").as<float>()[3] = std::numeric_limits<float>::quiet_NaN();
    rank.write(2, 2);
    EXPECT_TRUE(rank.programs.finish_step(1e-3, 1, false).skipped);
    EXPECT_EQ(rank.all_weights(), before);
    rank.write(2, 2);
    const StepResult next = rank.programs.finish_step(1e-3, 1, false);
    EXPECT_FALSE(next.skipped) << "the next step starts from clean gradients";
    EXPECT_NE(rank.all_weights(), before);
  }
}

TEST(Steps, ANormAboveTheLimitAndASpoiledStepSkipTheUpdate) {
  for (const bool deterministic : {false, true}) {
    Rank rank(tiny("attamba"), {.deterministic = deterministic}), untouched(tiny("attamba"), {.deterministic = deterministic});
    rank.write(0, 2);
    const double norm = rank.programs.finish_step(1e-3, 0, false, {}, 1e-9).gradient_norm;
    EXPECT_GT(norm, 1e-9);
    EXPECT_EQ(rank.all_weights(), untouched.all_weights());
    rank.write(0, 2);
    rank.programs.poison_step();
    const StepResult poisoned = rank.programs.finish_step(1e-3, 0, false, {.stop = 7, .abandoned = 1});
    EXPECT_TRUE(poisoned.skipped);
    ASSERT_EQ(poisoned.news.size(), 1u);
    EXPECT_EQ(poisoned.news[0].stop, 7);
    EXPECT_EQ(poisoned.news[0].abandoned, 1);
    EXPECT_EQ(rank.all_weights(), untouched.all_weights());
    rank.write(0, 2);
    const StepResult within = rank.programs.finish_step(1e-3, 0, false, {}, norm);
    EXPECT_FALSE(within.skipped);
    EXPECT_EQ(within.gradient_norm, norm) << "nothing is left of the steps before";
  }
}

TEST(Steps, DiscardedGradientsLeaveNoTrace) {
  for (const bool deterministic : {false, true}) {
    Rank plain(tiny("attamba"), {.deterministic = deterministic}), discarded(tiny("attamba"), {.deterministic = deterministic});
    discarded.write(7, 2);
    discarded.programs.accumulate();
    discarded.programs.discard_gradients();
    for (Rank* rank : {&plain, &discarded}) {
      rank->write(0, 2);
    }
    EXPECT_EQ(plain.programs.finish_step(1e-3, 0, false).loss, discarded.programs.finish_step(1e-3, 0, false).loss);
    EXPECT_EQ(plain.all_weights(), discarded.all_weights());
  }
}

TEST(Steps, TheFiniteCheckNamesTheLayer) {
  Rank rank(tiny("attamba"), {});
  rank.programs.observe({}, true);
  rank.write(0, 2);
  EXPECT_NO_THROW(rank.programs.finish_step(1e-3, 0, false));
  rank.programs.master("layers.1.ffn_norm.weight").as<float>()[0] = std::numeric_limits<float>::infinity();
  rank.write(0, 2);
  try {
    rank.programs.accumulate();
    FAIL() << "not found";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("layers.1"), testing::HasSubstr("add_rms_norm")));
  }
}

}  // namespace
}  // namespace attamba
