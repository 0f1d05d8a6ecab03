// Whole training runs through the built program, on one small data set.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "src/core/error.h"
#include "tests/core/temporary_folder.h"
#include "tests/launch/mpirun.h"
#include "tests/launch/shell.h"
#include "tests/launch/small_training.h"

namespace attamba {

/// Every "name": value of a JSON text, as written: equal texts are equal bits.
inline std::vector<std::string> fields(const std::string& json, const std::string& name) {
  std::vector<std::string> values;
  const std::regex pattern("\"" + name + "\": ?([^,}\\n]+)");
  for (std::sregex_iterator match(json.begin(), json.end(), pattern), end; match != end; ++match) {
    values.push_back((*match)[1]);
  }
  return values;
}

/// One small data set for all tests of this program, in a folder that goes when they are done.
class Training : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    temporary_ = std::make_unique<TemporaryFolder>();
    folder_ = temporary_->path();
    prepare_small_data(ATTAMBA_PROGRAM, folder_);
  }
  static void TearDownTestSuite() { temporary_.reset(); }

  static std::filesystem::path run_folder(const std::string& name) { return folder_ / name; }

  static std::string arguments(const std::string& name, const std::string& more) {
    std::string words = " train";
    for (const auto& [key, value] : small_training()) {
      words += concat(" --", key, ' ', value);
    }
    return concat(
        words, " --train.steps 6 --train.global_batch 5 --eval.every 3 --checkpoint.every 3 --checkpoint.keep 0 --data.train ",
        (folder_ / "data/train").string(), " --data.valid ", (folder_ / "data/valid").string(), " --run.folder ",
        run_folder(name).string(), ' ', more);
  }

  /// What a shell runs to train into a folder of that name on `ranks` ranks of one thread.
  static std::string command_of(const std::string& name, int ranks, const std::string& more = "",
                                const std::string& environment = "") {
    return on_ranks(ranks, ATTAMBA_PROGRAM, environment) + arguments(name, more);
  }
  static Outcome train(const std::string& name, int ranks, const std::string& more = "", const std::string& environment = "") {
    return shell(command_of(name, ranks, more, environment));
  }
  static void train_well(const std::string& name, int ranks, const std::string& more = "",
                         const std::string& environment = "") {
    const Outcome outcome = train(name, ranks, more, environment);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  }

  static std::vector<std::string> losses(const std::string& name) {
    return fields(read_file(run_folder(name) / "metrics.jsonl"), "loss");
  }
  static std::vector<std::string> evaluations(const std::string& name) {
    return fields(read_file(run_folder(name) / "metrics.jsonl"), "eval_loss");
  }
  /// Checksum of the weights and moments after the last step.
  static std::string final_state(const std::string& name, const std::string& step = "000000006") {
    const auto sums = fields(read_file(run_folder(name) / "checkpoints" / ("step-" + step) / "manifest.json"), "state_crc32c");
    return sums.size() == 1 ? sums[0] : "no checkpoint in " + name;
  }
  static void expect_same_run(const std::string& a, const std::string& b) {
    EXPECT_EQ(losses(a).size(), 6u);
    EXPECT_EQ(losses(a), losses(b)) << a << " and " << b;
    EXPECT_EQ(evaluations(a), evaluations(b)) << a << " and " << b;
    EXPECT_EQ(final_state(a), final_state(b)) << a << " and " << b;
  }

  static inline std::unique_ptr<TemporaryFolder> temporary_;
  static inline std::filesystem::path folder_;
};

}  // namespace attamba
