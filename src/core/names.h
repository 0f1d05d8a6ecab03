// Help for names that nobody knows: the nearest known one, and one sentence that says so.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "src/core/error.h"

namespace attamba {

/// Insertions, deletions, substitutions and swaps of neighbours that turn one string into the other.
std::size_t edit_distance(std::string_view a, std::string_view b);

/// The known name nearest to `name`, or an empty view when none is near enough to be what was meant.
std::string_view nearest_name(std::string_view name, const std::vector<std::string_view>& known);

/// "did you mean "x"? Known: x, y, z", without the question when no name is near.
std::string advice_on_names(std::string_view name, const std::vector<std::string_view>& known);

/// Throws a UsageError naming `key`, `name` and the known names when `name` is not one of them.
void require_known(std::string_view key, std::string_view name, const std::vector<std::string_view>& known);

}  // namespace attamba
