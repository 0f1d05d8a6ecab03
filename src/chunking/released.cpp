#include <algorithm>

#include "src/chunking/chunking.h"
#include "src/core/names.h"

namespace attamba {
namespace {

/// Ends at position 0 and at j with (j + 1 + offset) mod P = 0, the last one of them moved to n - 1; offset = l floor(P /
/// layers) in layer l where boundaries move (docs/model.md, released semantics).
class Released final : public ChunkingStrategy {
 public:
  Released(std::int64_t size, std::int64_t layers, bool moves, bool full_attention)
      : size_(size), shift_(moves ? size / layers : 0), full_attention_(full_attention) {}

  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    out.push_back(0);
    const std::int64_t first = size_ - 1 - layer_class(request.layer);
    for (std::int64_t j = first == 0 ? size_ : first; j < request.length; j += size_) {
      out.push_back(static_cast<std::int32_t>(j));
    }
    out.back() = static_cast<std::int32_t>(request.length - 1);
  }
  std::int64_t layer_class(std::int64_t layer) const override { return layer * shift_; }
  std::int64_t longest_chunk(std::int64_t n) const override { return std::min(n, 2 * size_ - 1); }
  bool full_attention() const override { return full_attention_; }

 private:
  std::int64_t size_, shift_;
  bool full_attention_;
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_released_chunking(std::string_view name, std::int64_t size, std::int64_t layers) {
  require<UsageError>(size >= 1, "chunking: size is ", size, ", must be at least 1");
  require_known("chunking strategy of the released code", name, {"uniform", "cyclic", "none"});
  return std::make_unique<Released>(size, layers, name != "uniform", name == "none");
}

}  // namespace attamba
