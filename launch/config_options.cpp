#include "launch/config_options.h"

#include <CLI/Formatter.hpp>

namespace attamba {

namespace {

constexpr std::size_t kHelpColumn = 52;

std::string joined(const CLI::results_t& results) {
  std::string text;
  for (std::size_t i = 0; i < results.size(); ++i) {
    text += (i == 0 ? "" : ",") + results[i];
  }
  return text;
}

void add_key(CLI::App& command, const ConfigKey& key, ConfigOptions& options) {
  const bool flag = key.type == "true|false";
  const auto remember = [&options, name = key.key, flag](const CLI::results_t& results) {
    const bool bare = flag && (results.empty() || results.front().empty() || results.front() == "{}");
    options.overrides.emplace_back(name, bare ? "true" : joined(results));
    return true;
  };
  CLI::Option* option = command.add_option("--" + key.key, remember, key.help);
  option->type_name(key.type)->type_size(1)->expected(flag ? 0 : 1, 1);
  option->multi_option_policy(key.list ? CLI::MultiOptionPolicy::TakeAll : CLI::MultiOptionPolicy::TakeLast);
  option->group("[" + key.section + "] " + key.about);
  option->option_text(key.type + (key.default_text.empty() ? "" : " = " + key.default_text));
}

}  // namespace

Config ConfigOptions::load() const {
  Config config = file.empty() ? Config() : load_config(file);
  for (const auto& [key, text] : overrides) {
    set_key(config, key, text);
  }
  return config;
}

void add_config_options(CLI::App& command, ConfigOptions& options) {
  command.get_formatter()->column_width(kHelpColumn);
  command
      .add_option("--config,config", options.file,
                  "configuration file, such as configs/attamba_small.toml; without one, the defaults below")
      ->option_text("FILE.toml");
  for (const ConfigKey& key : config_keys()) {
    add_key(command, key, options);
  }
}

void add_device_option(CLI::App& command, ConfigOptions& options) {
  command
      .add_option_function<std::string>(
          "--device", [&options](const std::string& name) { options.overrides.emplace_back("train.device", name); },
          "the same as --train.device")
      ->option_text("auto|cpu|cuda");
}

}  // namespace attamba
