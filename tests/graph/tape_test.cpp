#include "src/graph/tape.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/graph/toy_ops.h"

namespace attamba::toys {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

/// What the failure says; empty when nothing was thrown.
template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// ---------------------------------------------------------------------------------------------- values and leaves

TEST(Tape, EveryOutputIsANewValue) {
  Tape tape;
  const Value x = tape.input("x", vector_type(4));
  const auto mix = std::make_shared<Mix>(Mix::Options{.sizes = {4, 3}});
  const std::vector<Value> first = tape.emit(mix, {{x}}), second = tape.emit(mix, {{x}});
  std::vector<int> ids{x.id};
  for (const Value v : {first[0], first[1], second[0], second[1]}) {
    EXPECT_EQ(std::count(ids.begin(), ids.end(), v.id), 0);
    ids.push_back(v.id);
    EXPECT_EQ(tape.info(v).role, Role::activation);
  }
  EXPECT_EQ(tape.type(first[1]), vector_type(3));
  ASSERT_EQ(tape.nodes().size(), 2u);
  EXPECT_EQ(tape.nodes()[1].inputs, (std::vector{x}));
  EXPECT_EQ(tape.nodes()[1].outputs, second);
}

TEST(Tape, ALeafIsFoundByItsName) {
  Tape tape;
  const Value x = tape.input("x", vector_type(4)), w = tape.parameter("w", vector_type(2));
  EXPECT_EQ(tape.input("x", vector_type(4)), x);
  EXPECT_EQ(tape.parameter("w", vector_type(2)), w);
  EXPECT_EQ(tape.parameters(), std::vector{w}) << "listed once";
  EXPECT_NE(tape.input("y", vector_type(4)), x);
}

TEST(Tape, ALeafKeepsItsTypeAndRole) {
  Tape tape;
  tape.input("x", vector_type(4));
  EXPECT_THAT(message_of([&] { tape.input("x", vector_type(5)); }),
              testing::AllOf(HasSubstr("x"), HasSubstr("float64[4]"), HasSubstr("float64[5]")));
  EXPECT_THAT(message_of([&] { tape.leaf("x", {DType::float32, {4}}, Role::input); }), HasSubstr("float32[4]"));
  EXPECT_THAT(message_of([&] { tape.parameter("x", vector_type(4)); }),
              testing::AllOf(HasSubstr("input"), HasSubstr("parameter")));
}

TEST(Tape, AnActivationDoesNotShadowALeafOfItsName) {
  Tape tape;
  const Value x = tape.input("x", vector_type(4));
  const Value y = tape.emit_one(std::make_shared<Mix>(Mix::Options{.name = "same"}), {{x}});
  ASSERT_EQ(tape.info(y).name, "same");
  EXPECT_NE(tape.input("same", vector_type(4)), y);
}

TEST(Tape, MissingInputsNameTheOp) {
  Tape tape;
  EXPECT_THAT(message_of([&] { multiply(tape, tape.input("x", vector_type(4)), Value{}); }), HasSubstr("toy_multiply"));
}

TEST(Tape, ScopesNameOpsAndEnd) {
  Tape tape;
  const Value x = tape.input("x", vector_type(4));
  Value inside, nested, outside;
  {
    const Tape::Scope layer(tape, "layers.3");
    inside = add(tape, x, x);
    {
      const Tape::Scope attention(tape, "attention");
      nested = add(tape, x, x);
    }
  }
  outside = add(tape, x, x);
  EXPECT_EQ(tape.info(inside).name, "layers.3/toy_add");
  EXPECT_EQ(tape.info(nested).name, "layers.3.attention/toy_add");
  EXPECT_EQ(tape.info(outside).name, "toy_add");
}

TEST(Tape, ActivationsAreNeverWrittenInPlace) {
  Tape tape;
  const Value x = tape.input("x", vector_type(4)), y = add(tape, x, x);
  EXPECT_THAT(message_of([&] { tape.emit(std::make_shared<AddToLeaf>(), {{y, x}}); }), HasSubstr("toy_add_to_leaf"));
  const Tape::Segment segment(tape, true);
  EXPECT_THAT(message_of([&] { tape.emit(std::make_shared<AddToLeaf>(), {{x, x}}); }), HasSubstr("recompute"));
}

// ---------------------------------------------------------------------------------------------- gradients

TEST(Backward, SumsWhatEveryUseOfAValueContributes) {
  // f = sum((a b + a c + a a)^2): a is used four times.
  Tape tape;
  const Value a = tape.input("a", vector_type(2)), b = tape.input("b", vector_type(2)), c = tape.input("c", vector_type(2));
  for (const Value v : {a, b}) {
    tape.want_gradient(v);
  }
  const Value y = add(tape, add(tape, multiply(tape, a, b), multiply(tape, a, c)), multiply(tape, a, a));
  tape.backward(square_sum(tape, y));
  tape.mark_output(tape.gradient(a));
  tape.mark_output(tape.gradient(b));
  EXPECT_FALSE(tape.gradient(c)) << "nobody asked for it";
  Runnable r(tape);
  r.set("a", {1, 2});
  r.set("b", {3, -1});
  r.set("c", {5, 0.5});
  r.program.run({});
  // y = {9, 3}; dy/da = b + c + 2a; df = 2 y dy
  EXPECT_THAT(r.get(tape.gradient(a)), ElementsAre(2 * 9 * (3 + 5 + 2), 2 * 3 * (-1 + 0.5 + 4)));
  EXPECT_THAT(r.get(tape.gradient(b)), ElementsAre(2 * 9 * 1, 2 * 3 * 2));
  EXPECT_THAT(r.get("a"), ElementsAre(1, 2)) << "leaves are not overwritten";
}

TEST(Backward, StartsFromAGivenSeed) {
  Tape tape;
  const Value a = tape.input("a", vector_type(2)), seed = tape.input("seed", vector_type(2));
  tape.want_gradient(a);
  tape.backward(multiply(tape, a, a), seed);
  tape.mark_output(tape.gradient(a));
  Runnable r(tape);
  r.set("a", {3, 4});
  r.set("seed", {10, -1});
  r.program.run({});
  EXPECT_THAT(r.get(tape.gradient(a)), ElementsAre(60, -8));
}

TEST(Backward, ParametersAccumulateOverUsesAndReplays) {
  Tape tape;
  const Value w = tape.parameter("w", vector_type(2)), x = tape.input("x", vector_type(2));
  tape.backward(square_sum(tape, add(tape, multiply(tape, w, x), w)));
  EXPECT_EQ(tape.info(tape.parameter_gradient(w)).name, "gradient/w");
  EXPECT_EQ(tape.info(tape.parameter_gradient(w)).role, Role::gradient);
  Runnable r(tape);
  r.set("w", {1, 2});
  r.set("x", {2, 0});
  r.program.run({});  // f = sum (w x + w)^2, df/dw = 2 w (x + 1)^2
  EXPECT_THAT(r.get("gradient/w"), ElementsAre(18, 4));
  r.set("x", {0, 1});
  r.program.run({});
  EXPECT_THAT(r.get("gradient/w"), ElementsAre(18 + 2, 4 + 16));
}

TEST(Backward, GradientsOfNarrowParametersAreWide) {
  Tape tape;
  const auto gradient_type = [&](const std::string& name, DType dtype) {
    return tape.type(tape.parameter_gradient(tape.parameter(name, {dtype, {3}}))).dtype;
  };
  EXPECT_EQ(gradient_type("narrow", DType::bfloat16), DType::float32);
  EXPECT_EQ(gradient_type("single", DType::float32), DType::float32);
  EXPECT_EQ(gradient_type("double", DType::float64), DType::float64);
}

TEST(Backward, SkipsWhatNobodyWants) {
  Tape tape;
  const Value a = tape.input("a", vector_type(2)), w = tape.parameter("w", vector_type(2));
  const Value constant = tape.emit_one(std::make_shared<Mix>(Mix::Options{.sizes = {2}}), {{a}});  // Mix has no gradient
  tape.backward(square_sum(tape, multiply(tape, constant, w)));
  EXPECT_FALSE(tape.gradient(a));
}

TEST(Backward, RefusesOpsWithoutAGradient) {
  Tape tape;
  const Value w = tape.parameter("w", vector_type(4));
  const Value y = tape.emit_one(std::make_shared<Mix>(Mix::Options{}), {{w}});
  EXPECT_THAT(message_of([&] { tape.backward(square_sum(tape, y)); }), HasSubstr("mix: has no gradient"));
}

TEST(Backward, HappensOnceAndOutsideOfSegments) {
  Tape tape;
  const Value root = square_sum(tape, tape.parameter("w", vector_type(2)));
  {
    const Tape::Segment segment(tape, true);
    EXPECT_THAT(message_of([&] { tape.backward(root); }), HasSubstr("segment"));
  }
  tape.backward(root);
  EXPECT_THAT(message_of([&] { tape.backward(root); }), HasSubstr("already"));
}

TEST(Backward, OnlyInputsCanBeAskedFor) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2));
  EXPECT_THAT(message_of([&] { tape.want_gradient(add(tape, x, x)); }), HasSubstr("not an input"));
  EXPECT_THAT(message_of([&] { tape.parameter_gradient(x); }), HasSubstr("not a parameter"));
}

// ---------------------------------------------------------------------------------------------- recomputation

/// depth blocks of h = h * (h + w_i), each in a segment when asked. Returns the gradient leaves' names.
Value declare_chain(Tape& tape, int depth, bool recompute) {
  Value h = tape.input("x", vector_type(64));
  tape.want_gradient(h);
  for (int i = 0; i < depth; ++i) {
    const Tape::Scope scope(tape, concat("layers.", i));
    const Tape::Segment segment(tape, recompute);
    const Value w = tape.parameter(concat("w", i), vector_type(64));
    h = multiply(tape, multiply(tape, h, add(tape, h, w)), multiply(tape, w, w));
  }
  const Value root = square_sum(tape, h);
  tape.mark_output(root);
  tape.backward(root);
  tape.mark_output(tape.gradient(tape.input("x", vector_type(64))));
  return root;
}

TEST(Recompute, GivesTheSameBitsFromLessMemory) {
  constexpr int kDepth = 6;
  Tape kept_tape, recomputed_tape;
  const Value kept_root = declare_chain(kept_tape, kDepth, false);
  const Value recomputed_root = declare_chain(recomputed_tape, kDepth, true);
  Runnable kept(kept_tape), recomputed(recomputed_tape);
  for (Runnable* r : {&kept, &recomputed}) {
    for (int i = -1; i < kDepth; ++i) {
      const std::string name = i < 0 ? "x" : concat("w", i);
      std::vector<double> values(64);
      for (std::size_t k = 0; k < 64; ++k) {
        values[k] = std::sin(static_cast<double>(k) * 1.3 + i) * 0.9;
      }
      r->set(name, values);
    }
    r->program.run({});
  }
  EXPECT_EQ(kept.get(kept_root), recomputed.get(recomputed_root));
  EXPECT_EQ(kept.get(kept_tape.gradient(kept_tape.input("x", vector_type(64)))),
            recomputed.get(recomputed_tape.gradient(recomputed_tape.input("x", vector_type(64)))));
  for (int i = 0; i < kDepth; ++i) {
    EXPECT_EQ(kept.get(concat("gradient/w", i)), recomputed.get(concat("gradient/w", i))) << i;
  }
  EXPECT_LT(recomputed.plan.arena_bytes, kept.plan.arena_bytes);
  EXPECT_GT(recomputed.plan.steps.size(), kept.plan.steps.size());
}

TEST(Recompute, MarksOnlyTheOpsThatRunAgain) {
  Tape tape;
  declare_chain(tape, 2, true);
  int recomputed = 0;
  for (const Tape::Node& node : tape.nodes()) {
    recomputed += node.recomputed ? 1 : 0;
  }
  EXPECT_EQ(recomputed, 2 * 4) << "four ops per block";
}

TEST(Recompute, SegmentsDoNotNest) {
  Tape tape;
  const Tape::Segment outer(tape, true);
  EXPECT_THAT(message_of([&] { const Tape::Segment inner(tape, true); }), HasSubstr("nest"));
}

// ---------------------------------------------------------------------------------------------- hoist_last

std::vector<std::string> names(const Tape& tape) {
  std::vector<std::string> result;
  for (const Tape::Node& node : tape.nodes()) {
    result.emplace_back(node.op->name());
  }
  return result;
}

Value emit_named(Tape& tape, const std::string& name, const std::vector<Value>& inputs) {
  return tape.emit_one(std::make_shared<Mix>(Mix::Options{.sizes = {2}, .name = name}), inputs);
}

TEST(HoistLast, MovesRightBehindTheLastOpThatTouchesItsInputs) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2));
  const Value a = tape.leaf("a", vector_type(2), Role::gradient), b = tape.leaf("b", vector_type(2), Role::gradient);
  tape.emit(std::make_shared<AddToLeaf>("writes_a"), {{a, x}});
  tape.emit(std::make_shared<AddToLeaf>("writes_b"), {{b, x}});
  emit_named(tape, "other", {x});
  tape.emit(std::make_shared<AddToLeaf>("start"), {{a, a}});
  tape.hoist_last();
  EXPECT_THAT(names(tape), ElementsAre("writes_a", "start", "writes_b", "other"));
}

TEST(HoistLast, WaitsForTheProducerOfAnInput) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2)), leaf = tape.leaf("leaf", vector_type(2), Role::gradient);
  const Value y = emit_named(tape, "produces", {x});
  emit_named(tape, "other", {x});
  tape.emit(std::make_shared<AddToLeaf>("start"), {{leaf, y}});
  tape.hoist_last();
  EXPECT_THAT(names(tape), ElementsAre("produces", "start", "other"));
}

TEST(HoistLast, NeverPassesItsOwnKind) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2));
  const Value a = tape.leaf("a", vector_type(2), Role::gradient), b = tape.leaf("b", vector_type(2), Role::gradient);
  const auto own = [&](Value leaf) { return tape.leaf(tape.info(leaf).name + "'", vector_type(2), Role::gradient); };
  tape.emit(std::make_shared<AddToLeaf>("writes_b"), {{b, x}});
  tape.emit(std::make_shared<AddToLeaf>("writes_a"), {{a, x}});
  emit_named(tape, "other", {x});
  tape.emit(std::make_shared<AddToLeaf>("start"), {{own(a), a}});
  tape.hoist_last();
  tape.emit(std::make_shared<AddToLeaf>("start"), {{own(b), b}});
  tape.hoist_last();
  EXPECT_THAT(names(tape), ElementsAre("writes_b", "writes_a", "start", "start", "other"));
  EXPECT_EQ(tape.nodes()[2].inputs[1], a) << "all ranks start them in one order";
  EXPECT_EQ(tape.nodes()[3].inputs[1], b);
}

TEST(HoistLast, MayBecomeTheFirstOp) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2));
  emit_named(tape, "other", {x});
  const Value leaf = tape.leaf("leaf", vector_type(2), Role::gradient);
  tape.emit(std::make_shared<AddToLeaf>("start"), {{leaf, leaf}});
  tape.hoist_last();
  EXPECT_THAT(names(tape), ElementsAre("start", "other"));
}

TEST(HoistLast, RefusesOpsWithOutputs) {
  Tape tape;
  emit_named(tape, "produces", {tape.input("x", vector_type(2))});
  EXPECT_THAT(message_of([&] { tape.hoist_last(); }), HasSubstr("produces"));
}

}  // namespace
}  // namespace attamba::toys
