#include "data/prepare.h"

#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <system_error>

#include "data/files.h"
#include "data/prepare_pipeline.h"
#include "data/prepare_plan.h"
#include "data/sha256.h"
#include "data/shard.h"
#include "src/core/error.h"

namespace attamba {
namespace {

constexpr auto kProgressInterval = std::chrono::milliseconds(200);

/// A shard is built in memory, at times twice; this bound keeps the program under a gigabyte.
constexpr std::uint64_t kLargestShardBytes = std::uint64_t{192} << 20;

constexpr InputPosition kNothingLeft{.file = std::numeric_limits<std::uint64_t>::max()};

bool before(std::uint64_t file, std::uint64_t offset, const InputPosition& position) {
  return file != position.file ? file < position.file : offset < position.offset;
}

/// Keeps a second preparation out of the output folder.
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder) : path_(folder / ".prepare.lock") {
    file_ = FileDescriptor(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    require(static_cast<bool>(file_), "cannot write '", path_.string(), "': ", std::generic_category().message(errno),
            "; check the permissions and the space there");
    // File systems without locks are used without one.
    require(::flock(file_.get(), LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK,
            "another 'attamba data prepare' is writing to '", folder.string(), "'");
  }
  ~FolderLock() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  std::filesystem::path path_;
  FileDescriptor file_;
};

/// True for the files that a preparation writes; only those are ever removed.
bool is_ours(const std::string& name) {
  return name == kManifestName || name == kUnfinishedName || name == kTokenizerName || name.ends_with(kTemporarySuffix) ||
         (name.starts_with("shard-") && name.ends_with(".h5"));
}

template <class Predicate>
void remove_files(const std::filesystem::path& folder, const Predicate& predicate) {
  std::error_code error;
  std::vector<std::filesystem::path> doomed;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.is_regular_file() && predicate(entry.path().filename().string())) {
      doomed.push_back(entry.path());
    }
  }
  // The manifest goes first: what is left is then not a data set.
  std::sort(doomed.begin(), doomed.end());
  for (const auto& path : doomed) {
    std::filesystem::remove(path, error);
    require(!error, "cannot remove '", path.string(), "': ", error.message());
  }
}

/// One data set in the making.
class Output {
 public:
  Output(std::filesystem::path folder, std::string plan) : folder_(std::move(folder)), plan_(std::move(plan)) {}

  /// Takes up what an earlier run left. Throws when it belongs to something else and `overwrite` is not set.
  void inspect(bool overwrite) {
    make_folder(folder_);
    for (const auto name : {kManifestName, kUnfinishedName}) {
      const auto path = folder_ / name;
      if (!std::filesystem::exists(path)) {
        continue;
      }
      bool same = false;
      try {
        Manifest found = read_manifest_file(path);
        same = found.plan == plan_ && sha256(read_whole_file(folder_ / kTokenizerName)) == found.vocabulary.tokenizer_sha256;
        if (same) {
          manifest_ = std::move(found);
        }
      } catch (const Error&) {
      }
      if (same && shards_are_there()) {
        finished_ = name == kManifestName;
        resumed_ = true;
        return;
      }
      require<UsageError>(overwrite, "'", folder_.string(), "' already holds ",
                          name == kManifestName ? "a data set" : "an unfinished data set",
                          " of other text or options; choose another --output or add --overwrite");
      break;
    }
    manifest_ = {};
    remove_files(folder_, is_ours);
  }

  void begin(const Tokenizer& tokenizer, const std::vector<std::string>& sources, std::uint64_t shard_tokens) {
    if (!resumed_) {
      manifest_.vocabulary = {.tokenizer_sha256 = tokenizer.hash(),
                              .vocabulary_size = tokenizer.vocabulary_size(),
                              .bos = tokenizer.bos(),
                              .eos = tokenizer.eos(),
                              .unknown = tokenizer.unknown()};
      manifest_.plan = plan_;
      manifest_.sources = sources;
      write_file_atomically(folder_ / kTokenizerName, tokenizer.model());
      save_unfinished();
    }
    remove_files(folder_, [](const std::string& name) { return name.ends_with(kTemporarySuffix); });
    writer_.emplace(manifest_.vocabulary, shard_tokens);
    shard_tokens_ = shard_tokens;
  }

  void add(const TokenJob& job, const InputPosition& after) {
    const TextUnit& unit = job.unit;
    const VocabularyFacts& vocabulary = manifest_.vocabulary;
    if (job.text.empty() && unit.begins_document) {
      writer_->count_text({.empty_documents = 1});
      return;
    }
    if (unit.begins_document) {
      writer_->begin_document();
      append_special(vocabulary.bos);
    }
    std::uint64_t words = 0;
    for (const auto& piece : job.pieces) {
      writer_->append(piece.tokens);
      words += piece.words;
    }
    if (unit.ends_document) {
      append_special(vocabulary.eos);
    }
    writer_->count_text({.text_bytes = job.text.size(), .text_words = words});
    if (writer_->tokens() >= shard_tokens_) {
      write_shard();
      manifest_.resume = after;
      save_unfinished();
    }
  }

  /// Writes the last shard; the set is not whole yet.
  void flush() {
    if (!finished_ && writer_->tokens() > 0) {
      write_shard();
      manifest_.resume = kNothingLeft;
      save_unfinished();
    }
  }

  /// Makes the set whole: writes the manifest.
  void finish() {
    if (finished_) {
      return;
    }
    manifest_.resume = {};
    manifest_.finish();
    write_file_atomically(folder_ / kManifestName, to_json(manifest_));
    std::error_code ignored;
    std::filesystem::remove(folder_ / kUnfinishedName, ignored);
    finished_ = true;
  }

  InputPosition position() const { return finished_ ? kNothingLeft : manifest_.resume; }
  bool finished() const { return finished_; }
  bool resumed() const { return resumed_; }
  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }

 private:
  bool shards_are_there() const {
    for (std::size_t i = 0; i < manifest_.shards.size(); ++i) {
      std::error_code error;
      const auto size = std::filesystem::file_size(folder_ / manifest_.shards[i].file, error);
      if (error || size != manifest_.shards[i].bytes) {
        return false;
      }
    }
    return true;
  }
  void append_special(std::int32_t token) {
    if (token >= 0) {
      writer_->append(std::span(&token, 1));
    }
  }
  void write_shard() { manifest_.shards.push_back(writer_->write(folder_, manifest_.shards.size())); }
  void save_unfinished() {
    manifest_.finish();
    write_file_atomically(folder_ / kUnfinishedName, to_json(manifest_));
  }

  std::filesystem::path folder_;
  std::string plan_;
  Manifest manifest_;
  std::optional<ShardWriter> writer_;
  std::uint64_t shard_tokens_ = 0;
  bool finished_ = false;
  bool resumed_ = false;
};

/// Hands out the units of all files from a position on, leaving out those that their output already has.
class JobReader {
 public:
  JobReader(const PreparePlan& plan, const Tokenizer& tokenizer, std::vector<InputPosition> positions)
      : plan_(plan), tokenizer_(tokenizer), positions_(std::move(positions)) {
    const auto first = std::min_element(positions_.begin(), positions_.end(),
                                        [](const auto& a, const auto& b) { return before(a.file, a.offset, b); });
    next_ = *first;
    for (std::size_t i = 0; i < std::min<std::size_t>(next_.file, plan.files.size()); ++i) {
      disk_before_ += plan.files[i].file.bytes;
    }
  }

  bool operator()(TokenJob& job) {
    while (next_.file < plan_.files.size()) {
      const PlannedFile& planned = plan_.files[next_.file];
      if (!reader_) {
        reader_.emplace(planned.file, &tokenizer_, next_.offset);
      }
      if (!reader_->next(job.unit)) {
        reader_.reset();
        disk_before_ += planned.file.bytes;
        next_ = {.file = next_.file + 1, .offset = 0, .document = 0};
        continue;
      }
      next_.document += job.unit.begins_document ? 1 : 0;
      next_.offset = job.unit.end;
      job.file = next_.file;
      job.output = plan_.output_of(next_.file, next_.document - 1);
      job.after = next_;
      job.disk_position = disk_before_ + reader_->disk_position();
      if (!before(job.file, job.unit.offset, positions_[job.output])) {
        return true;
      }
    }
    return false;
  }

 private:
  const PreparePlan& plan_;
  const Tokenizer& tokenizer_;
  std::vector<InputPosition> positions_;
  InputPosition next_;
  std::optional<UnitReader> reader_;
  std::uint64_t disk_before_ = 0;
};

/// Reports at intervals, and asks whether to stop.
class Reporter {
 public:
  Reporter(const PrepareOptions& options, std::uint64_t disk_total) : options_(options) { progress_.disk_total = disk_total; }

  void add(const TokenJob& job) {
    progress_.disk_bytes = job.disk_position;
    progress_.text_bytes += job.text.size();
    for (const auto& piece : job.pieces) {
      progress_.tokens += piece.tokens.size();
    }
    const auto now = Clock::now();
    if (now - last_ >= kProgressInterval) {
      last_ = now;
      report();
    }
    require(!options_.interrupted || !options_.interrupted(), "interrupted; run the same command again to continue");
  }
  void finish() {
    progress_.disk_bytes = progress_.disk_total;
    report();
  }

 private:
  using Clock = std::chrono::steady_clock;
  void report() {
    progress_.seconds = std::chrono::duration<double>(Clock::now() - begin_).count();
    if (options_.progress) {
      options_.progress(progress_);
    }
  }
  const PrepareOptions& options_;
  PrepareProgress progress_;
  Clock::time_point begin_ = Clock::now();
  Clock::time_point last_ = begin_;
};

void check_options(const PrepareOptions& options) {
  require<UsageError>(!options.inputs.empty(), "prepare: name the text to prepare");
  require<UsageError>(!options.output.empty(), "prepare: name the folder to write with --output");
  require<UsageError>(options.valid_fraction >= 0 && options.valid_fraction <= 0.5, "prepare: --valid-fraction is ",
                      options.valid_fraction, "; it must lie between 0 and 0.5");
  require<UsageError>(options.valid_fraction == 0 || options.valid_inputs.empty(),
                      "prepare: --valid and --valid-fraction exclude each other");
  require<UsageError>(options.shard_tokens > 0, "prepare: --shard-tokens must be positive");
  require<UsageError>(options.threads >= 0 && options.threads <= 4096, "prepare: --threads is ", options.threads);
}

void check_parts(const std::vector<Output>& outputs) {
  for (const Output& output : outputs) {
    const TextCounts& counts = output.manifest().counts;
    if (counts.tokens > 0) {
      continue;
    }
    require<UsageError>(outputs.size() == 1 || outputs.front().manifest().counts.tokens == 0, "prepare: no document of the ",
                        outputs.front().manifest().counts.documents, " went to '", output.folder().filename().string(),
                        "'; raise --valid-fraction or name held-out text with --valid");
    throw Error(concat("prepare: the input holds no text for '", output.folder().string(), "' (", counts.empty_documents,
                       " empty documents)"));
  }
}

void tokenize(const PrepareOptions& options, const PreparePlan& plan, const Tokenizer& tokenizer,
              std::vector<Output>& outputs) {
  std::vector<InputPosition> positions;
  for (const Output& output : outputs) {
    positions.push_back(output.position());
  }
  std::vector<InputFile> files;
  std::uint64_t disk_total = 0;
  for (const PlannedFile& planned : plan.files) {
    files.push_back(planned.file);
    disk_total += planned.file.bytes;
  }
  Reporter reporter(options, disk_total);
  const auto reader = std::make_shared<JobReader>(plan, tokenizer, positions);
  TokenPipeline pipeline(tokenizer, std::move(files), options.text_field, plan.threads,
                         [reader](TokenJob& job) { return (*reader)(job); });
  while (const auto job = pipeline.next()) {
    outputs[job->output].add(*job, job->after);
    reporter.add(*job);
  }
  reporter.finish();
}

}  // namespace

std::vector<PreparedSet> prepare(const PrepareOptions& options) {
  check_options(options);
  const auto say = [&](const auto&... parts) {
    if (options.message) {
      options.message(concat(parts...));
    }
  };
  const PreparePlan plan = make_plan(options);
  make_folder(options.output);
  const FolderLock lock(options.output);
  std::vector<Output> outputs;
  for (const std::string& part : plan.parts) {
    outputs.emplace_back(part.empty() ? options.output : options.output / part, plan.hash);
    outputs.back().inspect(options.overwrite);
  }
  const auto result = [&] {
    std::vector<PreparedSet> sets;
    for (const Output& output : outputs) {
      sets.push_back({output.folder(), output.manifest()});
    }
    return sets;
  };
  if (std::all_of(outputs.begin(), outputs.end(), [](const Output& output) { return output.finished(); })) {
    say("'", options.output.string(), "' is already prepared from this text with these options");
    return result();
  }

  const auto resumed = std::find_if(outputs.begin(), outputs.end(), [](const Output& output) { return output.resumed(); });
  const Tokenizer tokenizer =
      resumed != outputs.end() ? Tokenizer::load(resumed->folder() / kTokenizerName) : obtain_tokenizer(options, plan, say);
  require(tokenizer.bos() >= 0 || tokenizer.eos() >= 0,
          "tokenizer: it has neither a BOS nor an EOS piece to separate documents with");
  const VocabularyFacts facts{.tokenizer_sha256 = {}, .vocabulary_size = tokenizer.vocabulary_size()};
  require<UsageError>(options.shard_tokens * facts.token_bytes() <= kLargestShardBytes, "prepare: --shard-tokens ",
                      options.shard_tokens, " makes shards too large to build in memory; give at most ",
                      kLargestShardBytes / facts.token_bytes());
  for (Output& output : outputs) {
    if (output.resumed() && !output.finished()) {
      say("'", output.folder().string(), "': continuing after ", output.manifest().shards.size(), " whole shards, ",
          output.manifest().counts.tokens, " tokens");
    }
    output.begin(tokenizer, plan.sources, options.shard_tokens);
  }
  tokenize(options, plan, tokenizer, outputs);
  for (Output& output : outputs) {
    output.flush();
  }
  check_parts(outputs);
  for (Output& output : outputs) {
    output.finish();
  }
  return result();
}

}  // namespace attamba
