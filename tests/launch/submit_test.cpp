// attamba submit: the job script that it makes. tests/slurm runs such scripts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "src/core/error.h"
#include "tests/core/temporary_folder.h"
#include "tests/launch/shell.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class Submit : public testing::Test {
 protected:
  void SetUp() override {
    std::ofstream(folder_ / "a run.toml") << "[data]\ntrain = [\"tokens\"]\n[run]\nfolder = \""
                                          << (folder_ / "runs/first").string() << "\"\n[train]\nthreads = 6\n";
  }
  Outcome submit(const std::string& more, const std::string& environment = "") const {
    return shell(concat(environment, ' ', ATTAMBA_PROGRAM, " submit '", (folder_ / "a run.toml").string(), "' ", more));
  }

  TemporaryFolder folder_;
};

TEST_F(Submit, FillsTheJobScriptFromTheConfiguration) {
  const Outcome outcome = submit(
      "--nodes 4 --gpus 8 --time 2-00:00:00 --partition gpu --optim.lr 1e-3 --train.watch \"layers.0.*'\" --sbatch=--exclusive "
      "--dry-run");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("#SBATCH --job-name=first\n"), HasSubstr("#SBATCH --nodes=4\n"),
                                    HasSubstr("#SBATCH --ntasks-per-node=8\n"), HasSubstr("#SBATCH --gpus-per-node=8\n"),
                                    HasSubstr("#SBATCH --cpus-per-task=6\n"), HasSubstr("#SBATCH --time=2-00:00:00\n"),
                                    HasSubstr("#SBATCH --partition=gpu\n"), HasSubstr("#SBATCH --exclusive\n")));
  EXPECT_THAT(outcome.output, HasSubstr(concat("--output=", (folder_ / "runs/first.slurm/%j.out").string())));
  EXPECT_THAT(outcome.output, HasSubstr(concat(" train '", (folder_ / "a run.toml").string(), "'")));
  EXPECT_THAT(outcome.output, HasSubstr("'--train.watch=layers.0.*'\\'''"));
  EXPECT_FALSE(fs::exists(folder_ / "runs")) << "a dry run makes nothing";
  std::ofstream(folder_ / "script") << outcome.output;
  const Outcome checked = shell(concat("bash -n ", (folder_ / "script").string()));
  EXPECT_EQ(checked.exit_code, 0) << checked.output;
}

TEST_F(Submit, HandsTheScriptToSbatch) {
  fs::create_directories(folder_ / "bin");
  std::ofstream(folder_ / "bin/sbatch") << "#!/bin/sh\ngrep -c '^set -- ' \"$1\"\necho \"Submitted batch job 7\"\n";
  fs::permissions(folder_ / "bin/sbatch", fs::perms::owner_all);
  const Outcome outcome = submit("", concat("PATH=", (folder_ / "bin").string(), ":$PATH"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("1\nSubmitted batch job 7"), HasSubstr("first.slurm")));
}

TEST_F(Submit, SaysWhatToDoWhereThereIsNoSlurm) {
  const Outcome outcome = submit("", "PATH=/nonexistent");
  EXPECT_EQ(outcome.exit_code, 2) << outcome.output;
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("no sbatch"), HasSubstr("login node"), HasSubstr("train.sbatch")));
}

TEST_F(Submit, FindsMistakesBeforeTheQueueDoes) {
  const Outcome value = submit("--model.dim 0 --dry-run");
  EXPECT_EQ(value.exit_code, 2) << value.output;
  EXPECT_THAT(value.output, AllOf(HasSubstr("model.dim"), Not(HasSubstr("#SBATCH"))));
  const Outcome bundle = submit("--bundle /nonexistent/attamba.tar.gz --dry-run");
  EXPECT_EQ(bundle.exit_code, 2);
  EXPECT_THAT(bundle.output, AllOf(HasSubstr("/nonexistent/attamba.tar.gz"), HasSubstr("package.sh")));
}

}  // namespace
}  // namespace attamba
