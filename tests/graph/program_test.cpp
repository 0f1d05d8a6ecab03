#include "src/graph/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/core/fake_device.h"
#include "tests/graph/toy_ops.h"

namespace attamba::toys {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

/// sqrt: NaN for negative elements.
class Root final : public Op {
 public:
  std::string_view name() const override { return "toy_root"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[0]}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    for (std::int64_t i = 0; i < in[0].elements(); ++i) {
      out[0].as<double>()[i] = std::sqrt(in[0].as<double>()[i]);
    }
  }
};

TEST(Program, ProgramsOfOneStorageShareLeavesByName) {
  Tape writing, reading;
  const Value sum = writing.leaf("sum", vector_type(2), Role::state);
  writing.emit(std::make_shared<AddToLeaf>(), {{sum, writing.input("x", vector_type(2))}});
  const Value doubled =
      add(reading, reading.leaf("sum", vector_type(2), Role::state), reading.leaf("sum", vector_type(2), Role::state));
  reading.mark_output(doubled);
  Storage storage;
  Arena arena;
  const Plan write_plan = make_plan(writing), read_plan = make_plan(reading);
  arena.reserve(write_plan.arena_bytes);
  arena.reserve(read_plan.arena_bytes);
  const Program write(writing, write_plan, storage, arena), read(reading, read_plan, storage, arena);
  storage.find("x").as<double>()[0] = 5;
  write.run({});
  write.run({});
  read.run({});
  EXPECT_THAT(Runnable::values(read.tensor(doubled)), ElementsAre(20, 0));
}

TEST(Program, ProfilersSeeEachOpUnderItsLayersName) {
  auto made = std::make_unique<FakeDevice>(FakeDevice::Queue::immediate);
  const FakeDevice& device = *made;
  set_runtime(Device::cuda, std::move(made));
  Tape tape;
  Value x = tape.input("x", vector_type(2));
  {
    const Tape::Scope scope(tape, "layers.3");
    x = tape.emit_one(std::make_shared<Root>(), {{x}});
  }
  tape.mark_output(tape.emit_one(std::make_shared<Root>(), {{x}}));
  Storage storage;
  Arena arena;
  const Plan plan = make_plan(tape);
  arena.reserve(plan.arena_bytes);
  Program(tape, plan, storage, arena).run({.device = Device::cuda});
  EXPECT_EQ(device.ranges, "(layers.3/toy_root)(toy_root)");
  set_runtime(Device::cuda, nullptr);
}

TEST(Program, LeavesOfOneNameAgreeBetweenPrograms) {
  Tape first, second;
  first.mark_output(add(first, first.input("x", vector_type(2)), first.input("x", vector_type(2))));
  second.mark_output(add(second, second.input("x", vector_type(3)), second.input("x", vector_type(3))));
  Storage storage;
  Arena arena;
  arena.reserve(1024);
  const Program program(first, make_plan(first), storage, arena);
  EXPECT_THROW(Program(second, make_plan(second), storage, arena), Error);
}

TEST(Program, AnArenaDoesNotGrowUnderItsPrograms) {
  Tape tape;
  tape.mark_output(add(tape, tape.input("x", vector_type(2)), tape.input("x", vector_type(2))));
  Runnable r(tape);
  r.arena.reserve(1 << 20);
  EXPECT_THROW(r.arena.data(), Error);
}

TEST(Program, AddressesStayOverReplays) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2)), y = add(tape, multiply(tape, x, x), x);
  tape.mark_output(y);
  Runnable r(tape);
  const void *leaf = r.storage.find("x").data, *output = r.program.tensor(y).data;
  for (double v = 0; v < 5; ++v) {
    r.set("x", {v, 2 * v});
    r.program.run({});
    EXPECT_THAT(r.get(y), ElementsAre(v * v + v, 4 * v * v + 2 * v));
  }
  EXPECT_EQ(r.storage.find("x").data, leaf);
  EXPECT_EQ(r.program.tensor(y).data, output);
}

TEST(Program, ValuesThatAreNotComputedHaveNoTensor) {
  Tape tape;
  const Value x = tape.input("x", vector_type(2)), dropped = add(tape, x, x);
  tape.mark_output(multiply(tape, x, x));
  const Runnable r(tape);
  EXPECT_EQ(r.program.steps().size(), 1u);
  EXPECT_THROW(r.program.tensor(dropped), Error);
}

TEST(Program, ObservingSeesEveryOpInOrder) {
  Tape tape;
  const Value x = tape.input("x", vector_type(4));
  {
    const Tape::Scope scope(tape, "layers.0");
    tape.mark_output(add(tape, multiply(tape, x, x), x));
  }
  Runnable r(tape);
  r.set("x", {1, 2, 3, 4});
  std::vector<std::string> seen;
  r.program.run_observed(
      {},
      [&](const Program::Step& step, double seconds) {
        seen.push_back(concat(step.scope, "/", step.op->name()));
        EXPECT_GE(seconds, 0);
        EXPECT_EQ(step.bytes, 3 * 4 * sizeof(double));
      },
      true);
  EXPECT_THAT(seen, ElementsAre("layers.0/toy_multiply", "layers.0/toy_add"));
}

TEST(Program, TheFiniteCheckNamesOpLayerAndElement) {
  Tape tape;
  const Value x = tape.input("x", {DType::float64, {2, 3}});
  Value y;
  {
    const Tape::Scope scope(tape, "layers.7.attention");
    y = tape.emit_one(std::make_shared<Root>(), {{x}});
  }
  tape.mark_output(add(tape, y, y));
  Runnable r(tape);
  r.set("x", {1, 4, 9, 16, -1, 25});
  r.program.run({});  // unchecked: no message
  try {
    r.program.run_observed({}, {}, true);
    FAIL() << "not found";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("toy_root"), HasSubstr("layers.7.attention"), HasSubstr("row 1"),
                                             HasSubstr("column 1"), HasSubstr("float64[2, 3]")));
  }
  EXPECT_NO_THROW(r.program.run_observed({}, {}, false));
  r.set("x", {1, 4, 9, 16, 1, 25});
  EXPECT_NO_THROW(r.program.run_observed({}, {}, true));
}

TEST(Program, TheFiniteCheckLooksAtLeavesWrittenInPlace) {
  Tape tape;
  const Value sum = tape.leaf("gradient/w", vector_type(2), Role::gradient);
  const Tape::Scope scope(tape, "layers.2");
  tape.emit(std::make_shared<AddToLeaf>(), {{sum, tape.input("x", vector_type(2))}});
  Runnable r(tape);
  r.set("x", {1, std::numeric_limits<double>::infinity()});
  try {
    r.program.run_observed({}, {}, true);
    FAIL() << "not found";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("toy_add_to_leaf"), HasSubstr("layers.2"), HasSubstr("column 1")));
  }
}

}  // namespace
}  // namespace attamba::toys
