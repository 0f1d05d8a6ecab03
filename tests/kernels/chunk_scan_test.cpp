// The chunked scan against the recurrence of docs/model.md taken one step at a time in float64, and its gradient.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/core/parallel.h"
#include "tests/kernels/scan_support.h"

namespace attamba::kernels::cpu {
namespace {

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

/// One step at a time, with every state kept for the way back.
class Recurrence final : public ScanReference {
 public:
  using ScanReference::ScanReference;

 private:
  bool tap_counts(std::int64_t t, std::int64_t j) const override { return t - j >= p_.table[t]; }
  double* state(std::int64_t t, std::int64_t e) { return &states_[(t * E + e) * N]; }

  void mix() override {
    states_.assign(p_.rows * E * N, 0);
    for (std::int64_t t = 0; t < p_.rows; ++t) {
      for (std::int64_t e = 0; e < E; ++e) {
        const std::int64_t h = e / d;
        const double step = delta_[t * Hs + h], decay = std::exp(rate(h) * step);
        y_[t * E + e] = p_.weights.d_skip[h] * x(t, e);
        for (std::int64_t k = 0; k < N; ++k) {
          const double before = t > p_.table[t] ? state(t - 1, e)[k] : 0;
          state(t, e)[k] = decay * before + step * x(t, e) * xbc_[b(t, h, k)];
          y_[t * E + e] += state(t, e)[k] * xbc_[c(t, h, k)];
        }
      }
    }
  }

  void mix_backward() override {
    Weights& g = result_.gradients;
    Vector dstate(E * N);
    for (std::int64_t t = p_.rows - 1; t >= 0; --t) {
      if (t + 1 == p_.rows || p_.table[t + 1] == t + 1) {
        std::fill(dstate.begin(), dstate.end(), 0.0);  // nothing comes back from the next chunk
      }
      for (std::int64_t e = 0; e < E; ++e) {
        const std::int64_t h = e / d;
        const double step = delta_[t * Hs + h], decay = std::exp(rate(h) * step), dy = dy_[t * E + e];
        g.d_skip[h] += dy * x(t, e);
        dxbc_[t * C + e] += p_.weights.d_skip[h] * dy;
        for (std::int64_t k = 0; k < N; ++k) {
          double& ds = dstate[e * N + k];
          const double before = t > p_.table[t] ? state(t - 1, e)[k] : 0;
          dxbc_[c(t, h, k)] += dy * state(t, e)[k];
          ds += dy * xbc_[c(t, h, k)];
          ddelta_[t * Hs + h] += ds * (x(t, e) * xbc_[b(t, h, k)] + before * decay * rate(h));
          g.a_log[h] += ds * before * decay * rate(h) * step;
          dxbc_[t * C + e] += ds * step * xbc_[b(t, h, k)];
          dxbc_[b(t, h, k)] += ds * step * x(t, e);
          ds *= decay;
        }
      }
    }
  }

  Vector states_;
};

constexpr auto kRun = []<class T>(const Problem& p) {
  return run_scan<T>(
      p,
      [&](const TensorType& type, bool backward) {
        return backward ? chunk_scan_backward_workspace(type, p.shape, p.n) : chunk_scan_workspace(type, p.shape, p.n);
      },
      [&](const auto&... arguments) { chunk_scan(arguments..., p.shape, p.eps, p.n); },
      [&](const auto&... arguments) { chunk_scan_backward(arguments..., p.shape, p.eps, p.n); });
};
template <class T>
Result run_kernels(const Problem& p) {
  return kRun.operator()<T>(p);
}

void check_all_types(const Problem& p) {
  cpu::check_all_types(p, Recurrence(p).run(true), kRun);
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
  const Problem p = make_problem(kGroups, 14, make_starts(1, 14, {5, 9}), true, 3);
  expect_gradient_of_differences(p, Recurrence(p).run(true), [](const Problem& q) { return Recurrence(q).run(false); });
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
      expect_equal(run_kernels<float>(p), one);
    }
    omp_set_num_threads(threads);
  }
}

TEST(ChunkScanErrors, AStartOutsideTheSequenceIsNamed) {
  Problem p = make_problem(kSmall, 20, make_starts(2, 20, {5}), false, 1);
  p.table[20] = 19;
  try {
    run_kernels<float>(p);
    FAIL() << "a chunk that crosses sequences was accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("starts[20] = 19"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace attamba::kernels::cpu
