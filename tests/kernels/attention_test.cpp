// attention and attention_backward against a dense-mask float64 reference that is written from the mask's definition, not from
// the table.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "src/core/parallel.h"
#include "src/core/random.h"

namespace attamba::kernels::cpu {
namespace {

/// What one sequence looks like: sorted chunk ends, sorted document starts (the first is 0).
struct Layout {
  std::vector<std::int64_t> ends;
  std::vector<std::int64_t> starts = {0};
};

struct Case {
  std::string name;
  std::int64_t batch = 1, n = 0, heads = 1, kv_heads = 1, d = 8;
  std::int64_t window = 0;  ///< L; 0: the query's own chunk
  std::vector<Layout> layouts;
  const Layout& layout(std::int64_t sequence) const { return layouts[static_cast<std::size_t>(sequence) % layouts.size()]; }
};

std::int64_t document_start(const Layout& layout, std::int64_t t) {
  return *(std::upper_bound(layout.starts.begin(), layout.starts.end(), t) - 1);
}

/// First position of t's own chunk: after the last chunk end before t, and not before its document.
std::int64_t chunk_start(const Layout& layout, std::int64_t t) {
  const auto after = std::lower_bound(layout.ends.begin(), layout.ends.end(), t);
  const std::int64_t begin = after == layout.ends.begin() ? 0 : *(after - 1) + 1;
  return std::max(begin, document_start(layout, t));
}

/// The mask of docs/model.md: is key j of the sequence visible to query t?
bool visible(const Case& c, const Layout& layout, std::int64_t t, std::int64_t j) {
  if (j > t || j < document_start(layout, t)) {
    return false;
  }
  const bool is_end = std::binary_search(layout.ends.begin(), layout.ends.end(), j);
  return is_end || (c.window > 0 ? j > t - c.window : j >= chunk_start(layout, t));
}

/// The same, as compact and local keys that never overlap.
struct TableData {
  std::vector<std::int32_t> ends, key_begin, key_end, local_begin;

  explicit TableData(const Case& c) {
    for (std::int64_t s = 0; s < c.batch; ++s) {
      const Layout& layout = c.layout(s);
      const std::int64_t row = s * c.n;
      for (std::int64_t j = 0; j < c.n; ++j) {
        const bool used = j < static_cast<std::int64_t>(layout.ends.size());
        ends.push_back(used ? static_cast<std::int32_t>(row + layout.ends[static_cast<std::size_t>(j)]) : -12345);
      }
      for (std::int64_t t = 0; t < c.n; ++t) {
        const std::int64_t document = document_start(layout, t);
        const std::int64_t local = c.window > 0 ? std::max(t - c.window + 1, document) : chunk_start(layout, t);
        const auto before = [&](std::int64_t position) {
          const auto at = std::lower_bound(layout.ends.begin(), layout.ends.end(), position);
          return static_cast<std::int32_t>(row + (at - layout.ends.begin()));
        };
        key_begin.push_back(before(document));
        key_end.push_back(before(local));
        local_begin.push_back(static_cast<std::int32_t>(row + local));
      }
    }
  }
  AttentionTable table() {
    const TensorType type{DType::int32, {static_cast<std::int64_t>(ends.size())}};
    return {{ends.data(), type}, {key_begin.data(), type}, {key_end.data(), type}, {local_begin.data(), type}};
  }
};

std::vector<double> normals(std::int64_t count, std::uint32_t which) {
  RandomStream random(7, which);
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& value : values) {
    value = random.normal();
  }
  return values;
}

/// Values of type T, and the same rounded values as doubles.
template <class T>
struct Values {
  std::vector<T> data;
  std::vector<double> exact;
  explicit Values(const std::vector<double>& from) {
    for (double value : from) {
      if constexpr (std::is_same_v<T, double>) {
        data.push_back(value);
      } else {
        data.push_back(T(static_cast<float>(value)));
      }
      exact.push_back(static_cast<double>(static_cast<Accumulator<T>>(data.back())));
    }
  }
  Tensor tensor(Shape shape) { return {data.data(), {kDTypeOf<T>, shape}}; }
};

template <class T>
std::vector<double> to_double(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T& value : values) {
    out.push_back(static_cast<double>(static_cast<Accumulator<T>>(value)));
  }
  return out;
}

struct Results {
  std::vector<double> out, lse, dq, dk, dv;
};

/// Everything in float64 with a dense mask.
Results reference(const Case& c, const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& v,
                  const std::vector<double>& dout) {
  Results r;
  r.out.resize(q.size());
  r.dq.resize(q.size());
  r.dk.resize(k.size());
  r.dv.resize(k.size());
  r.lse.resize(static_cast<std::size_t>(c.batch * c.n * c.heads));
  const double scale = 1 / std::sqrt(static_cast<double>(c.d));
  std::vector<double> p(static_cast<std::size_t>(c.n)), dp(static_cast<std::size_t>(c.n));
  for (std::int64_t s = 0; s < c.batch; ++s) {
    for (std::int64_t t = 0; t < c.n; ++t) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        const std::size_t row = static_cast<std::size_t>((s * c.n + t) * c.heads + h), qi = row * static_cast<std::size_t>(c.d);
        const std::int64_t kv = h / (c.heads / c.kv_heads);
        const auto key = [&](std::int64_t j) { return static_cast<std::size_t>(((s * c.n + j) * c.kv_heads + kv) * c.d); };
        const auto width = static_cast<std::size_t>(c.d);
        double highest = -std::numeric_limits<double>::infinity(), total = 0, delta = 0;
        std::vector<std::int64_t> keys;
        for (std::int64_t j = 0; j <= t; ++j) {
          if (visible(c, c.layout(s), t, j)) {
            keys.push_back(j);
            double score = 0;
            for (std::size_t i = 0; i < width; ++i) {
              score += q[qi + i] * k[key(j) + i];
            }
            p[static_cast<std::size_t>(j)] = score * scale;
            highest = std::max(highest, score * scale);
          }
        }
        for (std::int64_t j : keys) {
          total += std::exp(p[static_cast<std::size_t>(j)] - highest);
        }
        r.lse[row] = highest + std::log(total);
        for (std::int64_t j : keys) {
          double& weight = p[static_cast<std::size_t>(j)];
          weight = std::exp(weight - r.lse[row]);
          double& gradient = dp[static_cast<std::size_t>(j)] = 0;
          for (std::size_t i = 0; i < width; ++i) {
            r.out[qi + i] += weight * v[key(j) + i];
            r.dv[key(j) + i] += weight * dout[qi + i];
            gradient += dout[qi + i] * v[key(j) + i];
          }
          delta += weight * gradient;
        }
        for (std::int64_t j : keys) {
          const double ds = p[static_cast<std::size_t>(j)] * (dp[static_cast<std::size_t>(j)] - delta) * scale;
          for (std::size_t i = 0; i < width; ++i) {
            r.dq[qi + i] += ds * k[key(j) + i];
            r.dk[key(j) + i] += ds * q[qi + i];
          }
        }
      }
    }
  }
  return r;
}

/// Runs the kernels with exactly the scratch that they ask for, between guard bytes.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(bytes + 192, std::byte{0xff}), bytes_(bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    offset_ = (64 - address % 64) % 64;
  }
  Launch launch() { return {.scratch = std::span(memory_).subspan(offset_, bytes_)}; }
  bool intact() const {
    return std::all_of(memory_.begin() + static_cast<std::ptrdiff_t>(offset_ + bytes_), memory_.end(),
                       [](std::byte b) { return b == std::byte{0xff}; });
  }

 private:
  std::vector<std::byte> memory_;
  std::size_t bytes_, offset_ = 0;
};

template <class T>
struct Problem {
  using A = Accumulator<T>;
  Case c;
  TableData table;
  Values<T> q, k, v, dout;

  explicit Problem(const Case& shape)
      : c(shape),
        table(shape),
        q(normals(shape.batch * shape.n * shape.heads * shape.d, 1)),
        k(normals(shape.batch * shape.n * shape.kv_heads * shape.d, 2)),
        v(normals(shape.batch * shape.n * shape.kv_heads * shape.d, 3)),
        dout(normals(shape.batch * shape.n * shape.heads * shape.d, 4)) {}

  Results run() {
    const Shape query{c.batch * c.n, c.heads, c.d}, key{c.batch * c.n, c.kv_heads, c.d};
    std::vector<T> out(q.data.size(), T(7)), dq(out), dk(k.data.size(), T(7)), dv(dk);
    std::vector<A> lse(static_cast<std::size_t>(c.batch * c.n * c.heads));
    const auto of = [](std::vector<T>& data, Shape shape) { return Tensor{data.data(), {kDTypeOf<T>, shape}}; };
    const Tensor lse_tensor{lse.data(), {kDTypeOf<A>, {c.batch * c.n, c.heads}}};
    const Tensor tq = q.tensor(query), tk = k.tensor(key), tv = v.tensor(key);
    Scratch forward(attention_workspace(tq.type, tk.type, c.n));
    attention(forward.launch(), of(out, query), lse_tensor, tq, tk, tv, table.table(), c.n);
    EXPECT_TRUE(forward.intact());
    Scratch backward(attention_backward_workspace(tq.type, tk.type, c.n));
    attention_backward(backward.launch(), of(dq, query), of(dk, key), of(dv, key), dout.tensor(query), of(out, query),
                       lse_tensor, tq, tk, tv, table.table(), c.n);
    EXPECT_TRUE(backward.intact());
    return {to_double(out), to_double(lse), to_double(dq), to_double(dk), to_double(dv)};
  }
};

double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);  // NaN anywhere makes this NaN, which fails every comparison
}
double largest_error(const std::vector<double>& got, const std::vector<double>& want) {
  double largest = 0, magnitude = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double difference = std::abs(got[i] - want[i]);
    largest = difference <= largest ? largest : difference;
    magnitude = std::max(magnitude, std::abs(want[i]));
  }
  return largest / magnitude;
}

std::vector<std::int64_t> uniform(std::int64_t n, std::int64_t period, std::int64_t shift = 0) {
  std::vector<std::int64_t> ends;
  for (std::int64_t j = 0; j < n; ++j) {
    if ((j + 1 + shift) % period == 0 || j == n - 1) {
      ends.push_back(j);
    }
  }
  return ends;
}
std::vector<std::int64_t> scattered(std::int64_t n, double density, std::uint32_t which) {
  RandomStream random(11, which);
  std::vector<std::int64_t> ends;
  for (std::int64_t j = 0; j < n; ++j) {
    if (random.uniform() < density || j == n - 1) {
      ends.push_back(j);
    }
  }
  return ends;
}
/// Packed documents: chunk ends restart at each document, whose last token ends a chunk.
Layout packed(std::int64_t n, std::int64_t period, std::vector<std::int64_t> starts) {
  Layout layout{{}, starts};
  starts.push_back(n);
  for (std::size_t i = 0; i + 1 < starts.size(); ++i) {
    for (std::int64_t end : uniform(starts[i + 1] - starts[i], period)) {
      layout.ends.push_back(starts[i] + end);
    }
  }
  return layout;
}

std::vector<Case> all_cases() {
  return {
      {"one_token", 1, 1, 1, 1, 8, 4, {{{0}}}},
      {"uniform", 1, 96, 2, 2, 64, 16, {{uniform(96, 8)}}},
      {"uniform_partial_last_chunk", 2, 77, 2, 2, 32, 16, {{uniform(77, 8)}}},
      {"cyclic_own_chunk_only", 2, 130, 4, 2, 32, 0, {{uniform(130, 8, 3)}}},
      {"window_of_one", 1, 70, 4, 4, 16, 1, {{uniform(70, 4, 1)}}},
      {"window_longer_than_sequence", 1, 70, 2, 1, 80, 1000, {{uniform(70, 8)}}},
      {"random_each_sequence_its_own",
       3,
       150,
       4,
       1,
       64,
       5,
       {{scattered(150, 0.15, 0)}, {scattered(150, 0.3, 1)}, {scattered(150, 0.02, 2)}}},
      {"explicit_all_at_once", 1, 90, 2, 2, 128, 3, {{{0, 1, 2, 3, 50, 51, 89}}}},
      {"every_position_ends_a_chunk", 1, 300, 2, 2, 64, 0, {{uniform(300, 1)}}},
      {"dense_causal", 2, 333, 2, 2, 64, 1000, {{{}}}},
      {"dense_causal_wide_head", 1, 140, 3, 1, 128, 1000, {{{}}}},
      {"sliding_window", 1, 400, 2, 2, 32, 37, {{{}}}},
      {"packed_documents", 2, 200, 4, 2, 64, 16, {packed(200, 8, {0, 1, 40, 41, 137}), packed(200, 8, {0, 64})}},
      {"packed_documents_own_chunk", 1, 200, 2, 2, 8, 0, {packed(200, 8, {0, 3, 77, 150})}},
      {"packed_dense", 1, 200, 2, 2, 64, 1000, {{{}, {0, 33, 99, 198}}}},
      {"odd_head_size", 1, 61, 3, 3, 5, 7, {{uniform(61, 5)}}},
      {"head_size_1", 1, 40, 2, 1, 1, 7, {{uniform(40, 5)}}},
      {"head_size_256", 1, 40, 2, 2, 256, 7, {{uniform(40, 5)}}},
      {"three_queries_per_key", 1, 100, 6, 2, 24, 9, {{uniform(100, 6)}}},
      {"seventy_queries_per_key", 1, 30, 70, 1, 16, 4, {{uniform(30, 6)}}},
      {"long", 1, 1100, 1, 1, 64, 16, {{uniform(1100, 8, 5)}}},
  };
}

class Attention : public testing::TestWithParam<Case> {};

/// Sums of `keys` rounded terms leave a relative error of about eps * sqrt(keys); the softmax's own errors are of that order.
template <class T>
void compare_with_reference(const Case& c) {
  Problem<T> problem(c);
  const Results got = problem.run();
  const Results want = reference(c, problem.q.exact, problem.k.exact, problem.v.exact, problem.dout.exact);
  double rounding = 1e-6 * std::sqrt(static_cast<double>(c.n));
  double gradient_rounding = rounding;
  if (std::is_same_v<T, double>) {
    rounding = gradient_rounding = 1e-14 * std::sqrt(static_cast<double>(c.n));
  } else if (std::is_same_v<T, bfloat16>) {
    rounding = 0x1p-8;             // one rounding of the result: at most 2^-9 of each element
    gradient_rounding = 0x1.8p-8;  // and out, rounded, enters the gradients through delta
  }
  const double lse_rounding = std::is_same_v<T, double> ? 1e-14 * 32 : 1e-6 * 4;
  EXPECT_LT(relative_error(got.out, want.out), rounding);
  EXPECT_LT(largest_error(got.out, want.out), 4 * rounding);
  EXPECT_LT(largest_error(got.lse, want.lse), lse_rounding * std::sqrt(static_cast<double>(c.d)));
  EXPECT_LT(relative_error(got.dv, want.dv), rounding);
  EXPECT_LT(largest_error(got.dv, want.dv), 4 * rounding);
  if (c.n == 1) {  // one key: its weight is 1 whatever q and k are
    return;
  }
  EXPECT_LT(relative_error(got.dq, want.dq), gradient_rounding);
  EXPECT_LT(largest_error(got.dq, want.dq), 4 * gradient_rounding);
  EXPECT_LT(relative_error(got.dk, want.dk), gradient_rounding);
  EXPECT_LT(largest_error(got.dk, want.dk), 4 * gradient_rounding);
}

TEST_P(Attention, Float32MatchesDenseReference) {
  compare_with_reference<float>(GetParam());
}
TEST_P(Attention, Bfloat16MatchesDenseReference) {
  compare_with_reference<bfloat16>(GetParam());
}
TEST_P(Attention, Float64MatchesDenseReference) {
  compare_with_reference<double>(GetParam());
}

/// The result of the query in the middle does not change with what the keys hold that it must not see.
TEST_P(Attention, UnseenKeysDoNotMatter) {
  const Case& c = GetParam();
  Problem<float> problem(c);
  const Results want = problem.run();
  std::vector<bool> seen(static_cast<std::size_t>(c.batch * c.n), false);
  for (std::int64_t s = 0; s < c.batch; ++s) {
    for (std::int64_t j = 0; j < c.n; ++j) {
      seen[static_cast<std::size_t>(s * c.n + j)] = visible(c, c.layout(s), c.n / 2, j);
    }
  }
  for (std::size_t row = 0; row < seen.size(); ++row) {
    if (!seen[row]) {
      const std::size_t width = static_cast<std::size_t>(c.kv_heads * c.d);
      std::fill_n(problem.k.data.begin() + static_cast<std::ptrdiff_t>(row * width), width, 3e4f);
      std::fill_n(problem.v.data.begin() + static_cast<std::ptrdiff_t>(row * width), width, -3e4f);
    }
  }
  const Results got = problem.run();
  for (std::int64_t s = 0; s < c.batch; ++s) {
    const auto width = static_cast<std::size_t>(c.heads * c.d);
    const std::size_t first = static_cast<std::size_t>(s * c.n + c.n / 2) * width;
    for (std::size_t i = first; i < first + width; ++i) {
      ASSERT_FLOAT_EQ(static_cast<float>(got.out[i]), static_cast<float>(want.out[i])) << "sequence " << s;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, Attention, testing::ValuesIn(all_cases()),
                         [](const auto& instance) { return instance.param.name; });

TEST(AttentionGradient, AgreesWithFiniteDifferences) {
  const Case c{"", 1, 12, 2, 1, 4, 3, {{uniform(12, 4)}}};
  Problem<double> problem(c);
  const Results analytic = problem.run();
  const auto loss = [&] {
    const Results r = problem.run();
    double total = 0;
    for (std::size_t i = 0; i < r.out.size(); ++i) {
      total += r.out[i] * problem.dout.data[i];
    }
    return total;
  };
  const auto check = [&](std::vector<double>& values, const std::vector<double>& gradient) {
    for (std::size_t i = 0; i < values.size(); i += 3) {
      const double kept = values[i], step = 1e-5;
      values[i] = kept + step;
      const double up = loss();
      values[i] = kept - step;
      const double down = loss();
      values[i] = kept;
      EXPECT_NEAR((up - down) / (2 * step), gradient[i], 1e-8);
    }
  };
  check(problem.q.data, analytic.dq);
  check(problem.k.data, analytic.dk);
  check(problem.v.data, analytic.dv);
}

TEST(AttentionThreads, ResultsAreBitwiseTheSame) {
  const Case c{"", 2, 300, 4, 2, 64, 16, {packed(300, 8, {0, 100}), {uniform(300, 8)}}};
  const int before = omp_get_max_threads();
  std::vector<Results> results;
  for (int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    results.push_back(Problem<float>(c).run());
  }
  omp_set_num_threads(before);
  for (std::size_t i = 1; i < results.size(); ++i) {
    EXPECT_EQ(results[i].out, results[0].out);
    EXPECT_EQ(results[i].lse, results[0].lse);
    EXPECT_EQ(results[i].dq, results[0].dq);
    EXPECT_EQ(results[i].dk, results[0].dk);
    EXPECT_EQ(results[i].dv, results[0].dv);
  }
}

/// Scores far apart: nothing overflows, and one key takes all the weight.
TEST(AttentionRange, LargeScoresStayFinite) {
  const Case c{"", 1, 80, 1, 1, 16, 16, {{uniform(80, 8)}}};
  Problem<float> problem(c);
  for (float& value : problem.q.data) {
    value *= 300;
  }
  problem.q.exact = to_double(problem.q.data);
  const Results got = problem.run();
  const Results want = reference(c, problem.q.exact, problem.k.exact, problem.v.exact, problem.dout.exact);
  EXPECT_LT(relative_error(got.out, want.out), 1e-3);  // scores near 1000 carry errors near 1e-4
  EXPECT_LT(relative_error(got.dv, want.dv), 1e-3);
}

TEST(AttentionErrors, NameTheTensorOrTheToken) {
  const Case c{"", 1, 16, 2, 2, 8, 4, {{uniform(16, 4)}}};
  Problem<float> problem(c);
  problem.table.key_end[9] = 17;
  EXPECT_THROW(
      {
        try {
          problem.run();
        } catch (const Error& error) {
          EXPECT_NE(std::string(error.what()).find("token 9"), std::string::npos) << error.what();
          throw;
        }
      },
      Error);
  problem.table = TableData(c);
  problem.table.ends[1] = 16;
  EXPECT_THROW(problem.run(), Error);
  EXPECT_THROW(attention_workspace({DType::float32, {16, 3, 8}}, {DType::float32, {16, 2, 8}}, 16), Error);
  EXPECT_THROW(attention_workspace({DType::float32, {16, 2, 8}}, {DType::float32, {16, 2, 8}}, 7), Error);
}

}  // namespace
}  // namespace attamba::kernels::cpu
