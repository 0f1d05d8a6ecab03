// A value of a TOML file as the configuration's reader takes it (config_reader.h). Private to src/train.
#pragma once

#include <toml++/toml.h>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/error.h"
#include "src/train/config_reader.h"

namespace attamba::detail {

inline std::string position_of(std::string_view source, const toml::source_region& region) {
  return concat(source, ":", region.begin.line, ":", region.begin.column);
}

class TomlNode {
 public:
  TomlNode(const toml::node& node, std::string_view source, const toml::key* key = nullptr)
      : node_(&node), key_(key), source_(source) {}

  bool is_table() const { return node_->is_table(); }
  bool is_array() const { return node_->is_array(); }

  std::vector<std::pair<std::string, TomlNode>> entries() const {
    std::vector<std::pair<std::string, TomlNode>> all;
    for (const auto& [key, value] : *node_->as_table()) {
      all.emplace_back(key.str(), TomlNode(value, source_, &key));
    }
    return all;
  }

  std::optional<TomlNode> get(std::string_view name) const {
    const toml::node* child = node_->as_table()->get(name);
    return child == nullptr ? std::nullopt : std::optional<TomlNode>(TomlNode(*child, source_));
  }

  std::vector<TomlNode> elements() const {
    std::vector<TomlNode> all;
    for (const toml::node& element : *node_->as_array()) {
      all.emplace_back(element, source_);
    }
    return all;
  }

  template <class Value>
  std::optional<Value> as() const {
    if constexpr (std::is_same_v<Value, double>) {
      return node_->value<double>();  // an integer without loss will do
    } else {
      return node_->value_exact<Value>();
    }
  }

  std::string found() const {
    if (const auto text = node_->value_exact<std::string>()) {
      return concat("the string \"", *text, "\"");
    }
    if (const auto number = node_->value_exact<double>()) {
      return concat("the number ", *number);
    }
    if (const auto number = node_->value_exact<std::int64_t>()) {
      return concat("the integer ", *number);
    }
    if (const auto flag = node_->value_exact<bool>()) {
      return *flag ? "true" : "false";
    }
    return node_->is_table() ? "a section" : node_->is_array() ? "a list" : "a date or time";
  }

  /// Of the key where it is known, else of the value.
  std::string position() const { return position_of(source_, key_ != nullptr ? key_->source() : node_->source()); }

 private:
  const toml::node* node_;
  const toml::key* key_;
  std::string_view source_;
};

/// Fills a struct that lists its keys in `describe`, over what it holds. Errors name `source`:line:column.
template <class Struct>
void read_toml(Struct& target, std::string_view toml, std::string_view source) {
  toml::table table;
  try {
    table = toml::parse(toml);
  } catch (const toml::parse_error& error) {
    throw UsageError(concat(position_of(source, error.source()), ": not valid TOML: ", error.description()));
  }
  Reader(TomlNode(table, source), "").read(target);
}

/// The whole of a file of this kind ("configuration"), or a UsageError that names it and says `advice`.
std::string read_toml_file(const std::filesystem::path& file, std::string_view kind, std::string_view advice);

}  // namespace attamba::detail
