// Turns text into data sets: reader -> workers -> ordered writer, with bounded queues.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "data/manifest.h"
#include "data/tokenizer.h"

namespace attamba {

struct PrepareProgress {
  std::uint64_t disk_bytes = 0;  ///< of the input, read so far
  std::uint64_t disk_total = 0;
  std::uint64_t text_bytes = 0;  ///< tokenised by this run
  std::uint64_t tokens = 0;      ///< written by this run
  double seconds = 0;            ///< of this run
};

struct PrepareOptions {
  std::vector<std::filesystem::path> inputs;
  std::filesystem::path output;
  /// Held-out text: with either of the two, output/train and output/valid are data sets; otherwise output is one.
  std::vector<std::filesystem::path> valid_inputs;
  double valid_fraction = 0;        ///< of the documents; which ones is fixed by their number
  std::filesystem::path tokenizer;  ///< a .model file; empty: train one
  TokenizerTraining training;
  std::uint64_t training_bytes = 24u << 20;  ///< of text to train on; SentencePiece needs up to 30 times as much memory
  std::string text_field = "text";
  std::uint64_t shard_tokens = std::uint64_t{1} << 26;
  int threads = 0;                                       ///< 0: one per core
  bool overwrite = false;                                ///< an output that belongs to something else is replaced
  std::function<void(const std::string&)> message;       ///< told what is being done, a line each
  std::function<void(const PrepareProgress&)> progress;  ///< called a few times a second
  std::function<bool()> interrupted;                     ///< asked now and then; true stops the run as a kill would
};

struct PreparedSet {
  std::filesystem::path folder;
  Manifest manifest;
};

/// Prepares and returns the data sets written. An interrupted run, repeated with the same options and inputs, continues after
/// the last whole shard and gives the same files; a finished one, repeated, does nothing. Memory stays bounded whatever the
/// input.
std::vector<PreparedSet> prepare(const PrepareOptions& options);

}  // namespace attamba
