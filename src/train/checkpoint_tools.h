// What can be done with a checkpoint besides training on: spreading it over another number of files, and taking its weights to
// and from safetensors files.
#pragma once

#include <filesystem>
#include <optional>

#include "src/train/checkpoint.h"
#include "src/train/config.h"

namespace attamba {

/// Writes the same state in `files` files under `folder`, in the place of a checkpoint of that step if there is one.
void reshard(const Checkpoint& checkpoint, int files, const std::filesystem::path& folder);

/// Writes the master weights, in the type that is asked for (float32 or bfloat16) or else as they are.
void export_weights(const Checkpoint& checkpoint, const std::filesystem::path& file, std::optional<DType> dtype);

/// Makes the run's folder with a checkpoint of step 0 that holds the file's weights, for training to start from. Names and
/// shapes must be the model's; an Error names the first that is not. Returns the checkpoint's folder.
std::filesystem::path import_weights(const Config& config, const std::filesystem::path& file);

}  // namespace attamba
