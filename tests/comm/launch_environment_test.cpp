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

TEST(LaunchEnvironment, SlurmTasksThatCannotFindEachOtherAreRefused) {
  try {
    read({{"SLURM_PROCID", "2"}, {"SLURM_STEP_NUM_TASKS", "4"}});
    FAIL() << "four tasks would have trained the same run alone";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("--mpi=pmix"));
  }
}

}  // namespace
}  // namespace attamba
