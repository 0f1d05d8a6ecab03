#include "comm/gpu_ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>

#include "comm/launch_environment.h"
#include "src/core/error.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

const std::vector<GpuOfRank> kTwoHosts{
    {"node1", "GPU-a", "H100", 22809}, {"node1", "GPU-b", "H100", 22809}, {"node2", "GPU-c", "H100", 22809}};

TEST(GpuRanks, OneGpuEachIsFineAndDescribed) {
  EXPECT_NO_THROW(require_usable_for_nccl(kTwoHosts));
  EXPECT_EQ(describe_gpus(kTwoHosts), "3 GPUs on 2 hosts (H100)");
}

TEST(GpuRanks, SharingAGpuIsAnErrorThatNamesItAndWhatToDo) {
  std::vector<GpuOfRank> ranks = kTwoHosts;
  ranks[1].gpu = ranks[0].gpu;
  EXPECT_THAT([&] { require_usable_for_nccl(ranks); },
              ThrowsMessage<UsageError>(AllOf(HasSubstr("ranks 0 and 1"), HasSubstr("GPU-a"), HasSubstr("node1"),
                                              HasSubstr("train.transport = \"staged\""), HasSubstr("one rank per GPU"))));
}

TEST(GpuRanks, VersionsMustAgree) {
  std::vector<GpuOfRank> ranks = kTwoHosts;
  ranks[2].library_version = 22304;
  EXPECT_THAT([&] { require_usable_for_nccl(ranks); },
              ThrowsMessage<UsageError>(AllOf(HasSubstr("2.28.9"), HasSubstr("rank 2 (host node2) has 2.23.4"))));
  EXPECT_EQ(nccl_version_text(2708), "2.7.8");
}

TEST(GpuRanks, AMissingLibraryIsNamedWithThePlacesAndTheAdvice) {
  const std::array<std::string, 2> places{"libattamba-none.so.2", "/nowhere/libattamba-none.so.2"};
  EXPECT_THAT([&] { open_library(places, "install it"); },
              ThrowsMessage<UsageError>(
                  AllOf(HasSubstr("libattamba-none.so.2, /nowhere/"), HasSubstr("No such file"), HasSubstr("install it"))));
  const std::array<std::string, 2> second_works{"/nowhere/libm.so.6", "libm.so.6"};
  EXPECT_NE(open_library(second_works, ""), nullptr);
}

const CollectiveCall kBucket{CollectiveCall::Kind::start_all_reduce_sum, DType::float32, 0, 4000},
    kLast{CollectiveCall::Kind::start_all_gather, DType::int64, 0, 32};
constexpr int kStep = 1, kOther = 2;

TEST(CollectiveLog, NothingIsStuckBeforeTheLimitOrWithoutWork) {
  CollectiveLog log;
  EXPECT_FALSE(log.stuck(1000, 10));
  log.add(kBucket, false, 1000);
  EXPECT_TRUE(log.close_piece(kStep, 1000));
  EXPECT_FALSE(log.stuck(1009, 10));
  EXPECT_TRUE(log.stuck(1011, 10));
  EXPECT_FALSE(log.stuck(1e9, 0)) << "a limit of 0 is none";
  log.observe(1, 0, 1012);
  EXPECT_FALSE(log.stuck(2000, 10)) << "everything is done";
}

TEST(CollectiveLog, NamesTheCollectiveAfterTheLastFinishedOne) {
  CollectiveLog log;
  EXPECT_EQ(log.add(kBucket, false, 0), 1u);
  EXPECT_EQ(log.add(kBucket, false, 0), 2u);
  EXPECT_EQ(log.add(kLast, false, 0), 3u);
  log.close_piece(kStep, 0);
  log.observe(0, CollectiveLog::mark_after(2), 5);
  EXPECT_FALSE(log.stuck(14, 10)) << "the second one finished at 5";
  const auto stuck = log.stuck(16, 10);
  ASSERT_TRUE(stuck);
  EXPECT_EQ(stuck->number, 3);
  EXPECT_EQ(stuck->position, 3u);
  EXPECT_EQ(stuck->call.signature(), kLast.signature());
  EXPECT_EQ(stuck->seconds, 11);
  EXPECT_THAT(describe_stuck(*stuck, 3, 8, "node7"),
              AllOf(HasSubstr("rank 3 of 8 on node7"),
                    HasSubstr("start_all_gather of 32 bytes of int64, collective number 3 (3 of 3"), HasSubstr("11 s")));
}

TEST(CollectiveLog, ReplaysOfARecordingCountOn) {
  CollectiveLog log;
  log.add(kBucket, true, 0);
  log.add(kLast, true, 0);
  EXPECT_FALSE(log.stuck(100, 10)) << "recording runs nothing";
  for (int step = 0; step < 3; ++step) {
    log.close_piece(kStep, 100 + step);
    log.observe(step == 0 ? 0 : 1, 0, 100 + step);
  }
  log.observe(0, CollectiveLog::mark_after(1), 103);  // the third replay has finished its first
  const auto stuck = log.stuck(114, 10);
  ASSERT_TRUE(stuck);
  EXPECT_EQ(stuck->number, 6);
  EXPECT_EQ(stuck->of, 2u);
}

TEST(CollectiveLog, RecordingsAreToldApart) {
  CollectiveLog log;
  EXPECT_FALSE(log.close_piece(kOther, 0)) << "a piece without collectives";
  log.add(kBucket, true, 0);
  EXPECT_TRUE(log.close_piece(kStep, 1));
  log.add(kLast, true, 2);
  log.add(kLast, true, 2);
  EXPECT_TRUE(log.close_piece(kOther, 2));
  EXPECT_TRUE(log.close_piece(kStep, 3));  // a replay of the first
  EXPECT_FALSE(log.close_piece(3, 4));
  log.observe(2, 0, 4);
  const auto stuck = log.stuck(15, 10);
  ASSERT_TRUE(stuck);
  EXPECT_EQ(stuck->number, 4);
  EXPECT_EQ(stuck->of, 1u);
  EXPECT_EQ(stuck->call.signature(), kBucket.signature());
}

TEST(CollectiveLog, CollectivesThatRunOneByOneAreWatchedBeforeTheirPieceIsClosed) {
  CollectiveLog log;
  log.add(kBucket, false, 0);
  log.add(kBucket, false, 1);
  log.observe(0, CollectiveLog::mark_after(1), 2);
  EXPECT_TRUE(log.stuck(13, 10)) << "the host may be waiting for the second one";
  log.observe(0, CollectiveLog::mark_after(2), 14);
  EXPECT_FALSE(log.stuck(100, 10)) << "both are done, and the host may take its time";
}

TEST(CollectiveLog, TellsWhereTheDeviceIs) {
  CollectiveLog log;
  const auto expect = [&](std::int64_t number, bool inside, const CollectiveCall& call) {
    const CollectiveProgress::Position at = log.position();
    EXPECT_EQ(at.number, number);
    EXPECT_EQ(at.inside, inside);
    EXPECT_EQ(at.signature, call.signature());
  };
  log.add(kBucket, true, 0);
  log.add(kLast, true, 0);
  log.close_piece(kStep, 0);
  log.close_piece(kStep, 0);
  log.observe(0, 0, 1);
  EXPECT_EQ(log.position().number, 0);
  log.observe(0, CollectiveLog::mark_before(1), 1);
  expect(1, true, kBucket);
  log.observe(0, CollectiveLog::mark_after(1), 2);
  expect(1, false, kBucket);
  log.observe(0, CollectiveLog::mark_before(2), 3);
  expect(2, true, kLast);
  log.observe(0, CollectiveLog::mark_before(1), 4);  // of the second replay, before the first one's end was seen
  expect(2, true, kLast);
  log.observe(1, CollectiveLog::mark_before(1), 5);
  expect(3, true, kBucket);
  log.observe(1, 0, 6);
  expect(4, false, kLast);
}

TEST(Timeouts, AreNumbersOfSeconds) {
  const auto with = [](const char* text) { return [=](const std::string&) { return std::optional<std::string>(text); }; };
  EXPECT_EQ(seconds_from_environment("ATTAMBA_TIMEOUT", 600, [](const std::string&) { return std::nullopt; }), 600);
  EXPECT_EQ(seconds_from_environment("ATTAMBA_TIMEOUT", 600, with("2.5")), 2.5);
  for (const char* wrong : {"", "ten", "5s", "-1", "nan", "inf"}) {
    EXPECT_THAT([&] { seconds_from_environment("ATTAMBA_TIMEOUT", 600, with(wrong)); },
                ThrowsMessage<UsageError>(HasSubstr("ATTAMBA_TIMEOUT")))
        << wrong;
  }
}

}  // namespace
}  // namespace attamba
