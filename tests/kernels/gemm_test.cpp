#include "kernels/cpu/gemm.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "src/core/device.h"
#include "src/core/error.h"
#include "src/core/random.h"
#include "tests/kernels/assumed.h"

namespace attamba::kernels::cpu {
namespace {

/// A matrix with room around it: `stride` is longer than a row, and what lies between rows is NaN.
template <class T>
class Padded {
 public:
  Padded(std::int64_t rows, std::int64_t columns, std::uint64_t seed)
      : rows_(rows),
        columns_(columns),
        stride_(columns + 5),
        values_(static_cast<std::size_t>((rows + 1) * stride_), not_a_number()) {
    RandomStream random(seed);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        values_[i * stride_ + j] = static_cast<T>(static_cast<float>(random.normal()));
      }
    }
  }

  double at(std::int64_t row, std::int64_t column) const { return static_cast<float>(values_[row * stride_ + column]); }
  GemmOperand operand(bool depth_first) const {
    return {values_.data(), stride_, depth_first, std::is_same_v<T, float> ? DType::float32 : DType::bfloat16};
  }
  GemmSums sums() { return {values_.data(), stride_, std::is_same_v<T, float> ? DType::float32 : DType::bfloat16}; }
  const T* row(std::int64_t i) const { return values_.data() + i * stride_; }
  std::int64_t columns() const { return columns_; }
  /// Whether all that lies around the matrix is still NaN.
  bool surroundings_are_whole() const {
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(values_.size()); ++i) {
      const bool inside = i / stride_ < rows_ && i % stride_ < columns_;
      if (!inside && !std::isnan(static_cast<float>(values_[i]))) {
        return false;
      }
    }
    return true;
  }

 private:
  static T not_a_number() { return static_cast<T>(std::numeric_limits<float>::quiet_NaN()); }
  std::int64_t rows_, columns_, stride_;
  std::vector<T> values_;
};

void run(const GemmProblem& problem, int workers) {
  const Memory scratch(Device::cpu, gemm_scratch_bytes(problem, workers), "a test");
  std::memset(scratch.data(), 0xff, gemm_scratch_bytes(problem, workers));  // NaN: scratch is undefined
  gemm(problem, scratch.data(), gemm_scratch_bytes(problem, workers), workers);
}

enum class Addend { none, apart, in_place };

class Gemm : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_own_gemm()) {
      GTEST_SKIP() << "no AVX2";
    }
  }

 private:
  const Assumed own_{assume_own_gemm, true};
};

template <class In, class Out>
void expect_product(std::int64_t m, std::int64_t n, std::int64_t k, int flags, Addend how) {
  SCOPED_TRACE(
      concat(m, "x", n, "x", k, " flags ", flags, " addend ", static_cast<int>(how), " sizes ", sizeof(In), sizeof(Out)));
  const bool a_depth_first = flags & 1, b_depth_first = flags & 2;
  const Padded<In> a(a_depth_first ? k : m, a_depth_first ? m : k, 1), b(b_depth_first ? k : n, b_depth_first ? n : k, 2);
  Padded<Out> addend(m, n, 3), out(m, n, 3);
  run({m, n, k, a.operand(a_depth_first), b.operand(b_depth_first), out.sums(),
       how == Addend::none    ? GemmSums{}
       : how == Addend::apart ? addend.sums()
                              : out.sums()},
      2);
  EXPECT_TRUE(out.surroundings_are_whole());
  const double round_unit = std::is_same_v<Out, bfloat16> ? 0x1p-8 : 0x1p-24;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = how == Addend::none ? 0.0 : addend.at(i, j), size = std::abs(sum);
      for (std::int64_t d = 0; d < k; ++d) {
        const double term = (a_depth_first ? a.at(d, i) : a.at(i, d)) * (b_depth_first ? b.at(d, j) : b.at(j, d));
        sum += term;
        size += std::abs(term);
      }
      // As in matmul_test: k roundings of partial sums of about sqrt(k) terms, four deviations.
      ASSERT_NEAR(out.at(i, j), sum, round_unit * std::abs(sum) + 4 * 0x1p-24 * size) << "at " << i << ", " << j;
    }
  }
}

template <class In, class Out>
void expect_products() {
  const std::int64_t extents[][3] = {{1, 1, 1},     {5, 15, 7},     {6, 16, 8},    {7, 17, 9},     {13, 33, 255},
                                     {12, 48, 256}, {191, 20, 257}, {200, 70, 40}, {30, 129, 600}, {64, 64, 1030}};
  for (const auto& [m, n, k] : extents) {
    for (int flags = 0; flags < 4; ++flags) {
      for (const Addend how : {Addend::none, Addend::apart, Addend::in_place}) {
        expect_product<In, Out>(m, n, k, flags, how);
      }
    }
  }
}

TEST_F(Gemm, Float32) {
  expect_products<float, float>();
}
TEST_F(Gemm, Bfloat16) {
  expect_products<bfloat16, bfloat16>();
}
TEST_F(Gemm, Bfloat16ToFloat32) {
  expect_products<bfloat16, float>();
}

TEST_F(Gemm, OnAvx2) {
  const Assumed avx2(assume_avx512, false);
  expect_products<float, float>();
  expect_products<bfloat16, float>();
}

/// Runs do not depend on the processor.
TEST_F(Gemm, BothInstructionSetsGiveTheSameBits) {
  if (!gemm_uses_avx512()) {
    GTEST_SKIP() << "no AVX-512";
  }
  for (const auto& [m, n, k] : {std::tuple{24, 64, 256}, {6, 16, 32}, {7, 33, 70}, {95, 47, 601}, {200, 1100, 300}}) {
    const Padded<float> a(m, k, 1), b(k, n, 2);
    Padded<float> narrow(m, n, 3), wide(m, n, 3);
    const GemmProblem problem{m, n, k, a.operand(false), b.operand(true), wide.sums(), wide.sums()};
    run(problem, 2);
    const Assumed avx2(assume_avx512, false);
    run({m, n, k, a.operand(false), b.operand(true), narrow.sums(), narrow.sums()}, 2);
    for (std::int64_t i = 0; i < m; ++i) {
      ASSERT_EQ(std::memcmp(narrow.row(i), wide.row(i), static_cast<std::size_t>(n) * sizeof(float)), 0)
          << m << "x" << n << "x" << k << ", row " << i;
    }
  }
}

/// Sums over more depth than is packed at a time, and more columns.
TEST_F(Gemm, ManyChunks) {
  expect_product<float, float>(7, 1100, 4200, 3, Addend::in_place);
  expect_product<float, float>(7, 1100, 4200, 0, Addend::none);
  expect_product<bfloat16, bfloat16>(7, 1100, 4200, 2, Addend::apart);
}

/// Every element is the same bit for bit, whatever part of the output is computed in one call and by how many threads.
template <class In, class Out>
void expect_same_however_cut(std::int64_t m, std::int64_t n, std::int64_t k) {
  const Padded<In> a(k, m, 1), b(n, k, 2);
  Padded<Out> whole(m, n, 3);
  run({m, n, k, a.operand(true), b.operand(false), whole.sums(), {}}, 1);
  const auto expect_same = [&](const Padded<Out>& part, std::int64_t row, std::int64_t column, std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i) {
      ASSERT_EQ(std::memcmp(part.row(i), whole.row(row + i) + column, part.columns() * sizeof(Out)), 0) << "row " << row + i;
    }
  };
  for (const int workers : {2, 3, 7}) {
    SCOPED_TRACE(concat(workers, " workers"));
    Padded<Out> out(m, n, 4);
    omp_set_num_threads(workers);
    run({m, n, k, a.operand(true), b.operand(false), out.sums(), {}}, workers);
    expect_same(out, 0, 0, m);
  }
  const std::int64_t row = 11, column = 21, rows = m - 30, columns = n - 50;  // other edges, other tiles
  Padded<Out> part(rows, columns, 5);
  run({rows, columns, k, a.operand(true).from(row, 0), b.operand(false).from(column, 0), part.sums(), {}}, 2);
  expect_same(part, row, column, rows);
}

TEST_F(Gemm, DoesNotDependOnHowItIsCut) {
  const int threads = omp_get_max_threads();
  expect_same_however_cut<float, float>(230, 310, 700);
  expect_same_however_cut<float, float>(60, 1200, 2500);
  expect_same_however_cut<bfloat16, bfloat16>(230, 310, 700);
  expect_same_however_cut<bfloat16, float>(230, 310, 300);
  omp_set_num_threads(threads);
}

/// bfloat16 operands give exactly what their float32 copies give: packing widens, nothing else.
TEST_F(Gemm, Bfloat16IsWidenedExactly) {
  const std::int64_t m = 50, n = 70, k = 300;
  const Padded<bfloat16> a(m, k, 1), b(k, n, 2);
  Padded<float> wide_a(m, k, 1), wide_b(k, n, 2), got(m, n, 3), expected(m, n, 3);
  for (auto [narrow, wide, rows] : {std::tuple{&a, &wide_a, m}, {&b, &wide_b, k}}) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < wide->columns(); ++j) {
        static_cast<float*>(wide->sums().data)[i * wide->sums().stride + j] = static_cast<float>(narrow->at(i, j));
      }
    }
  }
  run({m, n, k, a.operand(false), b.operand(true), got.sums(), {}}, 1);
  run({m, n, k, wide_a.operand(false), wide_b.operand(true), expected.sums(), {}}, 1);
  for (std::int64_t i = 0; i < m; ++i) {
    ASSERT_EQ(std::memcmp(got.row(i), expected.row(i), n * sizeof(float)), 0) << "row " << i;
  }
}

TEST_F(Gemm, TooLittleScratchIsAnError) {
  Padded<float> a(8, 8, 1);
  const GemmProblem problem{8, 8, 8, a.operand(false), a.operand(true), a.sums(), {}};
  EXPECT_THROW(gemm(problem, nullptr, 0, 1), Error);
}

}  // namespace
}  // namespace attamba::kernels::cpu
