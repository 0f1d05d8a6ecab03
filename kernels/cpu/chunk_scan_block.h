// The scan of one block, forward (docs/model.md), in the dual form of Mamba-2 (Dao and Gu, 2024): inside a run of rows of one
// chunk
//   Y = M X + entry o (C S_in),  M[t, s] = (C_t . B_s) delta_s exp(a_t - a_s) + [s = t] D,  s <= t,
// with exp(a_t - a_s) as a running product of decays, which neither overflows nor cancels.
#pragma once

#include <limits>

#include "kernels/cpu/chunk_scan_plan.h"

namespace attamba::kernels::cpu::scan {

template <class T>
struct Inputs {
  const T* zxbcdt;
  const std::int32_t* starts;
  const Accumulator<T>*conv, *rate, *norm;  ///< padded copies, see WindowScratch
  const Accumulator<T>*d_skip, *dt_bias;    ///< dt_bias may be null
  Accumulator<T> eps;

  const T* row(const Geometry& g, std::int64_t t) const { return zxbcdt + t * g.projection; }
};

/// A run of rows of one chunk inside a block; `first` counts from the block's begin.
struct Segment {
  std::int64_t first, rows, padded;
};

template <class A, class Body>
void for_segments(const Block& block, const std::int32_t* starts, const Body& body) {
  for (std::int64_t row = block.begin; row < block.end;) {
    const std::int64_t first = row;
    for (++row; row < block.end && starts[row] < row;) {
      ++row;
    }
    body(Segment{first - block.begin, row - first, round_up(row - first, kLanes<A>)});
  }
}

/// active = silu(sum_j w[W-1-j] x[t-j]) over `taps` rows (0: `count` of them, known at run time); with slope its derivative.
template <int Taps, bool Slope, class T, class A>
void convolve_row(const T* x, std::int64_t ldx, const A* last_tap, std::int64_t ldw, std::int64_t count, std::int64_t channels,
                  A* active, A* slope) {
  const std::int64_t taps = Taps > 0 ? Taps : count;
#pragma omp simd
  for (std::int64_t c = 0; c < channels; ++c) {
    A sum = last_tap[c] * convert<A>(x[c]);
    for (std::int64_t j = 1; j < taps; ++j) {
      sum += last_tap[c - j * ldw] * convert<A>(x[c - j * ldx]);
    }
    const A s = sigmoid(sum);
    active[c] = sum * s;
    if constexpr (Slope) {
      slope[c] = s * (A(1) + sum * (A(1) - s));
    }
  }
}

template <bool Slope, class T, class A>
void convolve(const T* x, std::int64_t ldx, const A* last_tap, std::int64_t ldw, std::int64_t taps, std::int64_t channels,
              A* active, A* slope) {
  switch (taps) {
    case 1:
      return convolve_row<1, Slope>(x, ldx, last_tap, ldw, taps, channels, active, slope);
    case 2:
      return convolve_row<2, Slope>(x, ldx, last_tap, ldw, taps, channels, active, slope);
    case 3:
      return convolve_row<3, Slope>(x, ldx, last_tap, ldw, taps, channels, active, slope);
    case 4:
      return convolve_row<4, Slope>(x, ldx, last_tap, ldw, taps, channels, active, slope);
    default:
      return convolve_row<0, Slope>(x, ldx, last_tap, ldw, taps, channels, active, slope);
  }
}

/// Fills active (and slope): X, B and, if asked, C of the block's rows.
template <bool Slope, class T, class A>
void load_channels(const Geometry& g, const Inputs<T>& in, const Block& block, bool with_c, const BlockScratch<A>& s) {
  const std::int64_t rows = block.end - block.begin;
  if (!g.dense()) {
    std::fill_n(s.active, rows * g.columns, A(0));
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t t = block.begin + i;
    const std::int64_t taps = std::min<std::int64_t>(g.conv, t - in.starts[t] + 1);
    for_channels(g, with_c, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
      const T* x = in.row(g, t) + from;
      A* active = s.active + i * g.columns + to;
      if (g.conv > 0) {
        A* slope = Slope ? s.slope + i * g.columns + to : nullptr;
        convolve<Slope>(x, g.projection, in.conv + (g.conv - 1) * g.columns + to, g.columns, taps, count, active, slope);
      } else {
        for (std::int64_t c = 0; c < count; ++c) {
          active[c] = convert<A>(x[c]);
        }
      }
    });
  }
}

/// Products of decays below this are taken as zero, so that arithmetic stays away from subnormal numbers.
template <class A>
inline constexpr A kNegligible = std::numeric_limits<A>::min() * A(1e7);
template <class A>
A flushed(A value) {
  return value < kNegligible<A> ? A(0) : value;
}

/// Fills delta, decay (and sigma = d delta / d dt), zero after the block's rows; where a state is handed over also
/// entry[t] = product of the decays of rows 0..t and exit[t] = product of those after t.
template <bool Sigma, class T, class A>
void load_steps(const Geometry& g, const Inputs<T>& in, const Block& block, const BlockScratch<A>& s) {
  const std::int64_t rows = block.end - block.begin, column = g.projection - g.heads;
  for (std::int64_t h = 0; h < g.heads; ++h) {
    A *delta = s.delta + h * g.block_pad, *decay = s.decay + h * g.block_pad;
    A* sigma = Sigma ? s.sigma + h * g.block_pad : nullptr;
    const A bias = in.dt_bias == nullptr ? A(0) : in.dt_bias[h];
    for (std::int64_t i = 0; i < rows; ++i) {
      delta[i] = convert<A>(in.row(g, block.begin + i)[column + h]) + bias;
    }
    const A rate = in.rate[h];
#pragma omp simd
    for (std::int64_t i = 0; i < rows; ++i) {
      if constexpr (Sigma) {
        sigma[i] = sigmoid(delta[i]);
      }
      delta[i] = fast_softplus(delta[i]);
      decay[i] = fast_exp(rate * delta[i]);
    }
    std::fill(delta + rows, delta + g.block_pad, A(0));
    if (block.carry_in >= 0) {
      A product = 1;
      for (std::int64_t i = 0; i < rows; ++i) {
        s.entry[h * g.block_pad + i] = product = flushed(product * decay[i]);
      }
    }
    if (block.carry_out >= 0) {
      A product = 1;
      for (std::int64_t i = rows - 1; i >= 0; --i) {
        s.exit[h * g.block_pad + i] = product;
        product = flushed(product * decay[i]);
      }
    }
  }
}

/// transposed = B^T and scores = C B^T of a segment, lower triangle.
template <class A>
void score(const Geometry& g, const Segment& seg, std::int64_t group, const BlockScratch<A>& s) {
  const A* b = s.active + seg.first * g.columns + g.b_column(group);
  const A* c = s.active + seg.first * g.columns + g.c_column(group);
  transpose(seg.rows, g.state_pad, b, g.columns, s.transposed, seg.padded);
  product_to_lower(seg.rows, g.state, Strided<A>{c, g.columns, 1}, s.transposed, seg.padded, s.scores, seg.padded);
}

/// strict[t, s] = decay over (s, t] for s < t, else 0; mixing = M. Rows of `padded`, M up to lower_columns.
template <class A>
void mix_matrix(const Geometry& g, const Segment& seg, std::int64_t head, A d_skip, const BlockScratch<A>& s) {
  const A *delta = s.delta + head * g.block_pad + seg.first, *decay = s.decay + head * g.block_pad + seg.first;
  const std::int64_t n = seg.padded;
  for (std::int64_t t = 0; t < seg.rows; ++t) {
    A* strict = s.strict + t * n;
    if (t == 0) {
      std::fill_n(strict, n, A(0));
    } else {
      const A factor = decay[t];
#pragma omp simd
      for (std::int64_t j = 0; j < n; ++j) {
        strict[j] = flushed(strict[j - n] * factor);
      }
      strict[t - 1] = factor;
    }
    const A* scores = s.scores + t * n;
    A* mixing = s.mixing + t * n;
    const std::int64_t columns = lower_columns<A>(t);
#pragma omp simd
    for (std::int64_t j = 0; j < columns; ++j) {
      mixing[j] = scores[j] * strict[j] * delta[j];
    }
    mixing[t] = scores[t] * delta[t] + d_skip;
  }
}

/// scaled [rows, width] = factor o from.
template <class A>
void scale_rows(std::int64_t rows, std::int64_t width, const A* factor, const A* from, std::int64_t ldf, A* scaled) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const A f = factor[i];
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) {
      scaled[i * width + j] = f * from[i * ldf + j];
    }
  }
}

/// y = Y of a block whose channels and steps are loaded; `state` is the block's entry state, if it has one.
template <class T, class A>
void mix_block(const Geometry& g, const Inputs<T>& in, const Block& block, const A* state, const BlockScratch<A>& s) {
  for_segments<A>(block, in.starts, [&](const Segment& seg) {
    const bool carried = seg.first == 0 && block.carry_in >= 0;
    for (std::int64_t group = 0; group < g.groups; ++group) {
      score(g, seg, group, s);
      for (std::int64_t h = group * g.heads_per_group(); h < (group + 1) * g.heads_per_group(); ++h) {
        mix_matrix(g, seg, h, in.d_skip[h], s);
        A* y = s.y + seg.first * g.x_columns + h * g.head_pad;
        const A* x = s.active + seg.first * g.columns + h * g.head_pad;
        product_lower(seg.rows, g.head_pad, Strided<A>{s.mixing, seg.padded, 1}, x, g.columns, y, g.x_columns, false);
        if (carried) {
          scale_rows(seg.rows, g.state_pad, s.entry + h * g.block_pad, s.active + g.c_column(group), g.columns, s.scaled);
          product(seg.rows, g.head_pad, g.state, Strided<A>{s.scaled, g.state_pad, 1}, state + h * g.state * g.head_pad,
                  g.head_pad, y, g.x_columns, true);
        }
      }
    }
  });
}

/// What a block that is a piece of one chunk adds to the state: out [Hs, N, head_pad] = sum_s exit_s delta_s B_s (x) X_s, and
/// the block's whole decay [Hs].
template <class T, class A>
void block_state(const Geometry& g, const Inputs<T>& in, const Block& block, const BlockScratch<A>& s, A* out, A* decay) {
  const std::int64_t rows = block.end - block.begin;
  load_channels<false>(g, in, block, false, s);
  load_steps<false>(g, in, block, s);
  for (std::int64_t h = 0; h < g.heads; ++h) {
    A* exit = s.exit + h * g.block_pad;
    decay[h] = flushed(exit[0] * s.decay[h * g.block_pad]);
    for (std::int64_t i = 0; i < rows; ++i) {
      exit[i] *= s.delta[h * g.block_pad + i];
    }
    scale_rows(rows, g.head_pad, exit, s.active + h * g.head_pad, g.columns, s.scaled);
    const Strided<A> b{s.active + g.b_column(h / g.heads_per_group()), 1, g.columns};
    product(g.state, g.head_pad, rows, b, s.scaled, g.head_pad, out + h * g.state * g.head_pad, g.head_pad, false);
  }
}

/// Entry states of all slots: states hold what the block before each slot adds, then the sum along each chunk.
template <class T, class A>
void entry_states(const Geometry& g, const Inputs<T>& in, const Cut& cut, const WindowScratch<A>& window,
                  const BlockScratch<A>* lanes, std::int64_t lane_count) {
  for_tasks(cut.slots, lane_count, [&](std::int64_t slot, std::int64_t lane) {
    const Block& before = window.blocks[window.slot_blocks[slot] - 1];
    block_state(g, in, before, lanes[lane], window.states + slot * g.state_size(), window.decays + slot * g.heads);
  });
  constexpr std::int64_t kStripe = 4096;  // elements that one task sums along all slots
  const std::int64_t stripes = (g.state_size() + kStripe - 1) / kStripe;
  for_tasks(cut.slots < 2 ? 0 : stripes, stripes, [&](std::int64_t stripe, std::int64_t) {
    const std::int64_t per_head = g.state * g.head_pad, end = std::min(g.state_size(), (stripe + 1) * kStripe);
    for (std::int64_t slot = 1; slot < cut.slots; ++slot) {
      if (window.blocks[window.slot_blocks[slot] - 1].carry_in < 0) {
        continue;
      }
      A* state = window.states + slot * g.state_size();
      const A* previous = state - g.state_size();
      for (std::int64_t i = stripe * kStripe; i < end;) {
        const std::int64_t h = i / per_head, stop = std::min(end, (h + 1) * per_head);
        const A decay = window.decays[slot * g.heads + h];
#pragma omp simd
        for (std::int64_t j = i; j < stop; ++j) {
          state[j] += decay * previous[j];
        }
        i = stop;
      }
    }
  });
}

/// Writes the padded copies of the weights that `in` points to.
template <class T, class A = Accumulator<T>>
Inputs<T> prepare_inputs(const Geometry& g, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts, double eps,
                         const WindowScratch<A>& window) {
  if (g.conv > 0) {
    const A* conv = weights.conv.as<A>();
    std::fill_n(window.conv, g.conv * g.columns, A(0));
    for_channels(g, true, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
      for (std::int64_t c = 0; c < count; ++c) {
        for (std::int64_t tap = 0; tap < g.conv; ++tap) {
          window.conv[tap * g.columns + to + c] = conv[(from - g.hidden + c) * g.conv + tap];
        }
      }
    });
  }
  for (std::int64_t h = 0; h < g.heads; ++h) {
    window.rate[h] = -std::exp(weights.a_log.as<A>()[h]);
  }
  std::fill_n(window.norm, g.x_columns, A(0));
  for_hidden(g, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
    std::copy_n(weights.norm.as<A>() + from, count, window.norm + to);
  });
  return Inputs<T>{.zxbcdt = zxbcdt.as<T>(),
                   .starts = starts.as<std::int32_t>(),
                   .conv = window.conv,
                   .rate = window.rate,
                   .norm = window.norm,
                   .d_skip = weights.d_skip.as<A>(),
                   .dt_bias = weights.dt_bias ? weights.dt_bias.as<A>() : nullptr,
                   .eps = static_cast<A>(eps)};
}

/// The lanes that the rest of the scratch holds, at most one per thread.
template <class A>
class Lanes {
 public:
  static constexpr std::int64_t kMost = 256;
  Lanes(const Geometry& g, bool backward, std::span<std::byte> memory) {
    Carver counter(nullptr);
    const BlockScratch<A> sizes(counter, g, backward);
    const std::int64_t held = static_cast<std::int64_t>(memory.size() / counter.used());
    count_ = std::min({held, kMost, std::int64_t{thread_count()}});
    require(count_ > 0, "chunk_scan: need ", counter.used(), " bytes of scratch per thread, have ", memory.size());
    for (std::int64_t i = 0; i < count_; ++i) {
      Carver carver(memory.data() + i * static_cast<std::int64_t>(counter.used()));
      lanes_[i] = BlockScratch<A>(carver, g, backward);
    }
  }
  const BlockScratch<A>* data() const { return lanes_; }
  const BlockScratch<A>& operator[](std::int64_t i) const { return lanes_[i]; }
  std::int64_t count() const { return count_; }

 private:
  BlockScratch<A> lanes_[kMost];
  std::int64_t count_ = 0;
};

}  // namespace attamba::kernels::cpu::scan
