// Wrong shapes and types are found where a model declares an op, and the message names the op and both sides.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/core/error.h"
#include "src/ops/ops.h"

namespace attamba {
namespace {

struct WrongTypes {
  const char* name;
  std::function<void(Tape&)> declare;
  std::vector<std::string> message;  ///< all of these
};

Value floats(Tape& tape, const std::string& name, const Shape& shape, DType dtype = DType::float32) {
  return tape.input(name, {dtype, shape});
}
Value rows(Tape& tape, const std::string& name, std::int64_t n) {
  return tape.input(name, {DType::int32, {n}});
}
ops::AttentionKeys keys(Tape& tape, std::int64_t n) {
  return {.ends = rows(tape, "ends", n),
          .key_begin = rows(tape, "key_begin", n),
          .key_end = rows(tape, "key_end", n),
          .local_begin = rows(tape, "local_begin", n)};
}

constexpr kernels::ScanShape kScan{.hidden = 8, .state = 2, .heads = 2, .groups = 1, .conv = 4};  // projection 2*8 + 4 + 2 = 22

/// A scan that fits, but for one leaf of another shape.
void scan(Tape& tape, const std::string& wrong, const Shape& shape) {
  const auto leaf = [&](const std::string& name, const Shape& right) {
    return floats(tape, name, name == wrong ? shape : right);
  };
  ops::chunk_scan(tape, leaf("zxbcdt", {6, 22}),
                  {.conv = leaf("conv", {12, 4}),
                   .a_log = leaf("A_log", {2}),
                   .d_skip = leaf("D", {2}),
                   .dt_bias = leaf("dt_bias", {2}),
                   .norm = leaf("norm", {8})},
                  rows(tape, "starts", wrong == "starts" ? shape[0] : 6), kScan, 1e-5, 3);
}

const std::vector<WrongTypes>& wrong_types() {
  static const std::vector<WrongTypes> kRows{
      WrongTypes{"linear",
                 [](Tape& t) {
                   ops::linear(t, floats(t, "x", {7, 6}), floats(t, "w", {5, 4}));
                 },
                 {"matmul", "float32[7, 6]", "float32[5, 4]"}},
      WrongTypes{"linear_types",
                 [](Tape& t) {
                   ops::linear(t, floats(t, "x", {7, 6}), floats(t, "w", {5, 6}, DType::bfloat16));
                 },
                 {"matmul", "float32[7, 6]", "bfloat16[5, 6]"}},
      WrongTypes{"linear_addend",
                 [](Tape& t) {
                   ops::linear(t, floats(t, "x", {7, 6}), floats(t, "w", {5, 6}), floats(t, "c", {5, 7}));
                 },
                 {"matmul", "float32[5, 7]", "float32[7, 5]"}},
      WrongTypes{"rms_norm",
                 [](Tape& t) {
                   ops::rms_norm(t, floats(t, "x", {7, 6}), floats(t, "w", {7}), 1e-5);
                 },
                 {"rms_norm", "float32[7]", "float32[7, 6]"}},
      WrongTypes{"rms_norm_weight_type",
                 [](Tape& t) {
                   ops::rms_norm(t, floats(t, "x", {7, 6}, DType::bfloat16), floats(t, "w", {6}, DType::bfloat16), 1e-5);
                 },
                 {"rms_norm", "bfloat16[6]"}},
      WrongTypes{"add_rms_norm",
                 [](Tape& t) {
                   ops::add_rms_norm(t, floats(t, "a", {7, 6}), floats(t, "b", {6, 7}), floats(t, "w", {6}), 1e-5);
                 },
                 {"add_rms_norm", "float32[7, 6]", "float32[6, 7]"}},
      WrongTypes{"add",
                 [](Tape& t) {
                   ops::add(t, floats(t, "a", {7, 6}), floats(t, "b", {7, 5}));
                 },
                 {"add", "float32[7, 6]", "float32[7, 5]"}},
      WrongTypes{"swiglu",
                 [](Tape& t) {
                   ops::swiglu(t, floats(t, "a", {7, 6}), floats(t, "b", {7, 5}));
                 },
                 {"swiglu", "float32[7, 6]", "float32[7, 5]"}},
      WrongTypes{"rope_odd_heads",
                 [](Tape& t) {
                   ops::rope(t, floats(t, "x", {7, 6}), {}, floats(t, "table", {9, 3}), rows(t, "p", 7), 3, DType::float32);
                 },
                 {"rope", "3", "float32[7, 6]"}},
      WrongTypes{"rope_table",
                 [](Tape& t) {
                   ops::rope(t, floats(t, "x", {7, 8}), {}, floats(t, "table", {9, 2}), rows(t, "p", 7), 4, DType::float32);
                 },
                 {"rope", "float32[9, 2]", "float32[7, 8]"}},
      WrongTypes{"rope_table_type",
                 [](Tape& t) {
                   ops::rope(t, floats(t, "x", {7, 8}), {}, floats(t, "table", {9, 4}, DType::float64), rows(t, "p", 7), 4,
                             DType::float32);
                 },
                 {"rope", "float64[9, 4]", "float32[7, 8]"}},
      WrongTypes{"rope_addend",
                 [](Tape& t) {
                   ops::rope(t, floats(t, "x", {7, 8}), floats(t, "y", {7, 4}), floats(t, "table", {9, 4}), rows(t, "p", 7), 4,
                             DType::bfloat16);
                 },
                 {"rope", "float32[7, 4]", "bfloat16[7, 8]"}},
      WrongTypes{"rope_result",
                 [](Tape& t) {
                   ops::rope(t, floats(t, "x", {7, 8}, DType::float64), {}, floats(t, "table", {9, 4}), rows(t, "p", 7), 4,
                             DType::float32);
                 },
                 {"rope", "float64[7, 8]", "float32[7, 8]"}},
      WrongTypes{"rope_positions",
                 [](Tape& t) {
                   ops::rope(t, floats(t, "x", {7, 8}), {}, floats(t, "table", {9, 4}), rows(t, "p", 6), 4, DType::float32);
                 },
                 {"rope", "int32[6]", "float32[7, 8]"}},
      WrongTypes{
          "attention_heads",
          [](Tape& t) {
            ops::attention(t, floats(t, "q", {6, 12}), floats(t, "k", {6, 8}), floats(t, "v", {6, 8}), keys(t, 6), 3, 2, 3);
          },
          {"attention", "3 heads", "2"}},
      WrongTypes{
          "attention_widths",
          [](Tape& t) {
            ops::attention(t, floats(t, "q", {6, 8}), floats(t, "k", {6, 4}), floats(t, "v", {6, 4}), keys(t, 6), 2, 2, 3);
          },
          {"attention", "float32[6, 8]", "float32[6, 4]"}},
      WrongTypes{
          "attention_values",
          [](Tape& t) {
            ops::attention(t, floats(t, "q", {6, 8}), floats(t, "k", {6, 8}), floats(t, "v", {6, 4}), keys(t, 6), 2, 2, 3);
          },
          {"attention", "float32[6, 8]", "float32[6, 4]"}},
      WrongTypes{
          "attention_sequences",
          [](Tape& t) {
            ops::attention(t, floats(t, "q", {6, 8}), floats(t, "k", {6, 8}), floats(t, "v", {6, 8}), keys(t, 6), 2, 2, 4);
          },
          {"attention", "float32[6, 8]", "sequences of 4"}},
      WrongTypes{
          "attention_table",
          [](Tape& t) {
            ops::attention(t, floats(t, "q", {6, 8}), floats(t, "k", {6, 8}), floats(t, "v", {6, 8}), keys(t, 5), 2, 2, 3);
          },
          {"attention", "int32[5]", "int32[6]"}},
      WrongTypes{"chunk_scan",
                 [](Tape& t) {
                   scan(t, "zxbcdt", {6, 21});
                 },
                 {"chunk_scan", "float32[6, 21]", "22"}},
      WrongTypes{"chunk_scan_sequences",
                 [](Tape& t) {
                   scan(t, "zxbcdt", {7, 22});
                 },
                 {"chunk_scan", "float32[7, 22]", "3"}},
      WrongTypes{"chunk_scan_starts", [](Tape& t) { scan(t, "starts", {5}); }, {"chunk_scan", "int32[5]", "int32[6]"}},
      WrongTypes{"chunk_scan_conv",
                 [](Tape& t) {
                   scan(t, "conv", {12, 3});
                 },
                 {"chunk_scan", "conv", "float32[12, 3]", "float32[12, 4]"}},
      WrongTypes{
          "chunk_scan_a_log", [](Tape& t) { scan(t, "A_log", {8}); }, {"chunk_scan", "A_log", "float32[8]", "float32[2]"}},
      WrongTypes{"chunk_scan_d", [](Tape& t) { scan(t, "D", {1}); }, {"chunk_scan", "D", "float32[1]", "float32[2]"}},
      WrongTypes{"chunk_scan_dt_bias",
                 [](Tape& t) { scan(t, "dt_bias", {3}); },
                 {"chunk_scan", "dt_bias", "float32[3]", "float32[2]"}},
      WrongTypes{"chunk_scan_norm", [](Tape& t) { scan(t, "norm", {2}); }, {"chunk_scan", "norm", "float32[2]", "float32[8]"}},
      WrongTypes{"chunk_scan_without_its_convolution",
                 [](Tape& t) {
                   ops::chunk_scan(t, floats(t, "x", {6, 22}), {}, rows(t, "starts", 6), kScan, 1e-5, 3);
                 },
                 {"chunk_scan", "4 taps"}},
      WrongTypes{"label_scan_labels",
                 [](Tape& t) {
                   const ops::ScanParameters weights{.conv = floats(t, "conv", {12, 4}),
                                                     .a_log = floats(t, "A_log", {2}),
                                                     .d_skip = floats(t, "D", {2}),
                                                     .dt_bias = {},
                                                     .norm = floats(t, "norm", {8})};
                   ops::label_scan(t, floats(t, "x", {7, 22}), weights, rows(t, "labels", 6), kScan, 1e-5);
                 },
                 {"label_scan", "int32[6]", "int32[7]"}},
      WrongTypes{"embedding",
                 [](Tape& t) {
                   ops::embedding(t, floats(t, "table", {7, 6}), floats(t, "tokens", {3}));
                 },
                 {"embedding", "float32[3]", "float32[7, 6]"}},
      WrongTypes{"linear_cross_entropy",
                 [](Tape& t) {
                   ops::linear_cross_entropy(t, floats(t, "h", {7, 6}), floats(t, "w", {9, 5}), rows(t, "y", 7));
                 },
                 {"linear_cross_entropy", "float32[7, 6]", "float32[9, 5]"}},
      WrongTypes{"linear_cross_entropy_targets",
                 [](Tape& t) {
                   ops::linear_cross_entropy(t, floats(t, "h", {7, 6}), floats(t, "w", {9, 6}), rows(t, "y", 6));
                 },
                 {"linear_cross_entropy", "float32[7, 6]", "int32[6]"}},
      WrongTypes{
          "linear_cross_entropy_types",
          [](Tape& t) {
            ops::linear_cross_entropy(t, floats(t, "h", {7, 6}), floats(t, "w", {9, 6}, DType::bfloat16), rows(t, "y", 7));
          },
          {"linear_cross_entropy", "float32[7, 6]", "bfloat16[9, 6]"}}};
  return kRows;
}

class OpTypes : public testing::TestWithParam<WrongTypes> {};

TEST_P(OpTypes, AreCheckedWhereTheOpIsDeclared) {
  Tape tape;
  try {
    GetParam().declare(tape);
    FAIL() << "accepted";
  } catch (const UsageError& error) {
    for (const std::string& part : GetParam().message) {
      EXPECT_THAT(error.what(), testing::HasSubstr(part));
    }
  }
  EXPECT_TRUE(tape.nodes().empty()) << "nothing is left on the tape";
}

INSTANTIATE_TEST_SUITE_P(Ops, OpTypes, testing::ValuesIn(wrong_types()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(OpTypes, OpsThatOnlyTrainRefuseABackwardPass) {
  Tape tape;
  const Value w = tape.parameter("w", {DType::float32, {9, 6}});
  const Value losses = ops::linear_cross_entropy(tape, floats(tape, "h", {7, 6}), w, rows(tape, "y", 7));
  EXPECT_THROW(tape.backward(losses), Error) << "declared for evaluation";
}

TEST(OpTypes, GradientsOfWeightsGoToParametersOnly) {
  Tape tape;
  const Value w = floats(tape, "w", {5, 6}), seed = floats(tape, "seed", {7, 5});
  tape.want_gradient(w);
  EXPECT_THROW(tape.backward(ops::linear(tape, floats(tape, "x", {7, 6}), w), seed), Error);
}

}  // namespace
}  // namespace attamba
