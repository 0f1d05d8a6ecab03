// Exit codes and messages of the program. Every mistake here is found before anything starts, so these tests are quick.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "src/core/error.h"
#include "tests/launch/shell.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

Outcome run(const std::string& arguments) {
  return shell(std::string(ATTAMBA_PROGRAM) + " " + arguments);
}

/// The one line that a mistaken command line gives, with exit code 2.
std::string usage_error(const std::string& arguments) {
  const Outcome outcome = run(arguments);
  EXPECT_EQ(outcome.exit_code, 2) << arguments << '\n' << outcome.output;
  EXPECT_THAT(outcome.output, StartsWith("attamba: error: ")) << arguments;
  EXPECT_EQ(outcome.output.find('\n'), outcome.output.size() - 1) << "not one line: " << outcome.output;
  return outcome.output;
}

TEST(CommandLine, VersionNamesNumberAndCommit) {
  const Outcome outcome = run("--version");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, testing::ContainsRegex("^attamba [0-9]+\\.[0-9]+\\.[0-9]+ \\(([0-9a-f]{12}(-dirty)?|unknown), "));
}

TEST(CommandLine, HelpNamesTheCommonFlows) {
  const Outcome outcome = run("--help");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("attamba train configs/"), HasSubstr("mpirun"), HasSubstr("verify")));
}

TEST(CommandLine, HelpOfTrainListsKeysBySectionWithDefaults) {
  const Outcome outcome = run("train --help");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("[model.ssm]"), HasSubstr("--model.ssm.hidden integer = 256"),
                                    HasSubstr("--optim.lr number = 0.003"), HasSubstr("[run]")));
}

TEST(CommandLine, NothingAskedForIsAMistake) {
  EXPECT_THAT(usage_error(""), HasSubstr("attamba --help"));
}

TEST(CommandLine, UnknownCommandsAndOptionsSuggestTheNearest) {
  EXPECT_THAT(usage_error("trian x.toml"), AllOf(HasSubstr("\"trian\""), HasSubstr("did you mean train?")));
  EXPECT_THAT(usage_error("train --model.dmi 64"), AllOf(HasSubstr("\"--model.dmi\""), HasSubstr("did you mean --model.dim?")));
  EXPECT_THAT(usage_error("train --lr=1"), AllOf(HasSubstr("\"--lr\""), HasSubstr("did you mean --optim.lr?")));
  EXPECT_THAT(usage_error("train --ssm.hidden 4"), HasSubstr("did you mean --model.ssm.hidden?"));
}

TEST(CommandLine, ValuesOfTheWrongTypeNameTheKey) {
  EXPECT_THAT(usage_error("train --model.dim=abc"),
              AllOf(HasSubstr("--model.dim"), HasSubstr("an integer"), HasSubstr("\"abc\"")));
  EXPECT_THAT(usage_error("train --train.debug maybe"), AllOf(HasSubstr("--train.debug"), HasSubstr("true or false")));
  EXPECT_THAT(usage_error("train --train.steps"), HasSubstr("--train.steps"));
}

TEST(CommandLine, DeviceIsShortForItsKey) {
  for (const char* command : {"train", "bench step"}) {
    EXPECT_THAT(usage_error(concat(command, " --device abacus")), HasSubstr("train.device = \"abacus\"")) << command;
  }
}

TEST(CommandLine, ImpossibleConfigurationsAreMistakes) {
  EXPECT_THAT(usage_error("train /nowhere/x.toml"), HasSubstr("/nowhere/x.toml"));
  EXPECT_THAT(usage_error("train --train.debug --model.dim 500"),
              AllOf(HasSubstr("model.dim = 500"), HasSubstr("try 496 or 504")));
  EXPECT_THAT(usage_error("train --optim.schedule cosin"), HasSubstr("did you mean \"cosine\"?"));
  EXPECT_THAT(usage_error("train --model.dim 512 --model.dim 500"), HasSubstr("model.dim = 500"));  // the last one counts
}

}  // namespace
}  // namespace attamba
