// The linear recurrence against its definition in float64. Its gradients are checked by finite differences in tests/ops.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "src/core/error.h"
#include "tests/kernels/pointwise_support.h"

namespace attamba::kernels::cpu {
namespace {

using ::testing::HasSubstr;

constexpr RecurrenceForm kForms[] = {RecurrenceForm::plain, RecurrenceForm::min_gru, RecurrenceForm::rg_lru};

double exact_sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

/// a and b of one element.
struct Step {
  double a, b;
  Step(RecurrenceForm form, double in_a, double in_b, double u, double rate) : a(in_a), b(in_b) {
    if (form == RecurrenceForm::min_gru) {
      a = exact_sigmoid(-in_a);
      b = exact_sigmoid(in_a) * in_b;
    } else if (form == RecurrenceForm::rg_lru) {
      const double log_a = -8 * exact_sigmoid(in_a) * std::log1p(std::exp(rate));
      a = std::exp(log_a);
      b = std::sqrt(std::max(-std::expm1(2 * log_a), 2.5e-7)) * exact_sigmoid(in_b) * u;
    }
  }
};

template <class T>
struct Problem {
  Array<T> a, b, u, h;
  Array<Accumulator<T>> rate;
  Array<std::int32_t> starts;
  std::int64_t n;
  RecurrenceForm form;

  /// Chunks of a sequence begin at the rows of `begins`, the first one at 0.
  Problem(RecurrenceForm of, std::int64_t sequences, std::int64_t length, std::int64_t columns,
          const std::vector<std::int32_t>& begins)
      : a(random_array<T>({sequences * length, columns}, 1, of == RecurrenceForm::plain ? 0.5 : 2)),
        b(random_array<T>(a.shape, 2)),
        u(random_array<T>(a.shape, 3)),
        h(a.shape, NAN),
        rate(random_array<Accumulator<T>>({columns % 2 == 0 ? columns / 2 : columns}, 4, 0.5)),
        starts({sequences * length}),
        n(length),
        form(of) {
    for (std::int64_t t = 0; t < sequences * n; ++t) {
      starts[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(t);
      if (std::find(begins.begin(), begins.end(), t % n) == begins.end()) {
        starts[static_cast<std::size_t>(t)] = starts[static_cast<std::size_t>(t - 1)];
      }
    }
  }
  RecurrenceInputs inputs() {
    const bool all = form == RecurrenceForm::rg_lru;
    return {a.tensor(), b.tensor(), all ? u.tensor() : Tensor{}, all ? rate.tensor() : Tensor{}};
  }
  void run() { linear_recurrence({}, h.tensor(), inputs(), starts.tensor(), form, n); }
};

template <class T>
class LinearRecurrence : public ::testing::Test {};
TYPED_TEST_SUITE(LinearRecurrence, ComputeTypes);

TYPED_TEST(LinearRecurrence, IsItsDefinition) {
  for (const RecurrenceForm form : kForms) {
    for (const std::int64_t columns : {1, 6, 131}) {
      Problem<TypeParam> p(form, 2, 29, columns, {0, 1, 9, 28});
      p.run();
      // An element of b and its way to h: sigmoids, exponentials and a root of 2 units each, and as much again for each row
      // that is behind it; |a| < 1 makes earlier rows' shares shrink. What is stored is rounded once.
      const double inner = 40 * rounding<Accumulator<TypeParam>>(), outer = rounding<TypeParam>();
      for (std::int64_t c = 0; c < columns; ++c) {
        double h = 0, size = 0;
        for (std::int64_t t = 0; t < 2 * 29; ++t) {
          const auto i = static_cast<std::size_t>(t * columns + c);
          const Step step(form, p.a.real(i), p.b.real(i), p.u.real(i),
                          p.rate.real(static_cast<std::size_t>(c) % p.rate.size()));
          const bool begins = p.starts[static_cast<std::size_t>(t)] == t;
          h = step.b + (begins ? 0 : step.a * h);
          size = std::abs(step.b) + (begins ? 0 : std::abs(step.a) * size);
          ASSERT_NEAR(p.h.real(i), h, outer * std::abs(h) + inner * size) << "row " << t << " column " << c;
        }
      }
    }
  }
}

/// A thousand steps that bfloat16 could not add one by one.
TEST(LinearRecurrenceState, IsNotRoundedFromRowToRow) {
  Problem<bfloat16> p(RecurrenceForm::plain, 1, 1000, 1, {0});
  p.a = Array<bfloat16>(p.a.shape, 1);
  p.b = Array<bfloat16>(p.b.shape, 1);
  p.run();
  EXPECT_EQ(p.h.real(999), 1000);
}

TEST(LinearRecurrenceGates, SaturateWithoutOverflow) {
  for (const RecurrenceForm form : {RecurrenceForm::min_gru, RecurrenceForm::rg_lru}) {
    Problem<float> p(form, 1, 4, 4, {0});
    const float gates[] = {-1000, 1000, -1000, 1000};
    for (std::size_t i = 0; i < p.a.size(); ++i) {
      p.a[i] = gates[i % 4];
      p.b[i] = gates[i / 4];
    }
    p.run();
    Problem<float> d = p;
    const Scratch scratch(linear_recurrence_backward_workspace(p.h.tensor().type, form, 4));
    linear_recurrence_backward(scratch.launch(), d.inputs(), p.u.tensor(), p.h.tensor(), p.inputs(), p.starts.tensor(), form,
                               4);
    for (std::size_t i = 0; i < p.h.size(); ++i) {
      EXPECT_TRUE(std::isfinite(p.h[i]) && std::isfinite(d.a[i]) && std::isfinite(d.b[i]) && std::isfinite(d.u[i])) << i;
    }
  }
}

TEST(LinearRecurrenceThreads, TheirNumberDoesNotMatter) {
  Problem<float> p(RecurrenceForm::rg_lru, 3, 40, 200, {0, 7});
  expect_same_for_any_thread_count([&] {
    p.run();
    return p.h;
  });
  const auto gradients = [&] {
    Problem<float> d = p;
    const Scratch scratch(linear_recurrence_backward_workspace(p.h.tensor().type, p.form, p.n));
    linear_recurrence_backward(scratch.launch(), d.inputs(), p.u.tensor(), p.h.tensor(), p.inputs(), p.starts.tensor(), p.form,
                               p.n);
    return d;
  };
  expect_same_for_any_thread_count([&] { return gradients().a; });
  expect_same_for_any_thread_count([&] { return gradients().rate; });
}

TEST(LinearRecurrenceErrors, NameWhatDoesNotFit) {
  Problem<float> p(RecurrenceForm::rg_lru, 1, 6, 6, {0});
  const auto message = [&] {
    try {
      p.run();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  p.n = 4;
  EXPECT_THAT(message(), HasSubstr("sequences of 4"));
  p.n = 6;
  p.rate = Array<float>({4});
  EXPECT_THAT(message(), HasSubstr("float32[4]"));
  p.u = Array<float>({6, 5});
  EXPECT_THAT(message(), HasSubstr("float32[6, 5]"));
}

}  // namespace
}  // namespace attamba::kernels::cpu
