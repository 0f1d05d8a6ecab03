// The scan of the released code (docs/model.md, released semantics), taken at its definition:
//
//   y_t = D x_t + sum over s in S(t) of (C_t . B_s) exp(A sum of delta over (s, t]) delta_s x_s
//   S(t): the s <= t of t's label, where every end e of a block of rows with s <= e < t has it too
//
// So inside a block of kLabelBlock rows, tokens of equal label mix, and a block hands on the state of its last token's label:
// to the next block's tokens of that label, and through it when its last token has the label as well. Decays run through all
// tokens. A task owns a block and a head, or all of a block. With b the decay over (s, t], e over a block's rows up to t, x
// over those after s, S and S' the states at a block's entry and exit, and sums over pairs (t, s) of the block that mix:
//   dX_s = D dY_s + sum_t (C_t . B_s) b delta_s dY_t + x_s delta_s dS' B_s
//   dC_t = sum_s (dY_t . X_s) b delta_s B_s + e_t S dY_t        dB_s = sum_t (dY_t . X_s) b delta_s C_t + x_s delta_s dS' X_s
//   d delta_s = sum_t (dY_t . X_s) (C_t . B_s) b + x_s B_s dS' X_s + A dl_s
//   dl_u = what the decay of row u (A delta_u its logarithm) is a factor of: sum over s < u <= t, entry terms of t >= u, exit
//          terms of s < u, and the whole block's decay of the state that passes through it
#include "kernels/chunk_scan_checks.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/chunk_scan_simd.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

constexpr std::int64_t kBlock = kLabelBlock;

template <class A>
A dot(const A* a, const A* b, std::int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}
/// to += factor from.
template <class A>
void add_scaled(A* to, A factor, const A* from, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] += factor * from[i];
  }
}

/// Rows of a block, whether a state enters and leaves it, and at the tokens of which label.
struct Block {
  std::int64_t index, begin, end;
  bool enters, leaves;
  std::int32_t entering, leaving;

  bool passes() const { return enters && leaves && entering == leaving; }
};

/// One problem: its inputs, its scratch and its steps.
template <class T>
struct LabelScan {
  using A = Accumulator<T>;

  ScanShape shape;
  std::int64_t rows;
  const T* zxbcdt = nullptr;
  const std::int32_t* labels = nullptr;
  const A *conv = nullptr, *a_log = nullptr, *d_skip = nullptr, *dt_bias = nullptr, *norm = nullptr;
  A eps = 0;
  std::int64_t blocks = (rows + kBlock - 1) / kBlock, columns = shape.projection();  ///< columns: of zxbcdt
  std::int64_t head = shape.hidden / shape.heads, channels = shape.hidden + 2 * shape.groups * shape.state;  ///< E/Hs; E + 2GN
  // Scratch. Slot i of states is the state at block i's entry, [Hs, N, E/Hs]; `passed` [blocks, Hs] the decay of the block
  // before it where the state passes through, else 0.
  A *active = nullptr, *delta = nullptr, *decay = nullptr, *y = nullptr, *states = nullptr, *passed = nullptr;
  A *slope = nullptr, *dactive = nullptr, *dy = nullptr, *dstates = nullptr, *partials = nullptr;  ///< backward only

  std::int64_t state_size() const { return shape.hidden * shape.state; }
  /// Of a block's part of the gradients of conv, norm, a_log, d_skip and dt_bias.
  std::int64_t partial_size() const { return channels * shape.conv + shape.hidden + 3 * shape.heads; }

  /// Scratch from `take(elements)`, which returns a pointer to that many A.
  template <class Take>
  void take_scratch(bool backward, const Take& take) {
    active = take(rows * channels);
    delta = take(rows * shape.heads);
    decay = take(rows * shape.heads);
    y = take(rows * shape.hidden);
    states = take(blocks * state_size());
    passed = take(blocks * shape.heads);
    if (backward) {
      slope = take(rows * channels);
      dactive = take(rows * channels);
      dy = take(rows * shape.hidden);
      dstates = take(blocks * state_size());
      partials = take(blocks * partial_size());
    }
  }

  Block block(std::int64_t index) const {
    const std::int64_t begin = index * kBlock, end = std::min(rows, begin + kBlock);
    const bool enters = begin > 0, leaves = end < rows;
    return {index, begin, end, enters, leaves, enters ? labels[begin - 1] : 0, labels[end - 1]};
  }
  template <class Body>
  void for_blocks(const Body& body) const {
    parallel_for(blocks, [&](std::int64_t index) { body(block(index)); });
  }
  template <class Body>
  void for_heads_of_blocks(const Body& body) const {
    parallel_for(blocks * shape.heads, [&](std::int64_t i) { body(block(i / shape.heads), i % shape.heads); });
  }

  const T* input(std::int64_t t) const { return zxbcdt + t * columns; }
  bool tap_counts(std::int64_t t, std::int64_t j) const { return t - j >= 0 && labels[t - j] == labels[t]; }
  std::int64_t group_of(std::int64_t h) const { return h / (shape.heads / shape.groups); }
  A* x_row(A* from, std::int64_t t, std::int64_t h) const { return from + t * channels + h * head; }
  A* b_row(A* from, std::int64_t t, std::int64_t group) const {
    return from + t * channels + shape.hidden + group * shape.state;
  }
  A* c_row(A* from, std::int64_t t, std::int64_t group) const { return b_row(from, t, shape.groups + group); }
  A* y_row(A* from, std::int64_t t, std::int64_t h) const { return from + t * shape.hidden + h * head; }
  A step(const A* from, std::int64_t t, std::int64_t h) const { return from[t * shape.heads + h]; }
  A* state(A* from, std::int64_t index, std::int64_t h) const { return from + index * state_size() + h * shape.state * head; }

  /// X, B and C after convolution and SiLU, delta = softplus(dt + bias) and the decays.
  void activate(const Block& block, bool backward) const {
    for (std::int64_t t = block.begin; t < block.end; ++t) {
      A* const to = active + t * channels;
      if (shape.conv == 0) {
        for (std::int64_t c = 0; c < channels; ++c) {
          to[c] = convert<A>(input(t)[shape.hidden + c]);
        }
      } else {
        std::fill_n(to, channels, A(0));
        for (std::int64_t j = 0; j < shape.conv; ++j) {
          if (tap_counts(t, j)) {
            const T* const x = input(t - j) + shape.hidden;
            for (std::int64_t c = 0; c < channels; ++c) {
              to[c] += conv[c * shape.conv + shape.conv - 1 - j] * convert<A>(x[c]);
            }
          }
        }
        for (std::int64_t c = 0; c < channels; ++c) {
          if (backward) {
            slope[t * channels + c] = silu_derivative(to[c]);
          }
          to[c] = silu(to[c]);
        }
      }
      for (std::int64_t h = 0; h < shape.heads; ++h) {
        const A dt = convert<A>(input(t)[columns - shape.heads + h]) + (dt_bias == nullptr ? A(0) : dt_bias[h]);
        delta[t * shape.heads + h] = scan::fast_softplus(dt);
        decay[t * shape.heads + h] = fast_exp(-std::exp(a_log[h]) * step(delta, t, h));
      }
    }
  }

  /// What the block adds to the state that leaves it, into the next block's slot.
  void block_state(const Block& block, std::int64_t h) const {
    if (!block.leaves) {
      return;
    }
    A* const to = state(states, block.index + 1, h);
    std::fill_n(to, shape.state * head, A(0));
    A after = 1;
    for (std::int64_t s = block.end - 1; s >= block.begin; --s) {
      if (labels[s] == block.leaving) {
        const A *b = b_row(active, s, group_of(h)), weight = after * step(delta, s, h);
        for (std::int64_t n = 0; n < shape.state; ++n) {
          add_scaled(to + n * head, weight * b[n], x_row(active, s, h), head);
        }
      }
      after *= step(decay, s, h);
    }
    passed[(block.index + 1) * shape.heads + h] = block.passes() ? after : A(0);
  }

  void mix(const Block& block, std::int64_t h) const {
    const std::int64_t group = group_of(h);
    for (std::int64_t t = block.begin; t < block.end; ++t) {
      A* const to = y_row(y, t, h);
      std::fill_n(to, head, A(0));
      add_scaled(to, d_skip[h], x_row(active, t, h), head);
      const A* const c = c_row(active, t, group);
      A between = 1;  // the decay over (s, t], at last over the block's rows up to t
      for (std::int64_t s = t; s >= block.begin; --s) {
        if (labels[s] == labels[t]) {
          const A weight = dot(c, b_row(active, s, group), shape.state) * between * step(delta, s, h);
          add_scaled(to, weight, x_row(active, s, h), head);
        }
        between *= step(decay, s, h);
      }
      if (block.enters && labels[t] == block.entering) {
        for (std::int64_t n = 0; n < shape.state; ++n) {
          add_scaled(to, between * c[n], state(states, block.index, h) + n * head, head);
        }
      }
    }
  }

  void make_y(bool backward) const {
    for_blocks([&](const Block& block) { activate(block, backward); });
    for_heads_of_blocks([&](const Block& block, std::int64_t h) { block_state(block, h); });
    parallel_for(shape.heads, [&](std::int64_t h) {
      for (std::int64_t i = 2; i < blocks; ++i) {
        add_scaled(state(states, i, h), step(passed, i, h), state(states, i - 1, h), shape.state * head);
      }
    });
    for_heads_of_blocks([&](const Block& block, std::int64_t h) { mix(block, h); });
  }

  /// out = RMSNorm(Y silu(z)) of row t.
  void gate_and_norm(std::int64_t t, T* out) const {
    A* const value = y_row(y, t, 0);
    for (std::int64_t c = 0; c < shape.hidden; ++c) {
      value[c] *= silu(convert<A>(input(t)[c]));
    }
    const A scale = A(1) / std::sqrt(dot(value, value, shape.hidden) / static_cast<A>(shape.hidden) + eps);
    for (std::int64_t c = 0; c < shape.hidden; ++c) {
      out[t * shape.hidden + c] = convert<T>(value[c] * scale * norm[c]);
    }
  }

  /// With u = Y silu(z), r = 1 / rms(u), v = dout w: du = r v - u r^3 mean(u v); dY, dz and the norm's partial.
  void gate_and_norm_backward(const Block& block, const T* dout, T* dzxbcdt) const {
    A* const dnorm = partials + block.index * partial_size() + channels * shape.conv;
    std::fill_n(dnorm, shape.hidden, A(0));
    for (std::int64_t t = block.begin; t < block.end; ++t) {
      const T *const z = input(t), *const from = dout + t * shape.hidden;
      const A* const value = y_row(y, t, 0);
      A squares = 0, dots = 0;
      for (std::int64_t c = 0; c < shape.hidden; ++c) {
        const A u = value[c] * silu(convert<A>(z[c]));
        squares += u * u;
        dots += u * norm[c] * convert<A>(from[c]);
      }
      const A mean = squares / static_cast<A>(shape.hidden) + eps, scale = A(1) / std::sqrt(mean);
      const A pull = scale / mean * dots / static_cast<A>(shape.hidden);
      for (std::int64_t c = 0; c < shape.hidden; ++c) {
        const A gate = convert<A>(z[c]), open = silu(gate), u = value[c] * open, d = convert<A>(from[c]);
        const A du = scale * norm[c] * d - u * pull;
        dnorm[c] += d * u * scale;
        dy[t * shape.hidden + c] = du * open;
        dzxbcdt[t * columns + c] = convert<T>(du * value[c] * silu_derivative(gate));
      }
    }
  }

  /// What the block adds to the gradient of its entry state.
  void entry_gradient(const Block& block, std::int64_t h) const {
    if (!block.enters) {
      return;
    }
    A* const to = state(dstates, block.index, h);
    std::fill_n(to, shape.state * head, A(0));
    A entry = 1;
    for (std::int64_t t = block.begin; t < block.end; ++t) {
      entry *= step(decay, t, h);
      if (labels[t] == block.entering) {
        const A* const c = c_row(active, t, group_of(h));
        for (std::int64_t n = 0; n < shape.state; ++n) {
          add_scaled(to + n * head, entry * c[n], y_row(dy, t, h), head);
        }
      }
    }
  }

  /// Adds to dactive (dB and dC are sums over a group's heads) and writes ddt.
  void scan_gradient(const Block& block, std::int64_t h, T* dzxbcdt) const {
    const std::int64_t group = group_of(h), N = shape.state;
    A dlog[kBlock] = {}, terms[kBlock] = {}, ddelta[kBlock] = {}, skip = 0;
    for (std::int64_t t = block.begin; t < block.end; ++t) {
      const A *const c = c_row(active, t, group), *const gradient = y_row(dy, t, h);
      A* const dc = c_row(dactive, t, group);
      skip += dot(gradient, x_row(active, t, h), head);
      add_scaled(x_row(dactive, t, h), d_skip[h], gradient, head);
      A between = 1;
      for (std::int64_t s = t; s >= block.begin; --s) {
        if (labels[s] == labels[t]) {
          const A* const b = b_row(active, s, group);
          const A score = dot(c, b, N), product = dot(gradient, x_row(active, s, h), head);
          const A weight = between * step(delta, s, h);
          add_scaled(x_row(dactive, s, h), score * weight, gradient, head);
          add_scaled(dc, product * weight, b, N);
          add_scaled(b_row(dactive, s, group), product * weight, c, N);
          ddelta[s - block.begin] += product * score * between;
          if (s < t) {
            dlog[t - block.begin] += product * score * weight;
            dlog[s - block.begin] -= product * score * weight;
          }
        }
        between *= step(decay, s, h);
      }
      if (block.enters && labels[t] == block.entering) {
        for (std::int64_t n = 0; n < N; ++n) {
          const A value = between * dot(state(states, block.index, h) + n * head, gradient, head);
          dc[n] += value;
          dlog[t - block.begin] += value * c[n];
        }
      }
    }
    A after = 1;
    for (std::int64_t s = block.end - 1; block.leaves && s >= block.begin; --s) {
      if (labels[s] == block.leaving) {
        const A *const b = b_row(active, s, group), weight = after * step(delta, s, h);
        A sum = 0;
        for (std::int64_t n = 0; n < N; ++n) {
          const A* const row = state(dstates, block.index + 1, h) + n * head;
          const A value = dot(row, x_row(active, s, h), head);
          add_scaled(x_row(dactive, s, h), weight * b[n], row, head);
          b_row(dactive, s, group)[n] += weight * value;
          sum += value * b[n];
        }
        ddelta[s - block.begin] += after * sum;
        terms[s - block.begin] = weight * sum;
      }
      after *= step(decay, s, h);
    }
    if (block.passes()) {  // the last row's term reaches all rows of the block
      dlog[block.end - 1 - block.begin] +=
          after * dot(state(states, block.index, h), state(dstates, block.index + 1, h), N * head);
    }
    partials[block.index * partial_size() + channels * shape.conv + shape.hidden + shape.heads + h] = skip;
    step_gradient(block, h, dlog, terms, ddelta, dzxbcdt);
  }

  /// From d delta and the terms of dl to ddt, and the head's partials of A_log and dt_bias.
  void step_gradient(const Block& block, std::int64_t h, A (&dlog)[kBlock], const A (&terms)[kBlock], const A (&ddelta)[kBlock],
                     T* dzxbcdt) const {
    const std::int64_t count = block.end - block.begin;
    for (std::int64_t i = count - 2; i >= 0; --i) {
      dlog[i] += dlog[i + 1];
    }
    const A rate = -std::exp(a_log[h]), bias = dt_bias == nullptr ? A(0) : dt_bias[h];
    A before = 0, rate_sum = 0, bias_sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t t = block.begin + i, column = columns - shape.heads + h;
      const A dl = dlog[i] + before, ddt = (ddelta[i] + rate * dl) * sigmoid(convert<A>(input(t)[column]) + bias);
      before += terms[i];
      rate_sum += step(delta, t, h) * dl;
      bias_sum += ddt;
      dzxbcdt[t * columns + column] = convert<T>(ddt);
    }
    A* const partial = partials + block.index * partial_size() + channels * shape.conv + shape.hidden + h;
    partial[0] = rate * rate_sum;
    partial[2 * shape.heads] = bias_sum;
  }

  /// dxBC, and the taps' partial. dactive is the gradient before SiLU; slope, which nobody needs any more, takes sums.
  void convolve_backward(const Block& block, T* dzxbcdt) const {
    const std::int64_t W = shape.conv;
    A* const partial = partials + block.index * partial_size();
    std::fill_n(partial, channels * W, A(0));
    for (std::int64_t t = block.begin; t < block.end; ++t) {
      A* const sum = W == 0 ? dactive + t * channels : slope + t * channels;
      std::fill_n(sum, W == 0 ? 0 : channels, A(0));
      for (std::int64_t j = 0; j < W; ++j) {
        const A* const taps = conv + W - 1 - j;
        for (std::int64_t c = 0; t + j < rows && tap_counts(t + j, j) && c < channels; ++c) {
          sum[c] += taps[c * W] * dactive[(t + j) * channels + c];
        }
        for (std::int64_t c = 0; tap_counts(t, j) && c < channels; ++c) {
          partial[c * W + W - 1 - j] += dactive[t * channels + c] * convert<A>(input(t - j)[shape.hidden + c]);
        }
      }
      for (std::int64_t c = 0; c < channels; ++c) {
        dzxbcdt[t * columns + shape.hidden + c] = convert<T>(sum[c]);
      }
    }
  }

  /// gradients += the sum of the blocks' partials, in order.
  void add_partials(const ScanWeights& gradients) const {
    const A* from = partials;
    const auto add = [&](const Tensor& to, std::int64_t count) {
      parallel_for(to ? count : 0, [&](std::int64_t i) {
        A sum = 0;
        for (std::int64_t b = 0; b < blocks; ++b) {
          sum += from[b * partial_size() + i];
        }
        to.as<A>()[i] += sum;
      });
      from += count;
    };
    add(gradients.conv, channels * shape.conv);
    add(gradients.norm, shape.hidden);
    add(gradients.a_log, shape.heads);
    add(gradients.d_skip, shape.heads);
    add(gradients.dt_bias, shape.heads);
  }
};

template <class T>
LabelScan<T> make_scan(const Launch& launch, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels,
                       const ScanShape& shape, double eps, bool backward) {
  using A = Accumulator<T>;
  LabelScan<T> scan{.shape = shape,
                    .rows = zxbcdt.shape().rows(),
                    .zxbcdt = zxbcdt.as<T>(),
                    .labels = labels.as<std::int32_t>(),
                    .conv = shape.conv > 0 ? weights.conv.as<A>() : nullptr,
                    .a_log = weights.a_log.as<A>(),
                    .d_skip = weights.d_skip.as<A>(),
                    .dt_bias = weights.dt_bias ? weights.dt_bias.as<A>() : nullptr,
                    .norm = weights.norm.as<A>(),
                    .eps = static_cast<A>(eps)};
  ScratchAllocator scratch(launch);
  scan.take_scratch(backward, [&](std::int64_t count) { return scratch.take<A>(static_cast<std::size_t>(count)); });
  return scan;
}

std::size_t workspace(const char* operation, const TensorType& zxbcdt, const ScanShape& shape, bool backward) {
  return dispatch_floating(zxbcdt.dtype, operation, [&]<class T>() {
    std::size_t bytes = 0;
    using A = Accumulator<T>;
    LabelScan<T> scan{.shape = shape, .rows = zxbcdt.shape.rows()};
    scan.take_scratch(backward, [&](std::int64_t count) -> A* {
      bytes += ScratchAllocator::aligned_bytes<A>(static_cast<std::size_t>(count));
      return nullptr;
    });
    return bytes;
  });
}

}  // namespace

void label_scan(const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels,
                const ScanShape& shape, double eps) {
  constexpr const char* kName = "label_scan";
  check_scan_input(kName, zxbcdt, "labels", labels, shape);
  check_scan_weights(kName, "weight", weights, shape, accumulator_of(zxbcdt.dtype()));
  check_scan_rows(kName, "out", out, zxbcdt, shape.hidden);
  dispatch_floating(zxbcdt.dtype(), kName, [&]<class T>() {
    const LabelScan<T> scan = make_scan<T>(launch, zxbcdt, weights, labels, shape, eps, false);
    scan.make_y(false);
    parallel_for(scan.rows, [&](std::int64_t t) { scan.gate_and_norm(t, out.as<T>()); });
  });
}

void label_scan_backward(const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients, const Tensor& dout,
                         const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& labels, const ScanShape& shape,
                         double eps) {
  constexpr const char* kName = "label_scan_backward";
  check_scan_input(kName, zxbcdt, "labels", labels, shape);
  check_scan_weights(kName, "weight", weights, shape, accumulator_of(zxbcdt.dtype()));
  check_scan_weights(kName, "gradient of", gradients, shape, accumulator_of(zxbcdt.dtype()));
  check_scan_rows(kName, "dzxbcdt", dzxbcdt, zxbcdt, shape.projection());
  check_scan_rows(kName, "dout", dout, zxbcdt, shape.hidden);
  dispatch_floating(zxbcdt.dtype(), kName, [&]<class T>() {
    using A = Accumulator<T>;
    const LabelScan<T> scan = make_scan<T>(launch, zxbcdt, weights, labels, shape, eps, true);
    T* const to = dzxbcdt.as<T>();
    scan.make_y(true);
    scan.for_blocks([&](const Block& block) { scan.gate_and_norm_backward(block, dout.as<T>(), to); });
    scan.for_heads_of_blocks([&](const Block& block, std::int64_t h) { scan.entry_gradient(block, h); });
    parallel_for(shape.heads, [&](std::int64_t h) {
      for (std::int64_t i = scan.blocks - 2; i > 0; --i) {
        add_scaled(scan.state(scan.dstates, i, h), scan.step(scan.passed, i + 1, h), scan.state(scan.dstates, i + 1, h),
                   shape.state * scan.head);
      }
    });
    scan.for_blocks([&](const Block& block) {
      const std::int64_t first = block.begin * scan.channels, count = (block.end - block.begin) * scan.channels;
      std::fill_n(scan.dactive + first, count, A(0));
      for (std::int64_t h = 0; h < shape.heads; ++h) {
        scan.scan_gradient(block, h, to);
      }
      for (std::int64_t i = first; shape.conv > 0 && i < first + count; ++i) {
        scan.dactive[i] *= scan.slope[i];
      }
    });
    scan.for_blocks([&](const Block& block) { scan.convolve_backward(block, to); });
    scan.add_partials(gradients);
  });
}

std::size_t label_scan_workspace(const TensorType& zxbcdt, const ScanShape& shape) {
  return workspace("label_scan", zxbcdt, shape, false);
}

std::size_t label_scan_backward_workspace(const TensorType& zxbcdt, const ScanShape& shape) {
  return workspace("label_scan_backward", zxbcdt, shape, true);
}

}  // namespace attamba::kernels::cpu
