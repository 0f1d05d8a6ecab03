// Optimizers through the registry: what they put on the tape.
#include "src/optim/optimizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "src/core/error.h"
#include "src/graph/program.h"
#include "src/ops/ops.h"

namespace attamba {
namespace {

TEST(Optimizers, UnknownNamesAreTheUsersMistake) {
  try {
    make_optimizer("adam", {});
    FAIL() << "accepted";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("adam"));
  }
}

TEST(AdamW, FollowsItsEquationsOverManySteps) {
  // The recipe of docs/model.md, in float64, against the equations written down for one scalar; the gradient is that of (w -
  // 1)^2 / 2.
  const OptimizerSettings s{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.033, .clip = 0.5};
  const auto optimizer = make_optimizer("adamw", s);
  Tape tape;
  const TensorType type{DType::float64, {1}};
  const Value step = tape.leaf("step", {DType::float64, {kernels::kStepFields}}, Role::state);
  const OptimizedParameter w{.name = "w",
                             .compute = {},
                             .master = tape.leaf("w", type, Role::parameter),
                             .gradient = tape.leaf("gradient/w", type, Role::gradient)};
  const std::vector<Value> gradients{w.gradient};
  optimizer->emit(tape, step, ops::square_sum(tape, gradients), {{w}});
  const Plan plan = make_plan(tape);
  Storage storage;
  Arena arena;
  arena.reserve(plan.arena_bytes);
  const Program program(tape, plan, storage, arena);
  for (const std::string_view state : optimizer->state_names()) {
    EXPECT_TRUE(storage.contains(concat(state, "/w"))) << "checkpoints look for " << state << "/w";
  }

  double expected = 4, m = 0, v = 0;
  auto* weight = storage.find("w").as<double>();
  auto* gradient = storage.find("gradient/w").as<double>();
  auto* fields = storage.find("step").as<double>();
  *weight = expected;
  for (int i = 1; i <= 50; ++i) {
    const double rate = 0.05 / i;
    *gradient = *weight - 1;
    fields[kernels::kStepLearningRate] = rate;
    fields[kernels::kStepBias1] = 1 - std::pow(s.beta1, i);
    fields[kernels::kStepBias2] = 1 - std::pow(s.beta2, i);
    program.run({});

    double g = expected - 1;
    EXPECT_NEAR(fields[kernels::kStepGradientNorm], std::abs(g), 1e-12);
    if (const double norm = std::abs(g); norm > s.clip) {
      g *= s.clip / (norm + 1e-6);
    }
    m = s.beta1 * m + (1 - s.beta1) * g;
    v = s.beta2 * v + (1 - s.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(s.beta1, i)), v_hat = v / (1 - std::pow(s.beta2, i));
    expected -= rate * (s.weight_decay * expected + m_hat / (std::sqrt(v_hat) + s.epsilon));
    ASSERT_NEAR(*weight, expected, 1e-12) << "step " << i;
    ASSERT_EQ(*gradient, 0) << "left ready for the next step";
  }
}

}  // namespace
}  // namespace attamba
