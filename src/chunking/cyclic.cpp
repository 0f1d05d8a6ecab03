#include <algorithm>

#include "src/chunking/chunking.h"
#include "src/chunking/every.h"

namespace attamba {
namespace {

/// Ends at j with (j+1+l) mod P = 0: the boundary moves by the layer index (paper, A.1.1).
class Cyclic final : public ChunkingStrategy {
 public:
  explicit Cyclic(std::int64_t size) : size_(size) {}
  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    append_every(size_ - 1 - request.layer % size_, size_, request.length, out);
  }
  std::int64_t layer_class(std::int64_t layer) const override { return layer % size_; }
  std::int64_t longest_chunk(std::int64_t n) const override { return std::min(size_, n); }

 private:
  std::int64_t size_;
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_cyclic_chunking(std::int64_t size) {
  return std::make_unique<Cyclic>(size);
}

}  // namespace attamba
