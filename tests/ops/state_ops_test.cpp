// Ops without a gradient, through a program: that each hands its leaves to the kernel in the right places. Their arithmetic is
// tested in tests/kernels.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "comm/single_process.h"
#include "tests/ops/op_case.h"

namespace attamba::testing_support {
namespace {

const TensorType kTotals{DType::int64, {2}};

/// A program of its own memory.
struct Built {
  Storage storage;
  Arena arena;
  Program program;
  explicit Built(const Tape& tape) {
    const Plan plan = make_plan(tape);
    arena.reserve(plan.arena_bytes);
    program = Program(tape, plan, storage, arena);
  }
};

TEST(StateOps, AccumulateLossAddsOverReplaysAndCountsBadLosses) {
  Tape tape;
  const Value totals = tape.leaf("totals", kTotals, Role::state);
  ops::accumulate_loss(tape, totals, tape.input("losses", {DType::float32, {3}}));
  Built built(tape);
  assign(built.storage.find("losses"), {1.5, 0.25, 2});
  built.program.run({});
  assign(built.storage.find("losses"), {1, std::numeric_limits<double>::infinity(), 1});
  built.program.run({});
  const auto sums = built.storage.find("totals").span<std::int64_t>();
  EXPECT_EQ(static_cast<double>(sums[0]) / kernels::kLossOne, 1.5 + 0.25 + 2 + 1 + 1);
  EXPECT_EQ(sums[1], 1);
}

TEST(StateOps, FixedPointSumsComeBackAsFloats) {
  Tape adding, closing;
  const TensorType floats{DType::float32, {2, 3}}, fixed{DType::int64, {2, 3}};
  const TensorType count{DType::int64, {1}};
  ops::add_to_fixed_point(adding, adding.leaf("sum", fixed, Role::gradient), adding.leaf("poisoned", count, Role::state),
                          adding.leaf("g", floats, Role::gradient), 1e3);
  ops::fixed_point_to_float(closing, closing.leaf("g", floats, Role::gradient), closing.leaf("sum", fixed, Role::gradient),
                            closing.leaf("poisoned", count, Role::state));
  Storage storage;
  Arena arena;
  const Program add(adding, make_plan(adding), storage, arena), close(closing, make_plan(closing), storage, arena);
  for (const double scale : {1.0, -3.0}) {
    assign(storage.find("g"), {scale, 2 * scale, 0.5 * scale, 0, 0x1p-30 * scale, 100 * scale});
    add.run({});
    EXPECT_EQ(values_of(storage.find("g")), std::vector<double>(6)) << "the gradient is taken over, not copied";
  }
  close.run({});
  EXPECT_EQ(values_of(storage.find("g")), (std::vector<double>{-2, -4, -1, 0, -0x1p-29, -200}));
  for (const std::int64_t x : storage.find("sum").span<std::int64_t>()) {
    EXPECT_EQ(x, 0);
  }
}

TEST(StateOps, SquareSumTakesAllLeaves) {
  Tape tape;
  const std::vector<Value> leaves{tape.leaf("a", {DType::float32, {2}}, Role::gradient),
                                  tape.leaf("b", {DType::float32, {1, 3}}, Role::gradient)};
  const Value sum = ops::square_sum(tape, leaves);
  tape.mark_output(sum);
  Built built(tape);
  assign(built.storage.find("a"), {3, 4});
  assign(built.storage.find("b"), {0, 5, 0.5});
  built.program.run({});
  EXPECT_EQ(built.program.tensor(sum).as<double>()[0], 9 + 16 + 25 + 0.25);
}

/// One step of AdamW by hand, from zero moments.
double adamw_step(double w, double g, double rate, const kernels::AdamWSettings& s) {
  const double m = (1 - s.beta1) * g / (1 - s.beta1), v = (1 - s.beta2) * g * g / (1 - s.beta2);
  return w - rate * (s.weight_decay * w + m / (std::sqrt(v) + s.epsilon));
}

TEST(StateOps, AdamWKeepsParametersWithAndWithoutCopiesApart) {
  const kernels::AdamWSettings settings{.weight_decay = 0.1};
  Tape tape;
  const Shape shape{2};
  const auto leaf = [&](const std::string& name, DType dtype) { return tape.leaf(name, {dtype, shape}, Role::state); };
  const auto leaves = [&](const std::string& prefix, bool copy) {
    return ops::AdamWLeaves{.compute = copy ? leaf(prefix + "compute", DType::bfloat16) : Value{},
                            .master = leaf(prefix + "master", DType::float32),
                            .moment1 = leaf(prefix + "moment1", DType::float32),
                            .moment2 = leaf(prefix + "moment2", DType::float32),
                            .gradient = leaf(prefix + "gradient", DType::float32)};
  };
  const std::vector<ops::AdamWLeaves> parameters{leaves("a.", true), leaves("b.", false), leaves("c.", true)};
  std::vector<Value> gradients;
  for (const auto& p : parameters) {
    gradients.push_back(p.gradient);
  }
  ops::adamw(tape, tape.leaf("step", {DType::float64, {kernels::kStepFields}}, Role::state), ops::square_sum(tape, gradients),
             parameters, settings);
  Built built(tape);
  const auto set = [&](const std::string& name, std::vector<double> values) { assign(built.storage.find(name), values); };
  set("a.master", {1, 2});
  set("a.gradient", {0.5, -0.25});
  set("b.master", {-3, 4});
  set("b.gradient", {0, 8});
  set("c.master", {0.125, -0.5});
  set("c.gradient", {-1, 1});
  auto* step = built.storage.find("step").as<double>();
  step[kernels::kStepLearningRate] = 0.01;
  step[kernels::kStepBias1] = 1 - settings.beta1;
  step[kernels::kStepBias2] = 1 - settings.beta2;
  built.program.run({});

  EXPECT_NEAR(step[kernels::kStepGradientNorm], std::sqrt(0.25 + 0.0625 + 64 + 2), 1e-12);
  const auto expect = [&](const std::string& prefix, double w0, double g0, double w1, double g1) {
    const std::vector<double> master = values_of(built.storage.find(prefix + "master"));
    EXPECT_NEAR(master[0], adamw_step(w0, g0, 0.01, settings), 1e-6) << prefix;
    EXPECT_NEAR(master[1], adamw_step(w1, g1, 0.01, settings), 1e-6) << prefix;
    EXPECT_EQ(values_of(built.storage.find(prefix + "gradient")), std::vector<double>(2)) << prefix;
    EXPECT_NEAR(values_of(built.storage.find(prefix + "moment1"))[1], 0.1 * g1, 1e-6) << prefix;
    EXPECT_NEAR(values_of(built.storage.find(prefix + "moment2"))[1], 0.05 * g1 * g1, 1e-6 * 64) << prefix;
  };
  expect("a.", 1, 0.5, 2, -0.25);
  expect("b.", -3, 0, 4, 8);
  expect("c.", 0.125, -1, -0.5, 1);
  for (const char* prefix : {"a.", "c."}) {
    const std::vector<double> master = values_of(built.storage.find(concat(prefix, "master")));
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(values_of(built.storage.find(concat(prefix, "compute")))[i],
                static_cast<double>(static_cast<float>(bfloat16(static_cast<float>(master[i])))));
    }
  }
}

/// Counts what is asked of it; reductions double their data, as if two equal ranks took part.
class Doubling final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 2; }
  int local_rank() const override { return 0; }
  int local_size() const override { return 2; }
  std::string description() const override { return "test"; }
  std::unique_ptr<Communicator> split(int) override { return nullptr; }
  void all_reduce_sum(const Tensor& data) override {
    for (float& x : data.span<float>()) {
      x *= 2;
    }
  }
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override {
    started.push_back(data);
    return later([this, data] { all_reduce_sum(data); });
  }
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override {
    return later([this, whole, part] {
      all_reduce_sum(whole);
      std::memmove(part.data, whole.data, part.bytes());
    });
  }
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override {
    return later([whole, part] {
      for (std::size_t rank = 0; rank < 2; ++rank) {
        std::memmove(static_cast<std::byte*>(whole.data) + rank * part.bytes(), part.data, part.bytes());
      }
    });
  }
  void all_reduce_max(const Tensor&) override {}
  void broadcast(const Tensor&, int) override {}
  void all_gather(const Tensor&, const Tensor&) override {}
  void barrier() override {}
  [[noreturn]] void abort(int) override { throw Error("abort"); }

  std::vector<Tensor> started;

 private:
  /// Done at the wait, the latest moment that there is.
  static std::unique_ptr<Request> later(std::function<void()> work) {
    struct Late final : Request {
      explicit Late(std::function<void()> to_do) : work(std::move(to_do)) {}
      void wait() override { work(); }
      std::function<void()> work;
    };
    return std::make_unique<Late>(std::move(work));
  }
};

TEST(StateOps, AllReduceSendsNeighboursTogetherAndEndsAtTheWait) {
  Doubling communicator;
  Tape tape;
  const auto leaf = [&](const std::string& name) { return tape.leaf(name, {DType::float32, {5}}, Role::gradient); };
  const std::vector<Value> leaves{leaf("a"), leaf("b"), leaf("far")};
  const auto pending = ops::start_all_reduce(tape, communicator, leaves);
  ops::wait_all_reduce(tape, pending, leaves);
  Storage storage;
  const TensorType type{DType::float32, {5}};
  const std::vector<Storage::Entry> together{{"a", type}, {"b", type}};
  storage.make_contiguous(together, "test");
  storage.get("far", type);
  Arena arena;
  const Program program(tape, make_plan(tape), storage, arena);
  for (const char* name : {"a", "b", "far"}) {
    assign(storage.find(name), {1, 2, 3, 4, 5});
  }
  program.run({});
  ASSERT_EQ(communicator.started.size(), 2u) << "a and b are neighbours in memory";
  EXPECT_EQ(communicator.started[0].data, storage.find("a").data);
  for (const char* name : {"a", "b", "far"}) {
    EXPECT_EQ(values_of(storage.find(name)), (std::vector<double>{2, 4, 6, 8, 10})) << name;
  }
}

TEST(StateOps, SumsGoOnFromARanksPartAndEndInIt) {
  Doubling communicator;
  Tape tape;
  const TensorType whole_type{DType::float32, {6}}, part_type{DType::float32, {3}};
  const Value whole = tape.leaf("whole", whole_type, Role::gradient), part = tape.leaf("part", part_type, Role::gradient);
  ops::begin_sum(tape, whole, part, 1);
  const auto pending = ops::start_reduce_scatter(tape, communicator, whole, part);
  ops::wait_reduce_scatter(tape, pending, whole, part);
  const Value gathered = tape.leaf("gathered", whole_type, Role::parameter);
  const auto gathering = ops::start_all_gather(tape, communicator, gathered, part);
  ops::wait_all_gather(tape, gathering, gathered);
  const Value cleared = tape.leaf("cleared", whole_type, Role::gradient),
              empty = tape.leaf("empty", whole_type, Role::gradient);
  ops::clear_other_parts(tape, cleared, 1, 2);
  ops::begin_sum(tape, empty, {}, 0);
  Built built(tape);
  Storage& storage = built.storage;
  assign(storage.find("whole"), {9, 9, 9, 9, 9, 9});
  assign(storage.find("part"), {1, 2, 3});
  assign(storage.find("cleared"), {1, 2, 3, 4, 5, 6});
  assign(storage.find("empty"), {1, 2, 3, 4, 5, 6});
  built.program.run({});
  EXPECT_THAT(values_of(storage.find("whole")), testing::ElementsAre(0, 0, 0, 2, 4, 6)) << "part 1 of the whole, twice";
  EXPECT_THAT(values_of(storage.find("gathered")), testing::ElementsAre(0, 0, 0, 0, 0, 0)) << "the fake is rank 0";
  EXPECT_THAT(values_of(storage.find("cleared")), testing::ElementsAre(0, 0, 0, 4, 5, 6));
  EXPECT_THAT(values_of(storage.find("empty")), testing::Each(0));
}

TEST(StateOps, SumsOverRanksAreNewValues) {
  Doubling communicator;
  Tape tape;
  const TensorType type{DType::float32, {2}};
  const Value x = tape.input("x", type), sum = ops::sum_over_ranks(tape, communicator, x);
  tape.mark_output(sum);
  Built built(tape);
  Storage& storage = built.storage;
  assign(storage.find("x"), {3, 4});
  built.program.run({});
  EXPECT_THAT(values_of(built.program.tensor(sum)), testing::ElementsAre(6, 8));
  EXPECT_THAT(values_of(storage.find("x")), testing::ElementsAre(3, 4)) << "a leaf stays";
}

TEST(StateOps, SquaresAddUpExactlyHoweverTheyAreDivided) {
  const auto digits_of = [&](const std::vector<std::vector<double>>& leaves) {
    Tape tape;
    std::vector<Value> values;
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      values.push_back(
          tape.leaf(concat("g", i), {DType::float32, {static_cast<std::int64_t>(leaves[i].size())}}, Role::gradient));
    }
    const Value digits = ops::square_digits(tape, values), sum = ops::square_digits_to_float(tape, digits);
    tape.mark_output(digits);
    tape.mark_output(sum);
    Built built(tape);
    Storage& storage = built.storage;
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      assign(storage.find(concat("g", i)), leaves[i]);
    }
    built.program.run({});
    const auto span = built.program.tensor(digits).span<std::int64_t>();
    return std::pair(std::vector<std::int64_t>(span.begin(), span.end()), values_of(built.program.tensor(sum))[0]);
  };
  const auto whole = digits_of({{3, 0x1p-40, 0x1p14}}), parts = digits_of({{0x1p14}, {}, {0x1p-40, 3}});
  EXPECT_EQ(whole, parts);
  EXPECT_EQ(whole.second, 9 + 0x1p28) << "2^-80 is in the digits, and beyond float64";
  EXPECT_EQ(whole.first[0], 0x10000);
}

}  // namespace
}  // namespace attamba::testing_support
