// Checkpoints: a folder step-N with a file per rank and a manifest, made under another name and renamed when all of it is on
// the disk. The newest folder whose manifest and files are what they were is the only truth (docs/checkpoints.md).
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "src/core/error.h"
#include "src/train/checkpoint_manifest.h"

namespace attamba {

struct NamedTensor;

/// A save that came to nothing: no space, a disk that fails. All ranks throw it alike, earlier checkpoints are untouched, and
/// nothing of it is left.
class SaveFailed : public Error {
 public:
  using Error::Error;
};

/// The part of all tensors that a rank saves when each has all of them: ranks write equal numbers of bytes, each a range.
std::vector<StateSlice> even_share(const std::vector<NamedTensor>& tensors, int rank, int ranks);
/// Every tensor as one slice.
std::vector<StateSlice> whole_slices(const std::vector<NamedTensor>& tensors);

/// Where the checkpoint of a step is or would be.
std::filesystem::path checkpoint_path(const std::filesystem::path& folder, std::int64_t step);

/// Writes FOLDER/step-N: each rank gives slices in host memory, which together cover every tensor once. Collective, and so are
/// the two outer ones of the three functions that it is made of; throws SaveFailed.
void save_checkpoint(const std::filesystem::path& folder, const TrainingState& state, const std::vector<StateSlice>& slices,
                     Communicator& communicator);

/// Removes what interrupted saves and removals have left in the folder, which need not exist, and puts back a checkpoint that
/// was being replaced. For the one process that writes there, between saves.
void tidy_checkpoints(const std::filesystem::path& folder);

/// One attempt to save a step: its folder, to be renamed.
struct SaveAttempt {
  std::filesystem::path folder, target;
};
/// Removes what earlier attempts left, looks whether there is room for all ranks' slices, and makes the attempt's folder.
SaveAttempt begin_save(const std::filesystem::path& folder, std::int64_t step, const std::vector<StateSlice>& slices,
                       Communicator& communicator);
/// Writes this rank's file; says what became of it, good or bad, in a text for `commit_save`. Needs no other rank, throws
/// nothing, and may run on any thread.
std::string write_share(const SaveAttempt& attempt, int rank, const std::vector<StateSlice>& slices,
                        const std::atomic<bool>* cancelled = nullptr);
/// What a rank reports instead that could not even begin.
std::string unwritten_share(std::string_view reason);
/// Makes the attempt a checkpoint when all shares were written, or removes it and throws SaveFailed with the first reason.
void publish_save(const SaveAttempt& attempt, const TrainingState& state, const std::vector<std::string>& reports);
/// The same by all ranks, each with its own report. Collective.
void commit_save(const SaveAttempt& attempt, const TrainingState& state, const std::string& report, Communicator& communicator);

struct Checkpoint {
  std::filesystem::path folder;
  CheckpointManifest manifest;
};

/// The newest checkpoint under `folder` that is what was written: one rank chooses, all ranks together read every byte of it,
/// each file once. Damaged ones are passed over with a line on standard error. Empty when there is no checkpoint at all; throws
/// when there are some but none is whole. With `to_go_back_to` checkpoints that end with bad steps do not count. Collective.
std::optional<Checkpoint> newest_checkpoint(const std::filesystem::path& folder, Communicator& communicator,
                                            bool to_go_back_to = false);
/// A checkpoint by its folder, checked in the same way; throws naming what is damaged. Collective.
Checkpoint checked_checkpoint(const std::filesystem::path& folder, Communicator& communicator);
/// Reads the manifest of a checkpoint's folder, and none of its files.
Checkpoint open_checkpoint(const std::filesystem::path& folder);
/// Checkpoints under `folder`, whole or not, by step, newest first.
std::vector<std::pair<std::int64_t, std::filesystem::path>> list_checkpoints(const std::filesystem::path& folder);

/// Fills the slices' values, in memory of any device, from wherever in the files their elements are, and reads nothing else. An
/// absent tensor or another type is an Error that names it.
void load_slices(const Checkpoint& checkpoint, const std::vector<StateSlice>& slices);

/// Which checkpoints stay.
struct Retention {
  std::int64_t keep = 0;        ///< the newest ones; 0: all
  std::int64_t keep_every = 0;  ///< and those of steps that this divides
  bool keep_best = false;       ///< and the one with the lowest validation loss
};
/// Removes the others. Only checkpoints with a good manifest and all of their files are counted or removed, so the last good
/// one always stays, and so does what is damaged, and the newest one that does not end with bad steps.
void remove_old_checkpoints(const std::filesystem::path& folder, const Retention& retention);
/// Removes those of later steps than `step` that end with bad steps: what a run has gone back from.
void remove_bad_checkpoints(const std::filesystem::path& folder, std::int64_t step);
/// Writes the manifest of a checkpoint again, with this validation loss.
void note_validation_loss(const std::filesystem::path& folder, double loss);

}  // namespace attamba
