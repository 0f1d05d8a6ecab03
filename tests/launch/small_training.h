// A data set and a model that tests train within seconds.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/launch/shell.h"

namespace attamba {

/// Settings, by key, of an Attamba of 42,000 parameters for that data, one sequence at a time.
inline std::vector<std::pair<std::string, std::string>> small_training() {
  return {{"model.vocab_size", "300"},    {"model.dim", "32"},
          {"model.n_layers", "2"},        {"model.n_heads", "2"},
          {"model.ffn_dim", "48"},        {"model.ssm.hidden", "16"},
          {"model.ssm.state", "8"},       {"model.ssm.heads", "2"},
          {"model.chunking.size", "4"},   {"model.chunking.leading_tokens", "3"},
          {"data.sequence_length", "24"}, {"optim.warmup", "2"},
          {"train.micro_batch", "1"},     {"train.log_every", "1"}};
}

/// Prepares folder/data/train and folder/data/valid, with a vocabulary of 300, by that program.
inline void prepare_small_data(const std::string& program, const std::filesystem::path& folder) {
  std::ofstream text(folder / "text.jsonl");
  RandomStream random(3);
  const std::vector<std::string> words{"the",   "river", "ran", "past",   "seven", "old",
                                       "mills", "and",   "a",   "bridge", "of",    "stone"};
  for (int document = 0; document < 60; ++document) {
    text << "{\"text\": \"";
    for (int i = 0; i < 120; ++i) {
      text << words[random.below(words.size())] << ' ';
    }
    text << "\"}\n";
  }
  text.close();
  const Outcome prepared = shell(concat(program, " data prepare ", (folder / "text.jsonl").string(), " -o ",
                                        (folder / "data").string(), " --vocab-size 300 --valid-fraction 0.1"));
  require(prepared.exit_code == 0, prepared.output);
}

}  // namespace attamba
