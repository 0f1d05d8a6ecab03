#include <algorithm>

#include "src/chunking/chunking.h"
#include "src/chunking/every.h"

namespace attamba {
namespace {

/// Pseudo-chunking (paper, A.2): attention is fully causal, the SSM still restarts every P tokens.
class Pseudo final : public ChunkingStrategy {
 public:
  explicit Pseudo(std::int64_t size) : size_(size) {}
  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    append_every(size_ - 1, size_, request.length, out);
  }
  std::int64_t layer_class(std::int64_t) const override { return 0; }
  bool full_attention() const override { return true; }
  std::int64_t longest_chunk(std::int64_t n) const override { return std::min(size_, n); }

 private:
  std::int64_t size_;
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_pseudo_chunking(std::int64_t size) {
  return std::make_unique<Pseudo>(size);
}

}  // namespace attamba
