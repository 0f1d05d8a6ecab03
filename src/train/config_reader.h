// Reads a configuration struct from a tree of named values, whatever the file format. Private to src/train.
//
// `Node` is a cheap handle of one value:
//   bool is_table(), std::vector<std::pair<std::string, Node>> entries(), std::optional<Node> get(std::string_view)
//   std::optional<T> as<T>() for bool, std::int64_t, double (an integer will do) and std::string; std::vector<Node> elements()
//   bool is_array(), std::string found() ("the string \"x\""), std::string position() ("file:line:column")
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "src/core/error.h"
#include "src/core/field.h"

namespace attamba::detail {

/// Names the members of a struct, in order.
class NameCollector {
 public:
  template <class Value>
  void field(std::string_view name, const Value&, const Field&) {
    names.push_back(name);
  }
  template <class Section>
  void section(std::string_view name, const Section&, std::string_view) {
    names.push_back(name);
  }
  std::vector<std::string_view> names;
};

inline std::string join_key(std::string_view path, std::string_view name) {
  return path.empty() ? std::string(name) : concat(path, ".", name);
}

/// What to do about an unknown `name` in the section `path` of `Config`; `names` are those that the section has.
std::string advice_on_key(std::string_view path, std::string_view name, const std::vector<std::string_view>& names);

template <class Value>
constexpr std::string_view expected_name() {
  if constexpr (std::is_same_v<Value, bool>) {
    return "true or false";
  } else if constexpr (std::is_same_v<Value, std::int64_t>) {
    return "an integer";
  } else if constexpr (std::is_same_v<Value, double>) {
    return "a number";
  } else if constexpr (std::is_same_v<Value, std::string>) {
    return "a string";
  } else {
    return "a list of strings";
  }
}

template <class Node>
class Reader {
 public:
  Reader(Node table, std::string path) : table_(table), path_(std::move(path)) {}

  template <class Struct>
  void read(Struct& target) {
    NameCollector known;
    Struct::describe(target, known);
    for (const auto& [name, node] : table_.entries()) {
      const bool found = std::find(known.names.begin(), known.names.end(), name) != known.names.end();
      require<UsageError>(found, node.position(), ": unknown key \"", join_key(path_, name), "\"; ",
                          advice_on_key(path_, name, known.names));
    }
    Struct::describe(target, *this);
  }

  template <class Value>
  void field(std::string_view name, Value& value, const Field&) {
    if (const auto node = table_.get(name)) {
      value = convert<Value>(*node, join_key(path_, name));
    }
  }

  template <class Section>
  void section(std::string_view name, Section& section, std::string_view) {
    const auto node = table_.get(name);
    if (!node) {
      return;
    }
    const std::string path = join_key(path_, name);
    require<UsageError>(node->is_table(), node->position(), ": ", path, " is a section: expected its keys, found ",
                        node->found());
    Reader(*node, path).read(section);
  }

 private:
  template <class Value>
  static Value convert(const Node& node, const std::string& key) {
    if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
      Value list;
      if (const auto single = node.template as<std::string>()) {
        return {*single};
      }
      require<UsageError>(node.is_array(), node.position(), ": ", key, ": expected ", expected_name<Value>(), ", found ",
                          node.found());
      for (const Node& element : node.elements()) {
        list.push_back(convert<std::string>(element, key));
      }
      return list;
    } else {
      const auto value = node.template as<Value>();
      require<UsageError>(value.has_value(), node.position(), ": ", key, ": expected ", expected_name<Value>(), ", found ",
                          node.found());
      return *value;
    }
  }

  Node table_;
  std::string path_;
};

}  // namespace attamba::detail
