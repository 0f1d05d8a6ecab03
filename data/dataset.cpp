#include "data/dataset.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <list>
#include <mutex>
#include <thread>

#include "data/files.h"
#include "data/sha256.h"
#include "data/shard.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// How many shards may be open at a time: a share of what the system allows this process.
std::size_t open_file_limit() {
  struct rlimit limit {};
  const bool known = ::getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  return std::clamp<std::size_t>(known ? limit.rlim_cur / 4 : 256, 16, 4096);
}

void check_tokenizer(const std::filesystem::path& folder, const Manifest& manifest) {
  const auto path = folder / kTokenizerName;
  const std::string found = sha256(read_whole_file(path));
  require(found == manifest.vocabulary.tokenizer_sha256, "tokenizer '", path.string(), "': its sha256 is ", found.substr(0, 12),
          "... where the manifest says ", manifest.vocabulary.tokenizer_sha256.substr(0, 12),
          "...: it is not the tokenizer that made this data set; restore it or prepare the data set again");
}

}  // namespace

/// The shards, each with the number of its first token and document, and which of them are open.
class Dataset::Shards {
 public:
  Shards(std::filesystem::path folder, Manifest manifest) : folder_(std::move(folder)), manifest_(std::move(manifest)) {
    std::uint64_t token = 0;
    std::uint64_t document = 0;
    for (std::size_t i = 0; i < manifest_.shards.size(); ++i) {
      const ShardEntry& entry = manifest_.shards[i];
      readers_.emplace_back(folder_ / entry.file, manifest_.shards, i, manifest_.vocabulary);
      readers_.back().check_size();
      first_token_.push_back(token);
      first_document_.push_back(document);
      token += entry.counts.tokens;
      document += entry.counts.documents;
    }
    places_.resize(readers_.size(), open_.end());
  }

  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  std::mutex& mutex() { return mutex_; }

  /// The shard that holds a token; it is the most recently used one afterwards. Call with the mutex held, as all below.
  std::size_t shard_of(std::uint64_t token) const { return index_of(first_token_, token); }
  std::size_t shard_of_document(std::uint64_t document) const { return index_of(first_document_, document); }
  std::uint64_t first_token(std::size_t shard) const { return first_token_[shard]; }
  std::uint64_t first_document(std::size_t shard) const { return first_document_[shard]; }

  ShardReader& use(std::size_t shard) {
    if (places_[shard] != open_.end()) {
      open_.splice(open_.begin(), open_, places_[shard]);
    } else {
      if (open_.size() >= open_limit_) {
        readers_[open_.back()].close();
        places_[open_.back()] = open_.end();
        open_.pop_back();
      }
      open_.push_front(shard);
      places_[shard] = open_.begin();
    }
    return readers_[shard];
  }

 private:
  /// The last shard whose first item is at or before `item`; shards without items are passed over.
  static std::size_t index_of(const std::vector<std::uint64_t>& first, std::uint64_t item) {
    return static_cast<std::size_t>(std::upper_bound(first.begin(), first.end(), item) - first.begin()) - 1;
  }

  std::filesystem::path folder_;
  Manifest manifest_;
  std::mutex mutex_;
  std::vector<ShardReader> readers_;
  std::vector<std::uint64_t> first_token_;
  std::vector<std::uint64_t> first_document_;
  std::list<std::size_t> open_;  ///< most recently used first
  std::vector<std::list<std::size_t>::iterator> places_;
  std::size_t open_limit_ = open_file_limit();
};

Dataset::Dataset(std::shared_ptr<Shards> shards) : shards_(std::move(shards)) {}

Dataset Dataset::open(const std::filesystem::path& folder) {
  Manifest manifest = read_manifest(folder);
  check_tokenizer(folder, manifest);
  return Dataset(std::make_shared<Shards>(folder, std::move(manifest)));
}

const Manifest& Dataset::manifest() const {
  return shards_->manifest();
}
const std::filesystem::path& Dataset::folder() const {
  return shards_->folder();
}
std::uint64_t Dataset::token_count() const {
  return manifest().counts.tokens;
}
std::uint64_t Dataset::document_count() const {
  return manifest().counts.documents;
}
std::uint64_t Dataset::text_bytes() const {
  return manifest().counts.text_bytes;
}
std::uint64_t Dataset::text_words() const {
  return manifest().counts.text_words;
}
std::int32_t Dataset::vocabulary_size() const {
  return manifest().vocabulary.vocabulary_size;
}
const std::string& Dataset::fingerprint() const {
  return manifest().fingerprint;
}
const std::string& Dataset::tokenizer_hash() const {
  return manifest().vocabulary.tokenizer_sha256;
}
std::filesystem::path Dataset::tokenizer_model_path() const {
  return folder() / kTokenizerName;
}

void Dataset::require_vocabulary(std::int64_t vocabulary_size) const {
  require(vocabulary_size == this->vocabulary_size(), "data set '", folder().string(), "' (first shard '",
          manifest().shards.front().file, "'): its vocabulary has ", this->vocabulary_size(), " pieces, the model's has ",
          vocabulary_size, "; set the model's vocabulary size to the data's, or prepare the data with the model's tokenizer");
}

std::uint64_t Dataset::window_count(std::uint64_t n) const {
  require(n > 0, "data set: windows need at least one token");
  return token_count() == 0 ? 0 : (token_count() - 1) / n;
}

/// Without the lock, which a read that does not end holds; nothing here changes.
std::filesystem::path Dataset::shard_path(std::uint64_t token) const {
  return folder() / manifest().shards[shards_->shard_of(token)].file;
}

void Dataset::read_tokens(std::uint64_t begin, std::span<std::int32_t> tokens) const {
  require(begin <= token_count() && tokens.size() <= token_count() - begin, "data set '", folder().string(), "': tokens ",
          begin, " to ", begin + tokens.size(), " are outside its ", token_count());
  const std::scoped_lock lock(shards_->mutex());
  while (!tokens.empty()) {
    const std::size_t shard = shards_->shard_of(begin);
    ShardReader& reader = shards_->use(shard);
    const std::uint64_t inside = begin - shards_->first_token(shard);
    const std::size_t count = std::min<std::uint64_t>(tokens.size(), reader.entry().counts.tokens - inside);
    reader.read(inside, tokens.first(count));
    begin += count;
    tokens = tokens.subspan(count);
  }
}

std::vector<std::uint64_t> Dataset::document_starts(std::uint64_t begin, std::uint64_t end) const {
  std::vector<std::uint64_t> starts;
  end = std::min(end, token_count());
  const std::scoped_lock lock(shards_->mutex());
  while (begin < end) {
    const std::size_t shard = shards_->shard_of(begin);
    ShardReader& reader = shards_->use(shard);
    const std::uint64_t first = shards_->first_token(shard);
    const std::uint64_t shard_end = first + reader.entry().counts.tokens;
    reader.document_starts(begin - first, std::min(end, shard_end) - first, first, starts);
    begin = shard_end;
  }
  return starts;
}

void Dataset::fill_document_starts(std::uint64_t begin, std::span<std::int32_t> starts) const {
  std::size_t at = 0;
  std::int32_t current = 0;
  for (const std::uint64_t start : document_starts(begin, begin + starts.size())) {
    const auto next = static_cast<std::size_t>(start - begin);
    std::fill(starts.begin() + at, starts.begin() + next, current);
    at = next;
    current = static_cast<std::int32_t>(next);
  }
  std::fill(starts.begin() + at, starts.end(), current);
}

std::uint64_t Dataset::document_begin(std::uint64_t position) const {
  require(position < token_count(), "data set '", folder().string(), "': token ", position, " is outside its ", token_count());
  const std::scoped_lock lock(shards_->mutex());
  for (std::size_t shard = shards_->shard_of(position) + 1; shard-- > 0;) {
    ShardReader& reader = shards_->use(shard);
    std::uint64_t start = 0;
    if (reader.entry().counts.documents > 0 && reader.last_document_start(position - shards_->first_token(shard), start)) {
      return shards_->first_token(shard) + start;
    }
  }
  return 0;
}

std::uint64_t Dataset::document_position(std::uint64_t i) const {
  require(i < document_count(), "data set '", folder().string(), "': document ", i, " is outside its ", document_count());
  const std::scoped_lock lock(shards_->mutex());
  const std::size_t shard = shards_->shard_of_document(i);
  return shards_->first_token(shard) + shards_->use(shard).document_start(i - shards_->first_document(shard));
}

std::vector<std::string> verify_dataset(const std::filesystem::path& folder, int threads) {
  std::vector<std::string> errors;
  const Manifest manifest = read_manifest(folder);
  try {
    check_tokenizer(folder, manifest);
  } catch (const Error& error) {
    errors.emplace_back(error.what());
  }
  std::vector<std::string> shard_errors(manifest.shards.size());
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t i = next++; i < manifest.shards.size(); i = next++) {
      try {
        ShardReader(folder / manifest.shards[i].file, manifest.shards, i, manifest.vocabulary).verify();
      } catch (const std::exception& error) {
        shard_errors[i] = error.what();
      }
    }
  };
  {
    std::vector<std::jthread> workers;
    for (int i = 0; i < std::max(threads, 1); ++i) {
      workers.emplace_back(work);
    }
  }
  std::copy_if(shard_errors.begin(), shard_errors.end(), std::back_inserter(errors),
               [](const auto& error) { return !error.empty(); });
  return errors;
}

}  // namespace attamba
