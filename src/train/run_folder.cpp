#include "src/train/run_folder.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "data/dataset.h"
#include "data/files.h"
#include "src/core/error.h"
#include "src/core/version.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

/// What may change between two starts of one run: where things lie and how it is computed, not what.
constexpr std::array kMayChange{"/run",
                                "/checkpoint",
                                "/eval",
                                "/data/prefetch",
                                "/data/train",
                                "/data/valid",
                                "/train/device",
                                "/train/transport",
                                "/train/threads",
                                "/train/log_every",
                                "/train/spike_factor",
                                "/train/skips_before_rollback",
                                "/train/rollbacks",
                                "/train/debug",
                                "/train/recompute",
                                "/train/zero",
                                "/train/zero_group",
                                "/train/watch",
                                "/train/compare_cpu",
                                "/model/chunking/ends_file"};

bool may_change(const std::string& path) {
  return std::any_of(kMayChange.begin(), kMayChange.end(), [&](const char* prefix) { return path.starts_with(prefix); });
}

/// The first key on which two configurations disagree, as "section.key is A there, B here"; empty when there is none.
std::string first_difference(const Config& there, const Config& here) {
  const nlohmann::json a = to_json(there), b = to_json(here);
  for (const auto& change : nlohmann::json::diff(a, b)) {
    const std::string path = change.at("path");
    if (!may_change(path)) {
      std::string key = path.substr(1);
      std::replace(key.begin(), key.end(), '/', '.');
      const nlohmann::json::json_pointer pointer(path);
      return concat(key, " is ", a.at(pointer).dump(), " there and ", b.at(pointer).dump(), " here");
    }
  }
  return {};
}

/// What the file of explicit chunk ends holds; empty for other strategies.
std::string chunk_ends_of(const ModelConfig& model) {
  const bool has_file = model.kind == "attamba" && model.chunking.strategy == "explicit";
  return has_file ? read_whole_file(model.chunking.ends_file) : std::string();
}

/// Nobody's: empty, or with what a start left that was cut off before its first file, the configuration, was whole.
bool is_unclaimed(const fs::path& folder) {
  return fs::is_directory(folder) &&
         std::all_of(fs::directory_iterator(folder), fs::directory_iterator(), [](const fs::directory_entry& entry) {
           return entry.path().filename() == concat(kConfigFile, kTemporarySuffix);
         });
}

}  // namespace

LoaderConfig open_training_data(const Config& config) {
  LoaderConfig data{.sources = {}, .n = config.data.sequence_length, .seed = static_cast<std::uint64_t>(config.train.seed)};
  for (const WeightedFolder& source : weighted_folders(config.data.train)) {
    data.sources.push_back({Dataset::open(source.folder), source.weight});
    data.sources.back().dataset.require_vocabulary(config.model.vocab_size);
  }
  require<UsageError>(!data.sources.empty(), "data.train is empty; name a folder made by `attamba data prepare`");
  return data;
}

void claim_run_folder(const Config& config, std::span<const WeightedSource> train, const Dataset* valid) {
  const fs::path folder = config.run.folder, config_file = folder / kConfigFile;
  if (fs::exists(config_file)) {
    require<UsageError>(config.run.resume != "never", folder.string(),
                        ": holds a run already, and run.resume is never; choose another run.folder");
    const std::string difference = first_difference(load_config(config_file), config);
    require<UsageError>(difference.empty(), folder.string(), ": holds another run: ", difference,
                        "; choose another run.folder, or give the same configuration to go on with that run");
  } else {
    require<UsageError>(!fs::exists(folder) || is_unclaimed(folder), folder.string(),
                        ": exists and is not a run's folder; choose an empty or a new one as run.folder");
  }
  const std::string chunk_ends = chunk_ends_of(config.model);
  if (!chunk_ends.empty() && fs::exists(folder / kRunChunkEnds)) {
    require<UsageError>(read_whole_file(folder / kRunChunkEnds) == chunk_ends, folder.string(),
                        ": holds another run: its chunk ends (", kRunChunkEnds, ") differ from those in ",
                        config.model.chunking.ends_file, "; choose another run.folder, or give the same chunk ends");
  }
  make_folder(folder);
  write_file_atomically(config_file, to_toml(config));  // first: it says that the folder is this run's
  nlohmann::json facts{{"version", version().number},
                       {"commit", version().commit},
                       {"build", version().build_type},
                       {"compiler", version().compiler},
                       {"data", nlohmann::json::array()}};
  for (const auto& [dataset, weight] : train) {
    facts["data"].push_back(
        {{"folder", dataset.folder().string()}, {"weight", weight}, {"fingerprint", dataset.fingerprint()}});
  }
  if (valid != nullptr) {
    facts["valid"] = {{"folder", valid->folder().string()}, {"fingerprint", valid->fingerprint()}};
  }
  write_file_atomically(folder / kRunFile, facts.dump(1) + "\n");
  write_file_atomically(folder / kRunTokenizer, read_whole_file(train.front().dataset.tokenizer_model_path()));
  if (!chunk_ends.empty()) {
    write_file_atomically(folder / kRunChunkEnds, chunk_ends);
  }
}

FoundRun find_run(const fs::path& folder, std::int64_t step, Communicator& communicator) {
  const fs::path checkpoints = folder / kCheckpointFolder;
  require<UsageError>(fs::exists(folder / kConfigFile), folder.string(), ": is not a run's folder (it has no ", kConfigFile,
                      ")");
  FoundRun run{.config = load_config(folder / kConfigFile), .checkpoint = {}};
  if (fs::exists(folder / kRunChunkEnds)) {
    run.config.model.chunking.ends_file = (folder / kRunChunkEnds).string();
  }
  if (step >= 0) {
    const fs::path path = checkpoint_path(checkpoints, step);
    require<UsageError>(fs::exists(path), folder.string(), ": has no checkpoint of step ", step);
    run.checkpoint = checked_checkpoint(path, communicator);
  } else {
    auto newest = newest_checkpoint(checkpoints, communicator);
    require<UsageError>(newest.has_value(), folder.string(), ": has no checkpoint yet");
    run.checkpoint = std::move(*newest);
  }
  return run;
}

}  // namespace attamba
