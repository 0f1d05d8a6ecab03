#include <array>
#include <utility>

#include "src/chunking/chunking.h"
#include "src/core/error.h"

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
  for (const auto& [known, factory] : kStrategies) {
    if (known == name) {
      return factory(size);
    }
  }
  throw UsageError(concat("chunking: no strategy named ", name));
}

const std::vector<std::string_view>& chunking_strategies() {
  static const std::vector<std::string_view> kNames = [] {
    std::vector<std::string_view> names;
    for (const auto& [name, factory] : kStrategies) {
      names.push_back(name);
    }
    names.push_back("explicit");
    return names;
  }();
  return kNames;
}

}  // namespace attamba
