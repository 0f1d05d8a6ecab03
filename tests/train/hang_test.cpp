// Whom the watchdog blames for a hang, on a clock that the test turns.
#include "src/train/hang.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace attamba {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

/// Lanes of the groups that share a model, and of those that hold the same part.
constexpr std::size_t kSharers = CollectiveProgress::kLanes + CollectiveProgress::background;
constexpr std::size_t kCopies = 2 * CollectiveProgress::kLanes + CollectiveProgress::background;

constexpr double kSilence = 8.5, kLimit = 8.5, kPatience = 600;

/// Ranks that beat twice a second, and get on unless they wait or `hung` says otherwise.
class Job {
 public:
  explicit Job(int ranks)
      : judge(hosts(ranks), kSilence, 0), beats(static_cast<std::size_t>(ranks)), hung(static_cast<std::size_t>(ranks)) {
    for (int r = 0; r < ranks; ++r) {
      beats[static_cast<std::size_t>(r)].rank = r;
      in(r, Phase::step, kLimit);
    }
  }
  static std::vector<std::string> hosts(int ranks) {
    std::vector<std::string> names;
    for (int r = 0; r < ranks; ++r) {
      names.push_back("node" + std::to_string(r / 2));
    }
    return names;
  }
  Heartbeat& rank(int r) { return beats[static_cast<std::size_t>(r)]; }
  void in(int r, Phase phase, double limit) {
    rank(r).phase = static_cast<std::int32_t>(phase);
    rank(r).limit = limit;
    ++rank(r).ticks;
  }
  /// The rank enters its next collective of a lane, and waits.
  void enter(int r, std::size_t lane = CollectiveProgress::background, std::size_t bytes = 4096) {
    auto& position = rank(r).lanes[lane];
    ++position.number;
    position.signature = CollectiveCall{CollectiveCall::Kind::start_all_reduce_sum, DType::float32, 0, bytes}.signature();
    position.inside = true;
    rank(r).waiting = 1;
    ++rank(r).ticks;
  }
  void leave(int r, std::size_t lane = CollectiveProgress::background) {
    rank(r).lanes[lane].inside = false;
    rank(r).waiting = 0;
    ++rank(r).ticks;
  }
  /// Lets time pass, during which `stopped` ranks send nothing; the first finding, and when.
  std::optional<HangJudge::Finding> pass(double seconds, const std::vector<int>& stopped = {}) {
    for (const double end = now + seconds; now < end;) {
      now += 0.5;
      for (Heartbeat& beat : beats) {
        beat.ticks += beat.waiting == 0 && !hung[static_cast<std::size_t>(beat.rank)] ? 1 : 0;
        if (std::find(stopped.begin(), stopped.end(), beat.rank) == stopped.end()) {
          judge.heard(beat, now);
        }
      }
      if (auto finding = judge.judge(now)) {
        return finding;
      }
    }
    return std::nullopt;
  }

  HangJudge judge;
  std::vector<Heartbeat> beats;
  std::vector<bool> hung;
  double now = 0;
};

TEST(Hang, RanksThatGetOnAreLeftAlone) {
  Job job(3);
  for (int step = 0; step < 100; ++step) {
    for (int r = 0; r < 3; ++r) {
      job.enter(r);
    }
    ASSERT_FALSE(job.pass(3));
    for (int r = 0; r < 3; ++r) {
      job.leave(r);
    }
    ASSERT_FALSE(job.pass(3));
  }
}

TEST(Hang, AStoppedRankIsNamedWithTheCollectiveThatWaitsForIt) {
  Job job(4);
  for (int r = 0; r < 4; ++r) {
    job.rank(r).step = 57;
  }
  ASSERT_FALSE(job.pass(5));
  for (const int r : {0, 1, 3}) {
    job.enter(r);
  }
  const double began = job.now;
  const auto finding = job.pass(60, {2});
  ASSERT_TRUE(finding);
  EXPECT_LE(job.now - began, 10);
  EXPECT_THAT(finding->ranks, ElementsAre(2));
  EXPECT_EQ(finding->step, 57);
  EXPECT_EQ(finding->number, 1);
  EXPECT_THAT(describe(*finding, Job::hosts(4)),
              testing::AllOf(HasSubstr("rank 2 of 4 on node1: no sign of life for"), HasSubstr("after step 57"),
                             HasSubstr("collective number 1 (start_all_reduce_sum of 4096 bytes of float32, background)")));
}

TEST(Hang, LostHeartbeatsOfAJobThatGetsOnAreNoHang) {
  Job job(3);
  for (int step = 0; step < 20; ++step) {
    for (int r = 0; r < 3; ++r) {
      ++job.rank(r).step;
    }
    ASSERT_FALSE(job.pass(2, {2})) << "ranks 0 and 1 could not step without rank 2";
  }
  const double began = job.now;
  const auto finding = job.pass(60, {2});
  ASSERT_TRUE(finding) << "nobody steps any more";
  EXPECT_LE(job.now - began, 10);
  EXPECT_THAT(finding->ranks, ElementsAre(2));
}

TEST(Hang, ARankIsNamedAlsoWhereThoseThatWaitForItHavePatience) {
  Job job(3);
  ASSERT_FALSE(job.pass(5));
  for (const int r : {0, 1}) {
    job.in(r, Phase::saving, kPatience);
    job.enter(r, CollectiveProgress::foreground);
  }
  job.hung[2] = true;
  const double began = job.now;
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  EXPECT_LE(job.now - began, 10);
  EXPECT_THAT(finding->ranks, ElementsAre(2));
}

TEST(Hang, AllRanksOfADeadHostAreNamed) {
  Job job(6);
  ASSERT_FALSE(job.pass(5));
  const auto finding = job.pass(60, {2, 3});
  ASSERT_TRUE(finding);
  EXPECT_THAT(finding->ranks, ElementsAre(2, 3));
  EXPECT_THAT(describe(*finding, Job::hosts(6)), HasSubstr("rank 2 of 6 on node1, rank 3 of 6 on node1: no sign of life"));
}

TEST(Hang, ARankThatSkippedACollectiveIsNamedAndNotThoseThatWait) {
  Job job(3);
  for (int r = 0; r < 3; ++r) {
    job.enter(r);
    job.leave(r);
  }
  ASSERT_FALSE(job.pass(5));
  job.enter(0);
  job.enter(2);
  job.hung[1] = true;
  const double began = job.now;
  const auto finding = job.pass(60);  // rank 1 lives, and computes for ever
  ASSERT_TRUE(finding);
  EXPECT_LE(job.now - began, 10);
  EXPECT_THAT(finding->ranks, ElementsAre(1));
  EXPECT_EQ(finding->what, "does not get on");
  EXPECT_EQ(finding->number, 2);
}

TEST(Hang, RanksThatWaitForEachOtherAreToldApartByTheirNumbers) {
  Job job(3);
  job.enter(0);
  job.enter(1);
  job.enter(2, CollectiveProgress::foreground);  // it waits elsewhere: in a barrier that the others never come to
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  // Each of the two lanes has somebody missing; nobody can know who is right, so all who miss one are named.
  EXPECT_THAT(finding->ranks, ElementsAre(0, 1, 2));
  Job other(3);
  for (int r = 0; r < 3; ++r) {
    other.enter(r);
  }
  const auto nobody = other.pass(60);
  ASSERT_TRUE(nobody);
  EXPECT_TRUE(nobody->ranks.empty());
  EXPECT_THAT(describe(*nobody, Job::hosts(3)), HasSubstr("all ranks wait for each other"));
}

TEST(Hang, ARankWhoseDeviceDoesNotComeToACollectiveIsNamedWithIt) {
  Job job(4);
  for (int r = 0; r < 4; ++r) {
    job.enter(r, CollectiveProgress::device);
    job.leave(r, CollectiveProgress::device);
  }
  ASSERT_FALSE(job.pass(5));
  for (const int r : {0, 2, 3}) {
    job.enter(r, CollectiveProgress::device);
  }
  job.rank(1).waiting = 1;  // for its device, which computes for ever
  const double began = job.now;
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  EXPECT_LE(job.now - began, 10);
  EXPECT_THAT(finding->ranks, ElementsAre(1));
  EXPECT_THAT(describe(*finding, Job::hosts(4)),
              HasSubstr("collective number 2 (start_all_reduce_sum of 4096 bytes of float32, device) waits"));
}

TEST(Hang, ARankWhoseDeviceSkippedACollectiveIsInAnotherOneThanTheOthers) {
  Job job(3);
  ASSERT_FALSE(job.pass(5));
  job.enter(0, CollectiveProgress::device);
  job.enter(1, CollectiveProgress::device, 64);
  job.enter(2, CollectiveProgress::device);
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  EXPECT_THAT(finding->ranks, ElementsAre(1));
  EXPECT_THAT(describe(*finding, Job::hosts(3)),
              testing::AllOf(HasSubstr("is in another collective than the others"), HasSubstr("of 64 bytes")));
}

TEST(Hang, OfRanksThatWaitInTurnTheFirstCauseIsNamed) {
  Job job(4);  // on two hosts, whose ranks share a model
  for (int r = 0; r < 4; ++r) {
    job.rank(r).lanes[kSharers].color = r / 2 * 2;
    job.rank(r).lanes[kCopies].color = r % 2;
  }
  ASSERT_FALSE(job.pass(5));
  job.enter(0, kSharers);  // with rank 1, which hangs where it also waits for something
  job.rank(1).waiting = 1;
  for (const int r : {2, 3}) {
    job.enter(r, kSharers);
    job.leave(r, kSharers);
    job.enter(r, kCopies);  // with ranks 0 and 1
  }
  const double began = job.now;
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  EXPECT_LE(job.now - began, 10);
  EXPECT_THAT(finding->ranks, ElementsAre(1));
  EXPECT_THAT(describe(*finding, Job::hosts(4)),
              HasSubstr("4096 bytes of float32, background, among the ranks of a host) waits"));
}

TEST(Hang, RanksOfOtherGroupsAreNotBehind) {
  Job job(4);
  for (int r = 0; r < 4; ++r) {
    job.rank(r).lanes[kSharers].color = r / 2 * 2;
  }
  ASSERT_FALSE(job.pass(5));
  job.enter(0, kSharers);  // with rank 1
  job.rank(1).waiting = 1;
  job.enter(2);  // ranks 2 and 3 never come to their group's: they wait for the others elsewhere
  job.enter(3);
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  EXPECT_THAT(finding->ranks, ElementsAre(1));
}

TEST(Hang, WhoWaitsForARankThatMayTakeItsTimeIsPatientToo) {
  Job job(3);
  job.in(0, Phase::saving, kPatience);
  job.hung[0] = true;
  job.enter(1, CollectiveProgress::foreground);
  job.enter(2, CollectiveProgress::foreground);
  EXPECT_FALSE(job.pass(590));
  const auto finding = job.pass(30);
  ASSERT_TRUE(finding);
  EXPECT_THAT(finding->ranks, ElementsAre(0));
  EXPECT_EQ(finding->phase, "saving");
}

TEST(Hang, ARankThatLeftEarlyIsNamed) {
  Job job(2);
  job.in(1, Phase::left, 0);
  EXPECT_FALSE(job.pass(1, {}));
  job.enter(0);
  const auto finding = job.pass(60, {1});
  ASSERT_TRUE(finding);
  EXPECT_THAT(finding->ranks, ElementsAre(1));
  EXPECT_THAT(describe(*finding, Job::hosts(2)), HasSubstr("has left"));
}

TEST(Hang, TimeInWhichTheJudgeItselfWasStoppedCountsForNobody) {
  Job job(3);
  ASSERT_FALSE(job.pass(5));
  job.now += 100;
  job.judge.forgive(100);
  EXPECT_FALSE(job.judge.judge(job.now));
  EXPECT_FALSE(job.pass(5));
  EXPECT_TRUE(job.pass(60, {1}));
}

TEST(Hang, DatagramsThatArriveOutOfOrderChangeNothing) {
  Job job(2);
  const Heartbeat old = job.rank(1);
  job.enter(1);
  ASSERT_FALSE(job.pass(1));
  job.judge.heard(old, job.now);
  job.enter(0);
  job.in(0, Phase::step, kLimit);
  job.rank(0).waiting = 0;
  job.hung[0] = true;
  const auto finding = job.pass(60);
  ASSERT_TRUE(finding);
  EXPECT_THAT(finding->ranks, ElementsAre(0));
}

}  // namespace
}  // namespace attamba
