// `attamba train` with a communicator that does something wrong on one rank:
//
//   mpirun -n N faulty_training FAULT RANK STEPS section.key=value...
//
// FAULT in the steps of STEPS ("3", "5-7", "5-", from 1, in the order in which the process computes them):
//   nan    the rank's gradients are not numbers      spike  they are 10,000 times too large
//   inf    one of the rank's gradients is infinite
//   bit    the rank's sum differs in its last bits   skip   the rank leaves out one sum of gradients
//   stop   as nan, and in the last step but one the rank gets SIGUSR1, which all ranks know with the last
//   slow   the rank takes twice as long to compute, and 0.1 s longer at least
//   hang   the rank stops coming to collectives and computes for ever
//   record no fault: it prints how many microseconds each rank has computed per micro-batch
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <span>
#include <thread>

#include "comm/communicator.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/train/trainer.h"
#include "tests/comm/passing_on.h"

namespace attamba {
namespace {

class Nothing final : public Request {
 public:
  void wait() override {}
};

/// Changes the sum that it has waited for.
class ChangedSum final : public Request {
 public:
  ChangedSum(std::unique_ptr<Request> sum, float* first) : sum_(std::move(sum)), first_(first) {}
  void wait() override {
    sum_->wait();
    *first_ += 1.0f;
  }

 private:
  std::unique_ptr<Request> sum_;
  float* first_;
};

/// Prints the times among the news that all ranks have told (RankNews); they lie behind the step's totals.
class Recording final : public Request {
 public:
  Recording(std::unique_ptr<Request> sum, std::span<const std::int64_t> words, int ranks)
      : sum_(std::move(sum)), words_(words), ranks_(ranks) {}
  void wait() override {
    constexpr std::size_t kNews = 64 / sizeof(std::int64_t), kWords = sizeof(RankNews) / sizeof(std::int64_t);
    sum_->wait();
    std::string line;
    for (std::size_t rank = 0; rank < static_cast<std::size_t>(ranks_); ++rank) {
      line += concat(rank == 0 ? "" : " ", words_[kNews + kWords * rank + 2] / 1000);
    }
    std::cout << line << std::endl;
  }

 private:
  std::unique_ptr<Request> sum_;
  std::span<const std::int64_t> words_;
  int ranks_;
};

struct Fault {
  std::string kind;
  int rank = 0;
  std::int64_t first = 1, last = 1;
};

Fault parse_fault(const std::string& kind, const std::string& rank, const std::string& steps) {
  Fault fault{.kind = kind, .rank = std::stoi(rank), .first = std::stoll(steps), .last = std::stoll(steps)};
  if (const std::size_t dash = steps.find('-'); dash != std::string::npos) {
    fault.last = dash + 1 == steps.size() ? std::numeric_limits<std::int64_t>::max() : std::stoll(steps.substr(dash + 1));
  }
  return fault;
}

class FaultyCommunicator final : public PassingOn {
 public:
  FaultyCommunicator(Communicator& real, Fault fault) : PassingOn(real), fault_(std::move(fault)) {}
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override {
    if (data.dtype() == DType::int64) {  // totals and news: the last sum of a step
      ++step_;
      done_ = false;
      auto sum = PassingOn::start_all_reduce_sum(data);
      step_began_ = monotonic_seconds();
      waited_before_ = progress().waited();
      const bool recorded = fault_.kind == "record" && rank() == fault_.rank;
      return recorded ? std::make_unique<Recording>(std::move(sum), data.span<std::int64_t>(), size()) : std::move(sum);
    }
    if (rank() != fault_.rank || step_ < fault_.first || step_ > fault_.last || done_ || fault_.kind == "record") {
      return PassingOn::start_all_reduce_sum(data);
    }
    done_ = true;  // once a step
    if (fault_.kind == "hang") {
      for (;;) {
        sleep(1);
      }
    }
    if (fault_.kind == "slow") {  // outside of collectives, so that it counts as computing
      const double computed = monotonic_seconds() - step_began_ - (progress().waited() - waited_before_);
      std::this_thread::sleep_for(std::chrono::duration<double>(std::max(computed, SlowRanks::kShortest)));
      return PassingOn::start_all_reduce_sum(data);
    }
    if (fault_.kind == "skip") {
      return std::make_unique<Nothing>();
    }
    if (fault_.kind == "stop" && step_ == fault_.last - 1) {
      raise(SIGUSR1);
    }
    const auto values = data.span<float>();
    if (fault_.kind == "bit") {
      return std::make_unique<ChangedSum>(PassingOn::start_all_reduce_sum(data), values.data());
    }
    if (fault_.kind == "inf") {
      values.front() = std::numeric_limits<float>::infinity();
      return PassingOn::start_all_reduce_sum(data);
    }
    for (float& value : values) {
      value = fault_.kind == "nan" || fault_.kind == "stop" ? std::numeric_limits<float>::quiet_NaN() : value * 1e4f;
    }
    return PassingOn::start_all_reduce_sum(data);
  }

 private:
  const Fault fault_;
  std::int64_t step_ = 1;
  bool done_ = false;
  double step_began_ = monotonic_seconds(), waited_before_ = 0;  ///< seconds
};

int run(int argc, char** argv) {
  require<UsageError>(argc > 4, "usage: faulty_training FAULT RANK STEPS section.key=value...");
  handle_stop_signals();
  const std::unique_ptr<Communicator> real = make_communicator();
  ranks_have_met();
  try {
    Config config;
    for (int i = 4; i < argc; ++i) {
      const std::string argument = argv[i];
      const std::size_t equals = argument.find('=');
      set_key(config, argument.substr(0, equals), argument.substr(equals + 1));
    }
    FaultyCommunicator faulty(*real, parse_fault(argv[1], argv[2], argv[3]));
    return Trainer(config, faulty).run() == Trainer::Outcome::stopped ? kExitStopped : 0;
  } catch (const std::exception& error) {
    std::cerr << "attamba: error: rank " << real->rank() << ": " << error.what() << std::endl;
    real->abort(1);
  }
  std::_Exit(1);
}

}  // namespace
}  // namespace attamba

int main(int argc, char** argv) {
  return attamba::run(argc, argv);
}
