#include "comm/launch_environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "src/core/error.h"

namespace attamba {
namespace {

LaunchEnvironment read(const std::map<std::string, std::string>& variables) {
  return read_launch_environment([&](const std::string& name) {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

TEST(LaunchEnvironment, NothingSetMeansNoMpi) {
  EXPECT_FALSE(read({}).mpi);
}

TEST(LaunchEnvironment, KnowsTheLaunchersAndTheirCounts) {
  const LaunchEnvironment mpirun = read({{"OMPI_COMM_WORLD_SIZE", "4"}, {"PMIX_RANK", "1"}});
  EXPECT_TRUE(mpirun.mpi);
  EXPECT_EQ(mpirun.size, 4);
  const LaunchEnvironment hydra = read({{"PMI_RANK", "0"}, {"PMI_SIZE", "3"}});
  EXPECT_TRUE(hydra.mpi);
  EXPECT_EQ(hydra.size, 3);
  const LaunchEnvironment pmix = read({{"PMIX_RANK", "0"}});
  EXPECT_TRUE(pmix.mpi);
  EXPECT_EQ(pmix.size, 0);
  const LaunchEnvironment srun = read({{"PMIX_RANK", "5"}, {"SLURM_PROCID", "5"}, {"SLURM_STEP_NUM_TASKS", "8"}});
  EXPECT_TRUE(srun.mpi);
  EXPECT_EQ(srun.size, 8);
}

TEST(LaunchEnvironment, MpirunInsideASlurmStepCountsItsOwnRanks) {
  // mpirun's daemons are a step of one task per node; the ranks inherit that step's variables.
  const LaunchEnvironment launch = read({{"OMPI_COMM_WORLD_SIZE", "8"}, {"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "2"}});
  EXPECT_TRUE(launch.mpi);
  EXPECT_EQ(launch.size, 8);
}

TEST(LaunchEnvironment, ASlurmBatchShellIsAPlainStart) {
  EXPECT_FALSE(read({{"SLURM_JOB_ID", "7"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_NPROCS", "4"}}).mpi);
}

TEST(LaunchEnvironment, ASlurmStepOfOneTaskIsAPlainStart) {
  EXPECT_FALSE(read({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_STEP_NUM_TASKS", "1"}}).mpi);
}

TEST(LaunchEnvironment, SlurmTasksWithoutMpiMeetOnTheFirstNodeOfTheirStep) {
  const std::map<std::string, std::string> step{{"SLURM_PROCID", "2"},
                                                {"SLURM_STEP_NUM_TASKS", "4"},
                                                {"SLURM_JOB_ID", "1234"},
                                                {"SLURM_STEP_ID", "5"},
                                                {"SLURM_STEP_NODELIST", "gpu[03-04],x1"},
                                                {"SLURM_STEP_NUM_NODES", "3"}};
  const LaunchEnvironment launch = read(step);
  EXPECT_FALSE(launch.mpi);
  ASSERT_TRUE(launch.tcp);
  EXPECT_EQ(launch.tcp->rank, 2);
  EXPECT_EQ(launch.tcp->size, 4);
  EXPECT_EQ(launch.tcp->rendezvous, "gpu03:25663");
  EXPECT_EQ(launch.tcp->secret, "slurm-1234.5");
  EXPECT_TRUE(launch.tcp->several_hosts);
  auto asked_for_mpi = step;
  asked_for_mpi["ATTAMBA_TRANSPORT"] = "mpi";
  EXPECT_THAT([&] { read(asked_for_mpi); }, testing::ThrowsMessage<UsageError>(testing::HasSubstr("--mpi=pmix")));
  auto with_pmix = step;
  with_pmix["PMIX_RANK"] = "2";
  EXPECT_TRUE(read(with_pmix).mpi);
  with_pmix["ATTAMBA_TRANSPORT"] = "tcp";
  EXPECT_FALSE(read(with_pmix).mpi);
  EXPECT_TRUE(read(with_pmix).tcp);
}

TEST(LaunchEnvironment, NodeListsBeginWithTheirFirstHost) {
  EXPECT_EQ(first_host("node1"), "node1");
  EXPECT_EQ(first_host("a,b"), "a");
  EXPECT_EQ(first_host("gpu[007,012-015],z"), "gpu007");
  EXPECT_EQ(first_host("rack[2-3]n[04-07].cluster"), "rack2n04.cluster");
  EXPECT_EQ(first_host(""), "");
}

TEST(LaunchEnvironment, RanksCanBeSetByHand) {
  std::map<std::string, std::string> variables{{"ATTAMBA_RANK", "1"},
                                               {"ATTAMBA_RANKS", "3"},
                                               {"ATTAMBA_RENDEZVOUS", "node7:29500"},
                                               {"ATTAMBA_SECRET", "s"},
                                               {"ATTAMBA_CONNECT_TIMEOUT", "7"}};
  const LaunchEnvironment launch = read(variables);
  ASSERT_TRUE(launch.tcp);
  EXPECT_EQ(launch.size, 3);
  EXPECT_EQ(launch.tcp->rendezvous, "node7:29500");
  EXPECT_EQ(launch.tcp->secret, "s");
  EXPECT_EQ(launch.tcp->timeout, 7);
  const auto refused = [&](const char* name, const char* value, const char* message) {
    auto changed = variables;
    changed[name] = value;
    if (value[0] == '\0') {
      changed.erase(name);
    }
    EXPECT_THAT([&] { read(changed); }, testing::ThrowsMessage<UsageError>(testing::HasSubstr(message))) << name;
  };
  refused("ATTAMBA_RANK", "3", "ranks count from 0");
  refused("ATTAMBA_RANK", "one", "ATTAMBA_RANK is \"one\"");
  refused("ATTAMBA_RANKS", "", "ATTAMBA_RANKS");
  refused("ATTAMBA_RENDEZVOUS", "", "file:PATH");
  refused("ATTAMBA_TRANSPORT", "carrier pigeon", "mpi or tcp");
}

TEST(LaunchEnvironment, MpirunMayStartRanksThatUseTcp) {
  const LaunchEnvironment launch = read({{"OMPI_COMM_WORLD_RANK", "3"},
                                         {"OMPI_COMM_WORLD_SIZE", "4"},
                                         {"ATTAMBA_TRANSPORT", "tcp"},
                                         {"ATTAMBA_RENDEZVOUS", "file:/shared/x"}});
  ASSERT_TRUE(launch.tcp);
  EXPECT_EQ(launch.tcp->rank, 3);
  EXPECT_EQ(launch.tcp->size, 4);
}

}  // namespace
}  // namespace attamba
