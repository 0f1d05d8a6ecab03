// launch/mpirun.sh: what it asks of mpirun, and what becomes of exit codes and signals. two_hosts.sh starts ranks on two hosts.
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

class Mpirun : public testing::Test {
 protected:
  static Outcome start(const std::string& arguments, const std::string& environment = "") {
    return shell(concat("env OMP_NUM_THREADS=1 ", environment, " bash ", ATTAMBA_SOURCE_DIR, "/launch/mpirun.sh ", arguments));
  }

  TemporaryFolder folder_;
};

TEST_F(Mpirun, NamesHostsRanksAndEnvironment) {
  const Outcome hosts = start("--hosts far1:4,far2:4 --dry-run attamba train x.toml", "ATTAMBA_TIMEOUT=7 NCCL_DEBUG=INFO");
  ASSERT_EQ(hosts.exit_code, 0) << hosts.output;
  EXPECT_THAT(hosts.output, AllOf(HasSubstr("mpirun -np 8 --host far1:4"), HasSubstr("-x ATTAMBA_TIMEOUT "),
                                  HasSubstr("-x NCCL_DEBUG "), HasSubstr("-x PATH "), HasSubstr(" attamba train x.toml")));
  std::ofstream(folder_ / "hosts") << "# two machines\nfar1 slots=2\nfar2 slots=1 # small\n";
  const Outcome file = start(concat("--hostfile ", (folder_ / "hosts").string(), " --dry-run true"));
  EXPECT_THAT(file.output, HasSubstr("mpirun -np 3 --hostfile"));
}

TEST_F(Mpirun, MoreRanksThanCoresAreNotBoundToThem) {
  const Outcome many = start("-n 1000 --dry-run true");
  EXPECT_THAT(many.output, AllOf(HasSubstr("more ranks than cores"), HasSubstr("--bind-to none")));
  const Outcome one = start("-n 1 --dry-run true");
  EXPECT_THAT(one.output, Not(HasSubstr("more ranks than cores")));
}

TEST_F(Mpirun, MistakesNameTheValue) {
  EXPECT_THAT(start("-n many true").output, HasSubstr("\"many\""));
  EXPECT_THAT(start("--hosts a:0 true").output, HasSubstr("\"0\" slots"));
  EXPECT_THAT(start("--hostfile /nonexistent true").output, HasSubstr("/nonexistent"));
  const Outcome far = start("--hosts far1 true", "ATTAMBA_SSH=false");
  EXPECT_EQ(far.exit_code, 2);
  EXPECT_THAT(far.output, AllOf(HasSubstr("far1"), HasSubstr("without a password")));
}

TEST_F(Mpirun, TheExitCodeIsTheCommands) {
  EXPECT_EQ(start("-n 2 true").exit_code, 0);
  EXPECT_EQ(start("-n 2 sh -c 'exit 7'").exit_code, 7);
}

TEST_F(Mpirun, AStoppedRunIsStartedAgainAsOftenAsAsked) {
  std::ofstream(folder_ / "command.sh") << "echo once >> " << (folder_ / "starts").string() << "\n"
                                        << "[ $(wc -l < " << (folder_ / "starts").string() << ") -ge 3 ] || exit 75\n";
  const std::string command = concat("sh ", (folder_ / "command.sh").string());
  const Outcome few = start(concat("-n 1 --requeue 1 ", command));
  EXPECT_EQ(few.exit_code, 75) << few.output;
  const Outcome enough = start(concat("-n 1 --requeue 5 ", command));
  EXPECT_EQ(enough.exit_code, 0) << enough.output;
  fs::remove(folder_ / "starts");
  EXPECT_EQ(start(concat("-n 1 --requeue 5 ", command)).exit_code, 0);
}

TEST_F(Mpirun, AnMpirunThatHangsWithoutRanksIsEnded) {
  fs::create_directory(folder_ / "bin");
  std::ofstream(folder_ / "bin/mpirun") << "#!/bin/sh\n"
                                           "case \"$*\" in *hang*) sleep 0.3 & exec sleep 300 ;; esac\n"
                                           "sleep 4\nexit 3\n";
  fs::permissions(folder_ / "bin/mpirun", fs::perms::owner_all);
  const auto with_fake = [&](const char* command) {
    return shell(concat("ATTAMBA_PATIENCE=2 PATH=", (folder_ / "bin").string(), ":$PATH bash ", ATTAMBA_SOURCE_DIR,
                        "/launch/mpirun.sh -n 1 ", command));
  };
  const Outcome hung = with_fake("hang");
  EXPECT_EQ(hung.exit_code, 137) << hung.output;
  EXPECT_THAT(hung.output, HasSubstr("mpirun has had no process for 2 s"));
  const Outcome busy = with_fake("work");
  EXPECT_EQ(busy.exit_code, 3) << "it has a process: " << busy.output;
}

TEST_F(Mpirun, ASignalLetsRanksFinishAndIsNoReasonToStartAgain) {
  std::ofstream(folder_ / "rank.sh") << "trap 'sleep 2; echo saved; exit 75' USR1\necho ready > "
                                     << (folder_ / "ready").string() << "\nfor i in $(seq 300); do sleep 0.1; done\n";
  for (const char* signal : {"TERM", "USR2", "HUP"}) {
    fs::remove(folder_ / "ready");
    const Outcome outcome =
        shell(concat("bash ", ATTAMBA_SOURCE_DIR, "/launch/mpirun.sh -n 2 --requeue 5 sh ", (folder_ / "rank.sh").string(),
                     " & script=$!; until [ -e ", (folder_ / "ready").string(), " ]; do sleep 0.1; done; sleep 0.3; kill -",
                     signal, " $script; wait $script"));
    EXPECT_EQ(outcome.exit_code, 75) << signal << ": " << outcome.output;
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("saved"), Not(HasSubstr("going on")))) << signal;
  }
}

}  // namespace
}  // namespace attamba
