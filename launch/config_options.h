// A configuration file and one option per key, as the subcommands that run a model take them.
#pragma once

#include <CLI/App.hpp>
#include <string>
#include <utility>
#include <vector>

#include "src/train/config.h"

namespace attamba {

/// Filled while the command line is parsed; must live until then.
struct ConfigOptions {
  std::string file;                                            ///< empty = the defaults
  std::vector<std::pair<std::string, std::string>> overrides;  ///< (key, text)

  /// Defaults, then the file, then the overrides. Not yet validated.
  Config load() const;
};

/// Adds the positional `config` and an option `--section.key` for every key, grouped by section in the help.
void add_config_options(CLI::App& command, ConfigOptions& options);

/// Adds `--device`, as other subcommands have it, for --train.device.
void add_device_option(CLI::App& command, ConfigOptions& options);

}  // namespace attamba
