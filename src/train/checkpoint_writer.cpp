#include "src/train/checkpoint_writer.h"

#include <chrono>
#include <cstdio>
#include <utility>

#include "src/core/clock.h"
#include "src/core/storage.h"
#include "src/train/metrics.h"

namespace attamba {

namespace {

Device device_of(const std::vector<StateSlice>& slices) {
  return slices.empty() ? Device::cpu : slices.front().values.device;
}

/// Adds the seconds of its life.
class Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum) {}
  ~Stopwatch() { sum_ += monotonic_seconds() - began_; }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& sum_;
  double began_ = monotonic_seconds();
};

template <class T>
bool is_ready(const std::future<T>& future) {
  return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

}  // namespace

CheckpointWriter::CheckpointWriter(std::filesystem::path folder, Settings settings, Communicator& communicator)
    : folder_(std::move(folder)), settings_(std::move(settings)), communicator_(communicator) {}

CheckpointWriter::~CheckpointWriter() {
  given_up_ = true;  // the futures wait for their threads
}

void CheckpointWriter::say(std::string_view text) const {
  if (communicator_.rank() == 0 && settings_.say) {
    settings_.say(text);
  }
}

template <class Body>
void CheckpointWriter::reporting(const Body& body) {
  try {
    body();
  } catch (const SaveFailed& failure) {
    say(concat(failure.what(), "; training goes on and saves again when the next checkpoint is due"));
  }
}

std::vector<StateSlice> CheckpointWriter::snapshot(const std::vector<StateSlice>& slices) {
  std::size_t bytes = 0;
  for (const StateSlice& slice : slices) {
    bytes += align_up(slice.bytes());
  }
  const Device device = device_of(slices);
  if (bytes > snapshot_bytes_ || device != snapshot_device_) {
    snapshot_ = PinnedMemory();
    snapshot_ = PinnedMemory(device, bytes, "a checkpoint on its way to the disk");
    snapshot_bytes_ = bytes;
    snapshot_device_ = device;
  }
  std::vector<StateSlice> copies = slices;
  std::byte* next = snapshot_.data();
  for (StateSlice& copy : copies) {
    if (device == Device::cpu) {
      runtime(device).copy_on_device(next, copy.values.data, copy.bytes());  // with all threads
    } else {
      runtime(device).copy_to_host(next, copy.values.data, copy.bytes());
    }
    copy.values = {next, copy.values.type};
    next += align_up(copy.bytes());
  }
  runtime(device).synchronize();
  return copies;
}

void CheckpointWriter::begin(const TrainingState& state, const std::vector<StateSlice>& slices, bool from_copy) {
  const double began = monotonic_seconds();
  SaveAttempt attempt = begin_save(folder_, state.step, slices, communicator_);
  std::future<std::string> report;
  try {
    report = std::async(std::launch::async,
                        [this, attempt, rank = communicator_.rank(), values = from_copy ? snapshot(slices) : slices] {
                          return write_share(attempt, rank, values, &given_up_);
                        });
  } catch (const std::exception& error) {  // no memory for a copy, no thread: other ranks must hear of it
    std::promise<std::string> failed;
    failed.set_value(unwritten_share(error.what()));
    report = failed.get_future();
  }
  in_flight_.emplace(InFlight{.attempt = std::move(attempt), .state = state, .began = began, .report = std::move(report)});
}

void CheckpointWriter::commit() {
  InFlight save = std::move(*in_flight_);
  in_flight_.reset();
  commit_save(save.attempt, save.state, save.report.get(), communicator_);
  saved_step_ = save.state.step;
  save_seconds_ = monotonic_seconds() - save.began;
  if (communicator_.rank() == 0) {
    if (settings_.saved) {
      settings_.saved(saved_step_);
    }
    // Removing large files takes file systems a while.
    cleaning_ = std::async(std::launch::async, [folder = folder_, retention = settings_.retention] {
      try {
        remove_old_checkpoints(folder, retention);
      } catch (const std::exception&) {
        return;  // they are in nobody's way, and the next save tries again
      }
    });
  }
}

void CheckpointWriter::save(const TrainingState& state, const std::vector<StateSlice>& slices) {
  const NamedRange range(runtime(device_of(slices)), "save");
  const Stopwatch stall(stall_seconds_);
  if (in_flight_) {
    const double began = monotonic_seconds();
    const std::int64_t earlier = in_flight_->state.step;
    reporting([&] { commit(); });
    say(concat("training waited ", format_duration(monotonic_seconds() - began), " for the checkpoint of step ",
               format_integer(earlier), ", which was still being written when the next one was due; raise checkpoint.every"));
  }
  reporting([&] {
    if (settings_.background) {
      begin(state, slices, true);
    } else {
      save_now(state, slices);
    }
  });
}

void CheckpointWriter::poll() {
  if (!in_flight_) {
    return;
  }
  const Stopwatch stall(stall_seconds_);
  std::int64_t written = is_ready(in_flight_->report) ? 1 : 0;
  communicator_.all_reduce_sum({&written, {DType::int64, {1}}});
  if (written == communicator_.size()) {
    reporting([&] { commit(); });
  }
}

void CheckpointWriter::finish() {
  const Stopwatch stall(stall_seconds_);
  if (in_flight_) {
    reporting([&] { commit(); });
  }
  wait_for_cleaning();
}

void CheckpointWriter::wait_for_cleaning() const {
  if (cleaning_.valid()) {
    cleaning_.wait();
  }
}

void CheckpointWriter::evaluated(const TrainingState& state) {
  if (communicator_.rank() != 0 || saved_step_ != state.step || !state.validation_loss) {
    return;
  }
  try {
    note_validation_loss(checkpoint_path(folder_, state.step), *state.validation_loss);
  } catch (const std::exception& error) {
    say(concat("the checkpoint of step ", format_integer(state.step), " goes without its validation loss: ", error.what()));
  }
}

void CheckpointWriter::save_now(const TrainingState& state, const std::vector<StateSlice>& slices) {
  const NamedRange range(runtime(device_of(slices)), "save");
  finish();
  if (saved_step_ != state.step) {
    // On a device the file is written from a copy all the same; on the CPU nothing changes the values meanwhile.
    begin(state, slices, device_of(slices) != Device::cpu);
    commit();
    wait_for_cleaning();
  }
}

}  // namespace attamba
