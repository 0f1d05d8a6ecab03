// The causal convolution against its definition in float64. Its gradients are checked by finite differences in tests/ops.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/kernels.h"
#include "src/core/error.h"
#include "tests/kernels/pointwise_support.h"

namespace attamba::kernels::cpu {
namespace {

/// Chunks of 1, 2, 3, ... rows.
Array<std::int32_t> growing_chunks(std::int64_t rows) {
  Array<std::int32_t> starts({rows});
  std::int64_t start = 0, length = 1;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (t == start + length) {
      start = t;
      ++length;
    }
    starts[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(start);
  }
  return starts;
}

template <class T>
class CausalConv : public ::testing::Test {};
TYPED_TEST_SUITE(CausalConv, ComputeTypes);

TYPED_TEST(CausalConv, IsItsDefinition) {
  for (const Shape& shape : {Shape{1, 1}, Shape{29, 7}, Shape{300, 131}}) {  // more than a task's rows and columns
    for (const std::int64_t taps : {1, 4, 8}) {
      auto x = random_array<TypeParam>(shape, 1);
      auto w = random_array<Accumulator<TypeParam>>({shape[1], taps}, 2);
      auto starts = growing_chunks(shape[0]);
      Array<TypeParam> out(shape, NAN);
      causal_conv_silu({}, out.tensor(), x.tensor(), w.tensor(), starts.tensor());
      for (std::int64_t i = 0; i < shape.elements(); ++i) {
        const std::int64_t t = i / shape[1], c = i % shape[1];
        double y = 0, size = 0;
        for (std::int64_t j = 0; j < taps && t - j >= starts[static_cast<std::size_t>(t)]; ++j) {
          const double term =
              w.real(static_cast<std::size_t>(c * taps + taps - 1 - j)) * x.real(static_cast<std::size_t>(i - j * shape[1]));
          y += term;
          size += std::abs(term);
        }
        const double expected = y / (1 + std::exp(-y)), inner = rounding<Accumulator<TypeParam>>();
        ASSERT_NEAR(out.real(static_cast<std::size_t>(i)), expected,
                    rounding<TypeParam>() * std::abs(expected) + 16 * inner * (size + std::abs(expected)))
            << "row " << t << " column " << c;
      }
    }
  }
}

TEST(CausalConvThreads, TheirNumberDoesNotMatter) {
  const Shape shape{400, 130};
  auto x = random_array<float>(shape, 1), dout = random_array<float>(shape, 3), w = random_array<float>({130, 4}, 2);
  auto starts = growing_chunks(shape[0]);
  Array<float> dx(shape), dweight(w.shape);
  const auto run = [&] {
    dweight = Array<float>(w.shape, 0.5);
    const Scratch scratch(causal_conv_silu_backward_workspace(x.tensor().type, w.tensor().type));
    causal_conv_silu_backward(scratch.launch(), dx.tensor(), dweight.tensor(), dout.tensor(), x.tensor(), w.tensor(),
                              starts.tensor());
  };
  expect_same_for_any_thread_count([&] {
    run();
    return dx;
  });
  expect_same_for_any_thread_count([&] {
    run();
    return dweight;
  });
}

TEST(CausalConvErrors, NameWhatDoesNotFit) {
  Array<float> x({6, 4}), w({4, 9}), out({6, 4});
  auto starts = growing_chunks(6);
  try {
    causal_conv_silu({}, out.tensor(), x.tensor(), w.tensor(), starts.tensor());
    FAIL() << "nine taps were taken";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("9 taps; 1 to 8"));
  }
}

}  // namespace
}  // namespace attamba::kernels::cpu
