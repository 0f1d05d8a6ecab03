// attamba train: one run, on this process or on all ranks that mpirun or srun started.
#include <CLI/CLI.hpp>
#include <memory>

#include "launch/commands.h"
#include "launch/config_options.h"
#include "launch/devices.h"
#include "launch/session.h"
#include "src/train/trainer.h"

namespace attamba {

namespace {

void train(const ConfigOptions& options) {
  handle_stop_signals();
  Trainer::Outcome outcome = Trainer::Outcome::finished;
  run_on_ranks([&](Communicator& communicator) {
    ranks_have_met();
    const Config config = options.load();
    validate(config);
    set_threads(config.train.threads, communicator);
    const Device device =
        open_device(config.train.device, config.train.compute_dtype(), communicator, config.train.deterministic);
    const auto around = device_communicator(config.train.transport, device, communicator);
    outcome = Trainer(config, around ? *around : communicator, device).run();
  });
  if (outcome == Trainer::Outcome::stopped) {
    throw CLI::RuntimeError(kExitStopped);  // not an error: how a command ends with an exit code of its own
  }
}

}  // namespace

void add_train_command(CLI::App& program) {
  auto options = std::make_shared<ConfigOptions>();
  CLI::App* command = program.add_subcommand("train", "train a model; run the same line again to go on after an interruption");
  add_config_options(*command, *options);
  add_device_option(*command, *options);
  command->add_flag_callback(
      "--debug", [options] { options->overrides.emplace_back("train.debug", "true"); }, "the same as --train.debug true");
  command->callback([options] { train(*options); });
}

}  // namespace attamba
