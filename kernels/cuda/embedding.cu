// The vocabulary's first end: rows of a table by token, and the sums of their gradients. A token outside the table cannot be an
// error here: the embedding gives NaN, which shows in the loss, and the backward leaves it out.
//
// The backward must neither depend on the order of blocks nor leave a frequent token's thousands of rows to one of them. So
// tokens are sorted, rows with equal tokens staying in order, and the sorted list is cut into pieces of kPiece rows. A block
// adds up the runs of equal tokens in its piece: a run that lies within it goes straight to the table, one that crosses its
// ends leaves a partial sum. The piece in which such a run begins then adds its partial sums, in order. Every row of dout is
// read once, every touched row of the table is written once.
#include <algorithm>
#include <limits>

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kRowWarps = 8;        ///< rows that a block of the forward pass looks up, a warp each
constexpr int kSortTile = 512;      ///< tokens that a block sorts
constexpr int kMergeThreads = 256;  ///< of the kernel that merges sorted tiles
constexpr int kPiece = kWarp;       ///< sorted tokens that a block adds up: a lane knows one
constexpr int kSumThreads = 128;    ///< most threads of such a block; each owns some columns
constexpr int kAhead = 8;           ///< rows that are read before they are added

struct TableExtents {
  std::int64_t tokens, vocabulary;  ///< T, V
  int columns;                      ///< D
  ATTAMBA_DEVICE bool holds(std::int32_t token) const { return token >= 0 && token < vocabulary; }
};

template <class T, int kWidth>
ATTAMBA_KERNEL(kRowWarps* kWarp, 4)
look_up(T* out, const T* table, const std::int32_t* tokens, TableExtents extents) {
  const std::int64_t row = std::int64_t{block_x()} * kRowWarps + warp_index();
  if (row >= extents.tokens) {
    return;
  }
  const std::int32_t token = load(tokens + row);
  for (int c = lane_index() * kWidth; c < extents.columns; c += kWarp * kWidth) {
    Elements<T, kWidth> own;
    own.fill(std::numeric_limits<float>::quiet_NaN());
    if (extents.holds(token)) {
      own = Elements<T, kWidth>::read(table + std::int64_t{token} * extents.columns + c);
    }
    own.write(out + row * extents.columns + c);
  }
}

// ------------------------------------------------------------------------------------------------ sorting

/// Sorts tiles of kSortTile tokens: tile_tokens, and tile_rows, the rows that they are from.
ATTAMBA_KERNEL(kSortTile, 2)
sort_tiles(std::int32_t* tile_tokens, std::int32_t* tile_rows, const std::int32_t* tokens, std::int64_t count) {
  std::int32_t* const all = SharedMemory().take<std::int32_t>(kSortTile);
  const int own = thread_index();
  const std::int64_t first = std::int64_t{block_x()} * kSortTile, row = first + own;
  const std::int32_t token = row < count ? load(tokens + row) : std::numeric_limits<std::int32_t>::max();
  store(all + own, token);
  sync_block();
  int rank = 0;
  for (int j = 0; j < kSortTile; j += 4) {
    const Bytes16 others = load(reinterpret_cast<const Bytes16*>(all + j));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto other = static_cast<std::int32_t>(others.word[i]);
      rank += other < token || (other == token && j + i < own) ? 1 : 0;
    }
  }
  if (row < count) {
    store(tile_tokens + first + rank, token);
    store(tile_rows + first + rank, static_cast<std::int32_t>(row));
  }
}

/// How many of `count` sorted tokens come before `token`: those that are less, and with kEqual also those that are equal.
template <bool kEqual>
ATTAMBA_DEVICE int count_before(const std::int32_t* sorted, int count, std::int32_t token) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    const std::int32_t other = load(sorted + middle);
    if (other < token || (kEqual && other == token)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Each token of a sorted tile finds its place among all others: neighbours search for much the same, so their loads coincide.
ATTAMBA_KERNEL(kMergeThreads, 4)
merge_tiles(std::int32_t* sorted, std::int32_t* order, const std::int32_t* tile_tokens, const std::int32_t* tile_rows,
            std::int64_t count) {
  const std::int64_t own = std::int64_t{block_x()} * kMergeThreads + thread_index();
  if (own >= count) {
    return;
  }
  const std::int32_t token = load(tile_tokens + own);
  const std::int64_t tile = own / kSortTile * kSortTile;
  std::int64_t place = own - tile;
  for (std::int64_t first = 0; first < count; first += kSortTile) {
    const int size = count - first < kSortTile ? static_cast<int>(count - first) : kSortTile;
    if (first < tile) {
      place += count_before<true>(tile_tokens + first, size, token);
    } else if (first > tile) {
      place += count_before<false>(tile_tokens + first, size, token);
    }
  }
  store(sorted + place, token);
  store(order + place, load(tile_rows + own));
}

// ------------------------------------------------------------------------------------------------ sums

/// Partial sums of runs that cross a piece's ends: [pieces, 2, D], the run that goes on from the piece before and the run that
/// begins in this piece and goes on.
enum Part : int { kHead, kTail, kParts };

struct Sums {
  float* table;    ///< [V, D]
  float* partial;  ///< [pieces, kParts, D]
  const std::int32_t *sorted, *order;
  TableExtents extents;

  ATTAMBA_DEVICE float* part(std::int64_t piece, Part which) const {
    return partial + (piece * kParts + which) * extents.columns;
  }
};

/// The thread's first column, and whether it is one.
template <int kWidth>
ATTAMBA_DEVICE int own_column() {
  return (block_y() * block_threads() + thread_index()) * kWidth;
}

template <int kWidth>
ATTAMBA_DEVICE void add_to_table(const Sums& s, std::int32_t token, int column, const Elements<float, kWidth>& sum) {
  if (s.extents.holds(token)) {
    float* const at = s.table + std::int64_t{token} * s.extents.columns + column;
    auto total = Elements<float, kWidth>::read(at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      total.value[i] += sum.value[i];
    }
    total.write(at);
  }
}

ATTAMBA_DEVICE std::int32_t of_lane(std::int32_t value, int lane) {
  return static_cast<std::int32_t>(shuffle(static_cast<std::uint32_t>(value), lane));
}

template <class T, int kWidth>
ATTAMBA_KERNEL(kSumThreads, 4)
sum_runs(Sums s, const T* dout) {
  constexpr std::int32_t kNone = -1;  // like any token outside the table, it may be equal to others of its kind
  const std::int64_t first = std::int64_t{block_x()} * kPiece, last = first + kPiece;
  const int count = s.extents.tokens < last ? static_cast<int>(s.extents.tokens - first) : kPiece;
  const bool has_token = lane_index() < count;
  const std::int32_t token = has_token ? load(s.sorted + first + lane_index()) : kNone;
  const std::int32_t row = has_token ? load(s.order + first + lane_index()) : 0;
  const std::int32_t next = last < s.extents.tokens ? load(s.sorted + last) : kNone;
  const int column = own_column<kWidth>();
  const bool owns = column < s.extents.columns;

  bool from_before = first > 0 && load(s.sorted + first - 1) == of_lane(token, 0);
  Elements<float, kWidth> sum;
  sum.fill(0);
  for (int begin = 0; begin < count; begin += kAhead) {
    Elements<T, kWidth> ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int32_t from = of_lane(row, (begin + i) % kWarp);
      ahead[i].fill(0);
      if (owns && begin + i < count) {
        ahead[i] = Elements<T, kWidth>::read(dout + std::int64_t{from} * s.extents.columns + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = begin + i;
      const std::int32_t own = of_lane(token, at % kWarp), following = of_lane(token, (at + 1) % kWarp);
      if (owns && at < count) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          sum.value[j] += ahead[i].value[j];
        }
        const bool at_end = at + 1 == count;
        if (own != (at_end ? next : following)) {
          if (from_before) {
            sum.write(s.part(block_x(), kHead) + column);
          } else {
            add_to_table(s, own, column, sum);
          }
          from_before = false;
          sum.fill(0);
        } else if (at_end) {
          sum.write(s.part(block_x(), from_before ? kHead : kTail) + column);
        }
      }
    }
  }
}

/// A block per piece but the last: when a run begins in the piece and goes on, the run's partial sums are added to the table.
template <int kWidth>
ATTAMBA_KERNEL(kSumThreads, 4)
join_runs(Sums s) {
  const std::int64_t piece = block_x(), first = piece * kPiece, next = first + kPiece;
  const std::int32_t token = load(s.sorted + next - 1);
  const bool goes_on = load(s.sorted + next) == token;
  const bool from_before = first > 0 && load(s.sorted + first - 1) == token;
  const int column = own_column<kWidth>();
  if (!goes_on || from_before || !s.extents.holds(token) || column >= s.extents.columns) {
    return;
  }
  std::int64_t low = piece + 1, high = (s.extents.tokens + kPiece - 1) / kPiece;  // the run's last piece is in [low, high)
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (load(s.sorted + middle * kPiece) == token ? low : high) = middle;
  }
  auto sum = Elements<float, kWidth>::read(s.part(piece, kTail) + column);
#pragma unroll 4
  for (std::int64_t p = piece + 1; p <= low; ++p) {
    const auto head = Elements<float, kWidth>::read(s.part(p, kHead) + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum.value[i] += head.value[i];
    }
  }
  add_to_table(s, token, column, sum);
}

// ------------------------------------------------------------------------------------------------ host

struct BackwardScratch {
  std::int32_t *tile_tokens, *tile_rows, *sorted, *order;  ///< [T]
  float* partial;                                          ///< [pieces, kParts, D]

  static std::size_t partials(const Shape& dout) {
    return static_cast<std::size_t>(ceil_div(dout.rows(), kPiece) * kParts * dout.columns());
  }
  static std::size_t bytes(const Shape& dout) {
    return 4 * ScratchAllocator::aligned_bytes<std::int32_t>(static_cast<std::size_t>(dout.rows())) +
           ScratchAllocator::aligned_bytes<float>(partials(dout));
  }
  BackwardScratch(const Launch& launch, const Shape& dout) {
    ScratchAllocator scratch(launch);
    for (std::int32_t** list : {&tile_tokens, &tile_rows, &sorted, &order}) {
      *list = scratch.take<std::int32_t>(static_cast<std::size_t>(dout.rows()));
    }
    partial = scratch.take<float>(partials(dout));
  }
};

void sort_tokens(const Launch& launch, const BackwardScratch& scratch, const std::int32_t* tokens, std::int64_t count) {
  launch_kernel(
      "embedding_backward: sort_tiles", sort_tiles, launch,
      {.x = ceil_div(count, kSortTile), .threads = kSortTile, .shared_bytes = SharedMemory::bytes_of<std::int32_t>(kSortTile)},
      scratch.tile_tokens, scratch.tile_rows, tokens, count);
  launch_kernel("embedding_backward: merge_tiles", merge_tiles, launch,
                {.x = ceil_div(count, kMergeThreads), .threads = kMergeThreads}, scratch.sorted, scratch.order,
                scratch.tile_tokens, scratch.tile_rows, count);
}

template <class T, int kWidth>
void add_rows(const Launch& launch, const Sums& sums, const T* dout) {
  const std::int64_t owners = ceil_div(sums.extents.columns, kWidth), pieces = ceil_div(sums.extents.tokens, kPiece);
  const auto threads = static_cast<int>(std::min<std::int64_t>(kSumThreads, ceil_div(owners, kWarp) * kWarp));
  const Grid grid{.x = pieces, .y = ceil_div(owners, threads), .threads = threads};
  launch_kernel("embedding_backward: sum_runs", sum_runs<T, kWidth>, launch, grid, sums, dout);
  launch_kernel("embedding_backward: join_runs", join_runs<kWidth>, launch, {.x = pieces - 1, .y = grid.y, .threads = threads},
                sums);
}

}  // namespace

void embedding(const Launch& launch, const Tensor& out, const Tensor& table, const Tensor& tokens) {
  const TableExtents extents{
      .tokens = tokens.elements(), .vocabulary = table.shape()[0], .columns = static_cast<int>(table.shape().columns())};
  require(out.dtype() == table.dtype() && out.shape().columns() == extents.columns && out.shape().rows() == extents.tokens,
          "embedding: output ", out.type, " does not match table ", table.type, " and tokens ", tokens.type);
  dispatch_compute(out.dtype(), "embedding", [&]<class T>() {
    const auto run = [&]<int kWidth>() {
      launch_kernel("embedding", look_up<T, kWidth>, launch,
                    {.x = ceil_div(extents.tokens, kRowWarps), .threads = kRowWarps * kWarp}, elements_of<T>(out),
                    elements_of<T>(table), tokens.as<std::int32_t>(), extents);
    };
    if (packed_rows<T>(extents.columns, {out.data, table.data})) {
      run.template operator()<kPackWidth<T>>();
    } else {
      run.template operator()<1>();
    }
  });
}

std::size_t embedding_backward_workspace(const TensorType& dout) {
  return BackwardScratch::bytes(dout.shape);
}

void embedding_backward(const Launch& launch, const Tensor& dtable, const Tensor& dout, const Tensor& tokens) {
  const std::int64_t columns = dtable.shape().columns(), count = dout.shape().rows();
  require(dout.shape().columns() == columns && tokens.elements() == count, "embedding_backward: dout ", dout.type,
          " does not match dtable ", dtable.type, " and tokens ", tokens.type);
  require(count <= std::numeric_limits<std::int32_t>::max(), "embedding_backward: ", count, " tokens are too many");
  if (count == 0) {
    return;
  }
  dispatch_compute(dout.dtype(), "embedding_backward", [&]<class T>() {
    const BackwardScratch scratch(launch, dout.shape());
    sort_tokens(launch, scratch, tokens.as<std::int32_t>(), count);
    const Sums sums{.table = dtable.as<float>(),
                    .partial = scratch.partial,
                    .sorted = scratch.sorted,
                    .order = scratch.order,
                    .extents = {.tokens = count, .vocabulary = dtable.shape()[0], .columns = static_cast<int>(columns)}};
    if (packed_rows<T>(columns, {dout.data, dtable.data, scratch.partial})) {
      add_rows<T, kPackWidth<T>>(launch, sums, elements_of<T>(dout));
    } else {
      add_rows<T, 1>(launch, sums, elements_of<T>(dout));
    }
  });
}

}  // namespace attamba::kernels::cuda
