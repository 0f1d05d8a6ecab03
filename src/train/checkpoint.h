// Checkpoints: a folder with one HDF5 file of tensors and a manifest, made under another name and renamed when whole, so that a
// folder named step-N is always a whole checkpoint.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "src/train/programs.h"

namespace attamba {

/// Where a run stands between two steps. Everything else follows from the configuration.
struct TrainingState {
  std::int64_t step = 0;         ///< steps done; the next sample's index is (step + passed_over) times the global batch
  std::int64_t updates = 0;      ///< of these, steps that changed the weights
  double seconds = 0;            ///< spent training
  std::int64_t passed_over = 0;  ///< steps whose samples rollbacks have left out
  std::string data_fingerprint;  ///< of the samples; another one would go on with other samples
  std::string configuration;     ///< resolved, as TOML
  std::vector<double> norms;     ///< gradient norms of the last good steps (BadSteps)
};

/// Writes FOLDER/step-N and removes nothing else. On any error nothing named step-N is left behind, and the message names the
/// file and the reason.
void save_checkpoint(const std::filesystem::path& folder, const TrainingState& state, const std::vector<NamedTensor>& tensors);

/// The newest whole checkpoint under `folder`, by its step; checks sizes and checksums, passing over damaged ones with a line
/// on standard error. Empty when there is no checkpoint at all; throws Error when there are some but none is whole.
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& folder);

/// Where the checkpoint of a step is or would be.
std::filesystem::path checkpoint_path(const std::filesystem::path& folder, std::int64_t step);

TrainingState read_training_state(const std::filesystem::path& checkpoint);

/// Fills every tensor from the checkpoint; an absent tensor or another shape is an Error that names it.
void load_tensors(const std::filesystem::path& checkpoint, const std::vector<NamedTensor>& tensors);

/// Removes all but the newest `keep` checkpoints (0: keeps all), and what interrupted saves left behind.
void remove_old_checkpoints(const std::filesystem::path& folder, std::int64_t keep);

}  // namespace attamba
