// Reading a configuration from TOML.
#include <fstream>
#include <iterator>

#include "src/train/config.h"
#include "src/train/toml_node.h"

namespace attamba {

std::string detail::read_toml_file(const std::filesystem::path& file, std::string_view kind, std::string_view advice) {
  require<UsageError>(!std::filesystem::is_directory(file), file.string(), ": is a folder; name a TOML file, ", advice);
  std::ifstream in(file, std::ios::binary);
  require<UsageError>(in.good(), file.string(), ": cannot open this ", kind, " file; ", advice);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

Config parse_config(std::string_view toml, std::string_view source) {
  Config config;
  detail::read_toml(config, toml, source);
  return config;
}

Config load_config(const std::filesystem::path& file) {
  return parse_config(detail::read_toml_file(file, "configuration", "see configs/ for those that exist"), file.string());
}

}  // namespace attamba
