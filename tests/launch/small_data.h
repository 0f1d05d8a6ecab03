// A data set that small models learn within seconds.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/launch/shell.h"

namespace attamba {

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
