#include "src/graph/plan.h"

#include <algorithm>
#include <iomanip>
#include <map>
#include <numeric>
#include <ostream>

#include "src/core/storage.h"

namespace attamba {

namespace {

constexpr std::size_t kLargestShown = 6;

/// Steps in order, without those that nothing needs.
std::vector<int> live_steps(const Tape& tape) {
  std::vector<bool> needed(tape.values().size());
  for (std::size_t v = 0; v < needed.size(); ++v) {
    needed[v] = tape.values()[v].is_output;
  }
  std::vector<int> steps;
  for (std::size_t i = tape.nodes().size(); i-- > 0;) {
    const Tape::Node& node = tape.nodes()[i];
    const bool live = node.op->has_effect() || std::any_of(node.outputs.begin(), node.outputs.end(),
                                                           [&](Value v) { return needed[static_cast<std::size_t>(v.id)]; });
    if (live) {
      steps.push_back(static_cast<int>(i));
      for (const Value input : node.inputs) {
        needed[static_cast<std::size_t>(tape.memory_of(input).id)] = true;
      }
    }
  }
  std::reverse(steps.begin(), steps.end());
  return steps;
}

class Planner {
 public:
  Planner(const Tape& tape, Device device) : tape_(tape), device_(device) {
    plan_.steps = live_steps(tape);
    plan_.buffer_of_value.assign(tape.values().size(), -1);
    plan_.scratch_of_step.assign(plan_.steps.size(), -1);
    find_last_uses();
  }

  Plan run() {
    for (std::size_t s = 0; s < plan_.steps.size(); ++s) {
      add_buffers_of(static_cast<int>(s));
    }
    place();
    return std::move(plan_);
  }

 private:
  const Tape::Node& node(int step) const {
    return tape_.nodes()[static_cast<std::size_t>(plan_.steps[static_cast<std::size_t>(step)])];
  }

  void find_last_uses() {
    last_use_.assign(tape_.values().size(), -1);
    const int end = static_cast<int>(plan_.steps.size());
    for (int s = 0; s < end; ++s) {
      for (const Value output : node(s).outputs) {
        last_use_[static_cast<std::size_t>(output.id)] = s;
      }
      for (const Value input : node(s).inputs) {
        last_use_[static_cast<std::size_t>(tape_.memory_of(input).id)] = s;
      }
    }
    for (std::size_t v = 0; v < last_use_.size(); ++v) {
      if (tape_.values()[v].is_output) {
        last_use_[v] = end;
      }
    }
  }

  void add_buffers_of(int s) {
    const Tape::Node& n = node(s);
    std::vector<TensorType> input_types, output_types;
    for (const Value v : n.inputs) {
      input_types.push_back(tape_.type(v));
      add_temporary(tape_.memory_of(v), s);
    }
    for (std::size_t o = 0; o < n.outputs.size(); ++o) {
      const Value v = n.outputs[o];
      output_types.push_back(tape_.type(v));
      const int last = last_use_[static_cast<std::size_t>(v.id)];
      int buffer = reusable_buffer(s, static_cast<int>(o));
      if (buffer < 0) {
        buffer = new_buffer(v, s);
      }
      Plan::Buffer& b = plan_.buffers[static_cast<std::size_t>(buffer)];
      b.last_step = std::max(b.last_step, last);
      plan_.buffer_of_value[static_cast<std::size_t>(v.id)] = buffer;
    }
    if (const std::size_t bytes = n.op->workspace(device_, input_types, output_types); bytes > 0) {
      plan_.scratch_of_step[static_cast<std::size_t>(s)] = static_cast<int>(plan_.buffers.size());
      plan_.buffers.push_back({.name = concat(n.scope, n.scope.empty() ? "" : "/", n.op->name(), " scratch"),
                               .bytes = align_up(bytes),
                               .offset = 0,
                               .first_step = s,
                               .last_step = s,
                               .scratch = true});
    }
  }

  int new_buffer(Value v, int s) {
    plan_.buffers.push_back({.name = tape_.info(v).name,
                             .bytes = align_up(tape_.type(v).bytes()),
                             .offset = 0,
                             .first_step = s,
                             .last_step = last_use_[static_cast<std::size_t>(v.id)],
                             .scratch = false});
    return static_cast<int>(plan_.buffers.size()) - 1;
  }

  /// Leaves that the arena lends begin where they are touched first.
  void add_temporary(Value v, int s) {
    int& buffer = plan_.buffer_of_value[static_cast<std::size_t>(v.id)];
    if (tape_.info(v).temporary && buffer < 0) {
      buffer = new_buffer(v, s);
    }
  }

  /// The buffer of the input that output o of step s may overwrite: an activation whose buffer nobody needs after this step.
  int reusable_buffer(int s, int o) const {
    const Tape::Node& n = node(s);
    const int i = n.op->reusable_input(o);
    if (i < 0) {
      return -1;
    }
    const Value input = n.inputs[static_cast<std::size_t>(i)];
    if (tape_.info(input).role != Role::activation) {
      return -1;  // also one that the arena lends: its ops write it in place
    }
    const int buffer = plan_.buffer_of_value[static_cast<std::size_t>(input.id)];
    const bool fits = tape_.type(input).bytes() == tape_.type(n.outputs[static_cast<std::size_t>(o)]).bytes();
    const bool once = std::count(n.inputs.begin(), n.inputs.end(), input) == 1;
    const bool taken = std::any_of(n.outputs.begin(), n.outputs.begin() + o,
                                   [&](Value v) { return plan_.buffer_of_value[static_cast<std::size_t>(v.id)] == buffer; });
    return buffer >= 0 && fits && once && !taken && plan_.buffers[static_cast<std::size_t>(buffer)].last_step == s ? buffer
                                                                                                                   : -1;
  }

  /// Largest first, each at the lowest offset where it overlaps nothing that lives at the same time.
  void place() {
    std::vector<int> order(plan_.buffers.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return at(a).bytes > at(b).bytes; });
    std::vector<int> placed;  // by offset
    for (const int i : order) {
      std::size_t offset = 0;
      for (const int j : placed) {
        const bool together = at(i).first_step <= at(j).last_step && at(j).first_step <= at(i).last_step;
        if (together && at(j).offset < offset + at(i).bytes && offset < at(j).offset + at(j).bytes) {
          offset = at(j).offset + at(j).bytes;
        }
      }
      at(i).offset = offset;
      placed.insert(
          std::upper_bound(placed.begin(), placed.end(), i, [&](int a, int b) { return at(a).offset < at(b).offset; }), i);
      plan_.arena_bytes = std::max(plan_.arena_bytes, offset + at(i).bytes);
      plan_.unshared_bytes += at(i).bytes;
    }
  }

  Plan::Buffer& at(int i) { return plan_.buffers[static_cast<std::size_t>(i)]; }

  const Tape& tape_;
  Device device_;
  Plan plan_;
  std::vector<int> last_use_;
};

std::string mebibytes(std::size_t bytes) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(2) << static_cast<double>(bytes) / (1 << 20);
  return out.str();
}

}  // namespace

Plan make_plan(const Tape& tape, Device device) {
  return Planner(tape, device).run();
}

std::vector<const Plan::Buffer*> Plan::peak() const {
  std::vector<const Buffer*> best;
  std::size_t most = 0;
  for (int s = 0; s < static_cast<int>(steps.size()); ++s) {
    std::vector<const Buffer*> alive;
    std::size_t bytes = 0;
    for (const Buffer& buffer : buffers) {
      if (buffer.first_step <= s && s <= buffer.last_step) {
        alive.push_back(&buffer);
        bytes += buffer.bytes;
      }
    }
    if (bytes > most) {
      most = bytes;
      best = std::move(alive);
    }
  }
  std::stable_sort(best.begin(), best.end(), [](const Buffer* a, const Buffer* b) { return a->bytes > b->bytes; });
  return best;
}

std::string FoldedBuffer::label() const {
  return count > 1 ? concat(name, " x", count) : name;
}

std::vector<FoldedBuffer> fold_layers(const std::vector<const Plan::Buffer*>& buffers, std::size_t most) {
  std::map<std::string, FoldedBuffer> folded;
  for (const Plan::Buffer* buffer : buffers) {
    std::string name = buffer->name;
    if (const auto at = name.find("layers."); at != std::string::npos) {
      const auto digits = at + 7, end = name.find_first_not_of("0123456789", digits);
      name.replace(digits, end - digits, "*");
    }
    FoldedBuffer& row = folded[name];
    row.name = name;
    ++row.count;
    row.bytes += buffer->bytes;
  }
  std::vector<FoldedBuffer> rows;
  for (auto& [name, row] : folded) {
    rows.push_back(std::move(row));
  }
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  rows.resize(std::min(rows.size(), most));
  return rows;
}

void print_memory_table(std::ostream& out, const MemoryReport& report, const Plan& largest) {
  const auto row = [&](std::string_view name, std::size_t bytes) {
    out << "  " << std::left << std::setw(34) << name << std::right << std::setw(12) << mebibytes(bytes) << '\n';
  };
  out << "  memory per rank                            MiB\n";
  row("parameters", report.parameters);
  row("gradients", report.gradients);
  row("optimizer state", report.state);
  row("inputs and tables", report.inputs);
  row("activations and scratch", report.arena);
  row("total", report.total());
  out << "  activations would take " << mebibytes(largest.unshared_bytes) << " MiB without sharing; the largest at the peak:\n";
  for (const FoldedBuffer& buffer : fold_layers(largest.peak(), kLargestShown)) {
    row("  " + buffer.label(), buffer.bytes);
  }
}

}  // namespace attamba
