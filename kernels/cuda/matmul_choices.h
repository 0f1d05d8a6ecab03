// Which algorithm of cuBLASLt runs a shape: chosen once per kind of GPU, driver and library, kept on disk between runs.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <ostream>

#include "src/core/dtype.h"

namespace attamba::kernels::cuda {

/// out [m, n] = op(a) op(b) (+ addend).
struct MatmulShape {
  std::int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false, transpose_b = false, accumulate = false;
  DType input = DType::float32, output = DType::float32;
  std::uint32_t alignment = 256;  ///< bytes that all operands' addresses are multiples of, a power of two up to 256
  friend auto operator<=>(const MatmulShape&, const MatmulShape&) = default;
};
std::ostream& operator<<(std::ostream& out, const MatmulShape& shape);

/// Choices in memory, and a file that remembers them. A file that cannot be read or written costs time, never a run.
class MatmulChoices {
 public:
  /// An empty path: nothing is kept.
  explicit MatmulChoices(std::filesystem::path file);
  std::optional<cublasLtMatmulAlgo_t> find(const MatmulShape& shape) const;
  /// Remembers it, and replaces the file by one with everything known, which takes up what other processes have written there
  /// meanwhile. Nobody ever sees half a file; of two that write at the same moment the later one wins, and the other's new line
  /// is chosen again in the next run.
  void keep(const MatmulShape& shape, const cublasLtMatmulAlgo_t& algorithm);

 private:
  /// The file's choices of shapes that have none yet.
  void read_missing();

  std::filesystem::path file_;
  std::map<MatmulShape, cublasLtMatmulAlgo_t> choices_;
};

/// Of `count` candidates the one that ever took the least time, none if none of them works; seconds(i) is empty for one that
/// does not, and is not asked again. They take turns, in `rounds`: a clock that rises and whatever else disturbs the device for
/// a while then favours none. Disturbances as long as all rounds remain, as where ranks share a GPU and choose at the same
/// time.
std::optional<std::size_t> least_seconds(std::size_t count, int rounds,
                                         const std::function<std::optional<double>(std::size_t)>& seconds);

/// Those of this process's GPU: ATTAMBA_CACHE, XDG_CACHE_HOME/attamba or ~/.cache/attamba.
MatmulChoices& matmul_choices();

}  // namespace attamba::kernels::cuda
