// Forward half of chunk_scan_plain.h.
#include "kernels/cuda/chunk_scan_plain.h"

#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kStrip = 16;  ///< rows of a block of elementwise kernels
static_assert(kThreads > 2 * kTile);

/// active = silu(conv(xBC)), delta = softplus(dt + bias).
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
activate(Sizes s, Inputs<T> in, Memory m) {
  const int begin = block_x() * kStrip, rows = s.rows - begin < kStrip ? s.rows - begin : kStrip;
  for (int i = thread_index(); i < rows * s.channels; i += kThreads) {
    const int t = begin + i / s.channels, channel = i % s.channels;
    float value = 0;
    if (s.conv > 0) {
      value = convolve(s, in, t, channel);
      value *= sigmoid(value);
    } else {
      value = to_float(load(input_row(s, in, t) + s.hidden + channel));
    }
    store(m.active + static_cast<std::int64_t>(t) * s.channels + channel, value);
  }
  for (int i = thread_index(); i < rows * s.heads; i += kThreads) {
    const int t = begin + i / s.heads, head = i % s.heads;
    store(m.delta + static_cast<std::int64_t>(t) * s.heads + head, softplus(input_step(s, in, t, s.heads, head)));
  }
}

/// Block (tile, head): what the tile adds to the state [N, E/Hs] of the chunk that leaves it, and its decay, into the next
/// tile's slot.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
tile_state(Sizes s, Inputs<T> in, Memory m) {
  const int tile = block_x(), head = block_y(), group = head / (s.heads / s.groups);
  SharedMemory shared;
  const Steps steps = make_steps(s, in, tile, shared);
  if (!steps.leaves()) {
    return;
  }
  load_head(s, m.delta, in.a_log, head, steps);
  const int first = steps.leaving > 0 ? steps.leaving : 0;
  float* state = head_state(s, m.states, tile + 1, head);
  for (int i = thread_index(); i < s.state * s.head; i += kThreads) {
    float sum = 0;
    for (int t = first; t < steps.rows; ++t) {
      sum += load(steps.exit + t) * load(steps.delta + t) *
             load(tile_row(m.active, steps, t, s.channels, s.b_column(group) + i / s.head)) *
             load(tile_row(m.active, steps, t, s.channels, head * s.head + i % s.head));
    }
    store(state + i, sum);
  }
  if (thread_index() == 0) {
    store(m.decays + (tile + 1) * s.heads + head, steps.passes() ? load(steps.entry + kTile - 1) : 0.0f);
  }
}

/// Slots hold what the tile before them adds; one thread per element of the state sums along each chunk.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
sum_states(Sizes s, Inputs<T> in, Memory m) {
  const int i = block_x() * kThreads + thread_index(), head = i / (s.state * s.head);
  if (i >= s.state_size()) {
    return;
  }
  float state = 0;
  for (int first = 1; first < s.tiles(); first += kAhead) {
    float added[kAhead], decay[kAhead];
    bool enters[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      enters[a] = enters_tile(s, in, first + a);
      added[a] = enters[a] ? load(state_element(s, m.states, first + a, i)) : 0.0f;
      decay[a] = enters[a] ? load(m.decays + (first + a) * s.heads + head) : 0.0f;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (enters[a]) {
        state = added[a] + decay[a] * state;
        store(state_element(s, m.states, first + a, i), state);
      }
    }
  }
}

/// Block (tile, head): Y = M X + entry o (C S), M[t, s] = (C_t . B_s) delta_s between[t, s] + [s = t] D.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
mix(Sizes s, Inputs<T> in, Memory m) {
  const int tile = block_x(), head = block_y(), group = head / (s.heads / s.groups);
  SharedMemory shared;
  const Steps steps = make_steps(s, in, tile, shared);
  load_head(s, m.delta, in.a_log, head, steps);
  for (int i = thread_index(); i < kTile * kTile; i += kThreads) {
    const int t = i / kTile, from = i % kTile;
    float* between = steps.between + t * kStride + from;
    if (from > t || t >= steps.rows || load(steps.start + t) > from) {
      continue;  // 0 already
    }
    const float score = dot(tile_row(m.active, steps, t, s.channels, s.c_column(group)), 1,
                            tile_row(m.active, steps, from, s.channels, s.b_column(group)), 1, s.state);
    store(between, score * load(between) * load(steps.delta + from) + (from == t ? load(in.d_skip + head) : 0.0f));
  }
  sync_block();
  const bool enters = steps.enters();
  for (int i = thread_index(); i < steps.rows * s.head; i += kThreads) {
    const int t = i / s.head, p = i % s.head, start = load(steps.start + t);
    float sum = 0;
    for (int from = start > 0 ? start : 0; from <= t; ++from) {
      sum += load(steps.between + t * kStride + from) * load(tile_row(m.active, steps, from, s.channels, head * s.head + p));
    }
    if (enters && start < 0) {
      sum += load(steps.entry + t) * dot(tile_row(m.active, steps, t, s.channels, s.c_column(group)), 1,
                                         head_state(s, m.states, tile, head) + p, s.head, s.state);
    }
    store(tile_row(m.y, steps, t, s.hidden, head * s.head + p), sum);
  }
}

/// out = RMSNorm(Y silu(z)), a block per row.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
gate_and_norm(Sizes s, Inputs<T> in, Memory m, T* out) {
  SharedMemory shared;
  auto* sums = shared.take<float>(kThreads / kWarp);
  const int t = block_x();
  const std::int64_t row = static_cast<std::int64_t>(t) * s.hidden;
  const auto gated = [&](int column) {
    const float z = to_float(load(input_row(s, in, t) + column));
    return load(m.y + row + column) * z * sigmoid(z);
  };
  float squares = 0;
  for (int column = thread_index(); column < s.hidden; column += kThreads) {
    const float u = gated(column);
    squares += u * u;
  }
  const float scale = rsqrt(block_sum(squares, sums) / static_cast<float>(s.hidden) + s.eps);
  for (int column = thread_index(); column < s.hidden; column += kThreads) {
    store(out + row + column, from_float<T>(gated(column) * scale * load(in.norm + column)));
  }
}

constexpr int kReduceWarps = 16;

ATTAMBA_KERNEL(kReduceWarps* kWarp, 2) sum_partials(Sizes s, const float* partials, WeightGradients gradients, int count) {
  int i = block_x() * kWarp + lane_index();
  const float sum =
      column_sum<kReduceWarps>(partials, count, s.partial_size(), i, SharedMemory().take<float>(kReduceWarps * kWarp));
  if (warp_index() != 0) {
    return;
  }
  // One piece after another: an array of pointers, indexed by a number, would lie in local memory.
  float* to = nullptr;
  const auto piece = [&](float* gradient, int size) {
    if (i >= 0 && i < size && gradient != nullptr) {
      to = gradient + i;
    }
    i -= size;
  };
  piece(gradients.conv, s.channels * s.conv);
  piece(gradients.norm, s.hidden);
  piece(gradients.a_log, s.heads);
  piece(gradients.d_skip, s.heads);
  piece(gradients.dt_bias, s.heads);
  if (to != nullptr) {
    store(to, load(to) + sum);
  }
}

}  // namespace

Sizes make_sizes(const ScanShape& shape, double eps, std::int64_t rows) {
  Sizes s{};
  s.hidden = static_cast<int>(shape.hidden);
  s.state = static_cast<int>(shape.state);
  s.heads = static_cast<int>(shape.heads);
  s.groups = static_cast<int>(shape.groups);
  s.conv = static_cast<int>(shape.conv);
  s.head = s.hidden / s.heads;
  s.channels = s.hidden + 2 * s.groups * s.state;
  s.projection = static_cast<int>(shape.projection());
  s.eps = static_cast<float>(eps);
  s.rows = static_cast<int>(rows);
  return s;
}

std::int64_t window_rows(const ScanShape& shape, std::int64_t rows, std::int64_t sequence_length) {
  constexpr std::int64_t kWantedBlocks = 256, kFewest = 4096;
  const std::int64_t wanted = std::max(kFewest, kWantedBlocks * kTile / shape.groups);
  return std::min(rows, std::max<std::int64_t>(1, wanted / sequence_length) * sequence_length);
}

std::size_t plain_workspace(const ScanShape& shape, std::int64_t rows, std::int64_t sequence_length, bool backward) {
  const Sizes s = make_sizes(shape, 0, window_rows(shape, rows, sequence_length));
  std::size_t bytes = 0;
  make_memory(s, backward, [&](std::size_t count) {
    bytes += ScratchAllocator::aligned_bytes<float>(count);
    return nullptr;
  });
  return bytes;
}

template <class T>
void plain_mix(const Launch& launch, const Sizes& s, const Inputs<T>& in, const Memory& memory) {
  constexpr std::size_t kShared = kStepsBytes + kMatrixBytes;
  const Grid strips{.x = (s.rows + kStrip - 1) / kStrip, .threads = kThreads};
  const Grid heads{.x = s.tiles(), .y = s.heads, .threads = kThreads, .shared_bytes = kShared};
  launch_kernel("chunk_scan activate", activate<T>, launch, strips, s, in, memory);
  if (s.tiles() > 1) {
    const Grid states{.x = (s.state_size() + kThreads - 1) / kThreads, .threads = kThreads};
    launch_kernel("chunk_scan tile_state", tile_state<T>, launch, heads, s, in, memory);
    launch_kernel("chunk_scan sum_states", sum_states<T>, launch, states, s, in, memory);
  }
  launch_kernel("chunk_scan mix", mix<T>, launch, heads, s, in, memory);
}

template <class T>
void plain_forward(const Launch& launch, T* out, const Sizes& s, const Inputs<T>& in, const Memory& memory) {
  plain_mix(launch, s, in, memory);
  const Grid rows{.x = s.rows, .threads = kThreads, .shared_bytes = SharedMemory::bytes_of<float>(kThreads / kWarp)};
  launch_kernel("chunk_scan gate_and_norm", gate_and_norm<T>, launch, rows, s, in, memory, out);
}

void add_partials(const Launch& launch, const WeightGradients& gradients, const Sizes& s, const float* partials,
                  std::int64_t count) {
  const Grid grid{.x = (s.partial_size() + kWarp - 1) / kWarp,
                  .threads = kReduceWarps * kWarp,
                  .shared_bytes = SharedMemory::bytes_of<float>(kReduceWarps * kWarp)};
  launch_kernel("chunk_scan sum_partials", sum_partials, launch, grid, s, partials, gradients, static_cast<int>(count));
}

template void plain_mix(const Launch&, const Sizes&, const Inputs<float>&, const Memory&);
template void plain_mix(const Launch&, const Sizes&, const Inputs<bf16>&, const Memory&);
template void plain_forward(const Launch&, float*, const Sizes&, const Inputs<float>&, const Memory&);
template void plain_forward(const Launch&, bf16*, const Sizes&, const Inputs<bf16>&, const Memory&);

}  // namespace attamba::kernels::cuda::scan
