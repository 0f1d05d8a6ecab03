// Help for names that nobody knows: the nearest known one, and one sentence that says so.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <utility>
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

/// The registries' tables: names, in the order in which help shows them, and what each stands for.
template <class Entry, std::size_t N>
using NameTable = std::array<std::pair<std::string_view, Entry>, N>;

/// The entry of that name; null when there is none.
template <class Entry, std::size_t N>
const Entry* find_entry(const NameTable<Entry, N>& table, std::string_view name) {
  for (const auto& [known, entry] : table) {
    if (known == name) {
      return &entry;
    }
  }
  return nullptr;
}

template <class Entry, std::size_t N>
std::vector<std::string_view> names_of(const NameTable<Entry, N>& table) {
  std::vector<std::string_view> names;
  for (const auto& [name, entry] : table) {
    names.push_back(name);
  }
  return names;
}

/// The same, or a UsageError that begins with `key` and lists the known names.
template <class Entry, std::size_t N>
const Entry& require_entry(std::string_view key, const NameTable<Entry, N>& table, std::string_view name) {
  const Entry* entry = find_entry(table, name);
  if (entry == nullptr) {
    require_known(key, name, names_of(table));
  }
  return *entry;
}

}  // namespace attamba
