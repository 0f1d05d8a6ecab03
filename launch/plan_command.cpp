// attamba plan: what a run would take on machines that need not be there.
#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "launch/bench.h"
#include "launch/commands.h"
#include "launch/config_options.h"
#include "launch/devices.h"
#include "src/core/error.h"
#include "src/train/run_plan.h"

namespace attamba {

namespace {

struct PlanOptions {
  ConfigOptions config;
  int ranks = 1;
  std::string gpu = "H100";
  std::string machine;
  double tokens = 0;
  std::string json;
};

void plan(const PlanOptions& options) {
  Machine machine = known_machine(options.gpu);
  if (!options.machine.empty()) {
    machine = load_machine(options.machine, machine);
  }
  const RunPlan plan = plan_run({.config = options.config.load(),
                                 .ranks = options.ranks,
                                 .machine = machine,
                                 .kernels = machine.device == "gpu" ? kernels_to_plan_with() : Device::cpu,
                                 .tokens = options.tokens});
  if (options.json == "-") {
    std::cout << to_json(plan).dump(1) << '\n';
    return;
  }
  print_run_plan(std::cout, plan);
  write_json(options.json, to_json(plan));
}

}  // namespace

void add_plan_command(CLI::App& program) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* command = program.add_subcommand(
      "plan", "memory, time and network traffic that a run would take on given GPUs; needs neither GPU nor data");
  command->add_option("--ranks", options->ranks, "GPUs, one rank each")->capture_default_str();
  command->add_option("--gpu", options->gpu, "kind of GPU: H100, H200, A100 or A6000")->capture_default_str();
  command->add_option("--machine", options->machine,
                      "TOML file of measured numbers that take the place of --gpu's (docs/plan.md)");
  command->add_option("--tokens", options->tokens, "tokens to train on, like 8e9, instead of train.steps");
  command->add_option("--json", options->json, "also write the plan to this file; - prints it instead of the table");
  add_config_options(*command, options->config);
  command->callback([options] { plan(*options); });
}

}  // namespace attamba
