#include "src/graph/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <sstream>

#include "src/core/random.h"
#include "tests/graph/toy_ops.h"

namespace attamba::toys {
namespace {

/// A random tape: ops of one to three inputs and outputs of different sizes, some with scratch, some that may overwrite an
/// input, some that write leaves, some of whose results are outputs, and many that nobody needs.
void declare_random_tape(Tape& tape, std::uint64_t seed) {
  RandomStream random(seed);
  std::vector<Value> values{tape.input("x", vector_type(5)), tape.input("y", vector_type(40))};
  const Value leaf = tape.leaf("sum", vector_type(7), Role::state);
  const auto pick = [&] {  // recent values more often
    const std::size_t back = random.below(random.below(values.size()) + 1);
    return values[values.size() - 1 - back];
  };
  const int ops = 5 + static_cast<int>(random.below(60));
  for (int i = 0; i < ops; ++i) {
    if (random.below(8) == 0) {
      tape.emit(std::make_shared<AddToLeaf>(),
                {{leaf, tape.emit_one(std::make_shared<Mix>(Mix::Options{.sizes = {7}}), {{pick()}})}});
      continue;
    }
    Mix::Options options{.sizes = {}, .bias = i + 1.0};
    for (std::uint64_t outputs = 1 + random.below(3); outputs > 0; --outputs) {
      options.sizes.push_back(1 + static_cast<std::int64_t>(random.below(100)));
    }
    std::vector<Value> inputs;
    for (std::uint64_t count = 1 + random.below(3); count > 0; --count) {
      inputs.push_back(pick());
    }
    options.scratch = random.below(3) == 0 ? random.below(2000) : 0;
    if (random.below(2) == 0) {  // elementwise over input 0, so that its memory may be taken over
      options.sizes = {tape.type(inputs[0]).shape.columns()};
      options.reusable = 0;
    }
    const std::vector<Value> outputs = tape.emit(std::make_shared<Mix>(options), inputs);
    values.insert(values.end(), outputs.begin(), outputs.end());
    if (random.below(10) == 0) {
      tape.mark_output(outputs[0]);
    }
  }
  tape.mark_output(values.back());
}

/// The same steps with a place of its own for every value and every scratch: what a plan without any sharing looks like.
Plan unshared(const Tape& tape, const Plan& plan) {
  Plan result;
  result.steps = plan.steps;
  result.buffer_of_value.assign(tape.values().size(), -1);
  result.scratch_of_step.assign(plan.steps.size(), -1);
  const auto place = [&](std::size_t bytes) {
    result.buffers.push_back({.name = "own", .bytes = align_up(bytes), .offset = result.arena_bytes});
    result.arena_bytes += align_up(bytes);
    return static_cast<int>(result.buffers.size()) - 1;
  };
  for (std::size_t s = 0; s < plan.steps.size(); ++s) {
    const Tape::Node& node = tape.nodes()[static_cast<std::size_t>(plan.steps[s])];
    for (const Value output : node.outputs) {
      result.buffer_of_value[static_cast<std::size_t>(output.id)] = place(tape.type(output).bytes());
    }
    if (plan.scratch_of_step[s] >= 0) {
      result.scratch_of_step[s] = place(plan.buffers[static_cast<std::size_t>(plan.scratch_of_step[s])].bytes);
    }
  }
  return result;
}

/// A stretch of the arena and the steps during which it must keep its contents.
struct Occupation {
  std::size_t begin, end;
  int first, last;
  int value;  ///< -1: scratch
};

/// Liveness worked out anew from the plan's steps: from the step that writes a value to the last that reads it.
std::vector<Occupation> occupations(const Tape& tape, const Plan& plan) {
  std::vector<Occupation> all;
  const int steps = static_cast<int>(plan.steps.size());
  for (int s = 0; s < steps; ++s) {
    const Tape::Node& node = tape.nodes()[static_cast<std::size_t>(plan.steps[static_cast<std::size_t>(s)])];
    for (const Value output : node.outputs) {
      int last = tape.info(output).is_output ? steps : s;
      for (int later = s + 1; later < steps; ++later) {
        const Tape::Node& reader = tape.nodes()[static_cast<std::size_t>(plan.steps[static_cast<std::size_t>(later)])];
        if (std::count(reader.inputs.begin(), reader.inputs.end(), output) > 0) {
          last = std::max(last, later);
        }
      }
      const auto& buffer = plan.buffers[static_cast<std::size_t>(plan.buffer_of_value[static_cast<std::size_t>(output.id)])];
      all.push_back({buffer.offset, buffer.offset + tape.type(output).bytes(), s, last, output.id});
    }
    if (const int scratch = plan.scratch_of_step[static_cast<std::size_t>(s)]; scratch >= 0) {
      const auto& buffer = plan.buffers[static_cast<std::size_t>(scratch)];
      all.push_back({buffer.offset, buffer.offset + buffer.bytes, s, s, -1});
    }
  }
  return all;
}

/// Whether b is the output that its op may put in a's place, a being read there for the last time.
bool taken_over(const Tape& tape, const Plan& plan, const Occupation& a, const Occupation& b) {
  if (a.value < 0 || b.value < 0 || a.last != b.first) {
    return false;
  }
  const Tape::Node& node = tape.nodes()[static_cast<std::size_t>(plan.steps[static_cast<std::size_t>(b.first)])];
  for (std::size_t o = 0; o < node.outputs.size(); ++o) {
    const int i = node.op->reusable_input(static_cast<int>(o));
    if (node.outputs[o].id == b.value && i >= 0 && node.inputs[static_cast<std::size_t>(i)].id == a.value) {
      return std::count(node.inputs.begin(), node.inputs.end(), Value{a.value}) == 1;
    }
  }
  return false;
}

/// Calls body(tape, plan) for many random tapes.
template <class Body>
void for_random_tapes(const Body& body) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Tape tape;
    declare_random_tape(tape, seed);
    body(tape, make_plan(tape));
  }
}

TEST(RandomPlans, NeverShareMemoryBetweenLiveValues) {
  for_random_tapes([](const Tape& tape, const Plan& plan) {
    const std::vector<Occupation> all = occupations(tape, plan);
    for (const Occupation& a : all) {
      EXPECT_EQ(a.begin % kAlignment, 0u);
      EXPECT_LE(a.end, plan.arena_bytes);
      for (const Occupation& b : all) {
        const bool together = a.first <= b.last && b.first <= a.last && &a != &b;
        const bool overlap = a.begin < b.end && b.begin < a.end;
        if (together && overlap) {
          EXPECT_TRUE(taken_over(tape, plan, a, b) || taken_over(tape, plan, b, a))
              << "values " << a.value << " and " << b.value << " at steps " << a.first << "-" << a.last << " and " << b.first
              << "-" << b.last;
        }
      }
    }
  });
}

TEST(RandomPlans, ComputeWhatAnUnsharedPlanComputes) {
  for_random_tapes([](const Tape& tape, const Plan& plan) {
    Runnable shared(tape, plan), apart(tape, unshared(tape, plan));
    for (Runnable* r : {&shared, &apart}) {
      const auto x = r->storage.get("x", vector_type(5)).span<double>();  // made here when no op that matters reads it
      std::iota(x.begin(), x.end(), 1.0);
      for (int replay = 0; replay < 2; ++replay) {
        for (std::size_t i = 0; i < 40; ++i) {
          r->storage.get("y", vector_type(40)).as<double>()[i] = static_cast<double>(i) * 0.25 + replay;
        }
        r->program.run({});
      }
    }
    for (std::size_t v = 0; v < tape.values().size(); ++v) {
      if (tape.values()[v].is_output) {
        EXPECT_EQ(shared.get(Value{static_cast<int>(v)}), apart.get(Value{static_cast<int>(v)})) << "value " << v;
      }
    }
    if (shared.storage.contains("sum")) {
      EXPECT_EQ(shared.get("sum"), apart.get("sum"));
    }
    EXPECT_LE(plan.arena_bytes, plan.unshared_bytes);
  });
}

TEST(RandomPlans, RunExactlyTheOpsThatMatter) {
  for_random_tapes([](const Tape& tape, const Plan& plan) {
    // An op matters when it writes a leaf, gives an output, or feeds an op that matters: a fixed point, found without order.
    std::vector<bool> matters(tape.nodes().size());
    for (bool changed = true; changed;) {
      changed = false;
      for (std::size_t i = 0; i < tape.nodes().size(); ++i) {
        const Tape::Node& node = tape.nodes()[i];
        bool now = !node.op->mutated().empty();
        for (const Value output : node.outputs) {
          now = now || tape.info(output).is_output;
          for (std::size_t j = 0; j < tape.nodes().size(); ++j) {
            const auto& inputs = tape.nodes()[j].inputs;
            now = now || (matters[j] && std::count(inputs.begin(), inputs.end(), output) > 0);
          }
        }
        changed = changed || now != matters[i];
        matters[i] = now;
      }
    }
    std::vector<int> expected;
    for (std::size_t i = 0; i < matters.size(); ++i) {
      if (matters[i]) {
        expected.push_back(static_cast<int>(i));
      }
    }
    EXPECT_EQ(plan.steps, expected);
  });
}

TEST(Plan, ALongChainTakesTheMemoryOfTwoValues) {
  Tape tape;
  Value h = tape.input("x", vector_type(1024));
  for (int i = 0; i < 50; ++i) {
    h = tape.emit_one(std::make_shared<Mix>(Mix::Options{.sizes = {1024}}), {{h}});
  }
  tape.mark_output(h);
  const Plan plan = make_plan(tape);
  EXPECT_EQ(plan.arena_bytes, 2 * 1024 * sizeof(double));
  EXPECT_EQ(plan.unshared_bytes, 50 * 1024 * sizeof(double));
}

TEST(Plan, WorksInPlaceOnlyWhenNobodyNeedsTheInput) {
  for (const bool needed : {false, true}) {
    Tape tape;
    const Value x = tape.input("x", vector_type(8)), a = multiply(tape, x, x), b = add(tape, a, x);
    tape.mark_output(needed ? multiply(tape, a, b) : multiply(tape, x, b));
    const Plan plan = make_plan(tape);
    EXPECT_EQ(plan.buffer_of_value[static_cast<std::size_t>(a.id)] == plan.buffer_of_value[static_cast<std::size_t>(b.id)],
              !needed);
  }
}

TEST(Plan, NeverWritesOverLeavesOrOutputs) {
  Tape tape;
  const Value x = tape.input("x", vector_type(8)), a = add(tape, x, x), b = add(tape, a, x);
  tape.mark_output(a);
  tape.mark_output(b);
  const Plan plan = make_plan(tape);
  EXPECT_EQ(plan.buffer_of_value[static_cast<std::size_t>(x.id)], -1);
  EXPECT_NE(plan.buffer_of_value[static_cast<std::size_t>(a.id)], plan.buffer_of_value[static_cast<std::size_t>(b.id)]);
}

TEST(Plan, ThePeakIsTheLargestSumOfLiveBuffers) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Tape tape;
    declare_random_tape(tape, seed);
    const Plan plan = make_plan(tape);
    std::size_t most = 0, peak = 0;
    for (int s = 0; s < static_cast<int>(plan.steps.size()); ++s) {
      std::size_t bytes = 0;
      for (const Plan::Buffer& buffer : plan.buffers) {
        bytes += buffer.first_step <= s && s <= buffer.last_step ? buffer.bytes : 0;
      }
      most = std::max(most, bytes);
    }
    std::size_t previous = most + 1;
    for (const Plan::Buffer* buffer : plan.peak()) {
      peak += buffer->bytes;
      EXPECT_LE(buffer->bytes, previous) << "largest first";
      previous = buffer->bytes;
    }
    EXPECT_EQ(peak, most);
    EXPECT_GE(plan.arena_bytes, most);
    EXPECT_LE(plan.arena_bytes, most * 3 / 2) << "seed " << seed << ": the arena is far above what is live at once";
  }
}

TEST(MemoryTable, FoldsLayersAndAddsUp) {
  Tape tape;
  Value h = tape.input("x", vector_type(1 << 17));
  std::vector<Value> kept;
  for (int layer = 0; layer < 12; ++layer) {
    const Tape::Scope scope(tape, concat("layers.", layer));
    kept.push_back(tape.emit_one(std::make_shared<Mix>(Mix::Options{.sizes = {1 << 17}}), {{h}}));
    tape.mark_output(kept.back());
  }
  const Plan plan = make_plan(tape);
  MemoryReport report{.parameters = 3 << 20, .gradients = 2 << 20, .state = 1 << 20, .inputs = 0, .arena = plan.arena_bytes};
  std::ostringstream out;
  print_memory_table(out, report, plan);
  EXPECT_NE(out.str().find("layers.*/mix x12"), std::string::npos) << out.str();
  EXPECT_NE(out.str().find("18.00"), std::string::npos) << "3 + 2 + 1 + 12 MiB\n" << out.str();
}

}  // namespace
}  // namespace attamba::toys
