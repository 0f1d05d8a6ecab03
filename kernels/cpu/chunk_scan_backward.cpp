// Chunked selective scan, backward: everything is recomputed from zxbcdt, block by block. A chunk longer than a block first
// takes its entry states forwards (entry_states) and their gradients backwards; the blocks themselves are independent.
//
// With P[t, s] = dM[t, s] M[t, s] (s < t), e = entry, x = exit and the entry and exit states S, S' of a block:
//   dX = M^T dY + x delta (dS' B)           dM = dY X^T
//   dC = sum_h (dM o L) B + e (S^T dY)      dB = sum_h (dM o L)^T C + x delta (dS'^T X),    L[t, s] = delta_s exp(a_t - a_s)
//   d delta_s = sum_t dM[t, s] (C_t . B_s) exp(a_t - a_s) + x_s X_s^T dS' B_s + A dl_s
//   dl_t = sum_{t' >= t} (sum_s P[t', s] - sum_r P[r, t'] + e_t' dY_t'^T S C_t') + sum_{s < t} x_s delta_s X_s^T dS' B_s
//          + exp(a_end) <dS', S>,           l_t = A delta_t the log decay
#include "kernels/chunk_scan_checks.h"
#include "kernels/cpu/chunk_scan_block.h"
#include "kernels/cpu/chunk_scan_sums.h"

namespace attamba::kernels::cpu {
namespace {

using namespace scan;

template <class T>
struct Backward {
  using A = Accumulator<T>;

  Geometry g;
  Inputs<T> in;
  const T* dout;
  T* dzxbcdt;
  const WindowScratch<A>* window;

  const A* entry_state(const Block& block) const {
    return block.carry_in < 0 ? nullptr : window->states + block.carry_in * g.state_size();
  }
  const A* exit_gradient(const Block& block) const {
    return block.carry_out < 0 ? nullptr : window->dstates + block.carry_out * g.state_size();
  }
  T* drow(std::int64_t t) const { return dzxbcdt + t * g.projection; }

  void load(const Block& block, const BlockScratch<A>& s) const {
    load_channels<true>(g, in, block, true, s);
    load_steps<true>(g, in, block, s);
  }
  void gate_and_norm(const T* z, const A* y, const T* dout_row, T* dz, A* dy, A* dnorm) const;
  void output_gradient(const Block& block, const BlockScratch<A>& s, A* dy, const Partial<A>& partial) const;
  void entry_gradient(const Block& block, const BlockScratch<A>& s, const A* dy, A* out) const;
  void head_gradient(const Segment& seg, std::int64_t head, const A* dy, const BlockScratch<A>& s,
                     const Partial<A>& partial) const;
  A entry_terms(const Block& block, const Segment& seg, std::int64_t head, const A* dy, const BlockScratch<A>& s) const;
  void exit_terms(const Block& block, std::int64_t head, const BlockScratch<A>& s) const;
  void step_gradient(const Block& block, const Segment& seg, std::int64_t head, A whole, const BlockScratch<A>& s,
                     const Partial<A>& partial) const;
  void scan_gradient(const Block& block, const A* dy, const BlockScratch<A>& s, const Partial<A>& partial) const;
  void conv_gradient(const Block& block, const BlockScratch<A>& s, const Partial<A>& partial) const;
  void conv_weight_gradient(const Block& block, const BlockScratch<A>& s, const Partial<A>& partial) const;
  void write_inputs(std::int64_t t, const A* dactive, std::int64_t taps) const;
  void conv_edge(std::int64_t slot) const;
};

/// One row of out = RMSNorm(y silu(z)): with u = y silu(z), r = 1 / rms(u), v = dout w: du = r v - u r^3 mean(u v).
template <class T>
void Backward<T>::gate_and_norm(const T* z, const A* y, const T* dout_row, T* dz, A* dy, A* dnorm) const {
  A squares = 0, dots = 0;
  for_hidden(g, [&](std::int64_t column, std::int64_t padded, std::int64_t count) {
    A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (std::int64_t c = 0; c < count; ++c) {
      const A zc = convert<A>(z[column + c]), open = sigmoid(zc);
      const A u = y[padded + c] * zc * open;
      dy[padded + c] = open;  // kept for the second pass
      sum += u * u;
      dot += u * in.norm[padded + c] * convert<A>(dout_row[column + c]);
    }
    squares += sum;
    dots += dot;
  });
  const A mean = squares / static_cast<A>(g.hidden) + in.eps;
  const A scale = A(1) / std::sqrt(mean);
  const A pull = scale / mean * dots / static_cast<A>(g.hidden);
  for_hidden(g, [&](std::int64_t column, std::int64_t padded, std::int64_t count) {
    const T *gate = z + column, *gradient = dout_row + column;
    const A *value = y + padded, *weight = in.norm + padded;
    A *to = dy + padded, *dweight = dnorm + padded;
    T* dgate = dz + column;
#pragma omp simd
    for (std::int64_t c = 0; c < count; ++c) {
      const A zc = convert<A>(gate[c]), yc = value[c], d = convert<A>(gradient[c]);
      const A s = to[c], open = zc * s, u = yc * open;
      const A du = scale * weight[c] * d - u * pull;
      dweight[c] += d * u * scale;
      to[c] = du * open;
      dgate[c] = convert<T>(du * yc * (s * (A(1) + zc * (A(1) - s))));
    }
  });
}

/// Writes dz and dy [rows, x_columns] of a loaded block.
template <class T>
void Backward<T>::output_gradient(const Block& block, const BlockScratch<A>& s, A* dy, const Partial<A>& partial) const {
  mix_block(g, in, block, entry_state(block), s);
  const std::int64_t rows = block.end - block.begin;
  if (g.head != g.head_pad) {
    std::fill_n(dy, rows * g.x_columns, A(0));
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t t = block.begin + i;
    gate_and_norm(in.row(g, t), s.y + i * g.x_columns, dout + t * g.hidden, drow(t), dy + i * g.x_columns, partial.norm);
  }
}

/// out [Hs, N, head_pad] = sum_t e_t C_t (x) dY_t over the rows of the chunk that enters the block.
template <class T>
void Backward<T>::entry_gradient(const Block& block, const BlockScratch<A>& s, const A* dy, A* out) const {
  std::int64_t rows = 1;
  while (block.begin + rows < block.end && in.starts[block.begin + rows] < block.begin) {
    ++rows;
  }
  for (std::int64_t h = 0; h < g.heads; ++h) {
    scale_rows(rows, g.head_pad, s.entry + h * g.block_pad, dy + h * g.head_pad, g.x_columns, s.scaled);
    const Strided<A> c{s.active + g.c_column(h / g.heads_per_group()), 1, g.columns};
    product(g.state, g.head_pad, rows, c, s.scaled, g.head_pad, out + h * g.state * g.head_pad, g.head_pad, false);
  }
}

/// Inside a segment: dX of the head, its part of dscores, and into row_sums d delta (direct) and the terms of dl.
template <class T>
void Backward<T>::head_gradient(const Segment& seg, std::int64_t head, const A* dy, const BlockScratch<A>& s,
                                const Partial<A>& partial) const {
  const std::int64_t n = seg.padded, m = seg.rows;
  const A* x = s.active + seg.first * g.columns + head * g.head_pad;
  const A* dy_head = dy + seg.first * g.x_columns + head * g.head_pad;
  mix_matrix(g, seg, head, in.d_skip[head], s);
  transpose(m, g.head_pad, x, g.columns, s.transposed, n);
  product_to_lower(m, g.head, Strided<A>{dy_head, g.x_columns, 1}, s.transposed, n, s.dmixing, n);
  const A* delta = s.delta + head * g.block_pad + seg.first;
  A* ddelta = s.ddelta + head * g.block_pad + seg.first;
  A *dlog = s.row_sums, *column_sums = s.row_sums + g.block_pad;
  std::fill_n(column_sums, n, A(0));
  A skip = 0;
  for (std::int64_t t = 0; t < m; ++t) {
    const A *strict = s.strict + t * n, *scores = s.scores + t * n, *dmixing = s.dmixing + t * n;
    A* dscores = s.dscores + t * n;
    const std::int64_t columns = lower_columns<A>(t);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < columns; ++j) {
      const A weighted = dmixing[j] * strict[j];
      dscores[j] += weighted * delta[j];
      column_sums[j] += weighted * scores[j];
      sum += weighted * scores[j] * delta[j];
    }
    dlog[t] = sum;
    dscores[t] += dmixing[t] * delta[t];
    ddelta[t] = dmixing[t] * scores[t];
    skip += dmixing[t];
  }
  partial.d_skip[head] += skip;
#pragma omp simd
  for (std::int64_t t = 0; t < m; ++t) {
    ddelta[t] += column_sums[t];
    dlog[t] -= column_sums[t] * delta[t];
  }
  product_upper(m, g.head_pad, Strided<A>{s.mixing, 1, n}, dy_head, g.x_columns,
                s.dactive + seg.first * g.columns + head * g.head_pad, g.columns, false);
}

/// What the entry state adds to dC and to the terms of dl. Returns exp(a_end) <dS', S>, where the block hands a state on.
template <class T>
auto Backward<T>::entry_terms(const Block& block, const Segment& seg, std::int64_t head, const A* dy,
                              const BlockScratch<A>& s) const -> A {
  const std::int64_t group = head / g.heads_per_group(), size = g.state * g.head_pad;
  const std::int64_t width = round_up(g.state, kLanes<A>);
  const A* state = entry_state(block) + head * size;
  const A* entry = s.entry + head * g.block_pad;
  transpose(g.state, g.head_pad, state, g.head_pad, s.state_transposed, width);
  product(seg.rows, width, g.head, Strided<A>{dy + head * g.head_pad, g.x_columns, 1}, s.state_transposed, width, s.scaled,
          width, false);
  for (std::int64_t t = 0; t < seg.rows; ++t) {
    const A *from = s.scaled + t * width, *c = s.active + t * g.columns + g.c_column(group), e = entry[t];
    A* dc = s.dactive + t * g.columns + g.c_column(group);
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (std::int64_t j = 0; j < g.state; ++j) {
      dc[j] += e * from[j];
      dot += c[j] * from[j];
    }
    s.row_sums[t] += e * dot;
  }
  if (block.carry_out < 0) {
    return A(0);
  }
  const A* gradient = exit_gradient(block) + head * size;
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (std::int64_t j = 0; j < size; ++j) {
    dot += gradient[j] * state[j];
  }
  return entry[seg.rows - 1] * dot;
}

/// What the gradient of the exit state adds to dX, dB and d delta; row_sums[2] gets the terms x_s delta_s X_s^T dS' B_s of dl.
template <class T>
void Backward<T>::exit_terms(const Block& block, std::int64_t head, const BlockScratch<A>& s) const {
  const std::int64_t group = head / g.heads_per_group(), rows = block.end - block.begin;
  const std::int64_t width = round_up(g.state, kLanes<A>);
  const A* gradient = exit_gradient(block) + head * g.state * g.head_pad;
  const A *exit = s.exit + head * g.block_pad, *delta = s.delta + head * g.block_pad;
  A *weight = s.row_sums + g.block_pad, *terms = s.row_sums + 2 * g.block_pad;
  for (std::int64_t t = 0; t < rows; ++t) {
    weight[t] = exit[t] * delta[t];
  }
  scale_rows(rows, g.state_pad, weight, s.active + g.b_column(group), g.columns, s.scaled);
  product(rows, g.head_pad, g.state, Strided<A>{s.scaled, g.state_pad, 1}, gradient, g.head_pad, s.dactive + head * g.head_pad,
          g.columns, true);
  transpose(g.state, g.head_pad, gradient, g.head_pad, s.state_transposed, width);
  product(rows, width, g.head, Strided<A>{s.active + head * g.head_pad, g.columns, 1}, s.state_transposed, width, s.scaled,
          width, false);
  for (std::int64_t t = 0; t < rows; ++t) {
    const A *from = s.scaled + t * width, *b = s.active + t * g.columns + g.b_column(group), w = weight[t];
    A* db = s.dactive + t * g.columns + g.b_column(group);
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (std::int64_t j = 0; j < g.state; ++j) {
      db[j] += w * from[j];
      dot += b[j] * from[j];
    }
    s.ddelta[head * g.block_pad + t] += exit[t] * dot;
    terms[t] = w * dot;
  }
}

/// From d delta and the terms of dl to ddt, dA_log and ddt_bias of one head.
template <class T>
void Backward<T>::step_gradient(const Block& block, const Segment& seg, std::int64_t head, A whole, const BlockScratch<A>& s,
                                const Partial<A>& partial) const {
  const std::int64_t first = head * g.block_pad + seg.first, column = g.projection - g.heads;
  A *dlog = s.row_sums, *terms = s.row_sums + 2 * g.block_pad;
  A later = 0;
  for (std::int64_t t = seg.rows - 1; t >= 0; --t) {
    later += dlog[t];
    dlog[t] = later + whole;
  }
  if (block.carry_out >= 0) {
    A before = 0;
    for (std::int64_t t = 0; t < seg.rows; ++t) {
      dlog[t] += before;
      before += terms[t];
    }
  }
  const A rate = in.rate[head];
  A rate_sum = 0, bias_sum = 0;
  for (std::int64_t t = 0; t < seg.rows; ++t) {
    const A ddt = (s.ddelta[first + t] + rate * dlog[t]) * s.sigma[first + t];
    rate_sum += s.delta[first + t] * dlog[t];
    bias_sum += ddt;
    drow(block.begin + seg.first + t)[column + head] = convert<T>(ddt);
  }
  partial.a_log[head] += rate * rate_sum;
  partial.dt_bias[head] += bias_sum;
}

/// dactive = gradient of the channels after the convolution, and everything of dt.
template <class T>
void Backward<T>::scan_gradient(const Block& block, const A* dy, const BlockScratch<A>& s, const Partial<A>& partial) const {
  for (std::int64_t i = 0; i < block.end - block.begin; ++i) {
    std::fill_n(s.dactive + i * g.columns + g.x_columns, g.columns - g.x_columns, A(0));
  }
  for_segments<A>(block, in.starts, [&](const Segment& seg) {
    const std::int64_t n = seg.padded;
    for (std::int64_t group = 0; group < g.groups; ++group) {
      score(g, seg, group, s);
      std::fill_n(s.dscores, seg.rows * n, A(0));
      for (std::int64_t h = group * g.heads_per_group(); h < (group + 1) * g.heads_per_group(); ++h) {
        head_gradient(seg, h, dy, s, partial);
        const A whole = seg.first == 0 && block.carry_in >= 0 ? entry_terms(block, seg, h, dy, s) : A(0);
        if (block.carry_out >= 0) {
          exit_terms(block, h, s);
        }
        step_gradient(block, seg, h, whole, s, partial);
      }
      const std::int64_t first = seg.first * g.columns, b = first + g.b_column(group), c = first + g.c_column(group);
      product_lower(seg.rows, g.state_pad, Strided<A>{s.dscores, n, 1}, s.active + b, g.columns, s.dactive + c, g.columns,
                    true);
      product_upper(seg.rows, g.state_pad, Strided<A>{s.dscores, 1, n}, s.active + c, g.columns, s.dactive + b, g.columns,
                    true);
    }
  });
}

/// dconv [W, columns] += sum_t dactive_t x_{t-j}.
template <class T>
void Backward<T>::conv_weight_gradient(const Block& block, const BlockScratch<A>& s, const Partial<A>& partial) const {
  for (std::int64_t i = 0; i < block.end - block.begin; ++i) {
    const std::int64_t t = block.begin + i, taps = std::min<std::int64_t>(g.conv, t - in.starts[t] + 1);
    for (std::int64_t j = 0; j < taps; ++j) {
      for_channels(g, true, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
        const T* x = in.row(g, t - j) + from;
        const A* gradient = s.dactive + i * g.columns + to;
        A* weight = partial.conv + (g.conv - 1 - j) * g.columns + to;
#pragma omp simd
        for (std::int64_t c = 0; c < count; ++c) {
          weight[c] += gradient[c] * convert<A>(x[c]);
        }
      });
    }
  }
}

/// Gradient of xBC at row t from that of the convolution's result at rows t, t+1, ... (taps of them, one under the other).
template <class T>
void Backward<T>::write_inputs(std::int64_t t, const A* dactive, std::int64_t taps) const {
  for_channels(g, true, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
    T* dx = drow(t) + from;
    const A* gradient = dactive + to;
    const A* weight = in.conv + (g.conv - 1) * g.columns + to;
    const std::int64_t ld = g.columns;
    const auto sum = [&](auto fixed) {
      const std::int64_t used = fixed > 0 ? fixed : taps;
#pragma omp simd
      for (std::int64_t c = 0; c < count; ++c) {
        A value = weight[c] * gradient[c];
        for (std::int64_t j = 1; j < used; ++j) {
          value += weight[c - j * ld] * gradient[c + j * ld];
        }
        dx[c] = convert<T>(value);
      }
    };
    switch (taps) {
      case 1:
        return sum(std::integral_constant<std::int64_t, 1>());
      case 2:
        return sum(std::integral_constant<std::int64_t, 2>());
      case 3:
        return sum(std::integral_constant<std::int64_t, 3>());
      case 4:
        return sum(std::integral_constant<std::int64_t, 4>());
      default:
        return sum(std::integral_constant<std::int64_t, 0>());
    }
  });
}

/// Through SiLU and convolution to dzxbcdt. The last W-1 rows of a block that hands its chunk on are left to conv_edge, which
/// finds what it needs in `edges` [slots, 2 (W-1), columns]: these rows and the next block's first ones.
template <class T>
void Backward<T>::conv_gradient(const Block& block, const BlockScratch<A>& s, const Partial<A>& partial) const {
  const std::int64_t rows = block.end - block.begin, overlap = g.conv - 1;
  if (g.conv == 0) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for_channels(g, true, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
        T* dx = drow(block.begin + i) + from;
        const A* gradient = s.dactive + i * g.columns + to;
        for (std::int64_t c = 0; c < count; ++c) {
          dx[c] = convert<T>(gradient[c]);
        }
      });
    }
    return;
  }
#pragma omp simd
  for (std::int64_t c = 0; c < rows * g.columns; ++c) {
    s.dactive[c] *= s.slope[c];
  }
  conv_weight_gradient(block, s, partial);
  for_segments<A>(block, in.starts, [&](const Segment& seg) {
    const std::int64_t end = seg.first + seg.rows;
    for (std::int64_t i = seg.first; i < (block.carry_out >= 0 ? end - overlap : end); ++i) {
      write_inputs(block.begin + i, s.dactive + i * g.columns, std::min(g.conv, end - i));
    }
    if (seg.first == 0 && block.carry_in >= 0) {
      A* edge = window->edges + (2 * block.carry_in + 1) * overlap * g.columns;
      const std::int64_t count = std::min(overlap, seg.rows) * g.columns;
      std::copy_n(s.dactive, count, edge);
      std::fill_n(edge + count, overlap * g.columns - count, A(0));
    }
    if (block.carry_out >= 0) {
      std::copy_n(s.dactive + (rows - overlap) * g.columns, overlap * g.columns,
                  window->edges + 2 * block.carry_out * overlap * g.columns);
    }
  });
}

template <class T>
void Backward<T>::conv_edge(std::int64_t slot) const {
  const std::int64_t overlap = g.conv - 1, begin = window->blocks[window->slot_blocks[slot]].begin;
  const A* edge = window->edges + 2 * slot * overlap * g.columns;
  for (std::int64_t i = 0; i < overlap; ++i) {
    write_inputs(begin - overlap + i, edge + i * g.columns, g.conv);
  }
}

template <class T, class A = Accumulator<T>>
void backward_window(const Backward<T>& pass, const Cut& cut, const WindowLimits& limits, const Lanes<A>& lanes,
                     const ScanWeights& gradients) {
  const Geometry& g = pass.g;
  const WindowScratch<A>& window = *pass.window;
  entry_states(g, pass.in, cut, window, lanes.data(), lanes.count());
  const std::int64_t grain = (cut.blocks + limits.ranges - 1) / limits.ranges;
  const std::int64_t ranges = (cut.blocks + grain - 1) / grain, partial_size = Partial<A>::size(g);
  const auto for_blocks = [&](const auto& body) {
    for_tasks(ranges, lanes.count(), [&](std::int64_t range, std::int64_t lane) {
      const Partial<A> partial(window.partials + range * partial_size, g);
      for (std::int64_t b = range * grain; b < std::min(cut.blocks, (range + 1) * grain); ++b) {
        body(window.blocks[b], lanes[lane], partial);
      }
    });
  };
  const auto saved_dy = [&](const Block& block) { return window.dy + block.carry_in * g.block * g.x_columns; };
  std::fill_n(window.partials, ranges * partial_size, A(0));
  if (cut.slots > 0) {
    for_blocks([&](const Block& block, const BlockScratch<A>& s, const Partial<A>& partial) {
      if (block.carry_in >= 0) {
        pass.load(block, s);
        pass.output_gradient(block, s, saved_dy(block), partial);
        pass.entry_gradient(block, s, saved_dy(block), window.dstates + block.carry_in * g.state_size());
      }
    });
    sum_state_gradients(g, cut, window);
  }
  for_blocks([&](const Block& block, const BlockScratch<A>& s, const Partial<A>& partial) {
    pass.load(block, s);
    if (block.carry_in < 0) {
      pass.output_gradient(block, s, s.dy, partial);
    }
    pass.scan_gradient(block, block.carry_in < 0 ? s.dy : saved_dy(block), s, partial);
    pass.conv_gradient(block, s, partial);
  });
  if (g.conv > 1) {
    for_tasks(cut.slots, cut.slots, [&](std::int64_t slot, std::int64_t) { pass.conv_edge(slot); });
  }
  add_partials(g, gradients, window.partials, ranges);
}

template <class T>
void backward(const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients, const Tensor& dout,
              const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts, const ScanShape& shape, double eps,
              std::int64_t sequence_length) {
  using A = Accumulator<T>;
  const Geometry g = make_geometry(shape, kLanes<A>);
  const std::int64_t rows = zxbcdt.shape().rows();
  const WindowLimits limits = window_limits(g, rows, sequence_length, sizeof(A));
  Carver carver(launch.scratch.data());
  const WindowScratch<A> window(carver, g, limits, true);
  require(carver.used() <= launch.scratch.size(), "chunk_scan_backward: need ", carver.used(),
          " bytes of scratch and more, have ", launch.scratch.size());
  const Lanes<A> lanes(g, true, launch.scratch.subspan(carver.used()));
  const Backward<T> pass{g, prepare_inputs<T>(g, zxbcdt, weights, starts, eps, window), dout.as<T>(), dzxbcdt.as<T>(), &window};
  for (std::int64_t begin = 0; begin < rows; begin += limits.rows) {
    const Cut cut = cut_blocks(g, begin, std::min(rows, begin + limits.rows), sequence_length, pass.in.starts, window.blocks,
                               window.slot_blocks);
    backward_window(pass, cut, limits, lanes, gradients);
  }
}

}  // namespace

void chunk_scan_backward(const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients, const Tensor& dout,
                         const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts, const ScanShape& shape,
                         double eps, std::int64_t sequence_length) {
  constexpr const char* kName = "chunk_scan_backward";
  check_scan_input(kName, zxbcdt, starts, shape, sequence_length);
  check_scan_weights(kName, "weight", weights, shape, accumulator_of(zxbcdt.dtype()));
  check_scan_weights(kName, "gradient of", gradients, shape, accumulator_of(zxbcdt.dtype()));
  check_scan_rows(kName, "dzxbcdt", dzxbcdt, zxbcdt, shape.projection());
  check_scan_rows(kName, "dout", dout, zxbcdt, shape.hidden);
  dispatch_floating(zxbcdt.dtype(), kName, [&]<class T>() {
    backward<T>(launch, dzxbcdt, gradients, dout, zxbcdt, weights, starts, shape, eps, sequence_length);
  });
}

std::size_t chunk_scan_backward_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length) {
  return dispatch_floating(zxbcdt.dtype, "chunk_scan_backward", [&]<class T>() {
    return scan::scratch_bytes<Accumulator<T>>(shape, zxbcdt.shape.rows(), sequence_length, true);
  });
}

}  // namespace attamba::kernels::cpu
