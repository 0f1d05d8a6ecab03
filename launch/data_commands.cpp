#include "launch/data_commands.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iomanip>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>

#include "data/dataset.h"
#include "data/prepare.h"
#include "data/tokenizer.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// 12345678 as 12.3M, in powers of 1000.
std::string brief(double value) {
  constexpr const char* kUnits[] = {"", "k", "M", "G", "T", "P"};
  std::size_t unit = 0;
  while (value >= 999.5 && unit + 1 < std::size(kUnits)) {
    value /= 1000;
    ++unit;
  }
  std::ostringstream out;
  out << std::setprecision(value >= 100 || unit == 0 ? 0 : 1) << std::fixed << value << kUnits[unit];
  return out.str();
}

std::string brief(std::uint64_t value) {
  return brief(static_cast<double>(value));
}

std::string duration(double seconds) {
  const auto whole = static_cast<long>(seconds + 0.5);
  std::ostringstream out;
  if (whole >= 3600) {
    out << whole / 3600 << 'h' << std::setw(2) << std::setfill('0') << whole / 60 % 60 << 'm';
  } else {
    out << whole / 60 << 'm' << std::setw(2) << std::setfill('0') << whole % 60 << 's';
  }
  return out.str();
}

/// Shows progress on standard error: one line that is rewritten on a terminal, a plain line every few seconds elsewhere.
class ProgressBar {
 public:
  void show(const PrepareProgress& progress) {
    const bool finished = progress.disk_bytes >= progress.disk_total;
    if (!terminal_ && progress.seconds < next_line_ && !finished) {
      return;
    }
    next_line_ = progress.seconds + kSecondsPerLine;
    if (finished && !terminal_ && shown_finished_) {
      return;
    }
    shown_finished_ = finished;
    std::cerr << (terminal_ ? "\r" : "") << line(progress) << (terminal_ ? "\x1b[K" : "\n") << std::flush;
    open_ = terminal_;
  }
  /// Ends the line that is being rewritten, so that other output starts on one of its own.
  void close() {
    if (open_) {
      std::cerr << '\n';
      open_ = false;
    }
  }
  ~ProgressBar() { close(); }

 private:
  static constexpr double kSecondsPerLine = 10;
  static constexpr int kCells = 24;

  static std::string line(const PrepareProgress& progress) {
    const double done =
        progress.disk_total > 0 ? static_cast<double>(progress.disk_bytes) / static_cast<double>(progress.disk_total) : 1.0;
    const double rate = progress.seconds > 0 ? 1 / progress.seconds : 0;
    if (first_share_ < 0) {
      first_share_ = done;
    }
    const int cells = static_cast<int>(done * kCells);
    std::ostringstream out;
    out << "prepare [" << std::string(static_cast<std::size_t>(cells), '#')
        << std::string(static_cast<std::size_t>(kCells - cells), '.') << "] " << std::setw(3) << static_cast<int>(done * 100)
        << "%  " << brief(progress.tokens) << " tokens  " << brief(static_cast<double>(progress.tokens) * rate) << " tokens/s  "
        << brief(static_cast<double>(progress.text_bytes) * rate) << "B/s";
    if (done < 1 && done > first_share_ && progress.seconds > 1) {
      out << "  " << duration(progress.seconds * (1 - done) / (done - first_share_)) << " left";
    } else if (done >= 1) {
      out << "  in " << duration(progress.seconds);
    }
    return out.str();
  }

  /// Where this run began, for the time left: a continued one does not start at zero.
  inline static double first_share_ = -1;
  bool terminal_ = ::isatty(STDERR_FILENO) != 0;
  bool open_ = false;
  bool shown_finished_ = false;
  double next_line_ = 0;
};

void print_summary(const std::filesystem::path& folder, const Manifest& manifest) {
  const TextCounts& counts = manifest.counts;
  std::cout << folder.string() << ": " << counts.tokens << " tokens in " << manifest.shards.size()
            << (manifest.shards.size() == 1 ? " shard, " : " shards, ") << counts.documents << " documents, fingerprint "
            << manifest.fingerprint << '\n';
  if (counts.empty_documents > 0) {
    std::cout << "  " << counts.empty_documents << " empty documents were left out\n";
  }
}

/// The data sets at a path: the folder itself, or its parts train and valid.
std::vector<std::filesystem::path> data_sets_at(const std::filesystem::path& folder) {
  if (!std::filesystem::exists(folder / kManifestName)) {
    std::vector<std::filesystem::path> parts;
    for (const char* part : {"train", "valid"}) {
      if (std::filesystem::is_directory(folder / part)) {
        parts.push_back(folder / part);
      }
    }
    if (!parts.empty()) {
      return parts;
    }
  }
  return {folder};
}

void run_prepare(PrepareOptions options) {
  ProgressBar bar;
  options.message = [&](const std::string& message) {
    bar.close();
    std::cerr << message << '\n';
  };
  options.progress = [&](const PrepareProgress& progress) { bar.show(progress); };
  const auto sets = prepare(options);
  bar.close();
  for (const auto& [folder, manifest] : sets) {
    print_summary(folder, manifest);
  }
}

void add_prepare(CLI::App& data) {
  auto* command = data.add_subcommand("prepare", "Turn text into a data set of token shards");
  auto options = std::make_shared<PrepareOptions>();
  command->add_option("input", options->inputs, "Text files, .jsonl files, either also .gz or .zst, and folders of them")
      ->required();
  command->add_option("-o,--output", options->output, "Folder to write")->required();
  auto* model = command->add_option("-t,--tokenizer", options->tokenizer, "SentencePiece .model file to use");
  command
      ->add_option("--vocab-size", options->training.vocabulary_size,
                   "Pieces of a vocabulary to train when no tokenizer is given")
      ->capture_default_str()
      ->excludes(model);
  command->add_option("--vocab-kind", options->training.kind, "bpe or unigram")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, VocabularyKind>{{"bpe", VocabularyKind::bpe}, {"unigram", VocabularyKind::unigram}}))
      ->default_str("bpe");
  auto sample_megabytes = std::make_shared<std::uint64_t>(options->training_bytes >> 20);
  command->add_option("--vocab-sample", *sample_megabytes, "MiB of text to train a vocabulary on")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096));
  command->add_option("--valid", options->valid_inputs, "Held-out text: write OUTPUT/train and OUTPUT/valid");
  command->add_option("--valid-fraction", options->valid_fraction, "Hold out this share of the documents instead");
  command->add_option("--text-field", options->text_field, "The field of .jsonl objects that holds the text")
      ->capture_default_str();
  command->add_option("--shard-tokens", options->shard_tokens, "Tokens of a shard")->capture_default_str();
  command->add_option("-j,--threads", options->threads, "Tokenising threads; 0: one per core")->capture_default_str();
  command->add_flag("--overwrite", options->overwrite, "Replace a data set that was made from other text or options");
  command->footer(
      "A plain text file is one document; every line of a .jsonl file is one, in its field \"text\".\n"
      "An interrupted run continues where it stopped when the same command is given again.");
  command->callback([options, sample_megabytes] {
    options->training_bytes = *sample_megabytes << 20;
    run_prepare(*options);
  });
}

void print_info(const std::filesystem::path& folder, bool list_shards) {
  const Dataset dataset = Dataset::open(folder);
  const Manifest& manifest = dataset.manifest();
  const TextCounts& counts = manifest.counts;
  std::uint64_t bytes = 0;
  for (const ShardEntry& shard : manifest.shards) {
    bytes += shard.bytes;
  }
  const double tokens = static_cast<double>(counts.tokens);
  std::cout << folder.string() << '\n'
            << "  fingerprint  " << manifest.fingerprint << '\n'
            << "  tokens       " << counts.tokens << " (" << (manifest.vocabulary.token_bytes() == 2 ? "uint16" : "uint32")
            << ", " << manifest.shards.size() << " shards, " << brief(bytes) << "B)\n"
            << "  documents    " << counts.documents << " (and " << counts.empty_documents << " empty ones left out)\n"
            << "  text         " << counts.text_bytes << " bytes, " << counts.text_words << " words; " << std::setprecision(4)
            << static_cast<double>(counts.text_bytes) / tokens << " bytes and "
            << static_cast<double>(counts.text_words) / tokens << " words per token\n"
            << "  vocabulary   " << manifest.vocabulary.vocabulary_size << " pieces, BOS " << manifest.vocabulary.bos
            << ", EOS " << manifest.vocabulary.eos << ", unknown " << manifest.vocabulary.unknown << '\n'
            << "  tokenizer    " << dataset.tokenizer_model_path().string() << ", sha256 " << dataset.tokenizer_hash() << '\n'
            << "  made from    " << manifest.sources.size() << (manifest.sources.size() == 1 ? " file: " : " files: ")
            << (manifest.sources.empty() ? "" : manifest.sources.front()) << (manifest.sources.size() > 1 ? ", ..." : "")
            << '\n';
  if (list_shards) {
    for (const ShardEntry& shard : manifest.shards) {
      std::cout << "  " << shard.file << "  " << shard.bytes << " bytes, " << shard.counts.tokens << " tokens, "
                << shard.counts.documents << " documents\n";
    }
  }
}

void add_info(CLI::App& data) {
  auto* command = data.add_subcommand("info", "Describe a data set");
  auto folder = std::make_shared<std::filesystem::path>();
  auto shards = std::make_shared<bool>(false);
  command->add_option("folder", *folder, "The data set")->required();
  command->add_flag("--shards", *shards, "List the shards");
  command->callback([folder, shards] {
    for (const auto& set : data_sets_at(*folder)) {
      print_info(set, *shards);
    }
  });
}

void add_verify(CLI::App& data) {
  auto* command = data.add_subcommand("verify", "Read all of a data set and compare every checksum");
  auto folder = std::make_shared<std::filesystem::path>();
  auto threads = std::make_shared<int>(0);
  command->add_option("folder", *folder, "The data set")->required();
  command->add_option("-j,--threads", *threads, "Threads; 0: one per core")->capture_default_str()->check(CLI::Range(0, 4096));
  command->callback([folder, threads] {
    const int count = *threads > 0 ? *threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    std::size_t damaged = 0;
    for (const auto& set : data_sets_at(*folder)) {
      const auto errors = verify_dataset(set, count);
      for (const auto& error : errors) {
        std::cerr << error << '\n';
      }
      damaged += errors.size();
      if (errors.empty()) {
        const Manifest manifest = read_manifest(set);
        std::cout << set.string() << ": whole (" << manifest.shards.size() << " shards, " << manifest.counts.tokens
                  << " tokens)\n";
      }
    }
    require(damaged == 0, "verify: ", damaged, damaged == 1 ? " file" : " files", " of '", folder->string(),
            "' cannot be used");
  });
}

struct ShowOptions {
  std::filesystem::path folder;
  std::int64_t at = -1;
  std::int64_t window = -1;
  std::int64_t document = -1;
  std::uint64_t length = 256;
  bool ids = false;
};

void show(const ShowOptions& options) {
  const Dataset dataset = Dataset::open(options.folder);
  const Tokenizer tokenizer = Tokenizer::load(dataset.tokenizer_model_path());
  std::uint64_t begin = 0;
  std::uint64_t length = options.length;
  if (options.window >= 0) {
    const std::uint64_t windows = dataset.window_count(length);
    require<UsageError>(static_cast<std::uint64_t>(options.window) < windows, "show: window ", options.window,
                        " is outside the ", windows, " windows of ", length, " tokens");
    begin = static_cast<std::uint64_t>(options.window) * length;
    ++length;
  } else if (options.document >= 0) {
    begin = dataset.document_position(static_cast<std::uint64_t>(options.document));
  } else if (options.at >= 0) {
    begin = static_cast<std::uint64_t>(options.at);
  }
  require<UsageError>(begin < dataset.token_count(), "show: token ", begin, " is outside the ", dataset.token_count(),
                      " tokens");
  std::vector<std::int32_t> tokens(std::min(length, dataset.token_count() - begin));
  dataset.read_tokens(begin, tokens);
  const auto starts = dataset.document_starts(begin, begin + tokens.size());
  std::cout << "tokens " << begin << " to " << begin + tokens.size() << " of " << dataset.token_count() << ", document from "
            << dataset.document_begin(begin);
  for (const std::uint64_t start : starts) {
    std::cout << (start != begin ? concat(", ", start) : std::string());
  }
  std::cout << '\n';
  if (options.ids) {
    for (const std::int32_t token : tokens) {
      std::cout << token << '\t' << tokenizer.piece(token) << '\n';
    }
    return;
  }
  std::cout << tokenizer.decode(tokens) << '\n';
}

void add_show(CLI::App& data) {
  auto* command = data.add_subcommand("show", "Decode a window of a data set");
  auto options = std::make_shared<ShowOptions>();
  command->add_option("folder", options->folder, "The data set")->required();
  auto* at = command->add_option("--at", options->at, "First token to show")->check(CLI::NonNegativeNumber);
  auto* window = command->add_option("--window", options->window, "Show this training window of LENGTH + 1 tokens")
                     ->check(CLI::NonNegativeNumber)
                     ->excludes(at);
  command->add_option("--document", options->document, "Show from the beginning of this document")
      ->check(CLI::NonNegativeNumber)
      ->excludes(at)
      ->excludes(window);
  command->add_option("-n,--length", options->length, "Tokens to show")->capture_default_str()->check(CLI::Range(1, 1 << 24));
  command->add_flag("--ids", options->ids, "Print each token's number and piece instead of text");
  command->callback([options] { show(*options); });
}

}  // namespace

void add_data_commands(CLI::App& app) {
  auto* data = app.add_subcommand("data", "Prepare and inspect training data");
  data->require_subcommand(1);
  add_prepare(*data);
  add_info(*data);
  add_verify(*data);
  add_show(*data);
}

}  // namespace attamba
