#include <algorithm>
#include <unordered_set>

#include "src/chunking/chunking.h"
#include "src/core/random.h"

namespace attamba {
namespace {

/// floor(n/P) - 1 distinct positions drawn uniformly from [0, n-1), plus n-1 (paper, A.1). A fresh draw per step, layer,
/// sequence and document from a counter-based generator.
class Random final : public ChunkingStrategy {
 public:
  explicit Random(std::int64_t size) : size_(size) {}
  bool varies() const override { return true; }

  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    const auto range = static_cast<std::uint64_t>(request.length - 1);
    const std::int64_t count = std::max<std::int64_t>(request.length / size_ - 1, 0);
    // A sample has at most 2^31 documents and a model at most 2^12 layers: both fit the second coordinate for real windows.
    RandomStream random(request.seed ^ kDomain, static_cast<std::uint32_t>(request.step),
                        static_cast<std::uint32_t>(request.layer + (request.document << 12)),
                        static_cast<std::uint32_t>(request.sample));
    // Floyd's sampling without replacement: one draw per position.
    std::unordered_set<std::int32_t> chosen;
    for (std::uint64_t last = range - static_cast<std::uint64_t>(count); last < range; ++last) {
      const auto candidate = static_cast<std::int32_t>(random.below(last + 1));
      chosen.insert(chosen.count(candidate) != 0 ? static_cast<std::int32_t>(last) : candidate);
    }
    const std::size_t begin = out.size();
    out.insert(out.end(), chosen.begin(), chosen.end());
    std::sort(out.begin() + static_cast<std::ptrdiff_t>(begin), out.end());
    out.push_back(static_cast<std::int32_t>(request.length - 1));
  }

 private:
  static constexpr std::uint64_t kDomain = 0x6368756e6b696e67;  // keeps these draws apart from other uses of the seed
  std::int64_t size_;
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_random_chunking(std::int64_t size) {
  return std::make_unique<Random>(size);
}

}  // namespace attamba
