#include "src/chunking/chunking.h"
#include "src/core/names.h"

namespace attamba {
namespace {

using Factory = std::unique_ptr<ChunkingStrategy> (*)(std::int64_t size);

constexpr std::array kStrategies{
    std::pair<std::string_view, Factory>{"uniform", make_uniform_chunking},
    std::pair<std::string_view, Factory>{"cyclic", make_cyclic_chunking},
    std::pair<std::string_view, Factory>{"random", make_random_chunking},
    std::pair<std::string_view, Factory>{"none", make_pseudo_chunking},
};

}  // namespace

std::unique_ptr<ChunkingStrategy> make_chunking(std::string_view name, std::int64_t size) {
  require<UsageError>(size >= 1, "chunking: size is ", size, ", must be at least 1");
  return require_entry("chunking strategy", kStrategies, name)(size);
}

const std::vector<std::string_view>& chunking_strategies() {
  static const std::vector<std::string_view> kNames = [] {
    std::vector<std::string_view> names = names_of(kStrategies);
    names.push_back("explicit");
    return names;
  }();
  return kNames;
}

}  // namespace attamba
