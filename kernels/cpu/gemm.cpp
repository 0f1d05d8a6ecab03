// How gemm is cut: the right operand is packed in chunks by all threads, then tasks, each a block of rows and columns of the
// output, pack their rows of the left operand and multiply.
#include "kernels/cpu/gemm.h"

#include <algorithm>

#include "kernels/cpu/matmul_tile.h"
#include "src/core/error.h"
#include "src/core/launch.h"

namespace attamba::kernels::cpu {

namespace {

constexpr std::int64_t kChunkElements = std::int64_t{2} << 20;  ///< of b that are packed at a time: 8 MiB
constexpr std::int64_t kChunkDepth = 2048;
constexpr std::int64_t kTaskColumns = 1024;                 ///< at most
constexpr std::int64_t kPackedTogether = 4 * kGemmColumns;  ///< columns of b that one task packs
constexpr std::int64_t kSerialProducts = 1 << 18;           ///< below this many multiplications a second thread does not pay

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

/// `extent` in equal parts of at most `most`, rounded up to `unit`.
std::int64_t even_part(std::int64_t extent, std::int64_t most, std::int64_t unit) {
  return divide_up(divide_up(extent, divide_up(extent, most)), unit) * unit;
}

struct GemmPlan {
  GemmDepth depth;
  std::int64_t chunk_blocks;       ///< blocks of depth whose part of b is packed at a time
  std::int64_t chunk_columns;      ///< columns likewise
  std::int64_t task_columns;       ///< of a task, at most
  std::size_t shared, left, sums;  ///< bytes: packed b; of each worker: packed a, sums that the output's type cannot hold

  explicit GemmPlan(const GemmProblem& problem) : depth(problem.k) {
    const bool kept_apart = problem.out.type == DType::bfloat16 && depth.blocks > 1;
    chunk_blocks = kept_apart ? depth.blocks : std::min(depth.blocks, kChunkDepth / depth.block);
    const std::int64_t chunk_depth = gemm_padded_depth(std::min(problem.k, chunk_blocks * depth.block));
    const std::int64_t most = std::max(kChunkElements / chunk_depth / kGemmColumns, std::int64_t{8}) * kGemmColumns;
    chunk_columns = even_part(problem.n, most, kGemmColumns);
    task_columns = std::min(kTaskColumns, chunk_columns);
    const auto bytes = [](std::int64_t elements) {
      return ScratchAllocator::aligned_bytes<float>(static_cast<std::size_t>(elements));
    };
    shared = bytes(chunk_columns * chunk_depth);
    left = bytes(kGemmRowBlock * gemm_padded_depth(std::min(depth.block, problem.k)));
    sums = kept_apart ? bytes(kGemmRowBlock * task_columns) : 0;
  }

  std::size_t worker_bytes() const { return left + sums; }
};

/// Extents of a task: what takes the least time with `workers` threads, whole tasks each.
struct GemmTask {
  std::int64_t rows, columns;

  GemmTask(std::int64_t m, std::int64_t n, std::int64_t most_columns, int workers)
      : rows(even_part(m, kGemmRowBlock, kGemmRows)), columns(even_part(n, most_columns, kGemmColumns)) {
    if (workers == 1) {
      return;
    }
    double best = 0;
    for (const std::int64_t most_rows : {kGemmRowBlock, kGemmRowBlock / 2, kGemmRowBlock / 4}) {
      for (std::int64_t most = most_columns; most >= 128; most /= 2) {
        const std::int64_t r = even_part(m, most_rows, kGemmRows), c = even_part(n, most, kGemmColumns);
        const std::int64_t rounds = divide_up(divide_up(m, r) * divide_up(n, c), workers);
        // In units of one multiplication: packing an element of a costs 8, fetching one of b from the shared cache about 4.
        const double time = static_cast<double>(rounds * (r * c + 8 * r + 4 * c));
        if (best == 0 || time < best) {
          best = time;
          rows = r, columns = c;
        }
      }
    }
  }
};

/// One chunk of b and what it adds to the output.
class GemmChunk {
 public:
  GemmChunk(const GemmProblem& problem, const GemmPlan& plan, std::byte* scratch, int workers)
      : problem_(problem),
        plan_(plan),
        packed_(reinterpret_cast<float*>(scratch)),
        worker_scratch_(scratch + plan.shared),
        workers_(workers) {}

  void run(std::int64_t first_column, std::int64_t first_block) {
    first_column_ = first_column, first_block_ = first_block;
    columns_ = std::min(plan_.chunk_columns, problem_.n - first_column);
    blocks_ = std::min(plan_.chunk_blocks, plan_.depth.blocks - first_block);
    padded_columns_ = divide_up(columns_, kGemmColumns) * kGemmColumns;
    const std::int64_t groups = divide_up(columns_, kPackedTogether);
    parallel_workers(groups * blocks_, workers_, [&](std::int64_t i, int) { pack(i / groups, i % groups * kPackedTogether); });
    const GemmTask task(problem_.m, columns_, plan_.task_columns, workers_);
    const std::int64_t across = divide_up(columns_, task.columns);
    parallel_workers(divide_up(problem_.m, task.rows) * across, workers_, [&](std::int64_t i, int worker) {
      multiply(task, i / across * task.rows, i % across * task.columns, worker);
    });
  }

 private:
  std::int64_t depth_of(std::int64_t block) const { return plan_.depth.size(first_block_ + block); }
  /// Packed columns from `column` on of a block of this chunk. All blocks but the last one are equally deep.
  float* packed(std::int64_t block, std::int64_t column) const {
    return packed_ + block * plan_.depth.block * padded_columns_ + column * gemm_padded_depth(depth_of(block));
  }

  void pack(std::int64_t block, std::int64_t column) const {
    gemm_pack_right(packed(block, column), problem_.b.from(first_column_ + column, plan_.depth.begin(first_block_ + block)),
                    std::min(kPackedTogether, columns_ - column), depth_of(block));
  }

  void multiply(const GemmTask& task, std::int64_t row, std::int64_t column, int worker) const {
    std::byte* scratch = worker_scratch_ + static_cast<std::size_t>(worker) * plan_.worker_bytes();
    auto* left = reinterpret_cast<float*>(scratch);
    const std::int64_t rows = std::min(task.rows, problem_.m - row), columns = std::min(task.columns, columns_ - column);
    const GemmSums out = problem_.out.from(row, first_column_ + column);
    const GemmSums sums = plan_.sums == 0 ? out : GemmSums{scratch + plan_.left, columns, DType::float32};
    for (std::int64_t block = 0; block < blocks_; ++block) {
      const std::int64_t index = first_block_ + block;
      gemm_pack_left(left, problem_.a.from(row, plan_.depth.begin(index)), rows, depth_of(block));
      gemm_multiply(rows, columns, depth_of(block), left, packed(block, column),
                    index == 0 ? problem_.addend.from(row, first_column_ + column) : sums,
                    index + 1 == plan_.depth.blocks ? out : sums);
    }
  }

  const GemmProblem& problem_;
  const GemmPlan& plan_;
  float* packed_;
  std::byte* worker_scratch_;
  int workers_;
  std::int64_t first_column_ = 0, first_block_ = 0, columns_ = 0, blocks_ = 0, padded_columns_ = 0;
};

}  // namespace

std::size_t gemm_scratch_bytes(const GemmProblem& problem, int workers) {
  const GemmPlan plan(problem);
  return plan.shared + plan.worker_bytes() * static_cast<std::size_t>(workers);
}

void gemm(const GemmProblem& problem, std::byte* scratch, std::size_t scratch_bytes, int workers) {
  const GemmPlan plan(problem);
  require(scratch_bytes >= plan.shared + plan.worker_bytes(), "gemm: need ", plan.shared + plan.worker_bytes(),
          " bytes of scratch, have ", scratch_bytes);
  const bool alone = omp_in_parallel() || problem.m * problem.n * problem.k <= kSerialProducts;
  GemmChunk chunk(problem, plan, scratch,
                  alone ? 1 : std::min(workers, worker_count(scratch_bytes - plan.shared, plan.worker_bytes())));
  for (std::int64_t column = 0; column < problem.n; column += plan.chunk_columns) {
    for (std::int64_t block = 0; block < plan.depth.blocks; block += plan.chunk_blocks) {
      chunk.run(column, block);
    }
  }
}

}  // namespace attamba::kernels::cpu
