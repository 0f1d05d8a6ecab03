// The subcommands of the `attamba` program. Each function adds its subcommands, with their options and callbacks, to the
// program; callbacks report failure by throwing (src/core/error.h), never by exiting.
#pragma once

#include <CLI/App.hpp>

namespace attamba {

void add_data_commands(CLI::App& program);       ///< data_commands.cpp: tokenizer training, packing and inspecting data sets
void add_train_command(CLI::App& program);       ///< train_command.cpp
void add_eval_command(CLI::App& program);        ///< eval_command.cpp: eval and generate
void add_checkpoint_command(CLI::App& program);  ///< checkpoint_command.cpp: info, verify, reshard, export, import
void add_verify_command(CLI::App& program);      ///< verify_command.cpp: this machine's results against the golden files
void add_bench_command(CLI::App& program);       ///< bench_command.cpp
void add_plan_command(CLI::App& program);        ///< plan_command.cpp: what a run needs, before it starts
void add_plot_command(CLI::App& program);        ///< plot_command.cpp
void add_submit_command(CLI::App& program);      ///< submit_command.cpp: train as a SLURM job

}  // namespace attamba
