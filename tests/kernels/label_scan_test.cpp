// The scan with labels against its definition (docs/model.md, released semantics), pair of rows by pair of rows in float64, and
// its gradient.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "src/core/parallel.h"
#include "tests/kernels/scan_support.h"

namespace attamba::kernels::cpu {
namespace {

/// All pairs (t, s) with s in S(t).
class Pairs final : public ScanReference {
 public:
  using ScanReference::ScanReference;

 private:
  std::int32_t label(std::int64_t t) const { return p_.table[t]; }
  bool tap_counts(std::int64_t t, std::int64_t j) const override { return t - j >= 0 && label(t - j) == label(t); }

  /// s in S(t): equal labels, and that label at every end e of 64 rows with s <= e < t.
  bool mixes(std::int64_t t, std::int64_t s) const {
    bool mix = label(s) == label(t);
    for (std::int64_t e = s / 64 * 64 + 63; e < t; e += 64) {
      mix = mix && label(e) == label(t);
    }
    return mix;
  }
  double score(std::int64_t t, std::int64_t s, std::int64_t h) const {
    double sum = 0;
    for (std::int64_t k = 0; k < N; ++k) {
      sum += xbc_[c(t, h, k)] * xbc_[b(s, h, k)];
    }
    return sum;
  }
  /// Calls body(t, s, h, decay over (s, t]) for all pairs that mix and all heads.
  template <class Body>
  void for_pairs(const Body& body) const {
    for (std::int64_t h = 0; h < Hs; ++h) {
      for (std::int64_t t = 0; t < p_.rows; ++t) {
        double steps = 0;
        for (std::int64_t s = t; s >= 0; --s) {
          if (mixes(t, s)) {
            body(t, s, h, std::exp(rate(h) * steps));
          }
          steps += delta_[s * Hs + h];
        }
      }
    }
  }

  void mix() override {
    for (std::int64_t i = 0; i < p_.rows * E; ++i) {
      y_[i] = p_.weights.d_skip[i % E / d] * x(i / E, i % E);
    }
    for_pairs([&](std::int64_t t, std::int64_t s, std::int64_t h, double decay) {
      const double weight = score(t, s, h) * decay * delta_[s * Hs + h];
      for (std::int64_t e = h * d; e < (h + 1) * d; ++e) {
        y_[t * E + e] += weight * x(s, e);
      }
    });
  }

  void mix_backward() override {
    Weights& g = result_.gradients;
    for (std::int64_t i = 0; i < p_.rows * E; ++i) {
      g.d_skip[i % E / d] += dy_[i] * x(i / E, i % E);
      dxbc_[i / E * C + i % E] += p_.weights.d_skip[i % E / d] * dy_[i];
    }
    Vector dlog(p_.rows * Hs);  // of the sum of delta up to a row
    for_pairs([&](std::int64_t t, std::int64_t s, std::int64_t h, double decay) {
      const double step = delta_[s * Hs + h], of_pair = score(t, s, h);
      double product = 0;
      for (std::int64_t e = h * d; e < (h + 1) * d; ++e) {
        product += dy_[t * E + e] * x(s, e);
        dxbc_[s * C + e] += of_pair * decay * step * dy_[t * E + e];
      }
      for (std::int64_t k = 0; k < N; ++k) {
        dxbc_[c(t, h, k)] += product * decay * step * xbc_[b(s, h, k)];
        dxbc_[b(s, h, k)] += product * decay * step * xbc_[c(t, h, k)];
      }
      ddelta_[s * Hs + h] += product * of_pair * decay;
      dlog[t * Hs + h] += product * of_pair * decay * step;
      dlog[s * Hs + h] -= product * of_pair * decay * step;
    });
    for (std::int64_t h = 0; h < Hs; ++h) {
      double later = 0;
      for (std::int64_t t = p_.rows - 1; t >= 0; --t) {
        later += dlog[t * Hs + h];
        ddelta_[t * Hs + h] += rate(h) * later;
        g.a_log[h] += rate(h) * later * delta_[t * Hs + h];
      }
    }
  }
};

constexpr auto kRun = []<class T>(const Problem& p) {
  return run_scan<T>(
      p,
      [&](const TensorType& type, bool backward) {
        return backward ? label_scan_backward_workspace(type, p.shape) : label_scan_workspace(type, p.shape);
      },
      [&](const auto&... arguments) { label_scan(arguments..., p.shape, p.eps); },
      [&](const auto&... arguments) { label_scan_backward(arguments..., p.shape, p.eps); });
};

/// Positions in chunks of `size` rows, the first of each sequence of `first` (0: as the others).
std::vector<std::int32_t> positions(std::int64_t sequences, std::int64_t n, std::int64_t size, std::int64_t first = 0) {
  std::vector<std::int32_t> labels;
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t t = 0; t < n; ++t) {
      labels.push_back(static_cast<std::int32_t>(t < first ? t : (t - first) % size));
    }
  }
  return labels;
}

struct Case {
  const char* name;
  ScanShape shape;
  std::int64_t sequences, n, size, first = 0;
  bool bias = false;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

class LabelScan : public testing::TestWithParam<Case> {};

TEST_P(LabelScan, IsTheSumOverPairsAndItsGradient) {
  const Case& c = GetParam();
  const Problem p = make_problem(c.shape, c.n, positions(c.sequences, c.n, c.size, c.first), c.bias, 7);
  check_all_types(p, Pairs(p).run(true), kRun);
}

constexpr ScanShape kSmall{.hidden = 32, .state = 8, .heads = 4, .groups = 1, .conv = 4};
constexpr ScanShape kGroups{.hidden = 64, .state = 16, .heads = 4, .groups = 2, .conv = 4};
constexpr ScanShape kOdd{.hidden = 21, .state = 5, .heads = 3, .groups = 3, .conv = 3};
constexpr ScanShape kNoConv{.hidden = 32, .state = 8, .heads = 2, .groups = 1, .conv = 0};

INSTANTIATE_TEST_SUITE_P(, LabelScan,
                         testing::Values(Case{"chunks4", kSmall, 2, 128, 4}, Case{"chunks4Shifted", kSmall, 2, 130, 4, 1, true},
                                         Case{"chunks8", kGroups, 1, 256, 8, 0, true},
                                         Case{"chunks8Shifted", kSmall, 3, 100, 8, 5, true},
                                         Case{"chunks64", kSmall, 1, 300, 64}, Case{"chunks1", kSmall, 1, 150, 1, 0, true},
                                         Case{"chunks7", kGroups, 2, 99, 7},
                                         Case{"tapsReachTheChunkBefore", kSmall, 2, 77, 3, 1, true},
                                         Case{"odd", kOdd, 2, 77, 5, 2, true}, Case{"oddOne", kOdd, 3, 65, 1},
                                         Case{"noConvolution", kNoConv, 2, 90, 2}, Case{"oneToken", kSmall, 1, 1, 4, 0, true},
                                         Case{"oneBlock", kSmall, 1, 64, 16}),
                         [](const auto& test) { return test.param.name; });

TEST(LabelScanReference, GradientIsThatOfFiniteDifferences) {
  const Problem p = make_problem(kGroups, 70, positions(1, 70, 2, 1), true, 3);
  expect_gradient_of_differences(p, Pairs(p).run(true), [](const Problem& q) { return Pairs(q).run(false); });
}

/// With the numbers of chunks for labels, tokens mix inside of chunks: the scan of the paper.
TEST(LabelScanOfChunks, IsTheChunkScan) {
  constexpr std::int64_t kRows = 200;
  std::vector<std::int32_t> starts;
  for (std::int32_t t = 0; t < kRows; ++t) {
    starts.push_back(t < 3 ? 0 : t < 140 ? 3 + (t - 3) / 9 * 9 : 140);
  }
  const Problem p = make_problem(kGroups, kRows, starts, true, 5);
  const Result chunks = run_scan<double>(
      p,
      [&](const TensorType& type, bool backward) {
        return backward ? chunk_scan_backward_workspace(type, p.shape, p.n) : chunk_scan_workspace(type, p.shape, p.n);
      },
      [&](const auto&... arguments) { chunk_scan(arguments..., p.shape, p.eps, p.n); },
      [&](const auto&... arguments) { chunk_scan_backward(arguments..., p.shape, p.eps, p.n); });
  Result expected = chunks;
  for (Vector* v : {&expected.gradients.conv, &expected.gradients.a_log, &expected.gradients.d_skip,
                    &expected.gradients.dt_bias, &expected.gradients.norm}) {
    for (double& value : *v) {
      value -= kBefore;
    }
  }
  expect_close(p, kRun.operator()<double>(p), expected, 1e-13, 1e-12);
}

TEST(LabelScanStates, PassFromSequenceToSequenceWhereLabelsMatch) {
  Problem p = make_problem(kSmall, 64, positions(2, 64, 4), false, 9);
  const Result before = kRun.operator()<double>(p);
  p.zxbcdt[59 * p.shape.projection() + p.shape.hidden] += 1;  // X of a token with the label of its block's last
  const Result after = kRun.operator()<double>(p);
  const auto row_changed = [&](std::int64_t t) {
    return !std::equal(before.out.begin() + t * 32, before.out.begin() + (t + 1) * 32, after.out.begin() + t * 32);
  };
  for (std::int64_t t = 0; t < p.rows; ++t) {
    EXPECT_EQ(row_changed(t), t >= 59 && t % 4 == 3) << t;
  }
}

TEST(LabelScanThreads, ResultsDoNotDependOnTheirNumber) {
  const int threads = thread_count();
  const Problem p = make_problem(kGroups, 150, positions(2, 150, 3, 2), true, 9);
  omp_set_num_threads(1);
  const Result one = kRun.operator()<float>(p);
  for (const int count : {2, 3}) {
    omp_set_num_threads(count);
    expect_equal(kRun.operator()<float>(p), one);
  }
  omp_set_num_threads(threads);
}

TEST(LabelScanErrors, LabelsThatDoNotFitAreNamed) {
  Problem p = make_problem(kSmall, 20, positions(1, 20, 4), false, 1);
  const std::vector<std::int32_t> labels(19);
  try {
    run_scan<float>(
        p, [&](const TensorType& type, bool) { return label_scan_workspace(type, p.shape); },
        [&](const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor&) {
          const Tensor wrong{const_cast<std::int32_t*>(labels.data()), {DType::int32, {19}}};
          label_scan(launch, out, zxbcdt, weights, wrong, p.shape, p.eps);
        },
        [](const auto&...) {});
    FAIL() << "labels of fewer rows were accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("label_scan: labels int32[19]"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace attamba::kernels::cpu
