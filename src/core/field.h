// What is known of a configuration key besides its value. Each configuration struct lists its members once, in a function
// template `describe`; reading, writing, the command line, its help and JSON are visitors of that one list.
#pragma once

#include <string_view>
#include <vector>

namespace attamba {

struct Field {
  std::string_view help;                       ///< one line: what the value means
  std::string_view unit = "";                  ///< "tokens", "steps", ...; empty for pure numbers and names
  std::vector<std::string_view> choices = {};  ///< the names a string may take; empty = any string
};

}  // namespace attamba
