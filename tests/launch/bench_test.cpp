// Benchmarks through the built program. What they measure depends on the machine; what they count does not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "src/core/error.h"
#include "tests/launch/shell.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;

class Bench : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "attamba-bench-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path folder_;
};

TEST_F(Bench, MatmulListsEveryProductOfAStepBesideTheLibrary) {
  const fs::path json_file = folder_ / "matmul.json";
  const std::string command = concat(
      ATTAMBA_PROGRAM,
      " bench matmul --model.kind transformer --model.vocab_size 300 --model.dim 32 --model.n_layers 3 --model.n_heads 2 "
      "--model.ffn_dim 48 --data.sequence_length 64 --train.micro_batch 2 --train.dtype bfloat16 --repeats 1 --json ",
      json_file.string());
  const Outcome outcome = shell(command);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, testing::AllOf(testing::HasSubstr("GFLOP/s"), testing::HasSubstr("all products of a step")));

  const auto json = nlohmann::json::parse(std::ifstream(json_file));
  EXPECT_GT(json["ratio"], 0.0);
  EXPECT_GE(json["disturbance"], 0.0);
  double flops = 0, weight_gradients = 0;
  for (const auto& row : json["products"]) {
    EXPECT_GT(row["ratio"], 0.0) << row;
    const double multiplications = row["m"].get<double>() * row["n"].get<double>() * row["k"].get<double>();
    flops += row["runs_per_step"].get<double>() * multiplications;
    weight_gradients += row["product"] == "a^T b +=" ? row["runs_per_step"].get<double>() * multiplications : 0;
  }
  // Per token and layer: wq, wk, wv, wo 4 x 32 x 32, and three of 32 x 48; the output 32 x 300. Each thrice in a step: itself,
  // its input's gradient and its weight's.
  const double forward = 2 * 64 * (3 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 300);
  EXPECT_EQ(flops, 3 * forward);
  EXPECT_EQ(weight_gradients, forward);
}

}  // namespace
}  // namespace attamba
