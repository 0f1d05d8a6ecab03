// A prepared data set: a folder with a manifest, shards of tokens, and the tokenizer that made them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/manifest.h"

namespace attamba {

/// A handle: copies share one open data set. All functions may be called from several threads. Tokens are numbered through all
/// shards in order. Nothing is used before its checksum has been compared, and errors name the shard.
class Dataset {
 public:
  /// Reads the manifest and checks that every shard is there with the right size, and the tokenizer's checksum. Shards are
  /// opened and checked when they are first used.
  static Dataset open(const std::filesystem::path& folder);

  std::uint64_t token_count() const;
  std::uint64_t document_count() const;
  std::uint64_t text_bytes() const;  ///< UTF-8 bytes of all documents: the denominator of bits per byte
  std::uint64_t text_words() const;  ///< words between ASCII whitespace: the denominator of word perplexity
  std::int32_t vocabulary_size() const;
  /// Of tokens, documents, tokenizer and how shards are cut; equal for the same files wherever they lie.
  const std::string& fingerprint() const;
  const std::string& tokenizer_hash() const;
  std::filesystem::path tokenizer_model_path() const;
  const std::filesystem::path& folder() const;
  const Manifest& manifest() const;

  /// Throws when a model with `vocabulary_size` embeddings cannot read this data set's tokens.
  void require_vocabulary(std::int64_t vocabulary_size) const;

  /// Windows of n+1 tokens: window i is tokens [i n, i n + n + 1), so every token but the first is predicted exactly once; what
  /// is left at the end, fewer than n targets, is in no window.
  std::uint64_t window_count(std::uint64_t n) const;

  /// The path of the shard that holds a token.
  std::filesystem::path shard_path(std::uint64_t token) const;

  /// Copies tokens [begin, begin + tokens.size()), across shards where need be.
  void read_tokens(std::uint64_t begin, std::span<std::int32_t> tokens) const;
  /// The positions in [begin, end) at which documents begin, in order.
  std::vector<std::uint64_t> document_starts(std::uint64_t begin, std::uint64_t end) const;
  /// For each of n tokens from `begin`: where its document begins, counted from `begin`; 0 for a document that began before.
  void fill_document_starts(std::uint64_t begin, std::span<std::int32_t> starts) const;
  /// Where the document that `position` belongs to begins.
  std::uint64_t document_begin(std::uint64_t position) const;
  /// Where the i-th document begins.
  std::uint64_t document_position(std::uint64_t i) const;

 private:
  class Shards;
  explicit Dataset(std::shared_ptr<Shards> shards);
  std::shared_ptr<Shards> shards_;
};

/// Reads all of a data set: every checksum, every token, every document start. Returns the errors, one per damaged file.
std::vector<std::string> verify_dataset(const std::filesystem::path& folder, int threads);

}  // namespace attamba
