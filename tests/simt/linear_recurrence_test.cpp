#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "tests/simt/kernel_support.h"

namespace attamba::simt {
namespace {

namespace cpu = kernels::cpu;
namespace cuda = kernels::cuda;
using kernels::RecurrenceForm;
using kernels::RecurrenceInputs;

struct Case {
  const char* name;
  RecurrenceForm form;
  std::int64_t sequences, n, columns;
  std::vector<std::int64_t> begins;  ///< of chunks in a sequence, the first one 0
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

/// The four tensors of gates, or of their gradients.
struct Gates {
  DeviceTensor a, b, u, rate;
  RecurrenceInputs inputs(RecurrenceForm form) const {
    const bool all = form == RecurrenceForm::rg_lru;
    return {a, b, all ? u.tensor() : Tensor{}, all ? rate.tensor() : Tensor{}};
  }
};

constexpr double kBefore = 0.5;  ///< what the rate's gradient is added to

struct Problem {
  Case c;
  Gates gates;
  DeviceTensor dh, starts;

  TensorType type() const { return gates.a.tensor().type; }
  Problem in_float64() const {
    const DeviceTensor& s = starts;
    return {c,
            {wide(gates.a), wide(gates.b), wide(gates.u), wide(gates.rate)},
            wide(dh),
            DeviceTensor(DType::int32, s.shape(), s.values())};
  }
};
Problem make_problem(const Case& c, DType dtype) {
  const Shape shape{c.sequences * c.n, c.columns};
  std::vector<double> rows;
  for (std::int64_t t = 0; t < shape[0]; ++t) {
    const bool begins = std::find(c.begins.begin(), c.begins.end(), t % c.n) != c.begins.end();
    rows.push_back(begins ? static_cast<double>(t) : rows.back());
  }
  return {c,
          {DeviceTensor::random(dtype, shape, 1, c.form == RecurrenceForm::plain ? 0.5 : 2),
           DeviceTensor::random(dtype, shape, 2), DeviceTensor::random(dtype, shape, 3),
           DeviceTensor::random(accumulator_of(dtype), {c.columns % 2 == 0 ? c.columns / 2 : c.columns}, 4, 0.5)},
          DeviceTensor::random(dtype, shape, 5),
          DeviceTensor(DType::int32, {shape[0]}, rows)};
}

struct Results {
  DeviceTensor h;
  Gates gradients;
};
/// Of one backend's functions. The backward pass reads `state`, or the h that the forward pass wrote.
template <class Forward, class Backward>
Results run(const Problem& p, const DeviceTensor* state, std::size_t scratch, const Forward& forward,
            const Backward& backward) {
  const auto [dtype, shape] = p.type();
  Results r{DeviceTensor(dtype, shape),
            {DeviceTensor(dtype, shape), DeviceTensor(dtype, shape), DeviceTensor(dtype, shape),
             DeviceTensor(accumulator_of(dtype), p.gates.rate.shape(), kBefore)}};
  const RecurrenceInputs in = p.gates.inputs(p.c.form);
  forward(device_launch(), r.h, in, p.starts, p.c.form, p.c.n);
  backward(device_launch(scratch), r.gradients.inputs(p.c.form), p.dh, state == nullptr ? r.h : *state, in, p.starts, p.c.form,
           p.c.n);
  return r;
}
Results run_cuda(const Problem& p) {
  return run(p, nullptr, cuda::linear_recurrence_backward_workspace(p.type(), p.c.form, p.c.n), cuda::linear_recurrence,
             cuda::linear_recurrence_backward);
}
/// In float64, backwards from the state that the GPU's kernel has stored.
Results run_cpu(const Problem& narrow, const DeviceTensor& state) {
  const Problem p = narrow.in_float64();
  const DeviceTensor wide_state = wide(state);
  return run(p, &wide_state, cpu::linear_recurrence_backward_workspace(p.type(), p.c.form, p.c.n), cpu::linear_recurrence,
             cpu::linear_recurrence_backward);
}

class LinearRecurrence : public testing::TestWithParam<Case> {};

TEST_P(LinearRecurrence, AgreesWithTheCpu) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    const Problem p = make_problem(GetParam(), dtype);
    const Results got = run_cuda(p), want = run_cpu(p, got.h);
    // A hundred roundings of float32 lie behind a row: those of its gates, and of the map that its warp's and block's rows
    // make. They are relative to what is summed up, about the root mean square of all elements; an element is rounded once.
    const double sums = 100 * 0x1p-24, rounded = dtype == DType::float32 ? sums : rounding(dtype);
    const auto check = [&](const char* name, const DeviceTensor& found, const DeviceTensor& expected, double relative) {
      const std::vector<double> values = expected.values();
      double squares = 0;
      for (const double value : values) {
        squares += value * value;
      }
      const double size = std::sqrt(squares / static_cast<double>(values.size()));
      EXPECT_TRUE(within(found, values, relative, [&](std::size_t) { return 4 * sums * size; })) << name;
    };
    check("h", got.h, want.h, rounded);
    check("da", got.gradients.a, want.gradients.a, rounded);
    check("db", got.gradients.b, want.gradients.b, rounded);
    if (p.c.form == RecurrenceForm::rg_lru) {
      check("du", got.gradients.u, want.gradients.u, rounded);
      check("drate", got.gradients.rate, want.gradients.rate, 10 * sums);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, LinearRecurrence,
                         testing::Values(Case{"plain", RecurrenceForm::plain, 2, 150, 132, {0}},
                                         Case{"plainOddColumns", RecurrenceForm::plain, 1, 70, 37, {0, 33}},
                                         Case{"minGru", RecurrenceForm::min_gru, 2, 129, 128, {0, 64, 65, 100}},
                                         Case{"minGruOddColumns", RecurrenceForm::min_gru, 1, 70, 37, {0, 33}},
                                         Case{"rgLru", RecurrenceForm::rg_lru, 2, 100, 96, {0, 1, 31}},
                                         Case{"rgLruOddColumns", RecurrenceForm::rg_lru, 1, 65, 33, {0, 64}},
                                         Case{"oneRow", RecurrenceForm::min_gru, 3, 1, 4, {0}}),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(LinearRecurrenceCuda, TheOrderOfWarpsAndBlocksDoesNotMatter) {
  const Problem p = make_problem({"", RecurrenceForm::rg_lru, 2, 70, 132, {0, 40}}, DType::bfloat16);
  expect_same_in_any_order([&] { return run_cuda(p).h; });
  expect_same_in_any_order([&] { return run_cuda(p).gradients.a; });
  expect_same_in_any_order([&] { return run_cuda(p).gradients.rate; });
}

/// Inputs, results and little more: chunk starts, once per piece of columns.
TEST(LinearRecurrenceCuda, ReadsAndWritesEachByteOnce) {
  const double tensor = 256 * 256 * 2;
  for (const RecurrenceForm form : {RecurrenceForm::plain, RecurrenceForm::min_gru, RecurrenceForm::rg_lru}) {
    const Problem p = make_problem({"", form, 1, 256, 256, {0}}, DType::bfloat16);
    const bool all = form == RecurrenceForm::rg_lru;
    reset_counters();
    run_cuda(p);
    EXPECT_LT(bytes_of({"linear_recurrence"}), 1.05 * (all ? 4 : 3) * tensor);
    EXPECT_LT(bytes_of({"linear_recurrence_backward"}), 1.05 * (all ? 8 : 6) * tensor);
    if (all) {  // a sum per sequence and column, and the rate and its gradient
      EXPECT_EQ(bytes_of({"linear_recurrence_backward: rates"}), 4.0 * (256 + 3 * 128));
    }
  }
}

TEST(LinearRecurrenceCuda, Float64IsRefused) {
  const Problem p = make_problem({"", RecurrenceForm::plain, 1, 4, 4, {0}}, DType::float64);
  EXPECT_THROW(cuda::linear_recurrence(device_launch(), p.dh, p.gates.inputs(p.c.form), p.starts, p.c.form, 4), UsageError);
}

}  // namespace
}  // namespace attamba::simt
