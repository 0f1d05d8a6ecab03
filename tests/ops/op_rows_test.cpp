// Every op that has a gradient: its gradient against finite differences, and its arithmetic in each compute type against
// float64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <regex>
#include <set>

#include "tests/ops/gradient_check.h"

namespace attamba::testing_support {
namespace {

class OpRows : public testing::TestWithParam<OpRow> {};

TEST_P(OpRows, GradientsEqualFiniteDifferences) {
  for (const GradientError& e : check_gradients(GetParam())) {
    ADD_FAILURE() << "gradient of " << e.leaf << '[' << e.element << "] is " << e.computed << ", finite differences give "
                  << e.expected << " (tolerance " << e.tolerance << ')';
  }
}

/// Outputs and gradients of the row in `dtype` within `tolerance` of those in float64, relative to each tensor's norm.
void expect_close_to_float64(const OpRow& row, DType dtype, double tolerance) {
  RunnableRow reference(row, DType::float64), tested(row, dtype);
  reference.objective();
  tested.objective();
  for (std::size_t o = 0; o < reference.outputs(); ++o) {
    EXPECT_LE(relative_error(tested.output(o), reference.output(o)), tolerance) << "output " << o;
  }
  reference.run_gradients();
  tested.run_gradients();
  for (const std::string& name : reference.differentiated()) {
    EXPECT_LE(relative_error(tested.gradient(name), reference.gradient(name)), tolerance) << "gradient of " << name;
  }
}

TEST_P(OpRows, Float32IsCloseToFloat64) {
  // Rows are short (sums of tens of terms), so a result gathers a few roundings of 2^-24 each, amplified where terms cancel.
  expect_close_to_float64(GetParam(), DType::float32, 32 * 0x1p-24);
}

TEST_P(OpRows, Bfloat16IsCloseToFloat64) {
  // All rows start from numbers that bfloat16 holds exactly, and sums are kept in float32. What remains are the roundings of
  // results and stored intermediates, each at most 2^-9 of its value.
  expect_close_to_float64(GetParam(), DType::bfloat16, GetParam().roundings * 0x1p-9);
}

TEST_P(OpRows, GradientsAreTheSameBitsEveryTime) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    RunnableRow row(GetParam(), dtype);
    row.run_gradients();
    std::vector<std::vector<double>> first;
    for (const std::string& name : row.differentiated()) {
      first.push_back(row.gradient(name));
    }
    row.objective();  // leaves other values in the shared arena
    row.run_gradients();
    for (std::size_t i = 0; i < first.size(); ++i) {
      EXPECT_EQ(row.gradient(row.differentiated()[i]), first[i]) << row.differentiated()[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ops, OpRows, testing::ValuesIn(op_rows()),
                         [](const auto& test) { return std::string(test.param.name); });

/// Ops that a backward pass never meets; state_ops_test.cpp covers them.
const std::set<std::string> kWithoutGradient{"linear_cross_entropy",
                                             "accumulate_loss",
                                             "add_to_fixed_point",
                                             "fixed_point_to_float",
                                             "square_sum",
                                             "adamw",
                                             "start_all_reduce",
                                             "wait_all_reduce",
                                             "start_reduce_scatter",
                                             "wait_reduce_scatter",
                                             "start_all_gather",
                                             "wait_all_gather",
                                             "sum_over_ranks",
                                             "begin_sum",
                                             "clear_other_parts",
                                             "square_digits",
                                             "square_digits_to_float"};

TEST(OpRowsComplete, EveryDeclaredOpHasARow) {
  std::ifstream file(ATTAMBA_SOURCE_DIR "/src/ops/ops.h");
  ASSERT_TRUE(file) << "cannot read src/ops/ops.h";
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::set<std::string> covered = kWithoutGradient;
  for (const OpRow& row : op_rows()) {
    covered.insert(row.op);
  }
  const std::regex declaration(R"(([a-z_0-9]+)\(Tape& tape)");
  std::set<std::string> declared;
  for (auto match = std::sregex_iterator(text.begin(), text.end(), declaration); match != std::sregex_iterator(); ++match) {
    declared.insert((*match)[1]);
  }
  EXPECT_GE(declared.size(), 16u) << "the scan of ops.h finds too little";
  for (const std::string& op : declared) {
    EXPECT_TRUE(covered.count(op)) << "src/ops/ops.h declares " << op << ", but tests/ops/op_rows.cpp has no row for it";
  }
  for (const std::string& op : covered) {
    EXPECT_TRUE(declared.count(op)) << op << " is tested, but src/ops/ops.h does not declare it";
  }
}

}  // namespace
}  // namespace attamba::testing_support
