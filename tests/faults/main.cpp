// attamba_faults: does a run that is killed, starved of disk space or damaged on disk end with the weights of one that was not?
//
//   attamba_faults --trials 1000 --seed 7        random trials; a failure prints the seed that repeats it
//   attamba_faults --replay 12345                one trial again, its folder is kept
//   attamba_faults --sweep 2                     SIGKILL at every single system call that writes, on two ranks
//   attamba_faults --sweep 2 --sweep-with eio    each of these calls fails, and training may go on or be started again
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <map>
#include <mutex>
#include <thread>

#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/faults/trial.h"
#include "tests/launch/small_training.h"

namespace attamba::faults {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::int64_t trials = 20, replay = -1, sweep = 0, every = 1;
  std::uint64_t seed = 1;
  std::string sweep_with = "kill";
  int jobs = 1;
  double seconds = 0;
  bool keep = false;
  std::vector<std::string> kinds;
  Laboratory laboratory{ATTAMBA_PROGRAM, ATTAMBA_FAULTS, {}};
};

/// What is printed for one kind of fault.
struct Tally {
  std::int64_t trials = 0, hits = 0, failures = 0, aborted = 0, most_lost = 0;
  std::vector<double> ready = {};

  void add(const Verdict& verdict) {
    ++trials;
    hits += verdict.hit ? 1 : 0;
    failures += verdict.failure.empty() ? 0 : 1;
    aborted += verdict.aborted ? 1 : 0;
    most_lost = std::max(most_lost, verdict.lost_steps);
    if (verdict.ready_seconds > 0) {
      ready.push_back(verdict.ready_seconds);
    }
  }
  void print(const std::string& name) {
    std::sort(ready.begin(), ready.end());
    char median[16] = "-";
    if (!ready.empty()) {
      std::snprintf(median, sizeof median, "%.2f", ready[ready.size() / 2]);
    }
    std::printf("%-14s %7lld %7lld %8lld %8lld %10s %10lld\n", name.c_str(), static_cast<long long>(trials),
                static_cast<long long>(hits), static_cast<long long>(failures), static_cast<long long>(aborted), median,
                static_cast<long long>(most_lost));
  }
};

std::vector<Fault> chosen_kinds(const std::vector<std::string>& names) {
  std::vector<Fault> kinds;
  for (int i = 0; i < kFaults; ++i) {
    const std::string name = kFaultNames[static_cast<std::size_t>(i)];
    if (names.empty() || std::find(names.begin(), names.end(), name) != names.end()) {
      kinds.push_back(static_cast<Fault>(i));
    }
  }
  require<UsageError>(!kinds.empty() && (names.empty() || kinds.size() == names.size()), "--kinds: there is no such kind");
  return kinds;
}

/// SIGKILL, or an error, at every `every`-th call of every rank that writes.
std::vector<Plan> plan_sweep(const Options& options, const Reference& reference) {
  std::vector<Plan> plans;
  const auto ranks = static_cast<int>(options.sweep);
  const std::vector<long>& calls = reference.calls.at(static_cast<std::size_t>(ranks));
  const Start start{.ranks = ranks, .transport = ranks == 1 ? Transport::alone : Transport::tcp};
  const Fault fault = options.sweep_with == "kill" ? Fault::call_kill : Fault::call_error;
  for (std::size_t rank = 0; rank < calls.size(); ++rank) {
    for (long call = 1; call <= calls[rank]; call += options.every) {
      Plan plan{.seed = 0, .fault = fault, .starts = {start, start}, .moments = {{}}};
      plan.starts[0].faults = {{"ATTAMBA_FAULT_KIND", options.sweep_with},
                               {"ATTAMBA_FAULT_SCOPE", "job"},
                               {"ATTAMBA_FAULT_RANK", std::to_string(rank)},
                               {"ATTAMBA_FAULT_AT", std::to_string(call)}};
      plans.push_back(plan);
    }
  }
  return plans;
}

class Campaign {
 public:
  Campaign(const Options& options, const Reference& reference, const fs::path& folder)
      : options_(options), reference_(reference), folder_(folder), kinds_(chosen_kinds(options.kinds)) {
    if (options_.sweep > 0) {
      plans_ = plan_sweep(options_, reference_);
    } else if (options_.replay >= 0) {
      plans_ = {make_plan(static_cast<std::uint64_t>(options_.replay), reference_, kinds_)};
    } else {
      RandomStream random(options_.seed);
      for (std::int64_t i = 0; i < options_.trials; ++i) {
        plans_.push_back(make_plan(random.below(1u << 31), reference_, kinds_));
      }
    }
  }

  /// The number of failures.
  std::int64_t run() {
    const double begin = monotonic_seconds();
    std::vector<std::thread> threads;
    for (int i = 0; i < options_.jobs; ++i) {
      threads.emplace_back([&] {
        for (std::size_t next; (next = next_++) < plans_.size();) {
          if (options_.seconds > 0 && monotonic_seconds() - begin > options_.seconds) {
            return;
          }
          one(plans_[next], next);
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    return print(monotonic_seconds() - begin);
  }

 private:
  void one(const Plan& plan, std::size_t number) {
    const fs::path folder = folder_ / concat("trial-", number);
    Verdict verdict;
    try {
      verdict = run_trial(plan, options_.laboratory, reference_, folder);
    } catch (const std::exception& error) {
      verdict.failure = error.what();
    }
    const std::lock_guard lock(mutex_);
    tallies_[plan.fault].add(verdict);
    if (!verdict.failure.empty()) {
      std::cout << "FAILED: " << plan.text() << "\n  " << verdict.failure << '\n';
      if (options_.sweep == 0) {
        std::cout << "  again: attamba_faults --replay " << plan.seed;
        for (std::size_t i = 0; i < options_.kinds.size(); ++i) {
          std::cout << (i == 0 ? " --kinds " : ",") << options_.kinds[i];
        }
        std::cout << std::endl;
      }
    }
    if (!options_.keep && options_.replay < 0) {
      fs::remove_all(folder);
    }
  }

  std::int64_t print(double seconds) {
    Tally all;
    std::printf("%-14s %7s %7s %8s %8s %10s %10s\n", "fault", "trials", "struck", "failures", "aborted", "resumed, s",
                "most lost");
    for (auto& [fault, tally] : tallies_) {
      tally.print(kFaultNames[static_cast<std::size_t>(fault)]);
      all.trials += tally.trials;
      all.hits += tally.hits;
      all.failures += tally.failures;
      all.aborted += tally.aborted;
      all.most_lost = std::max(all.most_lost, tally.most_lost);
      all.ready.insert(all.ready.end(), tally.ready.begin(), tally.ready.end());
    }
    all.print("all");
    std::printf("%.1f s, %.2f s per trial, seed %llu; a checkpoint every %lld steps\n", seconds,
                seconds / static_cast<double>(std::max<std::int64_t>(all.trials, 1)),
                static_cast<unsigned long long>(options_.seed), static_cast<long long>(Laboratory::kEvery));
    return all.failures;
  }

  const Options& options_;
  const Reference& reference_;
  fs::path folder_;
  std::vector<Fault> kinds_;
  std::vector<Plan> plans_;
  std::atomic<std::size_t> next_ = 0;
  std::mutex mutex_;
  std::map<Fault, Tally> tallies_;
};

int run(int argc, char** argv) {
  Options options;
  CLI::App app("Trains tiny models, lets faults happen to them, and compares what comes out.", "attamba_faults");
  app.add_option("--trials", options.trials, "random trials")->capture_default_str();
  app.add_option("--seed", options.seed, "of the trials")->capture_default_str();
  app.add_option("--replay", options.replay, "one trial again, by the seed that it printed; keeps its folder");
  app.add_option("--sweep", options.sweep, "a fault at every call that writes, on so many ranks")->check(CLI::Range(1, 4));
  app.add_option("--sweep-with", options.sweep_with, "what happens there: SIGKILL, or an error of the call")
      ->check(CLI::IsMember({"kill", "eio"}))
      ->capture_default_str();
  app.add_option("--sweep-every", options.every, "only at every so many-th call")->check(CLI::PositiveNumber);
  app.add_option("--kinds", options.kinds, "only these faults")->delimiter(',');
  app.add_option("--jobs", options.jobs, "trials at a time")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--seconds", options.seconds, "begin no trial after so many seconds; 0: all are run");
  app.add_option("--program", options.laboratory.program, "the attamba to test")->capture_default_str();
  app.add_flag("--keep", options.keep, "keep all folders");
  CLI11_PARSE(app, argc, argv);
  std::string pattern = (fs::temp_directory_path() / "attamba-faults-XXXXXX").string();
  require(mkdtemp(pattern.data()) != nullptr, "cannot make a folder in ", fs::temp_directory_path().string());
  const fs::path folder = fs::canonical(pattern);
  options.laboratory.data = folder / "data";
  options.laboratory.program = fs::canonical(options.laboratory.program);
  std::int64_t failures = 1;
  try {
    prepare_small_data(options.laboratory.program, folder);
    const Reference reference = measure_reference(options.laboratory, folder);
    for (const std::string& what : reference.unsynced) {
      std::cout << "FAILED: a power cut could lose data: " << what << '\n';
    }
    failures = Campaign(options, reference, folder).run() + static_cast<std::int64_t>(reference.unsynced.size());
  } catch (const std::exception& error) {
    std::cerr << "attamba_faults: " << error.what() << '\n';
  }
  if (options.keep || options.replay >= 0) {
    std::cout << "everything is in " << folder.string() << '\n';
  } else {
    fs::remove_all(folder);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace attamba::faults

int main(int argc, char** argv) {
  return attamba::faults::run(argc, argv);
}
