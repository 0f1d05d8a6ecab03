#include "kernels/cpu/chunk_scan_plan.h"

#include "kernels/chunk_scan_checks.h"

namespace attamba::kernels::cpu::scan {
namespace {

constexpr std::int64_t kGatheredRows = 32;     ///< short chunks are put together into blocks of at most this many rows
constexpr std::int64_t kRanges = 128;          ///< weight gradients are summed in at most this many parts
constexpr std::int64_t kWindowRows = 4096;     ///< a window holds at least this many rows, or all
constexpr std::size_t kStateBytes = 64 << 20;  ///< and more while its entry states stay below this size

/// End of the block that begins at `begin`.
std::int64_t block_end(const Geometry& g, std::int64_t begin, std::int64_t end, const std::int32_t* starts) {
  const std::int64_t gathered = begin + kGatheredRows;
  if (gathered >= end) {
    return end;
  }
  if (starts[gathered] > begin) {
    return starts[gathered];
  }
  const std::int64_t most = std::min(end, begin + g.block);  // one chunk fills the block
  for (std::int64_t row = gathered + 1; row < most; ++row) {
    if (starts[row] == row) {
      return row;
    }
  }
  return most;
}

static_assert(kMostScanTaps <= kGatheredRows, "a block hands on to one block only");

}  // namespace

Geometry make_geometry(const ScanShape& shape, std::int64_t lanes) {
  Geometry g{};
  g.hidden = shape.hidden;
  g.state = shape.state;
  g.heads = shape.heads;
  g.groups = shape.groups;
  g.conv = shape.conv;
  g.head = shape.hidden / shape.heads;
  g.head_pad = round_up(g.head, lanes);
  g.state_pad = round_up(g.state, lanes);
  g.x_columns = g.heads * g.head_pad;
  g.columns = g.x_columns + 2 * g.groups * g.state_pad;
  g.projection = shape.projection();
  // Inside a block the dual form costs Q/2 per channel and row, the states 2N whatever Q is: large states want long blocks.
  g.block = g.state >= 256 ? 128 : 64;
  g.block_pad = round_up(g.block, lanes) + lanes;
  return g;
}

WindowLimits window_limits(const Geometry& g, std::int64_t rows, std::int64_t sequence_length, std::size_t accumulator_size) {
  const std::int64_t per_state =
      static_cast<std::int64_t>(kStateBytes / accumulator_size) / std::max<std::int64_t>(1, g.state_size());
  const std::int64_t wanted = std::max(kWindowRows, per_state * g.block);
  const std::int64_t sequences = std::max<std::int64_t>(1, wanted / sequence_length);
  WindowLimits limits{};
  limits.rows = std::min(rows, sequences * sequence_length);
  limits.blocks = limits.rows / (kGatheredRows / 2) + 2;  // two neighbours hold more than kGatheredRows rows
  limits.slots = limits.rows / g.block + 1;               // a full block lies before every slot
  limits.ranges = std::min(kRanges, limits.blocks);
  return limits;
}

Cut cut_blocks(const Geometry& g, std::int64_t begin, std::int64_t end, std::int64_t sequence_length,
               const std::int32_t* starts, Block* blocks, std::int32_t* slot_blocks) {
  for (std::int64_t row = begin; row < end; ++row) {
    const bool valid = starts[row] == row || (row % sequence_length != 0 && row > begin && starts[row] == starts[row - 1]);
    require(valid, "chunk_scan: starts[", row, "] = ", starts[row], " is neither row ", row,
            " itself nor the start of the row before it in its sequence of ", sequence_length, " tokens");
  }
  Cut cut{0, 0};
  for (std::int64_t row = begin; row < end;) {
    Block block{static_cast<std::int32_t>(row), 0, -1, -1};
    if (starts[row] < row) {
      block.carry_in = blocks[cut.blocks - 1].carry_out;
    }
    row = block_end(g, row, end, starts);
    block.end = static_cast<std::int32_t>(row);
    if (row < end && starts[row] < row) {
      block.carry_out = static_cast<std::int32_t>(cut.slots++);
      slot_blocks[block.carry_out] = static_cast<std::int32_t>(cut.blocks + 1);
    }
    blocks[cut.blocks++] = block;
  }
  return cut;
}

}  // namespace attamba::kernels::cpu::scan
