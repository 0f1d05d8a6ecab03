// The scan for every shape: float32 arithmetic in several kernels over workspace. It serves float32, and those shapes of
// bfloat16 that the fused kernels (chunk_scan_fused.h) do not know.
//
// It also serves label_scan: then the batch is one chunk whose rows mix only where their labels are equal, and which hands on
// the state of one label at a time, that of a tile's last row.
//
// Rows are cut into fixed tiles of kTile, whatever the chunks are. Inside a tile the scan is done in its dual form; a chunk
// that goes on in the next tile hands on its state [Hs, N, E/Hs] through workspace: what each tile adds, then a sum along each
// chunk.
#pragma once

#include "kernels/device/block.h"
#include "kernels/kernels.h"

namespace attamba::kernels::cuda::scan {

constexpr int kTile = 64;
constexpr int kStride = kTile + 1;  ///< of matrices [kTile, kTile] in shared memory

/// Widths of the SSM, and the window of rows that one pass of the kernels works on: whole sequences.
struct Sizes {
  int hidden, state, heads, groups, conv;
  int head, channels, projection;  ///< E/Hs, E + 2GN, columns of zxbcdt
  float eps;
  int first, rows;  ///< the window is rows [first, first + rows) of the batch

  ATTAMBA_HOST_DEVICE int tiles() const { return (rows + kTile - 1) / kTile; }
  ATTAMBA_HOST_DEVICE int state_size() const { return hidden * state; }
  ATTAMBA_HOST_DEVICE int partial_size() const { return channels * conv + hidden + 3 * heads; }
  ATTAMBA_HOST_DEVICE int b_column(int group) const { return hidden + group * state; }
  ATTAMBA_HOST_DEVICE int c_column(int group) const { return hidden + (groups + group) * state; }
};

Sizes make_sizes(const ScanShape& shape, double eps, std::int64_t rows = 0);

/// What the kernels read; rows of the window.
template <class T>
struct Inputs {
  const T* zxbcdt;
  const std::int32_t* starts;  ///< counts from the batch's first row
  const std::int32_t* labels;  ///< null: rows of a chunk mix whatever they are
  const float *conv, *a_log, *d_skip, *dt_bias, *norm;
};

/// Where the gradients of the weights are added to; dt_bias may be null.
struct WeightGradients {
  float *conv, *a_log, *d_skip, *dt_bias, *norm;
};

/// Workspace of a window. X, B and C after the convolution; slot i of the states is the state at the entry of tile i.
struct Memory {
  float *active, *delta, *y;  ///< [rows, channels], [rows, Hs], [rows, E]
  float *states, *decays;     ///< [tiles, Hs, N, E/Hs]; [tiles, Hs], decay of the tile before where one chunk fills it, or 0
  float *dactive, *dy, *dstates, *partials;  ///< backward: ..., and [tiles, partial_size]
};

/// Memory from `take(elements)`, which returns a pointer to that many floats.
template <class Take>
Memory make_memory(const Sizes& s, bool backward, const Take& take) {
  const auto rows = static_cast<std::size_t>(s.rows), tiles = static_cast<std::size_t>(s.tiles());
  Memory m{};
  m.active = take(rows * static_cast<std::size_t>(s.channels));
  m.delta = take(rows * static_cast<std::size_t>(s.heads));
  m.y = take(rows * static_cast<std::size_t>(s.hidden));
  m.states = take(tiles * static_cast<std::size_t>(s.state_size()));
  m.decays = take(tiles * static_cast<std::size_t>(s.heads));
  if (backward) {
    m.dactive = take(rows * static_cast<std::size_t>(s.channels));
    m.dy = take(rows * static_cast<std::size_t>(s.hidden));
    m.dstates = take(tiles * static_cast<std::size_t>(s.state_size()));
    m.partials = take(tiles * static_cast<std::size_t>(s.partial_size()));
  }
  return m;
}

/// Most rows of a window of a problem with `rows` rows: whole sequences, about 4096 rows, or as many as keep a GPU busy where
/// a block takes all heads of a group.
std::int64_t window_rows(const ScanShape& shape, std::int64_t rows, std::int64_t sequence_length);
std::size_t plain_workspace(const ScanShape& shape, std::int64_t rows, std::int64_t sequence_length, bool backward);

/// Fills active, delta, y and, where chunks cross tiles, the states.
template <class T>
void plain_mix(const Launch& launch, const Sizes& s, const Inputs<T>& in, const Memory& memory);
template <class T>
void plain_forward(const Launch& launch, T* out, const Sizes& s, const Inputs<T>& in, const Memory& memory);
template <class T>
void plain_backward(const Launch& launch, T* dzxbcdt, const WeightGradients& gradients, const T* dout, const Sizes& s,
                    const Inputs<T>& in, const Memory& memory);

/// gradients += the sum of partials [count, partial_size] (conv, norm, a_log, d_skip, dt_bias), in order.
void add_partials(const Launch& launch, const WeightGradients& gradients, const Sizes& s, const float* partials,
                  std::int64_t count);

// ------------------------------------------------------------------------------------------------ numbers
ATTAMBA_DEVICE float sigmoid(float x) {
  return 1.0f / (1.0f + device::exp(-x));
}
ATTAMBA_DEVICE float softplus(float x) {
  const float size = x < 0.0f ? -x : x;
  return (x > 0.0f ? x : 0.0f) + device::log1p(device::exp(-size));
}
/// d silu(x) / dx.
ATTAMBA_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// ------------------------------------------------------------------------------------------------ rows
template <class T>
ATTAMBA_DEVICE const T* input_row(const Sizes& s, const Inputs<T>& in, int t) {
  return in.zxbcdt + static_cast<std::int64_t>(t) * s.projection;
}
/// The window's row at which row t's chunk begins.
template <class T>
ATTAMBA_DEVICE int chunk_start(const Sizes& s, const Inputs<T>& in, int t) {
  return device::load(in.starts + t) - s.first;
}
/// Whether two rows of one chunk mix.
template <class T>
ATTAMBA_DEVICE bool same_label(const Inputs<T>& in, int t, int from) {
  return in.labels == nullptr || device::load(in.labels + t) == device::load(in.labels + from);
}
/// The convolution's result at row t, before SiLU.
template <class T>
ATTAMBA_DEVICE float convolve(const Sizes& s, const Inputs<T>& in, int t, int channel) {
  const int reach = t - chunk_start(s, in, t) + 1, taps = reach < s.conv ? reach : s.conv;
  float sum = 0;
  for (int j = 0; j < taps; ++j) {
    if (!same_label(in, t, t - j)) {
      continue;
    }
    sum += device::load(in.conv + channel * s.conv + s.conv - 1 - j) *
           device::to_float(device::load(input_row(s, in, t - j) + s.hidden + channel));
  }
  return sum;
}
/// dt of one of `heads` heads, with its bias.
template <class T>
ATTAMBA_DEVICE float input_step(const Sizes& s, const Inputs<T>& in, int t, int heads, int head) {
  const float dt = device::to_float(device::load(input_row(s, in, t) + s.projection - heads + head));
  return in.dt_bias == nullptr ? dt : dt + device::load(in.dt_bias + head);
}

// ------------------------------------------------------------------------------------------------ one head along one tile
/// In shared memory; vectors [kTile]. A row is counted from the tile's first one, `begin` of the window.
struct Steps {
  int begin, rows;
  int* start;   ///< row at which a row's chunk begins; negative: before the tile
  int* label;   ///< [kTile + 1], the last one that of the row before the tile; all alike where labels do not count
  int leaving;  ///< start of the chunk that goes on in the next tile; kTile: none does
  float *delta, *decay;
  float* entry;    ///< product of the decays of rows 0..t where t's chunk and label enter the tile, else 0
  float* exit;     ///< product of those after t where t's chunk and label leave the tile, else 0
  float* between;  ///< [kTile, kStride]: product of those of (s, t] where s <= t are of one chunk and label, else 0

  ATTAMBA_DEVICE bool enters() const { return device::load(start) < 0; }
  ATTAMBA_DEVICE bool leaves() const { return leaving < kTile; }
  ATTAMBA_DEVICE bool passes() const { return enters() && leaving == device::load(start); }  ///< a chunk does
};

constexpr std::size_t kStepsBytes =
    5 * device::SharedMemory::bytes_of<float>(kTile) + device::SharedMemory::bytes_of<int>(kTile + 1);
constexpr std::size_t kMatrixBytes = device::SharedMemory::bytes_of<float>(kTile * kStride);

template <class T>
ATTAMBA_DEVICE Steps make_steps(const Sizes& s, const Inputs<T>& in, int tile, device::SharedMemory& shared) {
  Steps steps{};
  steps.begin = tile * kTile;
  steps.rows = s.rows - steps.begin < kTile ? s.rows - steps.begin : kTile;
  steps.start = shared.take<int>(kTile);
  steps.label = shared.take<int>(kTile + 1);
  for (float** piece : {&steps.delta, &steps.decay, &steps.entry, &steps.exit}) {
    *piece = shared.take<float>(kTile);
  }
  steps.between = shared.take<float>(kTile * kStride);
  const int i = device::thread_index(), next = steps.begin + kTile;
  if (i < kTile) {
    device::store(steps.start + i, i < steps.rows ? chunk_start(s, in, steps.begin + i) - steps.begin : i);
  }
  if (i <= kTile) {
    const int row = i < kTile ? steps.begin + i : steps.begin - 1;
    device::store(steps.label + i, in.labels == nullptr || row < 0 || row >= s.rows ? 0 : device::load(in.labels + row));
  }
  steps.leaving = kTile;
  if (next < s.rows && chunk_start(s, in, next) < next) {
    steps.leaving = chunk_start(s, in, next) - steps.begin;
  }
  device::sync_block();
  return steps;
}

/// Fills a head's vectors and `between`. At least 2 kTile + 1 threads.
ATTAMBA_DEVICE void load_head(const Sizes& s, const float* delta, const float* a_log, int head, const Steps& steps) {
  using device::load;
  using device::store;
  const int i = device::thread_index();
  device::sync_block();
  if (i < kTile) {
    const bool valid = i < steps.rows;
    const float d = valid ? load(delta + static_cast<std::int64_t>(steps.begin + i) * s.heads + head) : 0.0f;
    store(steps.delta + i, d);
    store(steps.decay + i, valid ? device::exp(-device::exp(load(a_log + head)) * d) : 1.0f);
  }
  device::sync_block();
  float product = 1;
  // The label that counts: the thread's own row's, the entering one, the leaving one (the last row's; only full tiles are
  // left).
  const int label = load(steps.label + (i < kTile ? i : i == kTile ? kTile : kTile - 1));
  if (i < kTile) {
    for (int t = 0; t < kTile; ++t) {
      product = t > i ? product * load(steps.decay + t) : 1.0f;
      const bool mix = t >= i && t < steps.rows && load(steps.start + t) <= i && load(steps.label + t) == label;
      store(steps.between + t * kStride + i, mix ? product : 0.0f);
    }
  } else if (i == kTile) {
    for (int t = 0; t < kTile; ++t) {
      product *= load(steps.decay + t);
      store(steps.entry + t, load(steps.start + t) < 0 && load(steps.label + t) == label ? product : 0.0f);
    }
  } else if (i == 2 * kTile) {
    for (int t = kTile - 1; t >= 0; --t) {
      store(steps.exit + t, t >= steps.leaving && load(steps.label + t) == label ? product : 0.0f);
      product *= load(steps.decay + t);
    }
  }
  device::sync_block();
}

/// Row t of the tile of an array [rows, width], from `column`.
ATTAMBA_DEVICE float* tile_row(float* from, const Steps& steps, int t, int width, int column) {
  return from + static_cast<std::int64_t>(steps.begin + t) * width + column;
}
ATTAMBA_DEVICE const float* tile_row(const float* from, const Steps& steps, int t, int width, int column) {
  return from + static_cast<std::int64_t>(steps.begin + t) * width + column;
}

/// sum_i a[i a_step] b[i b_step].
ATTAMBA_DEVICE float dot(const float* a, int a_step, const float* b, int b_step, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) {
    sum += device::load(a + static_cast<std::int64_t>(i) * a_step) * device::load(b + static_cast<std::int64_t>(i) * b_step);
  }
  return sum;
}

/// Sums along a chunk read so many tiles ahead: one at a time, each would wait for the one before.
constexpr int kAhead = 8;
/// Whether a chunk goes on in a tile of the window.
template <class T>
ATTAMBA_DEVICE bool enters_tile(const Sizes& s, const Inputs<T>& in, int tile) {
  return tile > 0 && tile < s.tiles() && chunk_start(s, in, tile * kTile) < tile * kTile;
}
/// Element i of the state at the entry of a tile.
ATTAMBA_DEVICE float* state_element(const Sizes& s, float* states, int tile, int i) {
  return states + static_cast<std::int64_t>(tile) * s.state_size() + i;
}
/// One head's state at the entry of a tile.
ATTAMBA_DEVICE float* head_state(const Sizes& s, float* states, int tile, int head) {
  return states + static_cast<std::int64_t>(tile) * s.state_size() + static_cast<std::int64_t>(head) * s.state * s.head;
}

}  // namespace attamba::kernels::cuda::scan
