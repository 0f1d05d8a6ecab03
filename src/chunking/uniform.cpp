#include <algorithm>

#include "src/chunking/chunking.h"
#include "src/chunking/every.h"

namespace attamba {
namespace {

/// Ends at j with (j+1) mod P = 0 (paper, section 4.1).
class Uniform final : public ChunkingStrategy {
 public:
  explicit Uniform(std::int64_t size) : size_(size) {}
  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    append_every(size_ - 1, size_, request.length, out);
  }
  std::int64_t layer_class(std::int64_t) const override { return 0; }
  std::int64_t longest_chunk(std::int64_t n) const override { return std::min(size_, n); }

 private:
  std::int64_t size_;
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_uniform_chunking(std::int64_t size) {
  return std::make_unique<Uniform>(size);
}

}  // namespace attamba
