// The folder of a run: config.toml (resolved), run.json (version, build, data), tokenizer.model, chunk_ends.txt (of explicit
// chunking), metrics.jsonl, checkpoints/.
#pragma once

#include <filesystem>
#include <span>

#include "comm/communicator.h"
#include "data/loader.h"
#include "src/train/checkpoint.h"
#include "src/train/config.h"

namespace attamba {

inline constexpr const char* kMetricsFile = "metrics.jsonl";
inline constexpr const char* kCheckpointFolder = "checkpoints";
inline constexpr const char* kConfigFile = "config.toml";
inline constexpr const char* kRunFile = "run.json";
inline constexpr const char* kRunTokenizer = "tokenizer.model";
inline constexpr const char* kRunChunkEnds = "chunk_ends.txt";  ///< only with explicit chunking

/// The data sets that a configuration trains on; a missing one, or one with another vocabulary, is an error that names it.
LoaderConfig open_training_data(const Config& config);

/// Makes the folder, or takes up the run that is in it. A folder that holds something else, or a run with another model, data
/// or recipe, is a UsageError that names the first key that differs. Writes config.toml, run.json and a copy of the tokenizer.
/// `valid` may be null.
void claim_run_folder(const Config& config, std::span<const WeightedSource> train, const Dataset* valid);

/// A run as `eval` and `generate` find it: its configuration, and the checkpoint of `step` (negative: the newest whole one),
/// checked. Collective.
struct FoundRun {
  Config config;
  Checkpoint checkpoint;
};
FoundRun find_run(const std::filesystem::path& folder, std::int64_t step, Communicator& communicator);

}  // namespace attamba
