// What tests of the CPU's scans share: a reference in float64 that leaves open how rows mix, runs of kernels, comparisons.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "tests/kernels/scan_problem.h"

namespace attamba::kernels::cpu {

inline double sigmoid_of(double x) {
  return 1 / (1 + std::exp(-x));
}

/// A scan in float64 but for how rows mix, which a derived class says.
class ScanReference {
 public:
  explicit ScanReference(const Problem& p)
      : p_(p),
        E(p.shape.hidden),
        N(p.shape.state),
        Hs(p.shape.heads),
        G(p.shape.groups),
        W(p.shape.conv),
        d(E / Hs),
        C(p.channels()) {}
  virtual ~ScanReference() = default;

  Result run(bool with_gradient) {
    forward();
    if (with_gradient) {
      backward();
    }
    return result_;
  }

 protected:
  /// Whether row t's convolution reaches the row j before it.
  virtual bool tap_counts(std::int64_t t, std::int64_t j) const = 0;
  /// y_ of xbc_ and delta_.
  virtual void mix() = 0;
  /// Gradients of weights, dxbc_ and ddelta_ of dy_; all start at 0.
  virtual void mix_backward() = 0;

  double input(std::int64_t t, std::int64_t column) const { return p_.zxbcdt[t * p_.shape.projection() + column]; }
  double x(std::int64_t t, std::int64_t e) const { return xbc_[t * C + e]; }
  std::int64_t b(std::int64_t t, std::int64_t h, std::int64_t k) const { return t * C + E + h / (Hs / G) * N + k; }
  std::int64_t c(std::int64_t t, std::int64_t h, std::int64_t k) const { return b(t, h, k) + G * N; }
  double rate(std::int64_t h) const { return -std::exp(p_.weights.a_log[h]); }

  const Problem& p_;
  const std::int64_t E, N, Hs, G, W, d, C;
  Vector xbc_, delta_, y_, dxbc_, ddelta_, dy_;
  Result result_;

 private:
  double& dinput(std::int64_t t, std::int64_t column) { return result_.dzxbcdt[t * p_.shape.projection() + column]; }

  void forward() {
    const std::int64_t T = p_.rows;
    pre_.assign(T * C, 0);
    xbc_.assign(T * C, 0);
    delta_.assign(T * Hs, 0);
    raw_.assign(T * Hs, 0);
    y_.assign(T * E, 0);
    result_.out.assign(T * E, 0);
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t i = 0; i < C; ++i) {
        for (std::int64_t j = 0; j < W; ++j) {
          pre_[t * C + i] += tap_counts(t, j) ? p_.weights.conv[i * W + W - 1 - j] * input(t - j, E + i) : 0;
        }
        xbc_[t * C + i] = W > 0 ? pre_[t * C + i] * sigmoid_of(pre_[t * C + i]) : input(t, E + i);
      }
      for (std::int64_t h = 0; h < Hs; ++h) {
        raw_[t * Hs + h] = input(t, E + C + h) + (p_.weights.dt_bias.empty() ? 0 : p_.weights.dt_bias[h]);
        delta_[t * Hs + h] = std::log1p(std::exp(raw_[t * Hs + h]));
      }
    }
    mix();
    for (std::int64_t t = 0; t < T; ++t) {
      double squares = 0;
      for (std::int64_t e = 0; e < E; ++e) {
        squares += gated(t, e) * gated(t, e);
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(E) + p_.eps);
      for (std::int64_t e = 0; e < E; ++e) {
        result_.out[t * E + e] = gated(t, e) * scale * p_.weights.norm[e];
      }
    }
  }

  void backward() {
    const std::int64_t T = p_.rows;
    Weights& g = result_.gradients;
    result_.dzxbcdt.assign(T * p_.shape.projection(), 0);
    g.conv.assign(C * W, 0);
    g.a_log.assign(Hs, 0);
    g.d_skip.assign(Hs, 0);
    g.dt_bias.assign(p_.weights.dt_bias.size(), 0);
    g.norm.assign(E, 0);
    dxbc_.assign(T * C, 0);
    ddelta_.assign(T * Hs, 0);
    dy_.assign(T * E, 0);
    for (std::int64_t t = 0; t < T; ++t) {
      norm_backward(t);
    }
    mix_backward();
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t h = 0; h < Hs; ++h) {
        dinput(t, E + C + h) = ddelta_[t * Hs + h] * sigmoid_of(raw_[t * Hs + h]);
        if (!g.dt_bias.empty()) {
          g.dt_bias[h] += dinput(t, E + C + h);
        }
      }
    }
    conv_backward();
  }

  double gated(std::int64_t t, std::int64_t e) const { return y_[t * E + e] * input(t, e) * sigmoid_of(input(t, e)); }

  void norm_backward(std::int64_t t) {
    double squares = 0, dot = 0;
    for (std::int64_t e = 0; e < E; ++e) {
      squares += gated(t, e) * gated(t, e);
      dot += gated(t, e) * p_.weights.norm[e] * p_.dout[t * E + e];
    }
    const double mean = squares / static_cast<double>(E) + p_.eps, scale = 1 / std::sqrt(mean);
    for (std::int64_t e = 0; e < E; ++e) {
      const double z = input(t, e), s = sigmoid_of(z);
      result_.gradients.norm[e] += p_.dout[t * E + e] * gated(t, e) * scale;
      const double du = scale * (p_.weights.norm[e] * p_.dout[t * E + e] - gated(t, e) * dot / (mean * static_cast<double>(E)));
      dy_[t * E + e] = du * z * s;
      dinput(t, e) = du * y_[t * E + e] * s * (1 + z * (1 - s));
    }
  }

  void conv_backward() {
    for (std::int64_t t = 0; t < p_.rows; ++t) {
      for (std::int64_t i = 0; i < C; ++i) {
        if (W == 0) {
          dinput(t, E + i) = dxbc_[t * C + i];
          continue;
        }
        const double pre = pre_[t * C + i], s = sigmoid_of(pre), dpre = dxbc_[t * C + i] * s * (1 + pre * (1 - s));
        for (std::int64_t j = 0; j < W; ++j) {
          if (tap_counts(t, j)) {
            dinput(t - j, E + i) += p_.weights.conv[i * W + W - 1 - j] * dpre;
            result_.gradients.conv[i * W + W - 1 - j] += input(t - j, E + i) * dpre;
          }
        }
      }
    }
  }

  Vector pre_, raw_;
};

/// Owns the memory of a tensor.
template <class T>
struct Buffer {
  std::vector<T> values;
  Tensor tensor;

  Buffer(const Vector& from, const Shape& shape) : values(from.size()), tensor{nullptr, {kDTypeOf<T>, shape}} {
    for (std::size_t i = 0; i < from.size(); ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        values[i] = bfloat16(static_cast<float>(from[i]));
      } else {
        values[i] = static_cast<T>(from[i]);
      }
    }
    tensor.data = from.empty() ? nullptr : values.data();
  }
  Vector get() const {
    Vector to(values.size());
    for (std::size_t i = 0; i < to.size(); ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        to[i] = static_cast<float>(values[i]);
      } else {
        to[i] = static_cast<double>(values[i]);
      }
    }
    return to;
  }
};

template <class A>
struct WeightBuffers {
  Buffer<A> conv, a_log, d_skip, dt_bias, norm;
  WeightBuffers(const Weights& w, const Problem& p)
      : conv(w.conv, {p.channels(), p.shape.conv}),
        a_log(w.a_log, {p.shape.heads}),
        d_skip(w.d_skip, {p.shape.heads}),
        dt_bias(w.dt_bias, {static_cast<std::int64_t>(w.dt_bias.size())}),
        norm(w.norm, {p.shape.hidden}) {}
  ScanWeights tensors() const { return {conv.tensor, a_log.tensor, d_skip.tensor, dt_bias.tensor, norm.tensor}; }
  Weights get() const { return {conv.get(), a_log.get(), d_skip.get(), dt_bias.get(), norm.get()}; }
};

/// Scratch full of NaN, so that nothing may rely on its contents.
struct Scratch {
  std::byte* data;
  std::size_t size;
  explicit Scratch(std::size_t bytes) : size(bytes) {
    data = static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    std::fill_n(data, bytes, std::byte{0xff});
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Launch launch() const { return Launch{.scratch = {data, size}}; }
};

/// Gradients of weights start at this, to see that they are added to.
constexpr double kBefore = 0.5;

/// The results of forward(launch, out, zxbcdt, weights, table) and backward(launch, dzxbcdt, gradients, dout, zxbcdt, weights,
/// table), whose scratch is workspace(type, whether it is for backward).
template <class T, class Workspace, class Forward, class Backward>
Result run_scan(const Problem& p, const Workspace& workspace, const Forward& forward, const Backward& backward) {
  using A = Accumulator<T>;
  const std::int64_t T_rows = p.rows, columns = p.shape.projection();
  Buffer<T> zxbcdt(p.zxbcdt, {T_rows, columns}), dout(p.dout, {T_rows, p.shape.hidden});
  Buffer<T> out(Vector(p.dout.size(), NAN), {T_rows, p.shape.hidden}), dzxbcdt(Vector(p.zxbcdt.size(), NAN), {T_rows, columns});
  Tensor table{const_cast<std::int32_t*>(p.table.data()), {DType::int32, {T_rows}}};
  const WeightBuffers<A> weights(p.weights, p);
  Weights before = p.weights;
  for (Vector* v : {&before.conv, &before.a_log, &before.d_skip, &before.dt_bias, &before.norm}) {
    std::fill(v->begin(), v->end(), kBefore);
  }
  const WeightBuffers<A> gradients(before, p);
  forward(Scratch(workspace(zxbcdt.tensor.type, false)).launch(), out.tensor, zxbcdt.tensor, weights.tensors(), table);
  backward(Scratch(workspace(zxbcdt.tensor.type, true)).launch(), dzxbcdt.tensor, gradients.tensors(), dout.tensor,
           zxbcdt.tensor, weights.tensors(), table);
  return {out.get(), dzxbcdt.get(), gradients.get()};
}

/// ||a - b|| / ||b||.
inline double distance(const Vector& a, const Vector& b, double offset = 0) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(a[i] - offset - b[i], 2);
    norm += b[i] * b[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

inline Vector columns_of(const Vector& from, std::int64_t width, std::int64_t begin, std::int64_t end) {
  Vector to;
  for (std::size_t row = 0; row < from.size(); row += width) {
    to.insert(to.end(), from.begin() + row + begin, from.begin() + row + end);
  }
  return to;
}

/// `rounding` bounds what is of the compute type, `accumulated` what is summed in the accumulator type: the sums here have up
/// to 10^4 terms of mixed sign with partial sums well above the result (the norm's gradient of a single row is such a
/// difference), hence up to a hundred roundings of 2^-24 or 2^-53.
inline void expect_close(const Problem& p, const Result& got, const Result& expected, double rounding, double accumulated) {
  EXPECT_LT(distance(got.out, expected.out), rounding) << "out";
  const std::int64_t E = p.shape.hidden, GN = p.shape.groups * p.shape.state, width = p.shape.projection();
  const std::int64_t edges[] = {0, E, 2 * E, 2 * E + GN, 2 * E + 2 * GN, width};
  const char* names[] = {"dz", "dX", "dB", "dC", "ddt"};
  for (int i = 0; i < 5; ++i) {
    EXPECT_LT(distance(columns_of(got.dzxbcdt, width, edges[i], edges[i + 1]),
                       columns_of(expected.dzxbcdt, width, edges[i], edges[i + 1])),
              rounding)
        << names[i];
  }
  EXPECT_LT(distance(got.gradients.conv, expected.gradients.conv, kBefore), accumulated) << "dconv";
  EXPECT_LT(distance(got.gradients.a_log, expected.gradients.a_log, kBefore), accumulated) << "dA_log";
  EXPECT_LT(distance(got.gradients.d_skip, expected.gradients.d_skip, kBefore), accumulated) << "dD";
  EXPECT_LT(distance(got.gradients.dt_bias, expected.gradients.dt_bias, kBefore), accumulated) << "ddt_bias";
  EXPECT_LT(distance(got.gradients.norm, expected.gradients.norm, kBefore), accumulated) << "dnorm";
}

/// `exact`, of a reference, against differences of run(problem).out weighted by dout.
template <class Run>
void expect_gradient_of_differences(Problem p, const Result& exact, const Run& run) {
  const auto loss = [&] {
    const Vector out = run(p).out;
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      sum += out[i] * p.dout[i];
    }
    return sum;
  };
  const auto check = [&](const char* name, Vector& values, const Vector& gradient) {
    for (std::size_t i = 0; i < values.size(); i += 1 + values.size() / 40) {
      const double saved = values[i], step = 1e-5;
      values[i] = saved + step;
      const double above = loss();
      values[i] = saved - step;
      const double below = loss();
      values[i] = saved;
      EXPECT_NEAR((above - below) / (2 * step), gradient[i], 1e-7 * (1 + std::abs(gradient[i]))) << name << i;
    }
  };
  check("zxbcdt", p.zxbcdt, exact.dzxbcdt);
  check("conv", p.weights.conv, exact.gradients.conv);
  check("a_log", p.weights.a_log, exact.gradients.a_log);
  check("d_skip", p.weights.d_skip, exact.gradients.d_skip);
  check("dt_bias", p.weights.dt_bias, exact.gradients.dt_bias);
  check("norm", p.weights.norm, exact.gradients.norm);
}

/// run<T>(p) of every compute type T against `expected`.
template <class Run>
void check_all_types(const Problem& p, const Result& expected, const Run& run) {
  {
    SCOPED_TRACE("float64");
    expect_close(p, run.template operator()<double>(p), expected, 1e-13, 1e-12);
  }
  {
    SCOPED_TRACE("float32");
    expect_close(p, run.template operator()<float>(p), expected, 1e-5, 1e-5);
  }
  {
    SCOPED_TRACE("bfloat16");  // one rounding to 8 bits, half a unit of the last of them; sums as in float32
    expect_close(p, run.template operator()<bfloat16>(p), expected, 0x1p-8, 1e-5);
  }
}

}  // namespace attamba::kernels::cpu
