// The chunked scan against the recurrence of docs/model.md taken one step at a time in float64, and its gradient.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "src/core/parallel.h"
#include "src/core/random.h"

namespace attamba::kernels::cpu {
namespace {

using Vector = std::vector<double>;

double sigmoid_of(double x) {
  return 1 / (1 + std::exp(-x));
}

/// Weights of one SSM, or their gradients, in float64.
struct Weights {
  Vector conv, a_log, d_skip, dt_bias, norm;
};

struct Problem {
  ScanShape shape;
  std::int64_t n = 0, rows = 0;
  std::vector<std::int32_t> starts;
  Weights weights;
  Vector zxbcdt, dout;
  double eps = 1e-5;

  std::int64_t channels() const { return shape.hidden + 2 * shape.groups * shape.state; }
};

/// Starts of rows from a list of chunk lengths that is repeated over each sequence.
std::vector<std::int32_t> make_starts(std::int64_t sequences, std::int64_t n, const std::vector<std::int64_t>& lengths,
                                      std::int64_t first_length = 0) {
  std::vector<std::int32_t> starts;
  for (std::int64_t s = 0; s < sequences; ++s) {
    std::size_t next = 0;
    for (std::int64_t t = 0; t < n;) {
      const std::int64_t length = t == 0 && first_length > 0 ? first_length : lengths[next++ % lengths.size()];
      for (std::int64_t end = std::min(n, t + length), begin = t; t < end; ++t) {
        starts.push_back(static_cast<std::int32_t>(s * n + begin));
      }
    }
  }
  return starts;
}

/// Values that bfloat16 represents exactly, so that every compute type gets the same problem.
Vector normals(RandomStream& random, std::int64_t count, double scale, double mean = 0) {
  Vector values(static_cast<std::size_t>(count));
  for (double& value : values) {
    value = static_cast<float>(bfloat16(static_cast<float>(mean + scale * random.normal())));
  }
  return values;
}

Problem make_problem(const ScanShape& shape, std::int64_t n, std::vector<std::int32_t> starts, bool bias, std::uint64_t seed) {
  RandomStream random(seed);
  Problem p;
  p.shape = shape;
  p.n = n;
  p.rows = static_cast<std::int64_t>(starts.size());
  p.starts = std::move(starts);
  p.weights.conv = normals(random, p.channels() * shape.conv, shape.conv > 0 ? 1 / std::sqrt(shape.conv) : 1);
  p.weights.a_log = normals(random, shape.heads, 1.0, -1.0);
  p.weights.d_skip = normals(random, shape.heads, 0.1, 1.0);
  p.weights.dt_bias = bias ? normals(random, shape.heads, 0.5) : Vector();
  p.weights.norm = normals(random, shape.hidden, 0.1, 1.0);
  p.zxbcdt = normals(random, p.rows * shape.projection(), 1.0);
  p.dout = normals(random, p.rows * shape.hidden, 1.0);
  return p;
}

struct Result {
  Vector out, dzxbcdt;
  Weights gradients;
};

/// One step at a time, with every intermediate kept for the way back.
class Recurrence {
 public:
  explicit Recurrence(const Problem& p)
      : p_(p),
        E(p.shape.hidden),
        N(p.shape.state),
        Hs(p.shape.heads),
        G(p.shape.groups),
        W(p.shape.conv),
        d(E / Hs),
        C(p.channels()) {}

  Result run(bool with_gradient) {
    forward();
    if (with_gradient) {
      backward();
    }
    return result_;
  }

 private:
  double input(std::int64_t t, std::int64_t column) const { return p_.zxbcdt[t * p_.shape.projection() + column]; }
  double& dinput(std::int64_t t, std::int64_t column) { return result_.dzxbcdt[t * p_.shape.projection() + column]; }
  std::int64_t taps(std::int64_t t) const { return std::min<std::int64_t>(W, t - p_.starts[t] + 1); }
  double x(std::int64_t t, std::int64_t e) const { return xbc_[t * C + e]; }
  std::int64_t b(std::int64_t t, std::int64_t h, std::int64_t k) const { return t * C + E + h / (Hs / G) * N + k; }
  std::int64_t c(std::int64_t t, std::int64_t h, std::int64_t k) const { return b(t, h, k) + G * N; }
  double* state(std::int64_t t, std::int64_t e) { return &states_[(t * E + e) * N]; }

  void forward() {
    const std::int64_t T = p_.rows;
    pre_.assign(T * C, 0);
    xbc_.assign(T * C, 0);
    delta_.assign(T * Hs, 0);
    raw_.assign(T * Hs, 0);
    states_.assign(T * E * N, 0);
    y_.assign(T * E, 0);
    result_.out.assign(T * E, 0);
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t i = 0; i < C; ++i) {
        for (std::int64_t j = 0; j < taps(t); ++j) {
          pre_[t * C + i] += p_.weights.conv[i * W + W - 1 - j] * input(t - j, E + i);
        }
        xbc_[t * C + i] = W > 0 ? pre_[t * C + i] * sigmoid_of(pre_[t * C + i]) : input(t, E + i);
      }
      for (std::int64_t h = 0; h < Hs; ++h) {
        raw_[t * Hs + h] = input(t, E + C + h) + (p_.weights.dt_bias.empty() ? 0 : p_.weights.dt_bias[h]);
        delta_[t * Hs + h] = std::log1p(std::exp(raw_[t * Hs + h]));
      }
      double squares = 0;
      for (std::int64_t e = 0; e < E; ++e) {
        const std::int64_t h = e / d;
        const double step = delta_[t * Hs + h], decay = std::exp(-std::exp(p_.weights.a_log[h]) * step);
        double sum = p_.weights.d_skip[h] * x(t, e);
        for (std::int64_t k = 0; k < N; ++k) {
          const double before = t > p_.starts[t] ? state(t - 1, e)[k] : 0;
          state(t, e)[k] = decay * before + step * x(t, e) * xbc_[b(t, h, k)];
          sum += state(t, e)[k] * xbc_[c(t, h, k)];
        }
        y_[t * E + e] = sum;
        const double z = input(t, e);
        squares += std::pow(sum * z * sigmoid_of(z), 2);
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(E) + p_.eps);
      for (std::int64_t e = 0; e < E; ++e) {
        const double z = input(t, e);
        result_.out[t * E + e] = y_[t * E + e] * z * sigmoid_of(z) * scale * p_.weights.norm[e];
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
    Vector dxbc(T * C), dstate(E * N), dy(E);
    for (std::int64_t t = T - 1; t >= 0; --t) {
      if (t + 1 == T || p_.starts[t + 1] == t + 1) {
        std::fill(dstate.begin(), dstate.end(), 0.0);  // nothing comes back from the next chunk
      }
      norm_backward(t, dy);
      for (std::int64_t h = 0; h < Hs; ++h) {
        const double rate = -std::exp(p_.weights.a_log[h]), step = delta_[t * Hs + h], decay = std::exp(rate * step);
        double dstep = 0;
        for (std::int64_t e = h * d; e < (h + 1) * d; ++e) {
          g.d_skip[h] += dy[e] * x(t, e);
          dxbc[t * C + e] += p_.weights.d_skip[h] * dy[e];
          for (std::int64_t k = 0; k < N; ++k) {
            double& ds = dstate[e * N + k];
            const double before = t > p_.starts[t] ? state(t - 1, e)[k] : 0;
            dxbc[c(t, h, k)] += dy[e] * state(t, e)[k];
            ds += dy[e] * xbc_[c(t, h, k)];
            dstep += ds * (x(t, e) * xbc_[b(t, h, k)] + before * decay * rate);
            g.a_log[h] += ds * before * decay * rate * step;
            dxbc[t * C + e] += ds * step * xbc_[b(t, h, k)];
            dxbc[b(t, h, k)] += ds * step * x(t, e);
            ds *= decay;
          }
        }
        dinput(t, E + C + h) = dstep * sigmoid_of(raw_[t * Hs + h]);
        if (!g.dt_bias.empty()) {
          g.dt_bias[h] += dinput(t, E + C + h);
        }
      }
    }
    conv_backward(dxbc);
  }

  void norm_backward(std::int64_t t, Vector& dy) {
    double squares = 0, dot = 0;
    const auto gated = [&](std::int64_t e) { return y_[t * E + e] * input(t, e) * sigmoid_of(input(t, e)); };
    for (std::int64_t e = 0; e < E; ++e) {
      squares += gated(e) * gated(e);
      dot += gated(e) * p_.weights.norm[e] * p_.dout[t * E + e];
    }
    const double mean = squares / static_cast<double>(E) + p_.eps, scale = 1 / std::sqrt(mean);
    for (std::int64_t e = 0; e < E; ++e) {
      const double z = input(t, e), s = sigmoid_of(z);
      result_.gradients.norm[e] += p_.dout[t * E + e] * gated(e) * scale;
      const double du = scale * (p_.weights.norm[e] * p_.dout[t * E + e] - gated(e) * dot / (mean * static_cast<double>(E)));
      dy[e] = du * z * s;
      dinput(t, e) = du * y_[t * E + e] * s * (1 + z * (1 - s));
    }
  }

  void conv_backward(const Vector& dxbc) {
    for (std::int64_t t = 0; t < p_.rows; ++t) {
      for (std::int64_t i = 0; i < C; ++i) {
        if (W == 0) {
          dinput(t, E + i) = dxbc[t * C + i];
          continue;
        }
        const double pre = pre_[t * C + i], s = sigmoid_of(pre), dpre = dxbc[t * C + i] * s * (1 + pre * (1 - s));
        for (std::int64_t j = 0; j < taps(t); ++j) {
          dinput(t - j, E + i) += p_.weights.conv[i * W + W - 1 - j] * dpre;
          result_.gradients.conv[i * W + W - 1 - j] += input(t - j, E + i) * dpre;
        }
      }
    }
  }

  const Problem& p_;
  const std::int64_t E, N, Hs, G, W, d, C;
  Vector pre_, xbc_, delta_, raw_, states_, y_;
  Result result_;
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

template <class T>
Result run_kernels(const Problem& p) {
  using A = Accumulator<T>;
  const std::int64_t T_rows = p.rows, columns = p.shape.projection();
  Buffer<T> zxbcdt(p.zxbcdt, {T_rows, columns}), dout(p.dout, {T_rows, p.shape.hidden});
  Buffer<T> out(Vector(p.dout.size(), NAN), {T_rows, p.shape.hidden}), dzxbcdt(Vector(p.zxbcdt.size(), NAN), {T_rows, columns});
  Tensor starts{const_cast<std::int32_t*>(p.starts.data()), {DType::int32, {T_rows}}};
  const WeightBuffers<A> weights(p.weights, p);
  Weights before = p.weights;
  for (Vector* v : {&before.conv, &before.a_log, &before.d_skip, &before.dt_bias, &before.norm}) {
    std::fill(v->begin(), v->end(), kBefore);
  }
  const WeightBuffers<A> gradients(before, p);
  const Scratch forward(chunk_scan_workspace(zxbcdt.tensor.type, p.shape, p.n));
  chunk_scan(forward.launch(), out.tensor, zxbcdt.tensor, weights.tensors(), starts, p.shape, p.eps, p.n);
  const Scratch backward(chunk_scan_backward_workspace(zxbcdt.tensor.type, p.shape, p.n));
  chunk_scan_backward(backward.launch(), dzxbcdt.tensor, gradients.tensors(), dout.tensor, zxbcdt.tensor, weights.tensors(),
                      starts, p.shape, p.eps, p.n);
  return {out.get(), dzxbcdt.get(), gradients.get()};
}

/// ||a - b|| / ||b||.
double distance(const Vector& a, const Vector& b, double offset = 0) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(a[i] - offset - b[i], 2);
    norm += b[i] * b[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

Vector columns_of(const Vector& from, std::int64_t width, std::int64_t begin, std::int64_t end) {
  Vector to;
  for (std::size_t row = 0; row < from.size(); row += width) {
    to.insert(to.end(), from.begin() + row + begin, from.begin() + row + end);
  }
  return to;
}

/// `rounding` bounds what is of the compute type, `accumulated` what is summed in the accumulator type: the sums here have up
/// to 10^4 terms of mixed sign with partial sums well above the result (the norm's gradient of a single row is such a
/// difference), hence up to a hundred roundings of 2^-24 or 2^-53.
void expect_close(const Problem& p, const Result& got, const Result& expected, double rounding, double accumulated) {
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

void check_all_types(const Problem& p) {
  const Result expected = Recurrence(p).run(true);
  {
    SCOPED_TRACE("float64");
    expect_close(p, run_kernels<double>(p), expected, 1e-13, 1e-12);
  }
  {
    SCOPED_TRACE("float32");
    expect_close(p, run_kernels<float>(p), expected, 1e-5, 1e-5);
  }
  {
    SCOPED_TRACE("bfloat16");  // one rounding to 8 bits, half a unit of the last of them; sums as in float32
    expect_close(p, run_kernels<bfloat16>(p), expected, 0x1p-8, 1e-5);
  }
}

struct Case {
  const char* name;
  ScanShape shape;
  std::int64_t sequences, n;
  std::vector<std::int64_t> lengths;
  std::int64_t first = 0;  ///< length of the first chunk of a sequence; 0: as in `lengths`
  bool bias = false;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

class ChunkScan : public testing::TestWithParam<Case> {};

TEST_P(ChunkScan, MatchesTheRecurrenceAndItsGradient) {
  const Case& c = GetParam();
  check_all_types(make_problem(c.shape, c.n, make_starts(c.sequences, c.n, c.lengths, c.first), c.bias, 7));
}

constexpr ScanShape kSmall{.hidden = 32, .state = 8, .heads = 4, .groups = 1, .conv = 4};
constexpr ScanShape kGroups{.hidden = 64, .state = 16, .heads = 4, .groups = 2, .conv = 4};
constexpr ScanShape kOdd{.hidden = 21, .state = 5, .heads = 3, .groups = 3, .conv = 3};
constexpr ScanShape kOddState{.hidden = 32, .state = 3, .heads = 2, .groups = 1, .conv = 2};
constexpr ScanShape kNoConv{.hidden = 32, .state = 8, .heads = 2, .groups = 1, .conv = 0};
constexpr ScanShape kOneTap{.hidden = 16, .state = 16, .heads = 1, .groups = 1, .conv = 1};
constexpr ScanShape kManyTaps{.hidden = 16, .state = 8, .heads = 2, .groups = 2, .conv = 7};
constexpr ScanShape kLargeState{.hidden = 16, .state = 260, .heads = 2, .groups = 1, .conv = 4};

INSTANTIATE_TEST_SUITE_P(
    , ChunkScan,
    testing::Values(Case{"uniform1", kSmall, 2, 37, {1}}, Case{"uniform4", kSmall, 3, 50, {4}, 0, true},
                    Case{"uniform5", kGroups, 1, 99, {5}}, Case{"uniform8", kGroups, 2, 64, {8}, 0, true},
                    Case{"cyclic8", kSmall, 2, 100, {8}, 3, true}, Case{"uniform64", kSmall, 1, 256, {64}},
                    Case{"uniform65", kGroups, 1, 200, {65}, 0, true},
                    Case{"mixed", kSmall, 2, 300, {1, 70, 3, 2, 129, 33, 31}},
                    Case{"oneLongChunk", kGroups, 1, 300, {300}, 0, true}, Case{"wholeSequences", kSmall, 3, 130, {130}},
                    Case{"lastPieceOfOneRow", kSmall, 1, 129, {129}}, Case{"odd", kOdd, 2, 77, {9, 1, 4}, 0, true},
                    Case{"oddLong", kOdd, 2, 150, {150}, 0, true}, Case{"oddState", kOddState, 1, 140, {100}, 7},
                    Case{"noConvolution", kNoConv, 2, 90, {8}, 5, true}, Case{"noConvolutionLong", kNoConv, 1, 200, {190}},
                    Case{"oneTap", kOneTap, 1, 100, {11}}, Case{"oneTapLong", kOneTap, 1, 100, {100}},
                    Case{"manyTaps", kManyTaps, 2, 80, {3, 17}}, Case{"manyTapsLong", kManyTaps, 1, 195, {66, 129}},
                    Case{"largeState", kLargeState, 1, 270, {270}, 0, true}, Case{"oneToken", kSmall, 1, 1, {1}, 0, true}),
    [](const auto& test) { return test.param.name; });

TEST(ChunkScanReference, GradientIsThatOfFiniteDifferences) {
  Problem p = make_problem(kGroups, 14, make_starts(1, 14, {5, 9}), true, 3);
  const Result exact = Recurrence(p).run(true);
  const auto loss = [&] {
    const Vector out = Recurrence(p).run(false).out;
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

TEST(ChunkScanLarge, WindowsAndManyRangesOfWeightGradients) {
  // More rows than one window and more blocks than ranges of partial sums.
  const ScanShape shape{.hidden = 8, .state = 4, .heads = 2, .groups = 1, .conv = 4};
  check_all_types(make_problem(shape, 3000, make_starts(3, 3000, {8, 1, 30, 200, 5}), true, 11));
}

TEST(ChunkScanLarge, FastDecayStaysFiniteAndExact) {
  Problem p = make_problem(kSmall, 200, make_starts(1, 200, {200}), true, 5);
  std::fill(p.weights.a_log.begin(), p.weights.a_log.end(), 3.0);  // exp(-20 delta): products of decays underflow
  check_all_types(p);
}

TEST(ChunkScanThreads, ResultsDoNotDependOnTheirNumber) {
  const int threads = thread_count();
  for (const auto& lengths : {std::vector<std::int64_t>{8}, std::vector<std::int64_t>{3, 150, 40, 9, 66}}) {
    const Problem p = make_problem(kGroups, 500, make_starts(2, 500, lengths), true, 9);
    omp_set_num_threads(1);
    const Result one = run_kernels<float>(p);
    for (const int count : {2, 3}) {
      omp_set_num_threads(count);
      const Result many = run_kernels<float>(p);
      EXPECT_EQ(one.out, many.out);
      EXPECT_EQ(one.dzxbcdt, many.dzxbcdt);
      EXPECT_EQ(one.gradients.conv, many.gradients.conv);
      EXPECT_EQ(one.gradients.a_log, many.gradients.a_log);
      EXPECT_EQ(one.gradients.d_skip, many.gradients.d_skip);
      EXPECT_EQ(one.gradients.dt_bias, many.gradients.dt_bias);
      EXPECT_EQ(one.gradients.norm, many.gradients.norm);
    }
    omp_set_num_threads(threads);
  }
}

TEST(ChunkScanErrors, AStartOutsideTheSequenceIsNamed) {
  Problem p = make_problem(kSmall, 20, make_starts(2, 20, {5}), false, 1);
  p.starts[20] = 19;
  try {
    run_kernels<float>(p);
    FAIL() << "a chunk that crosses sequences was accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("starts[20] = 19"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace attamba::kernels::cpu
