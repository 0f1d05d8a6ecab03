#include "comm/single_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

#include "comm/launch_environment.h"
#ifdef ATTAMBA_HAS_MPI
#include "comm/mpi_communicator.h"
#endif

namespace attamba {
namespace {

template <class T>
Tensor view(std::vector<T>& values) {
  return {values.data(), {kDTypeOf<T>, {static_cast<std::int64_t>(values.size())}}};
}

TEST(MakeCommunicator, APlainStartNeedsNoMpi) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "SLURM_STEP_NUM_TASKS"}) {
    unsetenv(name);
  }
  const auto comm = make_communicator();
  EXPECT_EQ(comm->size(), 1);
  EXPECT_EQ(comm->local_size(), 1);
#ifdef ATTAMBA_HAS_MPI
  int initialized = -1;
  MPI_Initialized(&initialized);
  EXPECT_EQ(initialized, 0);
#endif
}

TEST(SingleProcess, CollectivesKeepTheDataOfTheOnlyRank) {
  SingleProcess comm;
  std::vector<float> data = {1.5f, -2.0f, 3.25f};
  const std::vector<float> expected = data;
  comm.all_reduce_sum(view(data));
  comm.start_all_reduce_sum(view(data))->wait();
  comm.all_reduce_max(view(data));
  comm.broadcast(view(data), 0);
  comm.barrier();
  EXPECT_EQ(data, expected);

  std::vector<float> whole(3);
  comm.all_gather(view(whole), view(data));
  EXPECT_EQ(whole, expected);
  comm.all_gather(view(whole), view(whole));
  EXPECT_EQ(whole, expected);

  std::vector<float> sum(3), gathered(3);
  comm.start_reduce_scatter_sum(view(whole), view(sum))->wait();
  comm.start_all_gather(view(gathered), view(sum))->wait();
  EXPECT_EQ(gathered, expected);
  comm.start_reduce_scatter_sum(view(sum), view(sum))->wait();
  EXPECT_EQ(sum, expected);
}

TEST(SingleProcess, RefusesWhatManyRanksWouldRefuse) {
  SingleProcess comm;
  std::vector<bfloat16> half(4);
  EXPECT_THROW(comm.all_reduce_sum(view(half)), Error);
  EXPECT_THROW(comm.start_all_reduce_sum(view(half)), Error);
  EXPECT_THROW(comm.all_reduce_max(view(half)), Error);
  std::vector<int> values(4);
  EXPECT_THROW(comm.broadcast(view(values), 1), Error);
  std::vector<int> shorter(3);
  EXPECT_THROW(comm.all_gather(view(values), view(shorter)), Error);
  const Tensor shifted{values.data() + 1, {DType::int32, {3}}};
  const Tensor front{values.data(), {DType::int32, {3}}};
  EXPECT_THROW(comm.all_gather(front, shifted), Error);
  EXPECT_THROW(comm.start_all_gather(front, shifted), Error);
  EXPECT_THROW(comm.start_reduce_scatter_sum(front, shifted), Error);
  EXPECT_THROW(comm.start_reduce_scatter_sum(view(values), view(shorter)), Error);
  EXPECT_THROW(comm.start_reduce_scatter_sum(view(half), view(half)), Error);
}

TEST(SingleProcessDeathTest, AbortExitsWithTheCodeAndKeepsTheOutput) {
  EXPECT_EXIT(
      {
        std::fputs("last words", stderr);
        SingleProcess().abort(9);
      },
      testing::ExitedWithCode(9), "last words");
}

}  // namespace
}  // namespace attamba
