// The manifest of a checkpoint: what its folder must hold, byte for byte, for it to be whole. Written last, as JSON.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/train/state_slice.h"

namespace attamba {

/// Where a run stands between two steps. Everything else follows from the configuration.
struct TrainingState {
  std::int64_t step = 0;              ///< steps done; the next sample's index is (step + passed_over) times the global batch
  std::int64_t updates = 0;           ///< of these, steps that changed the weights
  double seconds = 0;                 ///< spent training
  std::int64_t passed_over = 0;       ///< steps whose samples were left out
  std::string data_fingerprint;       ///< of the samples; another one would go on with other samples
  std::string configuration;          ///< resolved, as TOML
  std::vector<double> norms = {};     ///< gradient norms of the last good steps
  std::int64_t skipped_in_a_row = 0;  ///< bad steps that were the last ones: not a state to go back to
  std::int64_t rollbacks = 0;         ///< in a row
  std::optional<double> validation_loss = {};  ///< of the weights as they are, where they were evaluated
};

/// A slice in a file: `values` is empty, its elements are little-endian at `offset`.
struct SavedSlice {
  StateSlice slice;
  std::uint64_t offset = 0;
  std::uint32_t crc = 0;
};

struct SavedFile {
  std::string name;  ///< within the checkpoint's folder
  std::uint64_t bytes = 0;
  std::uint32_t crc = 0;  ///< of the whole file
  std::vector<SavedSlice> slices = {};
};

/// A whole tensor. Its CRC-32C does not depend on how the tensor is spread over files.
struct SavedTensor {
  std::string name;
  TensorType type;
  std::uint32_t crc = 0;
};

struct CheckpointManifest {
  TrainingState state;
  std::string written_by = {};
  std::vector<SavedTensor> tensors = {};  ///< sorted by name
  std::vector<SavedFile> files = {};

  std::uint64_t bytes() const;
  /// Of all tensors' values: equal for equal states, whatever number of ranks wrote them.
  std::uint32_t state_crc() const;
};

inline constexpr const char* kCheckpointManifest = "manifest.json";
inline constexpr int kCheckpointFormat = 2;

/// Puts a manifest together from what ranks wrote. Throws an Error that names the first tensor whose elements are not written
/// exactly once.
CheckpointManifest make_manifest(const TrainingState& state, std::vector<SavedFile> files);

/// The manifest as text, its own CRC-32C at the end.
std::string to_text(const CheckpointManifest& manifest);
/// Reads it back; throws an Error that begins with `source` when any byte is not as it was written, or the format is another
/// version's.
CheckpointManifest manifest_from_text(std::string_view text, std::string_view source);

/// One file's entry as text, for its way to the rank that writes the manifest.
std::string to_text(const SavedFile& file);
SavedFile saved_file_from_text(std::string_view text);

/// "1a2b3c4d"
std::string hexadecimal(std::uint32_t value);

}  // namespace attamba
