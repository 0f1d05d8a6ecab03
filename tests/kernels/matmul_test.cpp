#include <gtest/gtest.h>
#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/benchmarks.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/matmul_onednn.h"
#include "kernels/kernels.h"
#include "src/core/random.h"
#include "tests/kernels/assumed.h"

namespace attamba::kernels::cpu {
namespace {

using Bytes = std::vector<std::byte>;

template <class T>
double value_of(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<float>(value);
  } else {
    return value;
  }
}

template <class T>
std::vector<T> random_values(std::int64_t count, std::uint64_t seed) {
  RandomStream random(seed);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (auto& value : values) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      value = bfloat16(static_cast<float>(random.normal()));
    } else {
      value = static_cast<T>(random.normal());
    }
  }
  return values;
}

template <class T>
Tensor view(std::vector<T>& values, Shape shape) {
  return {values.data(), {kDTypeOf<T>, shape}};
}

void run(const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b, const Tensor& addend) {
  // Offset by hand: scratch is promised to be 64-byte aligned.
  Bytes memory(matmul_workspace(out.type, a.type, b.type, transpose_a, transpose_b) + 64);
  void* start = memory.data();
  std::size_t space = memory.size();
  std::align(64, memory.size() - 64, start, space);
  Launch launch;
  launch.scratch = {static_cast<std::byte*>(start), memory.size() - 64};
  matmul(launch, out, a, b, transpose_a, transpose_b, addend);
}

class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

struct Case {
  std::int64_t m, n, k;
  bool transpose_a, transpose_b;
  enum Addend { none, separate, in_place } addend;
};

/// |computed - exact| <= unit * exact's size + what float sums of k products may drift.
template <class In, class Out>
void expect_product(const Case& c) {
  SCOPED_TRACE(concat(name_of(kDTypeOf<In>), " to ", name_of(kDTypeOf<Out>), " ", c.m, "x", c.n, "x", c.k, " ta ",
                      c.transpose_a, " tb ", c.transpose_b, " addend ", c.addend));
  auto a = random_values<In>(c.m * c.k, 1), b = random_values<In>(c.k * c.n, 2);
  auto addend = random_values<Out>(c.m * c.n, 3);
  std::vector<Out> out(addend);
  if (c.addend != Case::in_place) {
    std::memset(static_cast<void*>(out.data()), 0xff, out.size() * sizeof(Out));  // NaN: nothing may be read
  }
  const Tensor to = view(out, {c.m, c.n});
  run(to, view(a, c.transpose_a ? Shape{c.k, c.m} : Shape{c.m, c.k}),
      view(b, c.transpose_b ? Shape{c.n, c.k} : Shape{c.k, c.n}), c.transpose_a, c.transpose_b,
      c.addend == Case::none       ? Tensor{}
      : c.addend == Case::in_place ? to
                                   : view(addend, {c.m, c.n}));

  const double sum_unit = std::is_same_v<In, double> ? 0x1p-53 : 0x1p-24;
  const double round_unit = std::is_same_v<Out, bfloat16> ? 0x1p-8 : sum_unit;  // half of bfloat16's 2^-7 spacing, with slack
  for (std::int64_t i = 0; i < c.m; ++i) {
    for (std::int64_t j = 0; j < c.n; ++j) {
      long double sum = c.addend == Case::none ? 0.0 : value_of(addend[i * c.n + j]), size = std::abs(sum);
      for (std::int64_t k = 0; k < c.k; ++k) {
        const long double term = static_cast<long double>(value_of(a[c.transpose_a ? k * c.m + i : i * c.k + k])) *
                                 value_of(b[c.transpose_b ? j * c.k + k : k * c.n + j]);
        sum += term;
        size += std::abs(term);
      }
      // Each of the k additions rounds a partial sum of about sqrt(k) terms: together about `size`; 4 deviations.
      const auto tolerance = static_cast<double>(round_unit * std::abs(sum) + 4 * sum_unit * size);
      ASSERT_NEAR(value_of(out[i * c.n + j]), static_cast<double>(sum), tolerance) << "at " << i << ", " << j;
    }
  }
}

template <class In, class Out>
void expect_products() {
  const std::int64_t extents[][3] = {{1, 1, 1}, {3, 5, 7}, {1, 300, 40}, {130, 1, 600}, {129, 257, 33}, {70, 40, 1100}};
  for (const auto& [m, n, k] : extents) {
    for (const bool transpose_a : {false, true}) {
      for (const bool transpose_b : {false, true}) {
        for (const auto addend : {Case::none, Case::separate, Case::in_place}) {
          expect_product<In, Out>({m, n, k, transpose_a, transpose_b, addend});
        }
      }
    }
  }
  expect_product<In, Out>({64, 1680, 512, false, true, Case::none});
}

TEST(Matmul, Float32) {
  expect_products<float, float>();
}
TEST(Matmul, Float64) {
  expect_products<double, double>();
}
TEST(Matmul, Bfloat16) {
  expect_products<bfloat16, bfloat16>();
}
TEST(Matmul, Bfloat16ToFloat32) {
  expect_products<bfloat16, float>();
}

/// The other way of multiplying bfloat16 than this processor's: converted instead of native, or the reverse, where tiles that
/// oneDNN refuses must be converted with the scratch that was planned.
TEST(Matmul, Bfloat16TheOtherWay) {
  const Assumed other(assume_native_bfloat16, !has_native_bfloat16());
  expect_products<bfloat16, bfloat16>();
  expect_products<bfloat16, float>();
}

/// Products by the libraries, which other processors use: float32 as it is, bfloat16 converted.
TEST(Matmul, InTheLibrary) {
  const Assumed library(assume_own_gemm, false);
  expect_products<float, float>();
  expect_products<bfloat16, bfloat16>();
  expect_products<bfloat16, float>();
}

TEST(Matmul, FlattensLeadingDimensions) {
  auto x = random_values<double>(2 * 3 * 4, 1), w = random_values<double>(5 * 4, 2), dy = random_values<double>(2 * 3 * 5, 3);
  std::vector<double> y(2 * 3 * 5), dw(5 * 4);
  run(view(y, {2, 3, 5}), view(x, {2, 3, 4}), view(w, {5, 4}), false, true, {});
  run(view(dw, {5, 4}), view(dy, {2, 3, 5}), view(x, {2, 3, 4}), true, false, {});
  double expected_y = 0, expected_dw = 0;
  for (int i = 0; i < 4; ++i) {
    expected_y += x[5 * 4 + i] * w[2 * 4 + i];
  }
  for (int t = 0; t < 6; ++t) {
    expected_dw += dy[t * 5 + 2] * x[t * 4 + 3];
  }
  EXPECT_NEAR(y[5 * 5 + 2], expected_y, 1e-14);
  EXPECT_NEAR(dw[2 * 4 + 3], expected_dw, 1e-14);
}

TEST(Matmul, EmptySumIsTheAddend) {
  std::vector<float> a, b, out{1, 2}, addend{3, 4};
  run(view(out, {1, 2}), view(a, {1, 0}), view(b, {2, 0}), false, true, view(addend, {1, 2}));
  EXPECT_EQ(out, addend);
  run(view(out, {1, 2}), view(a, {1, 0}), view(b, {2, 0}), false, true, {});
  EXPECT_EQ(out, (std::vector<float>{0, 0}));
}

TEST(Matmul, MismatchNamesBothOperands) {
  std::vector<float> a(6), b(8), out(4);
  try {
    run(view(out, {2, 2}), view(a, {2, 3}), view(b, {4, 2}), false, false, {});
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("float32[2, 3]"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("float32[4, 2]"), std::string::npos) << error.what();
  }
}

/// Bit for bit the same with 1, 2 and 3 threads, and inside a parallel region.
template <class In, class Out>
void expect_same_for_all_threads() {
  auto a = random_values<In>(300 * 700, 1), b = random_values<In>(520 * 700, 2);
  const auto start = random_values<Out>(300 * 520, 3);
  const auto compute = [&] {
    std::vector<Out> out(start);
    const Tensor to = view(out, {300, 520});
    run(to, view(a, {300, 700}), view(b, {520, 700}), false, true, to);
    return out;
  };
  const auto same = [](const std::vector<Out>& x, const std::vector<Out>& y) {
    return std::memcmp(x.data(), y.data(), x.size() * sizeof(Out)) == 0;
  };
  std::vector<Out> one;
  {
    const Threads threads(1);
    one = compute();
  }
  for (const int count : {2, 3}) {
    const Threads threads(count);
    EXPECT_TRUE(same(one, compute())) << count << " threads";
  }
  std::vector<Out> inside[2];
#pragma omp parallel for num_threads(2)
  for (int i = 0; i < 2; ++i) {
    inside[i] = compute();
  }
  EXPECT_TRUE(same(one, inside[0]) && same(one, inside[1])) << "inside a parallel region";
}

TEST(Matmul, DoesNotDependOnThreads) {
  expect_same_for_all_threads<float, float>();
  expect_same_for_all_threads<double, double>();
  expect_same_for_all_threads<bfloat16, bfloat16>();
  expect_same_for_all_threads<bfloat16, float>();
}

TEST(Matmul, InTheLibraryDoesNotDependOnThreads) {
  const Assumed library(assume_own_gemm, false);
  expect_same_for_all_threads<float, float>();
  expect_same_for_all_threads<bfloat16, bfloat16>();
}

TEST(Matmul, ScratchOfOneWorkerServesMoreThreads) {
  auto a = random_values<bfloat16>(300 * 64, 1), b = random_values<bfloat16>(64 * 600, 2);
  std::vector<bfloat16> out(300 * 600), expected(out.size());
  run(view(expected, {300, 600}), view(a, {300, 64}), view(b, {64, 600}), false, false, {});
  const Tensor to = view(out, {300, 600});
  std::size_t bytes = 0;
  {
    const Threads threads(1);
    bytes = matmul_workspace(to.type, view(a, {300, 64}).type, view(b, {64, 600}).type, false, false);
  }
  std::unique_ptr<std::byte, decltype(&std::free)> memory(
      static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
  const Threads threads(3);
  matmul({.scratch = {memory.get(), bytes}}, to, view(a, {300, 64}), view(b, {64, 600}), false, false, {});
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(bfloat16)), 0);
}

/// The oneDNN tiles in float32, which every processor multiplies: strides, transpositions, accumulation, and use by several
/// threads at once.
TEST(MatmulOneDnn, AgreesWithOpenBlasInFloat32) {
  for (const bool transpose_a : {false, true}) {
    for (const bool transpose_b : {false, true}) {
      for (const bool accumulate : {false, true}) {
        SCOPED_TRACE(concat(transpose_a, transpose_b, accumulate));
        const TileProduct tile{.m = 37,
                               .n = 51,
                               .k = 90,
                               .a_stride = 100,
                               .b_stride = 110,
                               .c_stride = 60,
                               .transpose_a = transpose_a,
                               .transpose_b = transpose_b,
                               .accumulate = accumulate};
        const auto a = random_values<float>(100 * 100, 1), b = random_values<float>(110 * 110, 2);
        const auto start = random_values<float>(60 * 60, 3);
        std::vector<float> expected(start);
        {
          const Assumed library(assume_own_gemm, false);
          run_tile(tile, expected.data(), a.data(), b.data(), nullptr);
        }
        std::vector<float> got[4];
        bool accepted[4];
#pragma omp parallel for num_threads(2)
        for (int i = 0; i < 4; ++i) {
          got[i] = start;
          Bytes scratch(onednn_scratch_bytes(tile) + 64);
          accepted[i] = run_onednn_tile(tile, got[i].data(), a.data(), b.data(), scratch.data());
        }
        for (int i = 0; i < 4; ++i) {
          ASSERT_TRUE(accepted[i]);
          ASSERT_EQ(std::memcmp(got[0].data(), got[i].data(), start.size() * sizeof(float)), 0) << "run " << i;
        }
        for (std::size_t i = 0; i < start.size(); ++i) {
          ASSERT_NEAR(got[0][i], expected[i], 90 * 0x1p-22) << "at " << i;  // also: nothing outside of the tile is touched
        }
      }
    }
  }
}

TEST(MatmulOneDnn, RefusesWithoutTouching) {
  const std::string isa = onednn_bfloat16_isa();
  EXPECT_TRUE(!has_native_bfloat16() || !isa.empty());
  if (!isa.empty()) {
    GTEST_SKIP() << "oneDNN multiplies bfloat16 here, by " << isa;
  }
  const TileProduct tile{.m = 4, .n = 4, .k = 4, .a_stride = 4, .b_stride = 4, .c_stride = 4, .input = DType::bfloat16};
  const std::vector<bfloat16> a(16), b(16);
  std::vector<float> c(16, 7.0f);
  EXPECT_FALSE(run_onednn_tile(tile, c.data(), a.data(), b.data(), nullptr));
  EXPECT_EQ(c, std::vector<float>(16, 7.0f));
}

/// Both sides of `attamba bench matmul` compute the same, so that their times may be compared.
template <class In, class Out>
void expect_library_agrees() {
  for (int flags = 0; flags < 8; ++flags) {
    const bool transpose_a = flags & 1, transpose_b = flags & 2, accumulate = flags & 4;
    SCOPED_TRACE(concat(name_of(kDTypeOf<In>), " ", flags));
    auto a = random_values<In>(40 * 70, 1), b = random_values<In>(70 * 50, 2);
    auto expected = random_values<Out>(40 * 50, 3);
    std::vector<Out> got(expected);
    const Tensor left = view(a, transpose_a ? Shape{70, 40} : Shape{40, 70});
    const Tensor right = view(b, transpose_b ? Shape{50, 70} : Shape{70, 50});
    const Tensor ours = view(expected, {40, 50});
    run(ours, left, right, transpose_a, transpose_b, accumulate ? ours : Tensor{});
    library_matmul(view(got, {40, 50}), left, right, transpose_a, transpose_b, accumulate)();
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], 70 * (std::is_same_v<In, double> ? 0x1p-50 : 0x1p-21)) << "at " << i;
    }
  }
}

TEST(MatmulPeak, LibraryAloneComputesTheSameAsMatmul) {
  expect_library_agrees<float, float>();
  expect_library_agrees<double, double>();
  if (library_operand_type(DType::bfloat16) == DType::bfloat16) {
    expect_library_agrees<bfloat16, float>();
  } else {
    std::vector<bfloat16> values(4);
    const Tensor matrix = view(values, {2, 2});
    EXPECT_THROW(library_matmul(matrix, matrix, matrix, false, false, false), Error);
  }
}

TEST(MatmulPeak, LibraryLeavesTheNumberOfThreads) {
  const Threads threads(2);
  expect_library_agrees<float, float>();
  EXPECT_EQ(omp_get_max_threads(), 2);
}

TEST(MatmulPeak, IsMeasuredAndNamed) {
  EXPECT_GT(measure_matmul_peak(DType::float32, 0.01), 1e8);
  EXPECT_NE(std::string(library_name(DType::float32)).find("OpenBLAS"), std::string::npos);
  EXPECT_EQ(std::string(matmul_library(DType::float32)).find("own") != std::string::npos, has_own_gemm());
  EXPECT_EQ(std::string(matmul_library(DType::float64)), library_name(DType::float64));
  EXPECT_NE(std::string(matmul_library(DType::bfloat16)), "");
  EXPECT_THROW(measure_matmul_peak(DType::int32, 0.01), Error);
}

}  // namespace
}  // namespace attamba::kernels::cpu
