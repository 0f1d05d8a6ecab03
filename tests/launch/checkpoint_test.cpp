// Saved runs through the built program: killed and resumed on other numbers of ranks, short of space, checked, converted.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <sstream>
#include <thread>

#include "tests/launch/training_fixture.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class SavedRuns : public Training {
 protected:
  static fs::path checkpoint(const std::string& name, const std::string& step) {
    return run_folder(name) / "checkpoints" / ("step-" + step);
  }
  static Outcome attamba(const std::string& arguments) { return shell(concat(ATTAMBA_PROGRAM, ' ', arguments)); }

  /// Starts training on `ranks` ranks without waiting for it.
  static pid_t start(const std::string& name, int ranks, const std::string& more) {
    const std::string command = command_of(name, ranks, more) + " >" + (folder_ / (name + ".log")).string() + " 2>&1";
    const pid_t child = fork();
    if (child == 0) {
      execl("/bin/sh", "sh", "-c", ("exec " + command).c_str(), nullptr);
      _exit(127);
    }
    return child;
  }
  /// Processes that a process started, as the kernel lists them.
  static std::vector<pid_t> children_of(pid_t parent) {
    std::istringstream list(read_file(concat("/proc/", parent, "/task/", parent, "/children")));
    std::vector<pid_t> children;
    for (pid_t child = 0; list >> child;) {
      children.push_back(child);
    }
    return children;
  }
  template <class Condition>
  static bool wait_for(const Condition& condition) {
    for (int i = 0; i < 3000; ++i) {
      if (condition()) {
        return true;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  static void flip_a_byte(const fs::path& file) {
    std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
    const auto middle = static_cast<std::streamoff>(fs::file_size(file) / 2);
    bytes.seekg(middle);
    const int byte = bytes.get();
    bytes.seekp(middle);
    bytes.put(static_cast<char>(byte ^ 1));
  }
};

TEST_F(SavedRuns, KilledRanksResumeOnAnotherNumberBitForBit) {
  const std::string more =
      "--train.deterministic true --train.steps 100 --checkpoint.every 4 --checkpoint.keep 3 --eval.every 0";
  train_well("never_killed", 1, more);
  int kills = 0;
  for (const int ranks : {3, 2, 1}) {
    const pid_t job = start("killed", ranks, more);
    const auto newest = [&] {
      std::string last;
      std::error_code none_yet;
      for (const auto& entry : fs::directory_iterator(run_folder("killed") / "checkpoints", none_yet)) {
        const std::string found = entry.path().filename();
        last = found.find(".tmp-") == std::string::npos ? std::max(last, found) : last;
      }
      return last;
    };
    const std::string before = newest();
    int status = 0;
    bool ended = false;
    ASSERT_TRUE(wait_for([&] {
      ended = waitpid(job, &status, WNOHANG) == job;
      return ended || newest() > before;
    })) << read_file(folder_ / "killed.log");
    if (ended) {  // a fast machine may be done before it can be killed
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << read_file(folder_ / "killed.log");
      break;
    }
    // One rank alone goes, at no moment in particular; the launcher ends the others.
    const std::vector<pid_t> processes = ranks == 1 ? std::vector{job} : children_of(job);
    if (!processes.empty()) {
      kill(processes.back(), SIGKILL);
    }
    waitpid(job, &status, 0);
    kills += WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1;
  }
  EXPECT_GT(kills, 0) << "all were done before they were killed";
  train_well("killed", 2, more);
  EXPECT_EQ(final_state("killed", "000000100"), final_state("never_killed", "000000100"));
  EXPECT_EQ(losses("killed"), losses("never_killed"));
  for (const auto& entry : fs::directory_iterator(run_folder("killed") / "checkpoints")) {
    EXPECT_THAT(entry.path().string(), Not(HasSubstr(".tmp-"))) << "left behind";
  }
}

TEST_F(SavedRuns, WithoutRoomTrainingGoesOnAndTheLastSaveIsAnError) {
  // Files may not grow beyond a megabyte: enough for everything but the checkpoints.
  const std::string big = "--model.ffn_dim 2048 --train.steps 4 --checkpoint.every 2";
  const Outcome full = shell(concat("ulimit -f 2000; ", command_of("full", 1, big)));
  EXPECT_EQ(full.exit_code, 1) << full.output;
  EXPECT_THAT(full.output, AllOf(HasSubstr("save failed: there is no checkpoint of step 2"), HasSubstr("File too large"),
                                 HasSubstr("bytes needed"), HasSubstr("training goes on")));
  EXPECT_THAT(full.output, HasSubstr("save failed: there is no checkpoint of step 4"));
  EXPECT_EQ(losses("full").size(), 4u);
  EXPECT_TRUE(fs::is_empty(run_folder("full") / "checkpoints"));
  train_well("full", 1, big);
  EXPECT_TRUE(fs::exists(checkpoint("full", "000000004")));
}

TEST_F(SavedRuns, InfoAndVerifySayWhatIsThereAndWhatIsDamaged) {
  train_well("inspected", 2);
  const std::string run = run_folder("inspected").string();
  const Outcome info = attamba("checkpoint info " + run);
  EXPECT_EQ(info.exit_code, 0) << info.output;
  EXPECT_THAT(info.output, AllOf(HasSubstr("step-000000006"), HasSubstr("after step   6"), HasSubstr("2 ranks"),
                                 HasSubstr("validation   loss"), HasSubstr("rank-00001.h5"), HasSubstr("moment1/"),
                                 HasSubstr("float32["), HasSubstr("older ones: step-000000003")));
  Outcome verified = attamba("checkpoint verify " + run);
  EXPECT_EQ(verified.exit_code, 0) << verified.output;
  EXPECT_THAT(verified.output, AllOf(HasSubstr("step-000000006: whole"), HasSubstr("step-000000003: whole")));

  flip_a_byte(checkpoint("inspected", "000000003") / "rank-00001.h5");
  verified = attamba("checkpoint verify " + run);
  EXPECT_EQ(verified.exit_code, 1);
  EXPECT_THAT(verified.output, AllOf(HasSubstr("step-000000006: whole"), HasSubstr("step-000000003: DAMAGED"),
                                     HasSubstr("rank-00001.h5"), HasSubstr("between bytes"), HasSubstr("1 of 2")));
  EXPECT_EQ(attamba("checkpoint verify " + run + " --step 6").exit_code, 0);
  EXPECT_EQ(attamba("checkpoint verify " + checkpoint("inspected", "000000003").string()).exit_code, 1);
  const Outcome eval = attamba("eval " + run + " --step 3");
  EXPECT_EQ(eval.exit_code, 1);
  EXPECT_THAT(eval.output, HasSubstr("rank-00001.h5"));
  EXPECT_EQ(attamba("checkpoint info " + run + "/nowhere").exit_code, 2);
}

TEST_F(SavedRuns, AReshardedCheckpointIsTheSameState) {
  train_well("resharded", 1, "--checkpoint.keep 1");
  const std::string state = final_state("resharded");
  const Outcome outcome = attamba("checkpoint reshard " + run_folder("resharded").string() + " --files 3");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_TRUE(fs::exists(checkpoint("resharded", "000000006") / "rank-00002.h5"));
  EXPECT_EQ(final_state("resharded"), state);
  EXPECT_EQ(attamba("checkpoint verify " + run_folder("resharded").string()).exit_code, 0);
}

TEST_F(SavedRuns, WeightsLeaveAsSafetensorsAndANewRunStartsFromThem) {
  train_well("exported", 2);
  const std::string file = (folder_ / "weights.safetensors").string();
  const Outcome out = attamba("checkpoint export " + run_folder("exported").string() + " -o " + file);
  ASSERT_EQ(out.exit_code, 0) << out.output;
  const auto import = [&](const std::string& name, const std::string& more) {
    return attamba("checkpoint import " + file + arguments(name, more).substr(std::string(" train").size()));
  };
  const Outcome in = import("imported", "");
  ASSERT_EQ(in.exit_code, 0) << in.output;
  EXPECT_THAT(in.output, HasSubstr("step-000000000"));
  const Outcome evaluated = attamba("eval " + run_folder("imported").string());
  char expected[32];
  std::snprintf(expected, sizeof expected, "%.4f nats", std::stod(evaluations("exported").back()));
  EXPECT_THAT(evaluated.output, HasSubstr(expected));
  train_well("imported", 2);
  EXPECT_EQ(losses("imported").size(), 6u);
  EXPECT_LT(std::stod(losses("imported").front()), std::stod(losses("exported").front()));

  const Outcome again = import("imported", "");
  EXPECT_EQ(again.exit_code, 2);
  EXPECT_THAT(again.output, HasSubstr("checkpoints already"));
  const Outcome wider = import("wider", "--model.ffn_dim 64");
  EXPECT_EQ(wider.exit_code, 1);
  EXPECT_THAT(wider.output, AllOf(HasSubstr("weights.safetensors"), HasSubstr("layers.0."), HasSubstr("64")));
  const Outcome deeper = import("deeper", "--model.n_layers 3");
  EXPECT_EQ(deeper.exit_code, 1);
  EXPECT_THAT(deeper.output, AllOf(HasSubstr("has no layers.2."), HasSubstr("the model needs")));
  EXPECT_FALSE(fs::exists(run_folder("wider")));
}

TEST_F(SavedRuns, TheBestAndEveryNthStayBesideTheNewest) {
  train_well("retained", 1,
             "--checkpoint.every 1 --eval.every 1 --checkpoint.keep 1 --checkpoint.keep_every 3 "
             "--checkpoint.keep_best true --optim.lr 0.05 --optim.warmup 0");
  const std::vector<std::string> found = evaluations("retained");
  ASSERT_EQ(found.size(), 6u);
  std::size_t best = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    best = std::stod(found[i]) < std::stod(found[best]) ? i : best;
  }
  for (std::size_t step = 1; step <= 6; ++step) {
    EXPECT_EQ(fs::exists(checkpoint("retained", concat("00000000", step))), step % 3 == 0 || step == best + 1)
        << step << ", the best is " << best + 1;
  }
}

}  // namespace
}  // namespace attamba
