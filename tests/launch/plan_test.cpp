// `attamba plan` as a user calls it, in a folder without data.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "src/core/error.h"
#include "tests/launch/shell.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;

Outcome plan(const std::string& arguments) {
  return shell(concat("cd / && ", ATTAMBA_PROGRAM, " plan ", arguments));
}

std::string config(const std::string& name) {
  return concat(ATTAMBA_SOURCE_DIR, "/configs/", name, ".toml");
}

TEST(Plan, NeedsNoDataAndScalesToAThousandRanks) {
  const Outcome table = plan(config("attamba_62m") + " --ranks 8 --gpu h200 --train.micro_batch 2 --tokens 8e9");
  ASSERT_EQ(table.exit_code, 0) << table.output;
  EXPECT_THAT(table.output, AllOf(HasSubstr("62,751,488 parameters"), HasSubstr("8 x H200"), HasSubstr("master weights"),
                                  HasSubstr("ring all-reduce"), HasSubstr("GPU-hours"), HasSubstr("not measured")));
  EXPECT_THAT(table.output, testing::Not(HasSubstr("warning")));

  const Outcome large =
      plan(concat("--config ", config("attamba_1b"), " --ranks 1024 --train.global_batch 1024 --train.micro_batch 1 --json -"));
  ASSERT_EQ(large.exit_code, 0) << large.output;
  const auto json = nlohmann::json::parse(large.output);
  EXPECT_EQ(json["ranks"], 1024);
  EXPECT_GT(json["exposed_communication_seconds"], 0.0);
  EXPECT_EQ(json["zero_stages"].size(), 4u);
}

TEST(Plan, TyposGetTheNearestName) {
  const Outcome gpu = plan(config("attamba_62m") + " --gpu H20");
  EXPECT_EQ(gpu.exit_code, 2);
  EXPECT_THAT(gpu.output, HasSubstr("did you mean \"H200\"?"));
  const Outcome key = plan(config("attamba_62m") + " --train.mirco_batch 4");
  EXPECT_EQ(key.exit_code, 2);
  EXPECT_THAT(key.output, HasSubstr("did you mean --train.micro_batch?"));
  const Outcome batch = plan(config("attamba_62m") + " --train.micro_batch 3");
  EXPECT_EQ(batch.exit_code, 2);
  EXPECT_THAT(batch.output, HasSubstr("train.global_batch"));
}

}  // namespace
}  // namespace attamba
