// Where chunks end (docs/model.md). A strategy is one class in one file and one line in registry.cpp.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

namespace attamba {

/// One document of one sequence in one layer: positions count from the document's first token.
struct ChunkRequest {
  std::int64_t length = 0;  ///< tokens of the document inside this window
  std::int64_t layer = 0;
  std::uint64_t seed = 0;
  std::int64_t step = 0;
  std::int64_t sample = 0;    ///< global sample index: never a rank or a place in a batch
  std::int64_t document = 0;  ///< which document of the window
};

class ChunkingStrategy {
 public:
  virtual ~ChunkingStrategy() = default;

  /// Appends the sorted positions of the chunks' last tokens; the last one is always length - 1.
  virtual void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const = 0;

  /// Layers of equal class have equal chunk ends in every step, so that they can share a table.
  virtual std::int64_t layer_class(std::int64_t layer) const { return layer; }
  /// Whether ends change with step or sample, so that tables must be made anew for each micro-batch.
  virtual bool varies() const { return false; }
  /// No chunk of a window of n tokens has more. A bound, for sharing out work.
  virtual std::int64_t longest_chunk(std::int64_t n) const { return n; }
  /// Pseudo-chunking (A.2): chunks cut the SSM only, attention stays fully causal.
  virtual bool full_attention() const { return false; }
};

/// Chunk ends given by the caller for every layer (the same for all sequences). Throws UsageError when a list is not strictly
/// increasing, reaches beyond n or does not end with n - 1; the message starts with `source`.
std::unique_ptr<ChunkingStrategy> make_explicit_chunking(std::vector<std::vector<std::int32_t>> ends_of_layer, std::int64_t n,
                                                         std::string_view source = "explicit chunking");
/// The same from a text file: one line of positions for all layers, or one per layer, between blanks or commas; '#' starts a
/// comment, and lines without positions do not count. Messages name the file, the layer and the value.
std::unique_ptr<ChunkingStrategy> read_explicit_chunking(const std::filesystem::path& file, std::int64_t layers,
                                                         std::int64_t n);

/// A strategy by its name in the configuration. Throws UsageError for names it does not know.
std::unique_ptr<ChunkingStrategy> make_chunking(std::string_view name, std::int64_t size);

/// The chunk ends of the released code (docs/model.md, released semantics) for a model of so many layers, by the same names.
/// Throws UsageError for those of which its code says nothing.
std::unique_ptr<ChunkingStrategy> make_released_chunking(std::string_view name, std::int64_t size, std::int64_t layers);

/// Every name that a configuration may give: those of `make_chunking`, and "explicit".
const std::vector<std::string_view>& chunking_strategies();

/// The constructors that registry.cpp lists.
std::unique_ptr<ChunkingStrategy> make_uniform_chunking(std::int64_t size);
std::unique_ptr<ChunkingStrategy> make_cyclic_chunking(std::int64_t size);
std::unique_ptr<ChunkingStrategy> make_random_chunking(std::int64_t size);
std::unique_ptr<ChunkingStrategy> make_pseudo_chunking(std::int64_t size);

}  // namespace attamba
