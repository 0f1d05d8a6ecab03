// What the tests of data/ share: temporary folders, made-up text, small vocabularies and data sets.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "data/files.h"
#include "data/prepare.h"
#include "data/tokenizer.h"
#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/core/temporary_folder.h"

namespace attamba::testing {

inline void write_text(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// Sentences of made-up words, with indented lines, blank lines and some characters beyond ASCII; a function of the number.
inline std::string made_up_text(std::uint32_t number, std::size_t bytes) {
  static const std::vector<std::string> kParts = {"ka",  "lo",  "mi",  "ren", "stra", "tion", "e", "u",
                                                  "ber", "dor", "wen", "sh",  "ö",    "ñ",    "语"};
  RandomStream random(number, 77);
  std::string text;
  while (text.size() < bytes) {
    const std::uint64_t parts = 1 + random.below(4);
    for (std::uint64_t i = 0; i < parts; ++i) {
      text += kParts[random.below(kParts.size() - (random.below(20) == 0 ? 0 : 3))];
    }
    switch (random.below(12)) {
      case 0:
        text += ".\n";
        break;
      case 1:
        text += ",  ";
        break;
      case 2:
        text += "\n\n    ";
        break;
      case 3:
        text += " " + std::to_string(random.below(1000)) + " ";
        break;
      default:
        text += ' ';
    }
  }
  return text;
}

inline std::string json_lines(std::span<const std::string> texts) {
  std::string lines;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    lines += nlohmann::json{{"id", i}, {"text", texts[i]}}.dump() + "\n";
  }
  return lines;
}

/// The bytes of a model of 400 pieces; trained once per program.
inline const std::string& small_model() {
  static const std::string model = [] {
    std::uint32_t number = 0;
    return train_tokenizer({.vocabulary_size = 400}, [&](std::string& text) {
      text = made_up_text(number++, 4000);
      return number <= 20;
    });
  }();
  return model;
}

/// Another model of as many pieces.
inline const std::string& other_model() {
  static const std::string model = [] {
    std::uint32_t number = 100;
    return train_tokenizer({.vocabulary_size = 400}, [&](std::string& text) {
      text = made_up_text(number++, 2000);
      return number <= 103;
    });
  }();
  return model;
}

inline std::vector<std::string> made_up_documents(std::size_t count, std::uint32_t seed = 0) {
  std::vector<std::string> texts;
  RandomStream random(seed, 5);
  for (std::size_t i = 0; i < count; ++i) {
    texts.push_back(made_up_text(seed + static_cast<std::uint32_t>(i), 20 + random.below(2000)));
  }
  return texts;
}

/// The tokens that a data set of these documents must hold, and where its documents begin.
struct ExpectedTokens {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint64_t> starts;
};

inline ExpectedTokens expected_tokens(const Tokenizer& tokenizer, std::span<const std::string> texts) {
  ExpectedTokens expected;
  for (const auto& text : texts) {
    expected.starts.push_back(expected.tokens.size());
    expected.tokens.push_back(tokenizer.bos());
    const auto tokens = tokenizer.encode(text);
    expected.tokens.insert(expected.tokens.end(), tokens.begin(), tokens.end());
    expected.tokens.push_back(tokenizer.eos());
  }
  return expected;
}

/// Writes the model and the documents into `folder` and gives options that prepare them into folder/out.
inline PrepareOptions small_preparation(const TemporaryFolder& folder, std::span<const std::string> texts) {
  write_text(folder / "small.model", small_model());
  write_text(folder / "text.jsonl", json_lines(texts));
  PrepareOptions options;
  options.inputs = {folder / "text.jsonl"};
  options.output = folder / "out";
  options.tokenizer = folder / "small.model";
  options.threads = 2;
  options.shard_tokens = 4096;
  return options;
}

/// The message that an action fails with; fails the test when it succeeds or the message is not one line.
template <class E = Error, class Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const E& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message;
  }
  ADD_FAILURE() << "no error";
  return {};
}

}  // namespace attamba::testing
