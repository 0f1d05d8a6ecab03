#include "data/prepare_plan.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <system_error>
#include <thread>

#include "data/sha256.h"
#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {
namespace {

/// Names the choice of held-out documents; changing it changes every split.
constexpr std::uint64_t kSplitSeed = 0x76616c6964;

/// Whether a document is held out: of every 1 / fraction documents in a row, one, at a place drawn by the row's number.
bool is_held_out(double fraction, std::size_t file, std::uint64_t document) {
  const double row = std::floor(static_cast<double>(document) * fraction);
  const auto first = static_cast<std::uint64_t>(std::ceil(row / fraction));
  const auto next = static_cast<std::uint64_t>(std::ceil((row + 1) / fraction));
  if (document < first || document >= next) {
    return false;
  }
  RandomStream random(kSplitSeed, static_cast<std::uint32_t>(file), static_cast<std::uint32_t>(row));
  return document - first == random.below(next - first);
}

/// The texts that a vocabulary is trained on, one after the other.
class TrainingSample {
 public:
  TrainingSample(const PrepareOptions& options, const PreparePlan& plan) : options_(options), plan_(plan) {
    for (const PlannedFile& planned : plan.files) {
      total_ += planned.valid ? 0 : planned.file.bytes;
    }
  }

  bool next(std::string& text) {
    TextUnit unit;
    while (file_ < plan_.files.size()) {
      const PlannedFile& planned = plan_.files[file_];
      if (!reader_) {
        reader_.emplace(planned.file, nullptr);
        const double share = static_cast<double>(planned.file.bytes) / static_cast<double>(std::max<std::uint64_t>(total_, 1));
        left_ = planned.valid ? 0 : static_cast<std::uint64_t>(std::ceil(share * static_cast<double>(options_.training_bytes)));
        document_ = 0;
      }
      if (left_ == 0 || !reader_->next(unit)) {
        reader_.reset();
        ++file_;
        continue;
      }
      document_ += unit.begins_document ? 1 : 0;
      if (plan_.output_of(file_, document_ - 1) != 0) {
        continue;
      }
      require_utf8(unit, planned.file.path);
      text = planned.file.jsonl ? text_of_json_line(unit, options_.text_field, planned.file.path) : std::move(unit.raw);
      // A whole document or piece may exceed the rest a little, never by more than a few megabytes.
      if (text.size() > left_ + kLongestTail) {
        std::size_t end = left_ + kLongestTail;
        while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0u) == 0x80u) {
          --end;
        }
        text.resize(end);
      }
      left_ -= std::min<std::uint64_t>(left_, text.size());
      return true;
    }
    return false;
  }

 private:
  static constexpr std::size_t kLongestTail = std::size_t{1} << 16;
  const PrepareOptions& options_;
  const PreparePlan& plan_;
  std::uint64_t total_ = 0;
  std::size_t file_ = 0;
  std::optional<UnitReader> reader_;
  std::uint64_t left_ = 0;
  std::uint64_t document_ = 0;
};

}  // namespace

std::size_t PreparePlan::output_of(std::size_t file, std::uint64_t document) const {
  return files[file].valid || (valid_fraction > 0 && is_held_out(valid_fraction, file, document)) ? 1 : 0;
}

PreparePlan make_plan(const PrepareOptions& options) {
  PreparePlan plan;
  plan.valid_fraction = options.valid_fraction;
  plan.threads = options.threads > 0 ? options.threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::set<std::filesystem::path> seen;
  for (const bool valid : {false, true}) {
    for (const InputFile& file : list_inputs(valid ? options.valid_inputs : options.inputs)) {
      std::error_code unresolved;
      const auto real = std::filesystem::canonical(file.path, unresolved);
      require<UsageError>(seen.insert(real).second, "prepare: '", file.path.string(), "' is named twice");
      plan.files.push_back({.file = file, .valid = valid});
      plan.sources.push_back(file.path.string());
    }
  }
  const bool split = options.valid_fraction > 0 || !options.valid_inputs.empty();
  plan.parts = split ? std::vector<std::string>{"train", "valid"} : std::vector<std::string>{""};

  std::string content = concat("prepare ", kDataFormatVersion, " field ", options.text_field, " shard ", options.shard_tokens,
                               " valid ", options.valid_fraction, '\n');
  if (options.tokenizer.empty()) {
    content += concat("train ", options.training.vocabulary_size, ' ', static_cast<int>(options.training.kind), ' ',
                      options.training_bytes, '\n');
  } else {
    content += concat("tokenizer ", Tokenizer::load(options.tokenizer).hash(), '\n');
  }
  for (const auto& [file, valid] : plan.files) {
    content += concat(std::filesystem::absolute(file.path).lexically_normal().string(), ' ', file.bytes, ' ', file.modified,
                      ' ', valid, '\n');
  }
  plan.hash = sha256(content).substr(0, 32);
  return plan;
}

Tokenizer obtain_tokenizer(const PrepareOptions& options, const PreparePlan& plan,
                           const std::function<void(std::string)>& say) {
  if (!options.tokenizer.empty()) {
    return Tokenizer::load(options.tokenizer);
  }
  say(concat("training a vocabulary of ", options.training.vocabulary_size, " pieces on up to ", options.training_bytes >> 20,
             " MiB of text"));
  TrainingSample sample(options, plan);
  TokenizerTraining training = options.training;
  training.threads = plan.threads;
  return Tokenizer::from_model(train_tokenizer(training, [&](std::string& text) { return sample.next(text); }),
                               "trained vocabulary");
}

}  // namespace attamba
