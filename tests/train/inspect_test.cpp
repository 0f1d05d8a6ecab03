// Looking inside programs: statistics by name, and the first difference between two devices.
#include "src/train/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "comm/single_process.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

ModelConfig tiny() {
  ModelConfig c;
  c.kind = "attamba";
  c.vocab_size = 40;
  c.dim = 32;
  c.n_layers = 2;
  c.n_heads = 2;
  c.ffn_dim = 48;
  c.ssm = {.hidden = 16, .state = 4, .heads = 2};
  c.chunking = {.strategy = "cyclic", .size = 4, .leading_tokens = 2};
  return c;
}

struct Rank {
  Rank()
      : chunking(make_model_chunking(model, 16)),
        programs({.model = model, .chunking = chunking.get(), .micro_batch = {1, 16}}, communicator) {
    programs.initialize(5);
    std::vector<std::int32_t> window;
    for (int t = 0; t < 17; ++t) {
      window.push_back(7 * t % 40);
    }
    programs.inputs().write(window, {}, {}, 0, 0);
  }
  ModelConfig model = tiny();
  SingleProcess communicator;
  std::unique_ptr<ChunkingStrategy> chunking;
  ModelPrograms programs;
};

TEST(Statistics, AreThoseOfTheFiniteElements) {
  std::vector<float> values{3, -1, std::numeric_limits<float>::infinity(), 1, std::nanf("")};
  const TensorStatistics s = statistics_of({values.data(), {DType::float32, {5}}});
  EXPECT_EQ(s.least, -1);
  EXPECT_EQ(s.most, 3);
  EXPECT_DOUBLE_EQ(s.mean, 1);
  EXPECT_DOUBLE_EQ(s.rms, std::sqrt(11.0 / 3));
  EXPECT_EQ(s.not_finite, 2);
}

TEST(Watching, PrintsTensorsByPatternAndNothingElse) {
  Rank rank;
  std::ostringstream out;
  rank.programs.observe_once(watch_tensors("layers.1.attention/*", out));
  rank.programs.accumulate();
  EXPECT_THAT(out.str(), AllOf(HasSubstr("layers.1.attention/chunk_scan"), HasSubstr("[16, 16]"), HasSubstr("rms "),
                               Not(HasSubstr("layers.0")), Not(HasSubstr("feed_forward"))));
}

TEST(Comparing, EqualProgramsAgreeInEveryResult) {
  Rank here, there;
  const std::vector<OpDifference> differences = compare_devices(here.programs, there.programs);
  EXPECT_GT(differences.size(), 60u);
  for (const OpDifference& d : differences) {
    EXPECT_EQ(d.error, 0) << d.name;
  }
  std::ostringstream out;
  EXPECT_FALSE(print_differences(differences, DType::float32, out));
  EXPECT_THAT(out.str(), HasSubstr("agree"));
}

TEST(Comparing, NamesTheFirstResultThatDiffersAndItsElement) {
  Rank here, there;
  here.programs.master("layers.1.attention.wq.weight").as<float>()[3 * 32] += 1;  // output column 3 of one product
  const std::vector<OpDifference> differences = compare_devices(here.programs, there.programs);
  std::ostringstream out;
  EXPECT_TRUE(print_differences(differences, DType::float32, out));
  const auto first = std::find_if(differences.begin(), differences.end(), [](const OpDifference& d) { return d.error > 0; });
  ASSERT_NE(first, differences.end());
  EXPECT_EQ(first->op, "matmul");
  EXPECT_THAT(first->name, HasSubstr("layers.1.attention"));
  EXPECT_EQ(first->column, 3);
  EXPECT_THAT(out.str(), HasSubstr(first->name));
}

TEST(Comparing, ANumberThatIsNotFiniteIsADifference) {
  Rank here, there;
  here.programs.master("norm.weight").as<float>()[0] = std::nanf("");
  std::ostringstream out;
  EXPECT_TRUE(print_differences(compare_devices(here.programs, there.programs), DType::float32, out));
}

TEST(Comparing, LeavesNoGradientBehind) {
  Rank here, there, untouched;
  compare_devices(here.programs, there.programs);
  EXPECT_EQ(here.programs.finish_step(1e-2, 0, false).gradient_norm,
            untouched.programs.finish_step(1e-2, 0, false).gradient_norm);
}

}  // namespace
}  // namespace attamba
