// Ranks that stop, hang or go astray are named, and the job ends.
#include <array>

#include "tests/reliability/job.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int kHangs = 76;

class Hangs : public Reliability {};

TEST_F(Hangs, AStoppedRankIsNamedAndTheJobEnds) {
  const bool full = std::getenv("ATTAMBA_TRIALS") != nullptr;
  const double limit = full ? 10 : 6;
  std::vector<double> seconds;
  for (int trial = 0; trial < trials(3); ++trial) {
    const int stopped = trial % 3;
    const std::string name = concat("stopped", trial);
    Job job(training(name, 3, {{"run.watchdog_seconds", concat(limit)}}), folder_ / (name + ".log"), 3);
    ASSERT_TRUE(job.wait_until([&] { return steps_logged(name) >= 5; })) << job.output();
    const pid_t pid = job.rank(stopped);
    ASSERT_GT(pid, 0);
    const double began = monotonic_seconds();
    kill(pid, SIGSTOP);
    const std::string wanted = concat("rank ", stopped, " of 3 on ");
    const bool named =
        job.wait_until([&] { return job.output().find("the job hangs: " + wanted) != std::string::npos; }, 3 * limit);
    seconds.push_back(monotonic_seconds() - began);
    EXPECT_TRUE(named) << job.output();
    EXPECT_LE(seconds.back(), limit) << job.output();
    EXPECT_EQ(job.exit_code(20), kHangs) << job.output();
    EXPECT_THAT(job.output(), AllOf(HasSubstr("no sign of life"), HasSubstr("after step")));
    const auto found = events(name, "hang");
    ASSERT_EQ(found.size(), 1u);
    EXPECT_EQ(found[0].at("ranks"), nlohmann::json::array({stopped}));
    fs::remove_all(folder_ / name);
  }
  std::sort(seconds.begin(), seconds.end());
  std::cout << seconds.size() << " stopped ranks, limit " << limit << " s: named after " << seconds.front() << " to "
            << seconds.back() << " s\n";
}

TEST_F(Hangs, ARankThatDoesNotComeToACollectiveIsNamedWithIt) {
  Job job(faulty("hang", 3, "hang 2 9", {{"run.watchdog_seconds", "3"}}), folder_ / "hang.log", 3);
  EXPECT_EQ(job.exit_code(60), kHangs) << job.output();
  EXPECT_THAT(job.output(), AllOf(HasSubstr("rank 2 of 3 on "), HasSubstr("does not get on"), HasSubstr("after step 8"),
                                  HasSubstr("collective number "), HasSubstr("start_all_reduce_sum of "), HasSubstr(" waits")));
}

TEST_F(Hangs, ARankThatSkipsACollectiveIsNamedAtOnce) {
  const double began = monotonic_seconds();
  Job job(faulty("skip", 3, "skip 1 9"), folder_ / "skip.log", 3);
  EXPECT_EQ(job.exit_code(60), 1) << job.output();
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  EXPECT_THAT(job.output(), AllOf(HasSubstr("ranks do not agree on what to do in collective number "),
                                  HasSubstr("ranks 0, 2 in start_all_reduce_sum"),
                                  HasSubstr(concat("; rank 1 on ", host.data(), " in ")), HasSubstr("; step 9")));
  EXPECT_LT(monotonic_seconds() - began, 30);
}

TEST_F(Hangs, AShardThatDoesNotComeIsNamedAndTheRunWaitsForIt) {
  const fs::path marker = folder_ / "shard.slow";
  Job job(training("shard", 2, {},
                   concat("SLOW_READS_RANK=1 SLOW_READS_WHILE=", marker.string(), " LD_PRELOAD=", ATTAMBA_SLOW_READS)),
          folder_ / "shard.log", 2);
  ASSERT_TRUE(job.wait_until([&] { return steps_logged("shard") >= 2; })) << job.output();
  std::ofstream(marker) << "slow";
  const double began = monotonic_seconds();
  EXPECT_TRUE(job.wait_until([&] { return job.output().find(" s for data") != std::string::npos; }, 30)) << job.output();
  std::cout << "a shard that does not come: named after " << monotonic_seconds() - began << " s\n";
  EXPECT_THAT(job.output(), testing::ContainsRegex("rank 1 on .* has waited 4 s for data in step .*, reading sample .*: window "
                                                   ".* in .*/shard-00000.h5"));
  EXPECT_EQ(events("shard", "slow data").size(), 1u);
  const std::int64_t before = steps_logged("shard");
  fs::remove(marker);
  EXPECT_TRUE(job.wait_until([&] { return steps_logged("shard") > before + 5; }, 20)) << job.output();
  kill(job.rank(1), SIGTERM);
  EXPECT_EQ(job.exit_code(25), 75) << job.output();
}

TEST_F(Hangs, ARankWhoseSumsDifferInTheirLastBitsIsNamed) {
  Job job(faulty("bit", 3, "bit 2 9"), folder_ / "bit.log", 3);
  EXPECT_EQ(job.exit_code(60), 1) << job.output();
  EXPECT_THAT(job.output(), AllOf(HasSubstr("different results of step 9"), HasSubstr("of rank 2 is not that of most ranks")));
}

TEST_F(Hangs, LongPausesOfAllRanksAreNoHang) {
  Job job(training("pause", 2, {{"run.watchdog_seconds", "1"}}), folder_ / "pause.log", 2);
  ASSERT_TRUE(job.wait_until([&] { return steps_logged("pause") >= 5; })) << job.output();
  const std::vector<pid_t> ranks{job.rank(0), job.rank(1)};
  for (const pid_t pid : ranks) {
    kill(pid, SIGSTOP);
  }
  std::this_thread::sleep_for(std::chrono::seconds(4));  // as when a machine is suspended
  for (const pid_t pid : ranks) {
    kill(pid, SIGCONT);
  }
  const std::int64_t before = steps_logged("pause");
  EXPECT_TRUE(job.wait_until([&] { return steps_logged("pause") > before + 5; }, 20)) << job.output();
  kill(ranks[0], SIGTERM);
  EXPECT_EQ(job.exit_code(25), 75) << job.output();
}

}  // namespace
}  // namespace attamba
