// Backward half of chunk_scan_plain.h; the equations are those of kernels/cpu/chunk_scan_backward.cpp.
#include "kernels/cuda/chunk_scan_plain.h"
#include "kernels/cuda/launch_kernel.h"

namespace attamba::kernels::cuda::scan {
namespace {

using namespace device;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kStrip = 16;

ATTAMBA_DEVICE float* tile_partial(const Sizes& s, const Memory& m, int tile) {
  return m.partials + static_cast<std::int64_t>(tile) * s.partial_size();
}

/// Block per tile: with u = Y silu(z), r = 1 / rms(u), v = dout w: du = r v - u r^3 mean(u v); dY, dz and the norm's partial.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
gate_and_norm_backward(Sizes s, Inputs<T> in, Memory m, const T* dout, T* dzxbcdt) {
  SharedMemory shared;
  auto* sums = shared.take<float>(kWarps);
  auto* dnorm = shared.take<float>(s.hidden);  // each thread its own columns
  for (int c = thread_index(); c < s.hidden; c += kThreads) {
    store(dnorm + c, 0.0f);
  }
  const int begin = block_x() * kTile, end = s.rows - begin < kTile ? s.rows : begin + kTile;
  for (int t = begin; t < end; ++t) {
    const std::int64_t row = static_cast<std::int64_t>(t) * s.hidden;
    const T* z = input_row(s, in, t);
    float squares = 0, dots = 0;
    for (int c = thread_index(); c < s.hidden; c += kThreads) {
      const float gate = to_float(load(z + c)), u = load(m.y + row + c) * gate * sigmoid(gate);
      squares += u * u;
      dots += u * load(in.norm + c) * to_float(load(dout + row + c));
    }
    squares = block_sum(squares, sums);
    dots = block_sum(dots, sums);
    const float mean = squares / static_cast<float>(s.hidden) + s.eps, scale = rsqrt(mean);
    const float pull = scale / mean * dots / static_cast<float>(s.hidden);
    for (int c = thread_index(); c < s.hidden; c += kThreads) {
      const float gate = to_float(load(z + c)), y = load(m.y + row + c), d = to_float(load(dout + row + c));
      const float open = gate * sigmoid(gate), u = y * open, du = scale * load(in.norm + c) * d - u * pull;
      store(dnorm + c, load(dnorm + c) + d * u * scale);
      store(m.dy + row + c, du * open);
      store(dzxbcdt + static_cast<std::int64_t>(t) * s.projection + c, from_float<T>(du * y * silu_slope(gate)));
    }
  }
  for (int c = thread_index(); c < s.hidden; c += kThreads) {
    store(tile_partial(s, m, block_x()) + s.channels * s.conv + c, load(dnorm + c));
  }
}

/// Block (tile, head): what the tile adds to the gradient of its entry state, sum_t entry_t C_t (x) dY_t.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
entry_gradient(Sizes s, Inputs<T> in, Memory m) {
  const int tile = block_x(), head = block_y(), group = head / (s.heads / s.groups);
  SharedMemory shared;
  const Steps steps = make_steps(s, in, tile, shared);
  if (!steps.enters()) {
    return;
  }
  load_head(s, m.delta, in.a_log, head, steps);
  float* gradient = head_state(s, m.dstates, tile, head);
  for (int i = thread_index(); i < s.state * s.head; i += kThreads) {
    float sum = 0;
    for (int t = 0; t < steps.rows && load(steps.start + t) < 0; ++t) {
      sum += load(steps.entry + t) * load(tile_row(m.active, steps, t, s.channels, s.c_column(group) + i / s.head)) *
             load(tile_row(m.dy, steps, t, s.hidden, head * s.head + i % s.head));
    }
    store(gradient + i, sum);
  }
}

/// Sums the gradients of entry states along each chunk, from its end.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
sum_state_gradients(Sizes s, Inputs<T> in, Memory m) {
  const int i = block_x() * kThreads + thread_index(), head = i / (s.state * s.head);
  if (i >= s.state_size()) {
    return;
  }
  float gradient = 0, decay = 0;
  for (int last = s.tiles() - 1; last > 0; last -= kAhead) {
    float added[kAhead], decays[kAhead];
    bool enters[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      enters[a] = enters_tile(s, in, last - a);
      added[a] = enters[a] ? load(state_element(s, m.dstates, last - a, i)) : 0.0f;
      decays[a] = enters[a] ? load(m.decays + (last - a) * s.heads + head) : 0.0f;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      gradient = added[a] + decay * gradient;
      decay = decays[a];
      if (enters[a]) {
        store(state_element(s, m.dstates, last - a, i), gradient);
      }
    }
  }
}

/// Shared memory of scan_gradient.
struct Pairs {
  float *scores, *dscores, *dmixing;  ///< [kTile, kStride]; dmixing becomes dM o between o scores
  float *dlog, *ddelta, *terms;       ///< [kTile]; terms of dl from the exit state
  float* skip;                        ///< [kTile], dM[t, t]
  float* sums;                        ///< one per warp
};
constexpr std::size_t kPairsBytes =
    3 * kMatrixBytes + 4 * SharedMemory::bytes_of<float>(kTile) + SharedMemory::bytes_of<float>(kWarps);

/// Rows by warps: dM = dY X^T and what follows from it for scores, row sums and the diagonal.
template <class T>
ATTAMBA_DEVICE void pair_gradient(const Sizes& s, const Memory& m, int head, const Steps& steps, const Pairs& pairs) {
  for (int t = warp_index(); t < kTile; t += kWarps) {
    float row_sum = 0;
    for (int from = lane_index(); from < kTile; from += kWarp) {
      const int at = t * kStride + from;
      float pair = 0;
      if (from <= t && t < steps.rows && load(steps.start + t) <= from) {
        const float gradient = dot(tile_row(m.dy, steps, t, s.hidden, head * s.head), 1,
                                   tile_row(m.active, steps, from, s.channels, head * s.head), 1, s.head);
        const float weighted = gradient * load(steps.between + at), delta = load(steps.delta + from);
        store(pairs.dscores + at, load(pairs.dscores + at) + weighted * delta);
        pair = weighted * load(pairs.scores + at);
        if (from == t) {
          store(pairs.skip + t, gradient);
        } else {
          row_sum += pair * delta;
        }
      } else if (from == t) {
        store(pairs.skip + t, 0.0f);
      }
      store(pairs.dmixing + at, pair);
    }
    row_sum = warp_sum(row_sum);
    if (lane_index() == 0) {
      store(pairs.dlog + t, row_sum);
      store(pairs.terms + t, 0.0f);
    }
  }
  sync_block();
  const int from = thread_index();
  if (from < kTile) {
    float sum = 0;
    for (int t = from + 1; t < kTile; ++t) {
      sum += load(pairs.dmixing + t * kStride + from);
    }
    store(pairs.dlog + from, load(pairs.dlog + from) - sum * load(steps.delta + from));
    store(pairs.ddelta + from, sum + load(pairs.dmixing + from * kStride + from));
  }
}

/// dX = M^T dY + exit delta (dS' B).
template <class T>
ATTAMBA_DEVICE void x_gradient(const Sizes& s, const Inputs<T>& in, const Memory& m, int tile, int head, const Steps& steps,
                               const Pairs& pairs) {
  const int group = head / (s.heads / s.groups);
  const float skip = load(in.d_skip + head);
  for (int i = thread_index(); i < steps.rows * s.head; i += kThreads) {
    const int from = i / s.head, p = i % s.head;
    float sum = 0;
    for (int t = from; t < steps.rows && load(steps.start + t) <= from; ++t) {
      sum += load(pairs.scores + t * kStride + from) * load(steps.between + t * kStride + from) *
             load(tile_row(m.dy, steps, t, s.hidden, head * s.head + p));
    }
    if (from >= steps.leaving) {
      sum += load(steps.exit + from) * dot(tile_row(m.active, steps, from, s.channels, s.b_column(group)), 1,
                                           head_state(s, m.dstates, tile + 1, head) + p, s.head, s.state);
    }
    sum = sum * load(steps.delta + from) + skip * load(tile_row(m.dy, steps, from, s.hidden, head * s.head + p));
    store(tile_row(m.dactive, steps, from, s.channels, head * s.head + p), sum);
  }
}

/// Rows [begin, end) by warps, `column` being B's or C's: with v_t = state vector_t, state [N, E/Hs], adds weight(t) v_t to
/// dactive and calls done(t, active_t . v_t).
template <class Weight, class Done>
ATTAMBA_DEVICE void state_terms(const Sizes& s, const Memory& m, const Steps& steps, int begin, int end, int column,
                                const float* state, const float* vectors, int width, int vector_column, const Weight& weight,
                                const Done& done) {
  for (int t = begin + warp_index(); t < end; t += kWarps) {
    const float* vector = tile_row(vectors, steps, t, width, vector_column);
    float sum = 0;
    for (int n = lane_index(); n < s.state; n += kWarp) {
      const float value = dot(state + static_cast<std::int64_t>(n) * s.head, 1, vector, 1, s.head);
      float* to = tile_row(m.dactive, steps, t, s.channels, column + n);
      store(to, load(to) + weight(t) * value);
      sum += value * load(tile_row(m.active, steps, t, s.channels, column + n));
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) {
      done(t, sum);
    }
  }
}

/// Sum over the rows of t's chunk from t on, t being `part`'s row of the lane; `rest` what follows the part's last row.
ATTAMBA_DEVICE float chunk_suffix(const Steps& steps, const float* values, int t, float rest) {
  const int lane = lane_index(), next = t - lane + kWarp;
  const auto goes_on = [&](int row) { return row < steps.rows && load(steps.start + row) <= t; };
  float sum = t < steps.rows ? load(values + t) : 0.0f;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float later = shuffle_down(sum, step);
    sum += lane + step < kWarp && goes_on(t + step) ? later : 0.0f;
  }
  return sum + (goes_on(next) ? rest : 0.0f);
}

/// Sum over the rows before t, of which `before` are those before the lanes' first one.
ATTAMBA_DEVICE float prefix(float value, float before) {
  const int lane = lane_index();
  float sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float earlier = shuffle_up(sum, step);
    sum += lane >= step ? earlier : 0.0f;
  }
  const float own = shuffle_up(sum, 1);
  return before + (lane > 0 ? own : 0.0f);
}

/// One warp: from d delta and the terms of dl to ddt and the head's partial gradients.
template <class T>
ATTAMBA_DEVICE void step_gradient(const Sizes& s, const Inputs<T>& in, int head, float whole, const Steps& steps,
                                  const Pairs& pairs, T* dzxbcdt, float* partial) {
  constexpr int kParts = kTile / kWarp;
  const int lane = lane_index();
  float later[kParts];
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) {
    const float rest = part + 1 < kParts ? shuffle(later[part + 1 < kParts ? part + 1 : part], 0) : 0.0f;
    later[part] = chunk_suffix(steps, pairs.dlog, part * kWarp + lane, rest);
  }
  const float rate = -exp(load(in.a_log + head));
  float before = 0, skip = 0, rate_sum = 0, bias_sum = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int t = part * kWarp + lane;
    const bool valid = t < steps.rows;
    const float term = valid ? load(pairs.terms + t) : 0.0f, earlier = prefix(term, before);
    before = shuffle(earlier + term, kWarp - 1);
    if (valid) {
      const float dlog = later[part] + (load(steps.start + t) < 0 ? whole : 0.0f) + earlier;
      const float ddt = (load(pairs.ddelta + t) + rate * dlog) * sigmoid(input_step(s, in, steps.begin + t, s.heads, head));
      store(dzxbcdt + static_cast<std::int64_t>(steps.begin + t) * s.projection + s.projection - s.heads + head,
            from_float<T>(ddt));
      skip += load(pairs.skip + t);
      rate_sum += load(steps.delta + t) * dlog;
      bias_sum += ddt;
    }
  }
  skip = warp_sum(skip);
  rate_sum = warp_sum(rate_sum);
  bias_sum = warp_sum(bias_sum);
  if (lane == 0) {
    store(partial, rate * rate_sum);
    store(partial + s.heads, skip);
    store(partial + 2 * s.heads, bias_sum);
  }
}

/// Block (tile, group): dactive of the group's heads, B and C, ddt, and the partial gradients of the group's heads.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
scan_gradient(Sizes s, Inputs<T> in, Memory m, T* dzxbcdt) {
  const int tile = block_x(), group = block_y(), heads = s.heads / s.groups;
  const int b = s.b_column(group), c = s.c_column(group);
  SharedMemory shared;
  const Steps steps = make_steps(s, in, tile, shared);
  Pairs pairs{};
  for (float** piece : {&pairs.scores, &pairs.dscores, &pairs.dmixing}) {
    *piece = shared.take<float>(kTile * kStride);
  }
  for (float** piece : {&pairs.dlog, &pairs.ddelta, &pairs.terms, &pairs.skip}) {
    *piece = shared.take<float>(kTile);
  }
  pairs.sums = shared.take<float>(kWarps);
  for (int i = thread_index(); i < kTile * kTile; i += kThreads) {
    const int t = i / kTile, from = i % kTile;
    const bool pair = from <= t && t < steps.rows && load(steps.start + t) <= from;
    store(pairs.dscores + t * kStride + from, 0.0f);
    store(pairs.scores + t * kStride + from,
          pair ? dot(tile_row(m.active, steps, t, s.channels, c), 1, tile_row(m.active, steps, from, s.channels, b), 1, s.state)
               : 0.0f);
  }
  for (int t = warp_index(); t < steps.rows; t += kWarps) {
    for (int n = lane_index(); n < s.state; n += kWarp) {
      store(tile_row(m.dactive, steps, t, s.channels, b + n), 0.0f);
      store(tile_row(m.dactive, steps, t, s.channels, c + n), 0.0f);
    }
  }
  const bool enters = steps.enters(), passes = steps.passes();
  for (int head = group * heads; head < (group + 1) * heads; ++head) {
    const float* entry = head_state(s, m.states, tile, head);
    const float* exit = head_state(s, m.dstates, tile + 1, head);
    load_head(s, m.delta, in.a_log, head, steps);
    pair_gradient<T>(s, m, head, steps, pairs);
    x_gradient(s, in, m, tile, head, steps, pairs);
    sync_block();
    if (enters) {
      int end = 0;
      while (end < steps.rows && load(steps.start + end) < 0) {
        ++end;
      }
      state_terms(
          s, m, steps, 0, end, c, entry, m.dy, s.hidden, head * s.head, [&](int t) { return load(steps.entry + t); },
          [&](int t, float sum) { store(pairs.dlog + t, load(pairs.dlog + t) + load(steps.entry + t) * sum); });
    }
    if (steps.leaves()) {
      const auto weight = [&](int t) { return load(steps.exit + t) * load(steps.delta + t); };
      state_terms(s, m, steps, steps.leaving > 0 ? steps.leaving : 0, steps.rows, b, exit, m.active, s.channels, head * s.head,
                  weight, [&](int t, float sum) {
                    store(pairs.ddelta + t, load(pairs.ddelta + t) + load(steps.exit + t) * sum);
                    store(pairs.terms + t, weight(t) * sum);
                  });
    }
    float whole = 0;
    if (passes) {
      for (int i = thread_index(); i < s.state * s.head; i += kThreads) {
        whole += load(entry + i) * load(exit + i);
      }
      whole = block_sum(whole, pairs.sums) * load(steps.entry + kTile - 1);
    }
    sync_block();
    if (warp_index() == 0) {
      step_gradient(s, in, head, whole, steps, pairs, dzxbcdt,
                    tile_partial(s, m, tile) + s.channels * s.conv + s.hidden + head);
    }
  }
  for (int t = warp_index(); t < steps.rows; t += kWarps) {
    const int start = load(steps.start + t);
    for (int n = lane_index(); n < s.state; n += kWarp) {
      float *db = tile_row(m.dactive, steps, t, s.channels, b + n), *dc = tile_row(m.dactive, steps, t, s.channels, c + n);
      float b_sum = 0, c_sum = 0;
      for (int from = start > 0 ? start : 0; from <= t; ++from) {
        c_sum += load(pairs.dscores + t * kStride + from) * load(tile_row(m.active, steps, from, s.channels, b + n));
      }
      for (int later = t; later < steps.rows && load(steps.start + later) <= t; ++later) {
        b_sum += load(pairs.dscores + later * kStride + t) * load(tile_row(m.active, steps, later, s.channels, c + n));
      }
      store(db, load(db) + b_sum);
      store(dc, load(dc) + c_sum);
    }
  }
}

/// dactive becomes the gradient before SiLU.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
activate_backward(Sizes s, Inputs<T> in, Memory m) {
  const int begin = block_x() * kStrip, rows = s.rows - begin < kStrip ? s.rows - begin : kStrip;
  for (int i = thread_index(); i < rows * s.channels; i += kThreads) {
    const int t = begin + i / s.channels, channel = i % s.channels;
    float* gradient = m.dactive + static_cast<std::int64_t>(t) * s.channels + channel;
    store(gradient, load(gradient) * silu_slope(convolve(s, in, t, channel)));
  }
}

/// Block (tile, channels): dxBC and the taps' partial gradient, a thread per channel.
template <class T>
ATTAMBA_KERNEL(kThreads, 1)
convolve_backward(Sizes s, Inputs<T> in, Memory m, T* dzxbcdt) {
  const int channel = block_y() * kThreads + thread_index(), begin = block_x() * kTile;
  const int end = s.rows - begin < kTile ? s.rows : begin + kTile;
  if (channel >= s.channels) {
    return;
  }
  const auto gradient = [&](int t) { return load(m.dactive + static_cast<std::int64_t>(t) * s.channels + channel); };
  for (int t = begin; t < end; ++t) {
    float sum = s.conv > 0 ? 0.0f : gradient(t);
    for (int j = 0; j < s.conv && t + j < s.rows && chunk_start(s, in, t + j) <= t; ++j) {
      if (same_label(in, t, t + j)) {
        sum += load(in.conv + channel * s.conv + s.conv - 1 - j) * gradient(t + j);
      }
    }
    store(dzxbcdt + static_cast<std::int64_t>(t) * s.projection + s.hidden + channel, from_float<T>(sum));
  }
  for (int j = 0; j < s.conv; ++j) {
    float sum = 0;
    for (int t = begin; t < end; ++t) {
      if (t - j >= chunk_start(s, in, t) && same_label(in, t, t - j)) {
        sum += gradient(t) * to_float(load(input_row(s, in, t - j) + s.hidden + channel));
      }
    }
    store(tile_partial(s, m, block_x()) + channel * s.conv + s.conv - 1 - j, sum);
  }
}

}  // namespace

template <class T>
void plain_backward(const Launch& launch, T* dzxbcdt, const WeightGradients& gradients, const T* dout, const Sizes& s,
                    const Inputs<T>& in, const Memory& memory) {
  plain_mix(launch, s, in, memory);
  const std::size_t norm_bytes = SharedMemory::bytes_of<float>(kWarps) + SharedMemory::bytes_of<float>(s.hidden);
  launch_kernel("chunk_scan gate_and_norm_backward", gate_and_norm_backward<T>, launch,
                {.x = s.tiles(), .threads = kThreads, .shared_bytes = norm_bytes}, s, in, memory, dout, dzxbcdt);
  if (s.tiles() > 1) {
    launch_kernel("chunk_scan entry_gradient", entry_gradient<T>, launch,
                  {.x = s.tiles(), .y = s.heads, .threads = kThreads, .shared_bytes = kStepsBytes + kMatrixBytes}, s, in,
                  memory);
    launch_kernel("chunk_scan sum_state_gradients", sum_state_gradients<T>, launch,
                  {.x = (s.state_size() + kThreads - 1) / kThreads, .threads = kThreads}, s, in, memory);
  }
  launch_kernel("chunk_scan scan_gradient", scan_gradient<T>, launch,
                {.x = s.tiles(), .y = s.groups, .threads = kThreads, .shared_bytes = kStepsBytes + kMatrixBytes + kPairsBytes},
                s, in, memory, dzxbcdt);
  if (s.conv > 0) {
    launch_kernel("chunk_scan activate_backward", activate_backward<T>, launch,
                  {.x = (s.rows + kStrip - 1) / kStrip, .threads = kThreads}, s, in, memory);
  }
  launch_kernel("chunk_scan convolve_backward", convolve_backward<T>, launch,
                {.x = s.tiles(), .y = (s.channels + kThreads - 1) / kThreads, .threads = kThreads}, s, in, memory, dzxbcdt);
  add_partials(launch, gradients, s, memory.partials, s.tiles());
}

template void plain_backward(const Launch&, float*, const WeightGradients&, const float*, const Sizes&, const Inputs<float>&,
                             const Memory&);
template void plain_backward(const Launch&, bf16*, const WeightGradients&, const bf16*, const Sizes&, const Inputs<bf16>&,
                             const Memory&);

}  // namespace attamba::kernels::cuda::scan
