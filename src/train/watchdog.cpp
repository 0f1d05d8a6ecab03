#include "src/train/watchdog.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/median.h"
#include "src/core/signal_free_thread.h"
#include "src/train/events.h"
#include "src/train/run_folder.h"

namespace attamba {

namespace {

/// A hang is named after this part of the time promised, which leaves the rest for heartbeats and judgement.
constexpr double kShare = 0.85;
constexpr double kStepsPromised = 5;
constexpr std::size_t kStepsRemembered = 64;
constexpr double kSecondsToComeThrough = 5;
/// What is said about a hang may not take longer: a pipe that is full, a file server that is the reason for the hang.
constexpr double kSecondsToSay = 2;
/// A verdict is sent so often, as datagrams may be lost, with a pause in between.
constexpr int kVerdicts = 3;
constexpr auto kVerdictPause = std::chrono::milliseconds(30);

}  // namespace

Watchdog::Watchdog(Communicator& communicator, Settings settings)
    : communicator_(communicator),
      settings_(std::move(settings)),
      // Many ranks speak less often, but at least a few times within what counts as silence.
      interval_(std::min(std::clamp(settings_.seconds / 20, 0.02, 0.5) * std::max(1.0, communicator.size() / 256.0),
                         settings_.seconds / 7)),
      silence_(kShare * settings_.seconds - interval_),
      seconds_to_say_(std::min(kSecondsToSay, silence_ / 2)),
      limit_(settings_.patience) {
  if (settings_.seconds == 0) {
    return;
  }
  channel_ = std::make_unique<HeartbeatChannel>(communicator);
  for (int rank = 0; rank < channel_->size(); ++rank) {
    hosts_.push_back(channel_->host(rank));
  }
  heard_.resize(hosts_.size());
  woke_ = last_answer_ = stepped_ = monotonic_seconds();
  judge_.emplace(hosts_, silence_, woke_);
  thread_ = start_signal_free_thread([this] { watch(); });
  try {
    meet();
  } catch (...) {
    end_thread();
    throw;
  }
}

void Watchdog::meet() {
  const double began = monotonic_seconds();
  while (!come_through() && monotonic_seconds() - began < kSecondsToComeThrough) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  const bool connected = come_through();
  std::int64_t failed[2] = {connected ? 0 : 1, connected ? -1 : channel_->rank()};
  communicator_.all_reduce_max({failed, {DType::int64, {2}}});
  watching_ = failed[0] == 0;
  meeting_ = false;
  if (!watching_ && channel_->rank() == 0) {
    std::cerr << "the watchdog is off: heartbeats (UDP) between rank " << failed[1] << " on "
              << channel_->host(static_cast<int>(failed[1])) << " and rank 0 at " << channel_->address(0) << " or rank "
              << channel_->deputy() << " at " << channel_->address(channel_->deputy())
              << " do not come through; a firewall? ATTAMBA_INTERFACE chooses the network\n";
  }
}

Watchdog::~Watchdog() {
  if (thread_.joinable()) {
    end_thread();
  }
}

void Watchdog::end_thread() {
  enter(Phase::left, step_);
  stopping_ = true;
  channel_->wake();
  thread_.join();
}

std::optional<StopRequest> Watchdog::asked_to_stop() const {
  const auto own = settings_.asked_to_stop ? settings_.asked_to_stop(median_) : std::nullopt;
  return own ? own : unpack_stop(stop_heard_);
}

/// Rank 0 and the deputy must hear everybody, and everybody them.
bool Watchdog::come_through() const {
  const bool listens = channel_->rank() == 0 || channel_->rank() == channel_->deputy();
  return (answered_ == 3) && (!listens || heard_ranks_ == channel_->size());
}

double Watchdog::limit_of(Phase phase) const {
  const bool usual =
      (phase == Phase::step && steps_taken_ >= kFirstSteps) || (phase == Phase::evaluation && evaluated_ > kFirstSteps);
  return usual ? kShare * std::max(settings_.seconds, kStepsPromised * median_) - interval_
               : std::max(settings_.patience, settings_.seconds);
}

void Watchdog::enter(Phase phase, std::int64_t step) {
  evaluated_ += phase == Phase::evaluation ? 1 : 0;
  step_ = step;
  phase_ = static_cast<std::int32_t>(phase);
  tick();
  limit_ = limit_of(phase);  // last: whoever reads it before `ticks_` sees this rank get on with the new limit
}

void Watchdog::step_took(double seconds) {
  ++steps_taken_;
  if (steps_taken_ > kFirstSteps) {
    steps_.push_back(seconds);
    if (steps_.size() > kStepsRemembered) {
      steps_.pop_front();
    }
  }
  median_ = steps_.empty() ? seconds : median({steps_.begin(), steps_.end()});
}

std::string Watchdog::on_host(int rank) const {
  return hosts_.empty() ? std::string() : concat(" on ", hosts_[static_cast<std::size_t>(rank)]);
}

void Watchdog::hear_stop(std::int64_t packed) {
  std::int64_t none = 0;
  if (packed != 0) {
    stop_heard_.compare_exchange_strong(none, packed);
  }
}

// ---------------------------------------------------------------------------------------------- the watching thread

void Watchdog::watch() {
  pthread_setname_np(pthread_self(), "watchdog");
  double next = woke_;
  while (!stopping_) {
    channel_->wait(std::max(0.0, next - monotonic_seconds()));
    const double now = monotonic_seconds();
    if (now - woke_ > 2 * interval_ + 1) {  // stopped and continued, or the machine was suspended
      judge_->forgive(now - woke_);
      last_answer_ += now - woke_;
    }
    woke_ = now;
    Heartbeat message;
    while (channel_->receive(message)) {
      take(message, now);
    }
    if (now >= next) {
      publish(now);
      next = now + (meeting_ ? std::min(interval_, 0.02) : interval_);
      if (watching_) {
        look(now);
      }
    }
  }
  for (int i = 0; i < kVerdicts; ++i) {
    publish(monotonic_seconds());
  }
}

Heartbeat Watchdog::own_beat() {
  hear_stop(pack(asked_to_stop()));
  const double limit = limit_;  // before `ticks_`
  const CollectiveProgress& progress = communicator_.progress();
  Heartbeat beat{.kind = Heartbeat::beat,
                 .rank = channel_->rank(),
                 .phase = phase_,
                 .waiting = progress.waiting() ? 1 : 0,
                 .step = step_,
                 .ticks = ticks_,
                 .limit = limit,
                 .lanes = progress.positions()};
  for (const CollectiveProgress::Position& lane : beat.lanes) {
    beat.ticks += 2 * lane.number + (lane.inside ? 0 : 1);
  }
  beat.stop = stop_heard_;
  return beat;
}

void Watchdog::publish(double now) {
  const Heartbeat beat = own_beat();
  take(beat, now);
  for (const int listener : {0, channel_->deputy()}) {
    if (listener != channel_->rank()) {
      channel_->send(listener, beat);
    }
    if (channel_->deputy() == 0) {
      break;
    }
  }
}

void Watchdog::take(const Heartbeat& message, double now) {
  hear_stop(message.stop);
  const bool from_first = message.rank == 0, from_deputy = message.rank == channel_->deputy();
  switch (message.kind) {
    case Heartbeat::verdict:
      _exit(kExitHangs);
    case Heartbeat::answer:
      answered_ |= (from_first ? 1 : 0) | (from_deputy ? 2 : 0);
      last_answer_ = now;
      return;
    default:
      break;
  }
  judge_->heard(message, now);
  if (!heard_[static_cast<std::size_t>(message.rank)]) {
    heard_[static_cast<std::size_t>(message.rank)] = true;
    ++heard_ranks_;
  }
  if (message.rank != channel_->rank()) {
    Heartbeat answer = own_beat();
    answer.kind = Heartbeat::answer;
    channel_->send(message.rank, answer);
  } else if (channel_->rank() == 0 || channel_->rank() == channel_->deputy()) {
    answered_ |= (from_first ? 1 : 0) | (from_deputy ? 2 : 0);  // it hears itself
  }
}

/// Rank 0, or the deputy when rank 0 is silent or has left.
bool Watchdog::judges(double now) const {
  return channel_->rank() == 0 || (channel_->rank() == channel_->deputy() && (judge_->silent(0, now) || judge_->has_left(0)));
}

void Watchdog::look(double now) {
  if (judges(now)) {
    if (const auto finding = judge_->judge(now)) {
      end_job(describe(*finding, hosts_), &*finding);
    }
  }
  const bool listens = channel_->rank() == 0 || channel_->rank() == channel_->deputy();
  stepped_ = step_ == step_seen_ ? stepped_ : now;
  step_seen_ = step_;
  // The others give the deputy the time to speak first.
  if (!listens && now - last_answer_ > silence_ + seconds_to_say_ + 4 * interval_ && now - stepped_ > kGettingOn * silence_) {
    end_job(concat("rank 0 on ", hosts_[0], " and rank ", channel_->deputy(), " on ",
                   hosts_[static_cast<std::size_t>(channel_->deputy())],
                   ", who watch over this job, give no sign of life; seen from rank ", channel_->rank(), " on ",
                   hosts_[static_cast<std::size_t>(channel_->rank())], ", after step ", step_),
            nullptr);
  }
}

void Watchdog::send_verdict() const {
  Heartbeat verdict;
  verdict.kind = Heartbeat::verdict;
  for (int i = 0; i < kVerdicts; ++i) {
    for (int rank = 0; rank < channel_->size(); ++rank) {
      if (rank != channel_->rank()) {
        channel_->send(rank, verdict);
      }
    }
    std::this_thread::sleep_for(kVerdictPause);
  }
}

void Watchdog::end_job(const std::string& text, const HangJudge::Finding* finding) const {
  std::thread([this] {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds_to_say_));
    send_verdict();
    _exit(kExitHangs);
  }).detach();
  const std::string line = concat("\nattamba: error: the job hangs: ", text, ". It is ended with exit code ", kExitHangs,
                                  "; run.watchdog_seconds sets when\n");
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
  nlohmann::json event{{"event", "hang"}, {"step", step_.load()}, {"message", text}, {"seen_by", channel_->rank()}};
  if (finding != nullptr) {
    event.update({{"step", finding->step},
                  {"ranks", finding->ranks},
                  {"phase", finding->phase},
                  {"collective", finding->collective},
                  {"number", finding->number},
                  {"seconds", finding->seconds}});
    event["hosts"] = nlohmann::json::array();
    for (const int rank : finding->ranks) {
      event["hosts"].push_back(hosts_[static_cast<std::size_t>(rank)]);
    }
  }
  std::error_code ignored;
  if (std::filesystem::exists(settings_.events.parent_path() / kConfigFile, ignored)) {  // the run's folder is there already
    append_event(settings_.events, event);
  }
  send_verdict();  // last: when ranks leave, a launcher kills the others
  _exit(kExitHangs);
}

}  // namespace attamba
