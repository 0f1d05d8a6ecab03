#include "src/train/stop.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <csignal>

#include "src/core/clock.h"
#include "src/core/error.h"

namespace attamba {

namespace {

/// How long a process that was told to stop goes on looking for the other ranks.
constexpr unsigned kSecondsToMeet = 5;

/// Of the time that there is, this part at most is kept in reserve: a fourth.
constexpr double kReservedPart = 4;

const double program_began = monotonic_seconds();

std::atomic<int> first_signal = 0;
std::atomic<bool> met = false;
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<bool>::is_always_lock_free, "used in signal handlers");

void set_handler(int signal, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigfillset(&action.sa_mask);
  sigaction(signal, &action, nullptr);
}

void remember(int signal) {
  int none = 0;
  const bool is_first = first_signal.compare_exchange_strong(none, signal);
  if (signal == SIGINT) {
    set_handler(SIGINT, SIG_DFL);
  }
  if (is_first && !met) {
    alarm(kSecondsToMeet);
  }
}

void leave(int) {
  if (!met) {
    _exit(kExitStopped);
  }
}

}  // namespace

std::string describe(const StopRequest& request) {
  if (request.reason == kTimeIsUp) {
    return "the job's time is nearly over";
  }
  const char* name = request.reason == SIGTERM   ? "SIGTERM"
                     : request.reason == SIGINT  ? "SIGINT"
                     : request.reason == SIGUSR1 ? "SIGUSR1"
                     : request.reason == SIGUSR2 ? "SIGUSR2"
                                                 : "a signal";
  return concat("rank ", request.rank, " got ", name);
}

void handle_stop_signals() {
  set_handler(SIGALRM, leave);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1, SIGUSR2}) {
    set_handler(signal, remember);
  }
}

void ranks_have_met() {
  met = true;
  alarm(0);
}

std::int64_t stop_signal() {
  return first_signal;
}

TimeLimit::TimeLimit(double seconds, double reserve, const EnvironmentLookup& lookup) : reserve_(reserve) {
  if (seconds > 0) {
    end_ = program_began + seconds;
  }
  if (const std::optional<std::string> text = lookup("SLURM_JOB_END_TIME")) {
    std::int64_t slurm = 0;
    const auto [rest, error] = std::from_chars(text->data(), text->data() + text->size(), slurm);
    require<UsageError>(error == std::errc() && rest == text->data() + text->size(), "SLURM_JOB_END_TIME is \"", *text,
                        "\"; it must be a number of seconds since 1970; unset it to train without");
    const double today = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    const double end = monotonic_seconds() + static_cast<double>(slurm) - today;
    end_ = end_ ? std::min(*end_, end) : end;
  }
  if (end_) {
    reserve_ = std::min(reserve_, std::max(0.0, *end_ - program_began) / kReservedPart);
  }
}

}  // namespace attamba
