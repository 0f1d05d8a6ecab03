// Runs that are told to stop: by which signal, to whom and when must not matter.
#include "src/core/random.h"
#include "tests/reliability/job.h"

namespace attamba {
namespace {

using testing::AnyOf;
using testing::HasSubstr;

constexpr int kStopped = 75;
/// What batch systems leave a job between its signal and its end, less what a busy machine may add.
constexpr double kGrace = 25;

const std::vector<std::pair<int, std::string>> kSignals{
    {SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"}, {SIGUSR1, "SIGUSR1"}, {SIGUSR2, "SIGUSR2"}};

class Signals : public Reliability {
 protected:
  enum class To { one_rank, all_ranks, mpirun };

  /// Sends the signal and returns the seconds until the job has ended, with its code.
  static std::pair<double, int> stop(Job& job, int signal, To to, int ranks, int one) {
    const double began = monotonic_seconds();
    if (to == To::mpirun) {
      kill(job.pid(), signal);
    }
    for (int r = 0; r < ranks && to != To::mpirun; ++r) {
      if (to == To::all_ranks || r == one) {
        const pid_t pid = job.rank(r);
        EXPECT_GT(pid, 0);
        kill(pid > 0 ? pid : job.pid(), signal);
      }
    }
    const int code = job.exit_code(kGrace);
    return {monotonic_seconds() - began, code};
  }
  /// What a stopped run leaves: the step that it names is the newest checkpoint, and the same command goes on from there.
  static void expect_stopped_well(const std::string& name, const std::string& output, bool must_have_started = true) {
    const std::size_t at = output.rfind("stopped after step ");
    if (at == std::string::npos) {
      EXPECT_THAT(output, HasSubstr(must_have_started ? "stopped after step" : "stopped while starting"));
      return;
    }
    std::string number = output.substr(at + 19, output.find(';', at) - at - 19);
    number.erase(std::remove(number.begin(), number.end(), ','), number.end());
    EXPECT_EQ(saved_step(name), std::stoll(number)) << output;
  }
};

// Settings that make a phase take most of the time, so that signals at random times fall into it.
const std::vector<std::pair<std::string, std::vector<std::pair<std::string, std::string>>>> kPhases{
    {"starting", {}},
    {"step", {{"train.global_batch", "60"}}},
    {"saving", {{"checkpoint.every", "1"}, {"checkpoint.keep", "1"}}},
    {"evaluation", {{"eval.every", "1"}}}};

TEST_F(Signals, EndEveryRunWithItsStateSavedWhateverItIsDoing) {
  RandomStream random(static_cast<std::uint64_t>(trials(0)) + 11);
  std::vector<double> seconds;
  for (int trial = 0; trial < trials(8); ++trial) {
    const int ranks = 1 + static_cast<int>(random.below(3)),
              one = static_cast<int>(random.below(static_cast<std::uint64_t>(ranks)));
    const auto& [phase, more] = kPhases[static_cast<std::size_t>(trial) % kPhases.size()];
    const auto& [signal, signal_name] = kSignals[random.below(kSignals.size())];
    const To to = static_cast<To>(random.below(2));
    const std::string name = concat("signal", trial);
    SCOPED_TRACE(
        concat(phase, ", ", signal_name, ", ", ranks, " ranks, to ", to == To::one_rank ? "rank " : "all, rank ", one));
    Job job(training(name, ranks, more), folder_ / (name + ".log"), ranks);
    ASSERT_TRUE(job.wait_for_signal_handlers()) << job.output();
    if (phase != "starting") {
      ASSERT_TRUE(job.wait_until([&] { return steps_logged(name) >= 2; })) << job.output();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(random.below(300)));
    const auto [took, code] = stop(job, signal, to, ranks, one);
    EXPECT_EQ(code, kStopped) << job.output();
    EXPECT_THAT(job.output(), HasSubstr(signal_name));
    if (to == To::one_rank) {
      EXPECT_THAT(job.output(), HasSubstr(concat("rank ", one, " got ", signal_name)));
    }
    expect_stopped_well(name, job.output(), phase != "starting");
    seconds.push_back(took);
    if (code != kStopped) {
      return;
    }
    fs::remove_all(folder_ / name);
  }
  std::sort(seconds.begin(), seconds.end());
  std::cout << seconds.size() << " stops: median " << seconds[seconds.size() / 2] << " s, longest " << seconds.back() << " s\n";
}

// Open MPI passes SIGUSR1 and SIGUSR2 on. With SIGTERM or SIGINT it ends the job itself: the ranks get SIGTERM, and are killed
// a second later, which is enough for these small ones.
TEST_F(Signals, ToMpirunReachTheRanks) {
  for (const auto& [signal, signal_name] : kSignals) {
    const std::string name = "mpirun_" + signal_name;
    Job job(training(name, 2), folder_ / (name + ".log"), 2);
    ASSERT_TRUE(job.wait_until([&] { return steps_logged(name) >= 2; })) << job.output();
    const auto [took, code] = stop(job, signal, To::mpirun, 2, 0);
    std::cout << signal_name << " to mpirun: exit code " << code << " after " << took << " s\n";
    const bool passed_on = signal == SIGUSR1 || signal == SIGUSR2;
    EXPECT_TRUE(code == kStopped || (!passed_on && code != 0 && code != -1)) << code << '\n' << job.output();
    if (passed_on) {
      EXPECT_THAT(job.output(), HasSubstr("got " + signal_name));
      expect_stopped_well(name, job.output());
    }
  }
}

TEST_F(Signals, EndAWaitForDataThatDoesNotCome) {
  enum class Told { the_rank_that_waits, the_other_one, nobody_but_the_clock };
  for (const int waiting : {0, 1}) {
    for (const Told told : {Told::the_rank_that_waits, Told::the_other_one, Told::nobody_but_the_clock}) {
      const std::string name = concat("data", waiting, static_cast<int>(told));
      const fs::path marker = folder_ / (name + ".slow");
      const bool clock = told == Told::nobody_but_the_clock;
      Job job(training(name, 2, clock ? Keys{{"run.time_limit", "20"}, {"run.stop_before_seconds", "10"}} : Keys{},
                       concat("SLOW_READS_RANK=", waiting, " SLOW_READS_WHILE=", marker.string(),
                              " LD_PRELOAD=", ATTAMBA_SLOW_READS)),
              folder_ / (name + ".log"), 2);
      ASSERT_TRUE(job.wait_until([&] { return steps_logged(name) >= 2; })) << job.output();
      std::ofstream(marker) << "slow";
      std::int64_t before = 0;
      do {  // what was read ahead is used up
        before = steps_logged(name);
        std::this_thread::sleep_for(std::chrono::seconds(1));
      } while (steps_logged(name) != before);
      if (clock) {
        EXPECT_EQ(job.exit_code(20), kStopped) << job.output();
        EXPECT_THAT(job.output(), HasSubstr("time is nearly over"));
      } else {
        const auto [took, code] =
            stop(job, SIGTERM, To::one_rank, 2, told == Told::the_rank_that_waits ? waiting : 1 - waiting);
        EXPECT_EQ(code, kStopped) << job.output();
        EXPECT_THAT(job.output(), HasSubstr("got SIGTERM"));
        std::cout << "waiting for data: exit after " << took << " s\n";
      }
      EXPECT_EQ(saved_step(name), before) << "the step that never got its data does not count";
      fs::remove(marker);
    }
  }
}

TEST_F(Signals, EndARunWhoseNextDataCannotBeRead) {
  const fs::path marker = folder_ / "ahead.slow";
  Job job(training("ahead", 2, {},
                   concat("SLOW_READS_RANK=1 SLOW_READS_WHILE=", marker.string(), " LD_PRELOAD=", ATTAMBA_SLOW_READS)),
          folder_ / "ahead.log", 2);
  ASSERT_TRUE(job.wait_until([&] { return steps_logged("ahead") >= 2; })) << job.output();
  std::ofstream(marker) << "slow";  // the thread that reads ahead is stuck, and there are batches left
  const auto [took, code] = stop(job, SIGTERM, To::one_rank, 2, 0);
  EXPECT_EQ(code, kStopped) << job.output();
  expect_stopped_well("ahead", job.output());
  std::cout << "reading ahead: exit after " << took << " s\n";
  fs::remove(marker);
}

TEST_F(Signals, ASecondInterruptKillsAsUsual) {
  const fs::path marker = folder_ / "second.slow";
  std::ofstream(marker) << "slow";
  Job job(training("second", 1, {},
                   concat("SLOW_READS_RANK=0 SLOW_READS_WHILE=", marker.string(), " LD_PRELOAD=", ATTAMBA_SLOW_READS)),
          folder_ / "second.log", 1);
  ASSERT_TRUE(job.wait_for_signal_handlers());
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  kill(job.pid(), SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  kill(job.pid(), SIGINT);
  EXPECT_EQ(job.exit_code(kGrace), -2) << job.output();
  fs::remove(marker);
}

TEST_F(Signals, AnInterruptedRunComputesWhatAnUninterruptedOneDoes) {
  const Keys more{{"train.steps", "300"}, {"train.deterministic", "true"}, {"eval.every", "50"}, {"train.log_every", "10"}};
  ASSERT_EQ(shell(training("whole", 1, more)).exit_code, 0);
  int stops = 0;
  for (int ranks = 1, code = kStopped; code == kStopped; ranks = ranks % 3 + 1) {
    Job job(training("parts", ranks, more), folder_ / concat("parts", ranks, ".log"), ranks);
    if (stops < 3 && job.wait_until([&] { return steps_logged("parts") >= 50 * (stops + 1); })) {
      stop(job, SIGUSR1, To::one_rank, ranks, 0);
    }
    code = job.exit_code();
    ASSERT_THAT(code, AnyOf(0, kStopped)) << job.output();
    stops += code == kStopped ? 1 : 0;
  }
  EXPECT_GT(stops, 0);
  const auto field = [](const std::string& name, const char* key) {
    std::vector<std::string> values;
    for (const auto& line : lines(name, "metrics.jsonl")) {
      if (line.contains(key)) {
        values.push_back(line.at(key).dump());
      }
    }
    return values;
  };
  EXPECT_EQ(field("parts", "loss").back(), field("whole", "loss").back());
  EXPECT_EQ(field("parts", "eval_loss"), field("whole", "eval_loss")) << "none is missing and none is there twice";
}

TEST_F(Signals, ARunStopsByItselfBeforeItsTimeIsUp) {
  const double began = monotonic_seconds();
  Job job(training("time", 2, {{"run.time_limit", "6"}, {"run.stop_before_seconds", "2"}}), folder_ / "time.log", 2);
  EXPECT_EQ(job.exit_code(30), kStopped) << job.output();
  EXPECT_GT(monotonic_seconds() - began, 2);
  EXPECT_THAT(job.output(), HasSubstr("time is nearly over"));
  expect_stopped_well("time", job.output(), false);
}

}  // namespace
}  // namespace attamba
