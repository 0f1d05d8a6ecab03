#include "tests/faults/trial.h"

#include <algorithm>
#include <csignal>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <thread>

#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/faults/durability.h"

namespace attamba::faults {

namespace fs = std::filesystem;

namespace {

constexpr double kLongestRun = 120;     ///< seconds; a tiny run takes one
constexpr double kLongestGoodbye = 10;  ///< for processes to be gone when their launcher is
constexpr int kMostStarts = 6;

/// Thrown by what finds a trial to have failed.
struct Failed {
  std::string why;
};

void pause_seconds(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

std::string last_lines(const std::string& text, int lines) {
  std::size_t begin = text.size();
  for (int i = 0; i <= lines && begin > 0 && begin != std::string::npos; ++i) {
    begin = text.rfind('\n', begin - 1);
  }
  return text.substr(begin == std::string::npos ? 0 : begin);
}

bool is_signal(Fault fault) {
  return fault <= Fault::interrupt;
}
/// What may happen to the next start, too, and to the one after it.
bool comes_again(Fault fault) {
  return is_signal(fault) || fault == Fault::call_kill || fault == Fault::call_torn;
}
bool is_damage(Fault fault) {
  return fault == Fault::flip || fault == Fault::truncate || fault == Fault::remove || fault == Fault::all_damaged;
}

/// Waits for the command's end, and then until no process of it is left.
int wait_for_end(Session& session, const std::function<void()>& meanwhile) {
  const double begin = monotonic_seconds();
  std::optional<int> code;
  while (!(code = session.exit_code())) {
    if (monotonic_seconds() - begin > kLongestRun) {
      throw Failed{concat("hangs: still running after ", kLongestRun, " s")};
    }
    meanwhile();
    pause_seconds(0.004);
  }
  const double ended = monotonic_seconds();
  while (!session.processes().empty()) {
    if (monotonic_seconds() - ended > kLongestGoodbye) {
      throw Failed{concat(session.processes().size(), " processes left ", kLongestGoodbye, " s after their launcher ended")};
    }
    pause_seconds(0.01);
  }
  return *code;
}

/// Sends a signal once its moment has come.
class Signal {
 public:
  /// `begins`: the start that it belongs to finds no checkpoint.
  Signal(Fault fault, const Moment& moment, bool begins, const Training& training, Session& session)
      : fault_(fault),
        moment_(moment),
        begins_(begins),
        training_(training),
        session_(session),
        since_(moment.after_steps == 0 ? monotonic_seconds() : 0) {}

  bool sent() const { return sent_; }

  void poll() {
    if (sent_ || !is_signal(fault_)) {
      return;
    }
    if (since_ == 0) {
      const std::optional<std::int64_t> from = begins_ ? 0 : training_.resumed_after();
      if (!from || training_.logged_step() < *from + moment_.after_steps) {
        return;
      }
      since_ = monotonic_seconds();
    }
    if (monotonic_seconds() - since_ >= moment_.delay) {
      send();
    }
  }

 private:
  void send() {
    const std::vector<pid_t> ranks = session_.running(training_.program());
    if (fault_ == Fault::kill_job) {
      session_.kill_all();
    } else {
      const bool launcher = fault_ == Fault::kill_launcher || (fault_ == Fault::interrupt && moment_.dice % 2 == 0);
      if (!launcher && ranks.empty()) {
        return;  // not there yet: at the next poll
      }
      const pid_t target = launcher ? session_.leader() : ranks[moment_.dice / 2 % ranks.size()];
      kill(target, fault_ == Fault::interrupt ? SIGTERM : SIGKILL);
    }
    sent_ = true;
  }

  Fault fault_;
  const Moment& moment_;
  bool begins_;
  const Training& training_;
  Session& session_;
  double since_;
  bool sent_ = false;
};

std::vector<fs::path> files_of(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) {
      files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

void flip_bit(const fs::path& file, RandomStream& random) {
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  const auto place = static_cast<std::streamoff>(random.below(fs::file_size(file)));
  bytes.seekg(place);
  const int byte = bytes.get();
  bytes.seekp(place);
  bytes.put(static_cast<char>(byte ^ (1 << random.below(8))));
}

/// What was done, for messages.
std::string damage(const Plan& plan, const Training& training) {
  RandomStream random(plan.dice);
  const std::vector<fs::path> checkpoints = training.checkpoints();
  require(!checkpoints.empty(), "an undisturbed run left no checkpoint");
  if (plan.fault == Fault::all_damaged) {
    for (const fs::path& checkpoint : checkpoints) {
      const std::vector<fs::path> files = files_of(checkpoint);
      flip_bit(*std::max_element(files.begin(), files.end(),
                                 [](const fs::path& a, const fs::path& b) { return fs::file_size(a) < fs::file_size(b); }),
               random);
    }
    return "a bit of every checkpoint";
  }
  const std::vector<fs::path> files = files_of(checkpoints.front());
  const fs::path file = files[random.below(files.size())];
  if (plan.fault == Fault::flip) {
    flip_bit(file, random);
  } else if (plan.fault == Fault::truncate) {
    fs::resize_file(file, random.below(fs::file_size(file)));
  } else {
    fs::remove(file);
  }
  return fs::relative(file, training.run());
}

/// A folder that is named like a checkpoint and is none.
constexpr const char* kDecoy = "step-000000099";

/// What interrupted writes leave behind, in the way of the next ones.
void leave_something(const Plan& plan, const Training& training) {
  if (!fs::exists(training.run() / "config.toml")) {  // a run that is not there yet leaves nothing else
    fs::create_directories(training.run());
    std::ofstream(training.run() / "config.toml.tmp") << "[mod";
    return;
  }
  const fs::path checkpoints = training.run() / "checkpoints";
  const bool some = !training.checkpoints().empty();
  const std::string next = concat("step-0000000", some ? "12" : "06");
  fs::create_directories(checkpoints);
  switch (plan.dice % 5) {
    case 0:
      fs::create_directories(checkpoints / (next + ".tmp-1") / "deeper");
      std::ofstream(checkpoints / (next + ".tmp-1") / "rank-0.h5") << "half";
      break;
    case 1:
      std::ofstream(checkpoints / (next + ".tmp-1")) << "a file";
      break;
    case 2:
      // Without another one this is a run whose only checkpoint is damaged, which is never started again from scratch.
      if (some) {
        fs::create_directories(checkpoints / kDecoy);
      }
      break;
    case 3:
      std::ofstream(training.run() / "metrics.jsonl.tmp") << "{\"step\"";
      std::ofstream(training.run() / "metrics.jsonl", std::ios::app) << "{\"step\":1";
      break;
    default:
      std::ofstream(training.run() / "config.toml.tmp") << "[mod";
      std::ofstream(training.run() / "run.json.tmp") << "{";
  }
}

/// One start of a trial: what is true after every one of them is checked here.
class Trial {
 public:
  Trial(const Plan& plan, const Laboratory& laboratory, const Reference& reference, const fs::path& folder)
      : plan_(plan), reference_(reference), training_(laboratory, folder) {}

  Verdict run() {
    try {
      for (std::size_t i = 0; !ended_ && i + 1 < plan_.starts.size(); ++i) {
        faulted_start(i);
      }
      while (!ended_) {
        if (verdict_.starts == kMostStarts) {
          throw Failed{concat("not at its end after ", kMostStarts, " starts")};
        }
        next_start();
      }
      if (plan_.fault != Fault::all_damaged) {
        judge_end();
      }
    } catch (const Failed& failed) {
      verdict_.failure = concat(failed.why, "; start ", verdict_.starts, " said:", last_lines(training_.log(), 12));
    }
    return verdict_;
  }

 private:
  void faulted_start(std::size_t number) {
    Start start = plan_.starts[number];
    const std::int64_t reached = training_.logged_step();
    const bool begins = training_.checkpoints().empty();
    const fs::path faults = training_.fault_log(++verdict_.starts);
    start.faults.emplace_back("ATTAMBA_FAULT_LOG", faults);
    const std::unique_ptr<Session> session = training_.start(start);
    Signal signal(plan_.fault, plan_.moments[number], begins, training_, *session);
    const int code = wait_for_end(*session, [&] { signal.poll(); });
    const bool finished = code == 0 && !training_.final_state().empty();
    const bool hit = is_signal(plan_.fault) ? signal.sent() && !finished : fs::exists(faults);
    const bool error = plan_.fault == Fault::call_error || plan_.fault == Fault::disk_full;
    verdict_.hit = verdict_.hit || hit;
    verdict_.aborted = error && !finished;
    // What could not be removed is the next start's to remove.
    ended_ = finished && !(error && hit && !training_.leftovers().empty());
    if (code != 0 && !hit) {
      throw Failed{concat("ended with ", code, " although nothing had happened")};
    }
    if (training_.resumed_after()) {
      check_loss(reached);
    }
    if ((plan_.fault == Fault::call_short || plan_.fault == Fault::call_delay) && !finished) {
      throw Failed{concat("ended with ", code, " where nothing fails")};
    }
    if (is_damage(plan_.fault)) {
      damaged_ = damage(plan_, training_);
      verdict_.hit = true;
      ended_ = false;
    } else if (plan_.fault == Fault::leftover) {
      leave_something(plan_, training_);
    }
  }

  void next_start() {
    const std::int64_t reached = training_.logged_step();
    const std::size_t had = training_.checkpoints().size();
    const double begin = monotonic_seconds();
    double ready = 0;
    const std::unique_ptr<Session> session = training_.start(plan_.starts.back());
    ++verdict_.starts;
    const int code = wait_for_end(*session, [&] {
      if (ready == 0 && training_.resumed_after()) {
        ready = monotonic_seconds() - begin;
      }
    });
    if (plan_.fault == Fault::all_damaged) {
      if (code == 0 || training_.log().find("step-") == std::string::npos) {
        throw Failed{concat("ended with ", code, " although every checkpoint is damaged")};
      }
      ended_ = true;
      return;
    }
    if (code != 0) {
      throw Failed{concat("cannot go on without help: ended with ", code)};
    }
    check_resumption(reached, had);
    verdict_.ready_seconds = verdict_.ready_seconds == 0 ? ready : verdict_.ready_seconds;
    ended_ = !training_.final_state().empty();
  }

  void check_resumption(std::int64_t reached, std::size_t had) {
    const std::int64_t from = training_.resumed_after().value_or(0);
    if (!damaged_.empty() && from >= Laboratory::kSteps) {
      throw Failed{concat("did not notice that ", damaged_, " is damaged")};
    }
    if (had > 0 && from == 0 && training_.log().find("finished already") == std::string::npos) {
      throw Failed{concat("began from scratch although there were ", had, " checkpoints")};
    }
    check_loss(reached);
  }

  void check_loss(std::int64_t reached) {
    const std::int64_t from = training_.resumed_after().value_or(0), lost = reached - from;
    verdict_.lost_steps = std::max(verdict_.lost_steps, lost);
    if (plan_.fault != Fault::disk_full && lost > allowed_loss()) {
      throw Failed{concat("lost ", lost, " steps: had logged step ", reached, ", went on after ", from)};
    }
  }

  /// An interval; another one for a save that was in flight in the background, which the next one waits for; another one when
  /// a save failed, or when what was saved is damaged. A start that ends early leaves the metrics of the one before it.
  std::int64_t allowed_loss() const {
    const bool unsaved = !damaged_.empty() || plan_.fault == Fault::call_error;
    const bool in_flight =
        std::any_of(plan_.starts.begin(), plan_.starts.end() - 1, [](const Start& start) { return start.background; });
    return Laboratory::kEvery * (1 + (in_flight ? 1 : 0) + (unsaved ? 1 : 0));
  }

  void judge_end() {
    if (training_.final_state() != reference_.state) {
      throw Failed{concat("final weights differ: ", training_.final_state(), ", undisturbed ", reference_.state)};
    }
    const std::vector<std::string> curve = training_.curve();
    if (curve != reference_.curve) {
      const auto difference = std::mismatch(curve.begin(), curve.end(), reference_.curve.begin(), reference_.curve.end());
      throw Failed{concat("the curve differs: \"", difference.first == curve.end() ? "end" : *difference.first,
                          "\", undisturbed \"", difference.second == reference_.curve.end() ? "end" : *difference.second, '"')};
    }
    if (const auto left = training_.leftovers(); !left.empty()) {
      throw Failed{concat("left behind: ", left.front(), left.size() > 1 ? concat(" and ", left.size() - 1, " more") : "")};
    }
    for (const std::string& broken : training_.broken_checkpoints()) {
      if (plan_.fault != Fault::leftover || !broken.starts_with(kDecoy)) {
        throw Failed{concat("half a checkpoint is left: ", broken)};
      }
    }
  }

  const Plan& plan_;
  const Reference& reference_;
  Training training_;
  Verdict verdict_;
  std::string damaged_;
  bool ended_ = false;
};

Start draw_start(RandomStream& random) {
  Start start{.ranks = 1 + static_cast<int>(random.below(4)), .background = random.below(2) == 0};
  start.transport = start.ranks == 1 ? Transport::alone : random.below(2) == 0 ? Transport::mpi : Transport::tcp;
  return start;
}

const char* name_of(Transport transport) {
  return transport == Transport::alone ? "alone" : transport == Transport::mpi ? "mpi" : "tcp";
}

/// For a start that goes on from somewhere, `steps` is the most that it is likely to make.
Moment draw_moment(RandomStream& random, std::int64_t steps) {
  Moment moment{.dice = random.below(1u << 30)};
  moment.after_steps =
      random.below(4) == 0 ? 0 : 1 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(steps)));
  moment.delay = random.uniform() * (moment.after_steps == 0 ? 1.5 : 0.02);
  return moment;
}

/// A rank that writes, and one of its calls: one of all, or of the first half, as a start makes that goes on from somewhere.
void aim(Start& start, RandomStream& random, const Reference& reference, const char* kind, const char* count,
         bool goes_on = false) {
  const std::vector<long>& calls = reference.calls[static_cast<std::size_t>(start.ranks)];
  std::vector<std::size_t> writers;
  for (std::size_t rank = 0; rank < calls.size(); ++rank) {
    if (calls[rank] > 0) {
      writers.push_back(rank);
    }
  }
  require(!writers.empty(), "no rank writes anything");
  const std::size_t rank = writers[random.below(writers.size())];
  const auto among = static_cast<std::uint64_t>(goes_on ? (calls[rank] + 1) / 2 : calls[rank]);
  start.faults = {{"ATTAMBA_FAULT_KIND", kind},
                  {"ATTAMBA_FAULT_COUNT", count},
                  {"ATTAMBA_FAULT_RANK", std::to_string(rank)},
                  {"ATTAMBA_FAULT_AT", std::to_string(1 + random.below(among))},
                  {"ATTAMBA_FAULT_SCOPE", random.below(2) == 0 ? "rank" : "job"},
                  {"ATTAMBA_FAULT_DELAY", std::to_string(50 + random.below(400))}};
}

}  // namespace

std::string Plan::text() const {
  std::ostringstream out;
  out << kFaultNames[static_cast<std::size_t>(fault)];
  for (std::size_t i = 0; i < starts.size(); ++i) {
    const Start& start = starts[i];
    out << (i == 0 ? ", ranks " : "; ") << start.ranks << ' ' << name_of(start.transport) << " zero " << start.zero
        << (start.background ? " background" : "");
    if (is_signal(fault) && i < moments.size()) {
      const Moment& moment = moments[i];
      out << ", " << moment.delay << " s after "
          << (moment.after_steps == 0 ? "the start" : concat(moment.after_steps, " steps"));
    }
    for (const auto& [name, value] : start.faults) {
      out << ' ' << name.substr(14) << '=' << value;
    }
  }
  return out.str();
}

Plan make_plan(std::uint64_t seed, const Reference& reference, const std::vector<Fault>& among) {
  RandomStream random(seed), more(seed, 1);  // the second one for what trials did not have at first, so that the rest stays
  Plan plan{.seed = seed, .fault = among[random.below(among.size())], .starts = {}, .moments = {}};
  plan.starts = {draw_start(random), draw_start(random)};
  plan.moments = {draw_moment(random, Laboratory::kSteps - 1)};
  plan.dice = plan.moments.front().dice;
  const std::uint64_t again = more.below(4) == 0 && comes_again(plan.fault) ? 1 + more.below(2) : 0;
  for (std::uint64_t i = 0; i < again; ++i) {
    plan.starts.insert(plan.starts.end() - 1, draw_start(more));
    plan.moments.push_back(draw_moment(more, 2 * Laboratory::kEvery));
  }
  for (Start& start : plan.starts) {
    start.zero = static_cast<int>(more.below(4));
  }
  if (plan.fault == Fault::kill_launcher || plan.fault == Fault::kill_rank) {
    for (std::size_t i = 0; i + 1 < plan.starts.size(); ++i) {
      Start& start = plan.starts[i];
      start.ranks = std::max(start.ranks, 2);
      start.transport = start.transport == Transport::alone ? Transport::mpi : start.transport;
    }
  }
  static constexpr std::array kErrors{"eio", "enospc", "edquot"};
  Start& first = plan.starts.front();
  switch (plan.fault) {
    case Fault::call_kill:
    case Fault::call_torn: {
      const char* kind = plan.fault == Fault::call_kill ? "kill" : "torn";
      aim(first, random, reference, kind, "1");
      for (std::size_t i = 1; i + 1 < plan.starts.size(); ++i) {
        aim(plan.starts[i], more, reference, kind, "1", true);
      }
      break;
    }
    case Fault::leftover:
      aim(first, random, reference, "kill", "1");
      break;
    case Fault::call_short:
      aim(first, random, reference, "short", random.below(2) == 0 ? "1" : "0");
      break;
    case Fault::call_error:
      aim(first, random, reference, kErrors[random.below(kErrors.size())], "1");
      break;
    case Fault::disk_full:
      aim(first, random, reference, "enospc", "0");
      break;
    case Fault::call_delay:
      aim(first, random, reference, "delay", "1");
      break;
    default:
      break;
  }
  return plan;
}

namespace {

/// One start without any fault, its calls traced.
void undisturbed(Training& training, int ranks) {
  const std::unique_ptr<Session> session = training.start({.ranks = ranks,
                                                           .transport = ranks == 1 ? Transport::alone : Transport::mpi,
                                                           .faults = {{"ATTAMBA_FAULT_TRACE", training.trace()}}});
  try {
    const int code = wait_for_end(*session, [] {});
    require(code == 0 && !training.final_state().empty(), "a run on ", ranks, " ranks without any fault ended with ", code, ":",
            last_lines(training.log(), 12));
  } catch (const Failed& failed) {
    throw Error(concat("a run on ", ranks, " ranks without any fault ", failed.why));
  }
}

std::vector<long> count_calls(const Training& training, int ranks) {
  std::vector<long> calls(static_cast<std::size_t>(ranks));
  std::ifstream trace(training.trace());
  std::size_t rank = 0;
  std::string number, call;
  for (std::string rest; trace >> rank >> number >> call && std::getline(trace, rest);) {
    calls.at(rank) += call == "failed" ? 0 : 1;
  }
  return calls;
}

}  // namespace

Reference measure_reference(const Laboratory& laboratory, const fs::path& folder) {
  Reference reference;
  for (int ranks = 1; ranks <= 4; ++ranks) {
    Training training(laboratory, folder / concat("reference-", ranks));
    undisturbed(training, ranks);
    reference.calls[static_cast<std::size_t>(ranks)] = count_calls(training, ranks);
    require(ranks == 1 || (training.final_state() == reference.state && training.curve() == reference.curve),
            "results without any fault depend on the number of ranks");
    reference.state = training.final_state();
    reference.curve = training.curve();
    if (ranks <= 2) {
      // A second start writes in other ways: it cuts the metrics back, and puts a checkpoint in the place of a damaged one.
      fs::resize_file(training.checkpoints().front() / "manifest.json", 0);
      undisturbed(training, ranks);
      const std::vector<std::string> unsynced = find_unsynced(training.trace());
      reference.unsynced.insert(reference.unsynced.end(), unsynced.begin(), unsynced.end());
    }
  }
  return reference;
}

Verdict run_trial(const Plan& plan, const Laboratory& laboratory, const Reference& reference, const fs::path& folder) {
  return Trial(plan, laboratory, reference, folder).run();
}

}  // namespace attamba::faults
