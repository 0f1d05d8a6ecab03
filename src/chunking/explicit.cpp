#include "src/chunking/chunking.h"
#include "src/core/error.h"

namespace attamba {
namespace {

/// Ends that the caller gave, per layer.
class Explicit final : public ChunkingStrategy {
 public:
  explicit Explicit(std::vector<std::vector<std::int32_t>> ends) : ends_(std::move(ends)) {}
  void ends(const ChunkRequest& request, std::vector<std::int32_t>& out) const override {
    require<UsageError>(request.layer < static_cast<std::int64_t>(ends_.size()), "explicit chunking: no chunk ends for layer ",
                        request.layer, "; give one list per layer");
    const auto& list = ends_[static_cast<std::size_t>(request.layer)];
    require<UsageError>(list.back() == request.length - 1, "explicit chunking: the list for layer ", request.layer, " ends at ",
                        list.back(), ", a document of ", request.length, " tokens ends at ", request.length - 1,
                        "; explicit ends do not go with document_mask");
    out.insert(out.end(), list.begin(), list.end());
  }

 private:
  std::vector<std::vector<std::int32_t>> ends_;
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_explicit_chunking(std::vector<std::vector<std::int32_t>> ends_of_layer, std::int64_t n) {
  for (std::size_t l = 0; l < ends_of_layer.size(); ++l) {
    const auto& ends = ends_of_layer[l];
    require<UsageError>(!ends.empty(), "explicit chunking: layer ", l, " has no chunk ends; the last position ", n - 1,
                        " always ends a chunk");
    for (std::size_t i = 0; i < ends.size(); ++i) {
      require<UsageError>(ends[i] >= 0 && ends[i] < n, "explicit chunking: chunk end ", ends[i], " of layer ", l,
                          " lies outside a sequence of ", n, " tokens");
      require<UsageError>(i == 0 || ends[i - 1] < ends[i], "explicit chunking: chunk ends of layer ", l,
                          " are not sorted: ", i == 0 ? 0 : ends[i - 1], " before ", ends[i]);
    }
    require<UsageError>(ends.back() == n - 1, "explicit chunking: the last chunk end of layer ", l, " is ", ends.back(),
                        ", but position n - 1 = ", n - 1, " always ends a chunk");
  }
  return std::make_unique<Explicit>(std::move(ends_of_layer));
}

}  // namespace attamba
