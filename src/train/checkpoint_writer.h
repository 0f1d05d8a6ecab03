// Saves while training goes on: a copy of what this rank saves, a thread that writes it, and a commit by all ranks at the first
// step's end at which all of them have written. The thread never talks to other ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/communicator.h"
#include "src/core/device.h"
#include "src/train/checkpoint.h"

namespace attamba {

class CheckpointWriter {
 public:
  struct Settings {
    bool background = true;
    Retention retention = {};
    std::function<void(std::string_view)> say = nullptr;  ///< called on rank 0; may be empty, like the next
    std::function<void(std::int64_t)> saved = nullptr;    ///< called on rank 0 when the checkpoint of this step is there
  };

  /// Saves into `folder`. The communicator outlives this object.
  CheckpointWriter(std::filesystem::path folder, Settings settings, Communicator& communicator);
  /// Gives up a save in flight; the next one removes what it left.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Saves this state: in the background, from a copy, or at once. A save that is still in flight is waited for first, with a
  /// message, so that at most two intervals' work can be lost: the one that is in flight and the one that follows it. A failure
  /// is a message; training goes on. Collective.
  void save(const TrainingState& state, const std::vector<StateSlice>& slices);
  /// After each step: commits the save in flight when all ranks have written. Collective while there is one.
  void poll();
  /// Waits for the save in flight, if any, and commits it, and for old checkpoints to be removed. A failure is a message.
  /// Collective.
  void finish();
  /// The last save: returns when this state is on the disk, or throws SaveFailed. Collective.
  void save_now(const TrainingState& state, const std::vector<StateSlice>& slices);
  /// The state was evaluated: its validation loss goes into its checkpoint where there is one already. A failure is a message.
  void evaluated(const TrainingState& state);
  /// Says that this step was loaded from the folder, so that it need not be saved again.
  void loaded(std::int64_t step) { saved_step_ = step; }
  /// Says that the state is not that of its step's checkpoint any more, so that it has to be saved again.
  void changed() { saved_step_ = -1; }

  std::int64_t saved_step() const { return saved_step_; }
  /// Seconds in which training stood still for saving, since this object was made.
  double stall_seconds() const { return stall_seconds_; }
  /// Seconds that the last save took from its beginning to its commit; 0 before the first one.
  double save_seconds() const { return save_seconds_; }

 private:
  struct InFlight {
    SaveAttempt attempt;
    TrainingState state;
    double began;
    std::future<std::string> report;
  };

  /// Copies of the slices, in host memory that is kept from save to save.
  std::vector<StateSlice> snapshot(const std::vector<StateSlice>& slices);
  void begin(const TrainingState& state, const std::vector<StateSlice>& slices, bool from_copy);
  /// Waits for the save in flight and commits it.
  void commit();
  void wait_for_cleaning() const;
  /// Runs `body`; when the save fails, says so.
  template <class Body>
  void reporting(const Body& body);
  void say(std::string_view text) const;

  std::filesystem::path folder_;
  Settings settings_;
  Communicator& communicator_;
  std::atomic<bool> given_up_ = false;
  Device snapshot_device_ = Device::cpu;
  std::size_t snapshot_bytes_ = 0;
  PinnedMemory snapshot_;
  std::optional<InFlight> in_flight_;  ///< the same step on all ranks
  std::future<void> cleaning_;         ///< on rank 0
  std::int64_t saved_step_ = -1;
  double stall_seconds_ = 0, save_seconds_ = 0;
};

}  // namespace attamba
