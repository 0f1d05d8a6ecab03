// Benchmarks through the built program. What they measure depends on the machine; what they count does not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "src/core/error.h"
#include "tests/core/temporary_folder.h"
#include "tests/launch/shell.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;

class Bench : public testing::Test {
 protected:
  TemporaryFolder folder_;
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

/// Keys that queries of a sequence of n see, by the definition: chunk ends (every 4th token), and the last 2 tokens.
double keys_of_chunks(std::int64_t n) {
  std::int64_t keys = 0;
  for (std::int64_t query = 0; query < n; ++query) {
    for (std::int64_t key = 0; key <= query; ++key) {
      keys += key % 4 == 3 || key > query - 2 ? 1 : 0;
    }
  }
  return static_cast<double>(keys) / static_cast<double>(n);
}

TEST_F(Bench, KernelsAreThoseOfAStepAndAttentionCountsTheKeysThatQueriesSee) {
  const fs::path json_file = folder_ / "kernels.json", peer = folder_ / "peer";
  std::ofstream(peer) << R"(echo '{"pattern": "dense", "backend": "flash", "sequence_length": 60, "forward_backward": )"
                         R"({"median_seconds": 1, "timed_as": "8 queued calls"}}')";
  const Outcome outcome = shell(concat(
      ATTAMBA_PROGRAM,
      " bench kernels --model.vocab_size 300 --model.dim 32 --model.n_layers 3 --model.n_heads 2 --model.ffn_dim 48 "
      "--model.ssm.hidden 16 --model.ssm.state 8 --model.ssm.heads 2 --model.chunking.strategy uniform --model.chunking.size 4 "
      "--model.chunking.leading_tokens 2 --data.sequence_length 64 --train.micro_batch 2 --train.device cpu --seconds 0.001 "
      "--repeats 1 --lengths 32,60 --tokens 120 --compare torch --python '/bin/sh ",
      peer.string(), "' --json ", json_file.string()));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, testing::HasSubstr("outside kernels"));
  EXPECT_THAT(outcome.output, testing::HasSubstr("(flash, as 8 queued calls)"));

  const auto json = nlohmann::json::parse(std::ifstream(json_file));
  EXPECT_GT(json["copy_bytes_per_s"], 0.0);
  EXPECT_EQ(json["device"], "CPU");
  double products = 0, scans = 0, attentions = 0;
  for (const auto& row : json["kernels"]) {
    EXPECT_GT(row["median_seconds"], 0.0) << row;
    EXPECT_GE(row["median_seconds"], row["best_seconds"]) << row;
    EXPECT_GT(row["roofline_share"], 0.0) << row;
    const std::string kernel = row["kernel"];
    const double runs = row["runs_per_step"], flops = row["flops"];
    const bool product = kernel == "matmul" || kernel == "linear_weight_gradient" || kernel == "linear_cross_entropy";
    products += product ? runs * flops : 0;
    scans += kernel == "chunk_scan" ? runs : 0;
    attentions += kernel == "attention" || kernel == "attention_backward" ? runs : 0;
  }
  // Per token and layer: wq and wo 2 x 32 x 32, both SSMs' projections 32 x (2 x 16 + 2 x 8 + 2) in and 16 x 32 out, and three
  // of 32 x 48; the output 32 x 300. Each thrice in a step, two operations a multiplication.
  EXPECT_EQ(products, 3 * 2 * 2 * 64 * (3 * (2 * 32 * 32 + 2 * (32 * 50 + 16 * 32) + 3 * 32 * 48) + 32 * 300));
  EXPECT_EQ(scans, 3 * 2);
  EXPECT_EQ(attentions, 3 * 2);

  ASSERT_EQ(json["attention"].size(), 4u);
  ASSERT_EQ(json["torch"]["speedups"].size(), 2u);
  for (const auto& row : json["attention"]) {
    const std::int64_t n = row["sequence_length"];
    const double keys = row["pattern"] == "dense" ? (static_cast<double>(n) + 1) / 2 : keys_of_chunks(n);
    EXPECT_DOUBLE_EQ(row["keys_per_query"], keys) << row;
    EXPECT_EQ(row["sequences"], 120 / n);
    const double median = row["forward_backward"]["median_seconds"];
    for (const auto& speedup : json["torch"]["speedups"]) {
      const bool this_row = speedup["pattern"] == row["pattern"] && n == 60;
      EXPECT_TRUE(!this_row || speedup["forward_backward"] == 1 / median) << speedup;
    }
    EXPECT_NEAR(row["forward_backward"]["flops"], 14 * keys * static_cast<double>(120 / n * n) * 2 * 16, 1e-3) << row;
  }
}

TEST_F(Bench, OpsStateTheirShareOfTheRooflineAndWhatLiesOutsideOfThem) {
  const fs::path json_file = folder_ / "ops.json";
  const Outcome outcome = shell(
      concat(ATTAMBA_PROGRAM,
             " bench ops --model.kind transformer --model.vocab_size 300 --model.dim 32 --model.n_layers 2 --model.n_heads 2 "
             "--model.ffn_dim 48 --data.sequence_length 64 --train.micro_batch 2 --train.device cpu --repeats 2 --json ",
             json_file.string()));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, testing::AllOf(testing::HasSubstr("of roofline"), testing::HasSubstr("outside of ops")));
  const auto json = nlohmann::json::parse(std::ifstream(json_file));
  // The update reads and writes weights, both moments and gradients, float32 each.
  const auto parameters = static_cast<double>(json["parameters"]);
  EXPECT_NEAR(json["ops"]["adamw"]["bytes"], 2 * 8 * 4 * parameters, 2 * 200);
  EXPECT_GT(json["ops"]["adamw"]["roofline_share"], 0.0);
  EXPECT_LT(json["outside_share"], 1.0);
}

}  // namespace
}  // namespace attamba
