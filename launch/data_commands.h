// `attamba data prepare|info|verify|show`.
#pragma once

#include <CLI/CLI.hpp>

namespace attamba {

/// Registers the commands on the program's command line. Their callbacks run the command and throw on an error.
void add_data_commands(CLI::App& app);

}  // namespace attamba
