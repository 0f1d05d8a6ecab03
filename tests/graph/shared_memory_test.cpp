// Values that are parts of others, leaves that the arena lends, and what passes do to a finished tape.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/graph/program.h"
#include "tests/graph/toy_ops.h"

namespace attamba::toys {
namespace {

using testing::ElementsAre;

std::vector<double> values_of(const Tensor& tensor) {
  const auto values = tensor.span<double>();
  return {values.begin(), values.end()};
}

/// A tape with memory.
struct Built {
  explicit Built(const Tape& tape) {
    const Plan plan = make_plan(tape);
    arena.reserve(plan.arena_bytes);
    program = Program(tape, plan, storage, arena);
  }
  Storage storage;
  Arena arena;
  Program program;
};

void add_to(Tape& tape, Value leaf, Value x) {
  tape.emit(std::make_shared<AddToLeaf>(), {{leaf, x}});
}

/// leaf = 0, in place.
class Clear final : public Op {
 public:
  std::string_view name() const override { return "toy_clear"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override { clear(in[0]); }
  std::vector<int> mutated() const override { return {0}; }
};

TEST(Views, OfALeafAreItsMemoryAndAreFoundByName) {
  Tape tape;
  const Value whole = tape.leaf("whole", vector_type(10), Role::parameter);
  tape.view(whole, "a", {DType::float64, {2, 2}}, 1);
  tape.view(whole, "b", vector_type(3), 6);
  const Value a = tape.parameter("a", {DType::float64, {2, 2}});
  EXPECT_EQ(tape.memory_of(a), whole);
  tape.mark_output(square_sum(tape, a));
  add_to(tape, tape.leaf("b", vector_type(3), Role::parameter), tape.input("x", vector_type(3)));
  Built built(tape);
  Storage& storage = built.storage;
  const Program& program = built.program;
  EXPECT_FALSE(storage.contains("a"));
  EXPECT_FALSE(storage.contains("b"));
  for (int i = 0; i < 10; ++i) {
    storage.find("whole").as<double>()[i] = i;
  }
  std::fill_n(storage.find("x").as<double>(), 3, 100);
  program.run({});
  EXPECT_THAT(values_of(program.tensor(tape.nodes()[0].outputs[0])), ElementsAre(1 + 4 + 9 + 16));
  EXPECT_THAT(values_of(storage.find("whole")), ElementsAre(0, 1, 2, 3, 4, 5, 106, 107, 108, 9));
}

TEST(Views, MustLieInTheirBase) {
  Tape tape;
  const Value whole = tape.leaf("whole", vector_type(10), Role::state);
  EXPECT_THROW(tape.view(whole, "long", vector_type(5), 6), Error);
  EXPECT_THROW(tape.view(whole, "before", vector_type(5), -1), Error);
  EXPECT_THROW(tape.view(whole, "other", {DType::float32, {2}}, 0), Error);
  const Value part = tape.view(whole, "part", vector_type(5), 5);
  EXPECT_THROW(tape.view(part, "twice", vector_type(1), 0), Error);
}

TEST(Views, OfAnActivationKeepItAlive) {
  // Were the view forgotten, the second result would take the first one's memory.
  Tape tape;
  const Value x = tape.input("x", vector_type(4));
  const Value first = add(tape, x, x);
  const Value tail = tape.view(first, "tail", vector_type(2), 2);
  const Value second = multiply(tape, x, x);
  tape.mark_output(tape.emit_one(std::make_shared<Mix>(Mix::Options{.sizes = {4}}), {{second, tail}}));
  Built built(tape);
  Storage& storage = built.storage;
  const Program& program = built.program;
  const auto values = storage.find("x").span<double>();
  std::copy_n(std::initializer_list<double>{1, 2, 3, 4}.begin(), 4, values.begin());
  program.run({});
  EXPECT_THAT(values_of(program.tensor(tape.nodes()[2].outputs[0])), ElementsAre(1 + 3 * 6, 4 + 3 * 8, 9 + 3 * 6, 16 + 3 * 8));
}

TEST(Temporaries, LieInTheArenaFromTheirFirstTouchToTheirLast) {
  Tape tape;
  const Value x = tape.input("x", vector_type(100)), kept = tape.leaf("kept", vector_type(100), Role::gradient);
  std::vector<Value> sums;
  for (const char* name : {"one", "two"}) {
    const Value sum = tape.temporary(name, vector_type(200), Role::gradient);
    tape.emit(std::make_shared<Clear>(), {{sum}});
    add_to(tape, tape.view(sum, concat(name, ".half"), vector_type(100), 100), x);
    add_to(tape, kept, tape.view(sum, concat(name, ".result"), vector_type(100), 100));
  }
  EXPECT_EQ(make_plan(tape).arena_bytes, align_up(1600)) << "the two are never there together";
  Built built(tape);
  Storage& storage = built.storage;
  const Program& program = built.program;
  EXPECT_FALSE(storage.contains("one"));
  std::fill_n(storage.find("x").as<double>(), 100, 3.0);
  for (int run = 1; run <= 2; ++run) {
    program.run({});
    EXPECT_EQ(storage.find("kept").as<double>()[99], run * 6);
  }
}

TEST(Weaving, PutsNewOpsInFrontOfOldOnesAndKeepsTheirOrder) {
  Tape tape;
  const Value x = tape.input("x", vector_type(1));
  const auto emit = [&](const char* name) {
    tape.emit(std::make_shared<AddToLeaf>(name), {{tape.leaf(name, vector_type(1), Role::state), x}});
  };
  for (const char* name : {"a", "b", "c"}) {
    emit(name);
  }
  for (const char* name : {"1", "2", "3", "4"}) {
    emit(name);
  }
  tape.weave(3, std::vector<std::size_t>{1, 3, 0, 1});
  std::string order;
  for (const Tape::Node& node : tape.nodes()) {
    order += node.op->name();
  }
  EXPECT_EQ(order, "3a14bc2");
  EXPECT_THROW(tape.weave(6, std::vector<std::size_t>{}), Error);
}

TEST(Touching, CountsViewsAndTheirBaseAsOne) {
  Tape tape;
  const Value whole = tape.leaf("whole", vector_type(4), Role::state), other = tape.leaf("other", vector_type(2), Role::state);
  const Value half = tape.view(whole, "half", vector_type(2), 2), x = tape.input("x", vector_type(2));
  add_to(tape, other, x);
  add_to(tape, half, x);
  add_to(tape, other, x);
  EXPECT_EQ(tape.first_touch(whole), 1u);
  EXPECT_EQ(tape.last_touch(whole), 1u);
  EXPECT_EQ(tape.last_touch(other), 2u);
  EXPECT_EQ(tape.first_touch(tape.leaf("unused", vector_type(1), Role::state)), 3u);
  tape.emit(std::make_shared<Clear>(), {{whole}});
  tape.hoist_last();
  EXPECT_EQ(tape.nodes()[2].op->name(), "toy_clear") << "behind the view's last op";
}

TEST(ClosingPart, HasTheOpsOfEveryRankAlone) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2)), sum = tape.leaf("sum", vector_type(2), Role::gradient);
  add_to(tape, sum, x);
  tape.set_closing(true);
  add_to(tape, tape.leaf("total", vector_type(2), Role::state), sum);
  const Tape part = tape.closing_part();
  ASSERT_EQ(part.nodes().size(), 1u);
  EXPECT_EQ(tape.nodes().size(), 2u);
  Built built(part);
  Storage& storage = built.storage;
  const Program& program = built.program;
  EXPECT_FALSE(storage.contains("x"));
  std::fill_n(storage.find("sum").as<double>(), 2, 7.0);
  program.run({});
  EXPECT_THAT(values_of(storage.find("total")), ElementsAre(7, 7));
}

}  // namespace
}  // namespace attamba::toys
