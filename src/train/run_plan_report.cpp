// A plan as people and programs read it.
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <ostream>

#include "src/core/error.h"
#include "src/train/metrics.h"
#include "src/train/run_plan.h"

namespace attamba {

namespace {

constexpr double kMebi = 0x1p20, kGibi = 0x1p30, kHour = 3600;

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char text[240];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

/// "  name ....   1,234.5  more"
void line(std::ostream& out, const std::string& name, double value, int decimals, const std::string& more = "") {
  out << format("  %-46s %12.*f%s%s\n", name.c_str(), decimals, value, more.empty() ? "" : "  ", more.c_str());
}

std::string percent(double share) {
  return format("%.1f%%", 100 * share);
}

void print_memory(std::ostream& out, const RunPlan& plan) {
  const Machine& machine = plan.request.machine;
  out << format("\n  %-46s %12s\n", "memory of each GPU", "MiB");
  for (const MemoryRow& row : plan.demands.lasting) {
    line(out, row.purpose, static_cast<double>(row.bytes) / kMebi, 1);
  }
  line(out, "activations and scratch; of these at the peak", static_cast<double>(plan.demands.arena) / kMebi, 1);
  for (const MemoryRow& row : plan.demands.largest) {
    line(out, "  " + row.purpose, static_cast<double>(row.bytes) / kMebi, 1);
  }
  line(out, "driver and libraries (assumed)", machine.reserved / kMebi, 1);
  line(out, "all", plan.used_bytes() / kMebi, 1,
       format("of %.1f, %s", machine.memory / kMebi, percent(plan.used_bytes() / machine.memory).c_str()));
}

void print_communication(std::ostream& out, const RunPlan& plan) {
  if (plan.request.ranks == 1) {
    return;
  }
  out << format("\n  %-46s %12s %12s %12s\n", "ZeRO stage, by its rule", "kept, MiB", "sent, MB", "network, ms");
  for (const StageRow& row : plan.stages) {
    out << format("  %-46s %12.1f %12.1f %12.2f\n",
                  row.stage == 0 ? "0: nothing divided, ring all-reduce"
                                 : format("%d: %s", row.stage,
                                          row.stage == 1   ? "optimizer state divided"
                                          : row.stage == 2 ? "and gradients"
                                                           : "and weights")
                                       .c_str(),
                  row.kept_bytes / kMebi, row.sent_bytes / 1e6, row.seconds * 1e3);
  }
}

void print_time(std::ostream& out, const RunPlan& plan) {
  const StepTime& time = plan.demands.time;
  const double tokens = plan.tokens_per_step();
  out << format("\n  %-46s %12s\n", "a step", "ms");
  line(out, "operations", time.compute * 1e3, 2, format("%.2f if all reached the machine's best speeds", time.floor * 1e3));
  if (plan.request.ranks > 1) {
    line(out, "waiting for the network", time.exposed * 1e3, 2,
         format("it is in use for %.2f, each GPU sends %.1f MB", time.communication * 1e3, time.sent_bytes / 1e6));
  }
  line(out, "all", time.total() * 1e3, 2,
       concat(format_quantity(tokens / time.total(), "tokens/s"), ", ", percent(plan.efficiency()), " of all GPUs' products"));
}

void print_run(std::ostream& out, const RunPlan& plan) {
  const double tokens = plan.tokens_per_step(), seconds = plan.run_seconds();
  out << "\n  FLOP of the model: " << format_quantity(plan.demands.model_flops / tokens, "FLOP") << " per token, "
      << format_quantity(plan.demands.model_flops, "FLOP") << " per step\n"
      << "  a checkpoint takes " << format_quantity(plan.demands.checkpoint_bytes, "B") << " on disk\n"
      << "  " << format_integer(plan.steps) << " steps, " << format_count(tokens * static_cast<double>(plan.steps))
      << " tokens: " << format_duration(seconds) << format(" (%.2f days), ", seconds / (24 * kHour))
      << format("%.1f GPU-hours", seconds / kHour * plan.request.ranks) << ", without evaluation and saving\n";
}

}  // namespace

void print_run_plan(std::ostream& out, const RunPlan& plan) {
  const Config& config = plan.request.config;
  out << config.model.kind << ", " << format_integer(plan.demands.parameters) << " parameters, " << config.train.dtype
      << ", on " << plan.request.ranks << " x " << plan.request.machine.name << ": predicted, not measured\n"
      << "  " << format_integer(config.train.global_batch) << " x " << format_integer(config.data.sequence_length)
      << " tokens a step in micro-batches of " << config.train.micro_batch
      << (config.train.recompute ? ", recomputing blocks" : "") << '\n'
      << "  the machine: " << plan.request.machine.source << '\n';
  if (plan.request.machine.device == "gpu" && plan.request.kernels == Device::cpu) {
    out << "  this program was built without CUDA: scratch memory is what the CPU's kernels ask for\n";
  }
  print_memory(out, plan);
  print_communication(out, plan);
  print_time(out, plan);
  print_run(out, plan);
  for (const std::string& warning : plan.warnings) {
    out << "\n  warning: " << warning << '\n';
  }
  if (plan.fits()) {
    return;
  }
  out << format("\n  warning: this does not fit: %.1f of %.1f GiB\n", plan.used_bytes() / kGibi,
                plan.request.machine.memory / kGibi);
  out << (plan.proposals.empty() ? "  no smaller micro-batch fits either, even with recomputation: use a GPU with more memory\n"
                                 : "  what fits, the quickest first:\n");
  for (const Proposal& proposal : plan.proposals) {
    out << format("    %-46s %8.1f GiB, %.2f ms a step, %+.1f%%\n", proposal.change.c_str(), proposal.bytes / kGibi,
                  proposal.step_seconds * 1e3, 100 * (proposal.step_seconds / plan.demands.time.total() - 1));
  }
}

nlohmann::json to_json(const RunPlan& plan) {
  const Machine& machine = plan.request.machine;
  const StepTime& time = plan.demands.time;
  nlohmann::json memory = nlohmann::json::object(), largest = nlohmann::json::array(), stages = nlohmann::json::array(),
                 proposals = nlohmann::json::array();
  for (const MemoryRow& row : plan.demands.lasting) {
    memory[row.purpose] = row.bytes;
  }
  memory["activations and scratch"] = plan.demands.arena;
  for (const MemoryRow& row : plan.demands.largest) {
    largest.push_back({{"name", row.purpose}, {"bytes", row.bytes}});
  }
  for (const StageRow& row : plan.stages) {
    stages.push_back({{"stage", row.stage},
                      {"kept_bytes", row.kept_bytes},
                      {"sent_bytes", row.sent_bytes},
                      {"network_seconds", row.seconds}});
  }
  for (const Proposal& proposal : plan.proposals) {
    proposals.push_back({{"change", proposal.change}, {"bytes", proposal.bytes}, {"step_seconds", proposal.step_seconds}});
  }
  return {{"machine", machine.name},
          {"machine_source", machine.source},
          {"ranks", plan.request.ranks},
          {"parameters", plan.demands.parameters},
          {"memory", memory},
          {"largest_at_the_peak", largest},
          {"allocated_bytes", plan.demands.allocated()},
          {"reserved_bytes", machine.reserved},
          {"memory_of_gpu", machine.memory},
          {"fits", plan.fits()},
          {"checkpoint_bytes", plan.demands.checkpoint_bytes},
          {"flops_per_token", plan.demands.model_flops / plan.tokens_per_step()},
          {"flops_per_step", plan.demands.model_flops},
          {"zero_stages", stages},
          {"step_seconds", time.total()},
          {"compute_seconds", time.compute},
          {"compute_floor_seconds", time.floor},
          {"exposed_communication_seconds", time.exposed},
          {"communication_seconds", time.communication},
          {"sent_bytes", time.sent_bytes},
          {"tokens_per_second", plan.tokens_per_step() / time.total()},
          {"efficiency", plan.efficiency()},
          {"steps", plan.steps},
          {"tokens", plan.tokens_per_step() * static_cast<double>(plan.steps)},
          {"run_seconds", plan.run_seconds()},
          {"gpu_hours", plan.run_seconds() / kHour * plan.request.ranks},
          {"warnings", plan.warnings},
          {"proposals", proposals}};
}

}  // namespace attamba
