// What a preparation is going to do: which files, in which order, into which data sets, with which tokenizer.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/prepare.h"
#include "data/text_source.h"
#include "data/tokenizer.h"

namespace attamba {

struct PlannedFile {
  InputFile file;
  bool valid = false;  ///< named as held-out text
};

struct PreparePlan {
  std::vector<PlannedFile> files;
  std::vector<std::string> parts;    ///< {""}: one data set; {"train", "valid"}: two
  std::vector<std::string> sources;  ///< the files' paths
  std::string hash;                  ///< of all that the result depends on
  double valid_fraction = 0;
  int threads = 1;

  /// The part that a document goes to: a pure function of the file's index and the document's number in it.
  std::size_t output_of(std::size_t file, std::uint64_t document) const;
};

PreparePlan make_plan(const PrepareOptions& options);

/// Reads the tokenizer that the options name, or trains one on a sample of the training part: the heads of its files, each in
/// proportion to its size.
Tokenizer obtain_tokenizer(const PrepareOptions& options, const PreparePlan& plan, const std::function<void(std::string)>& say);

}  // namespace attamba
