// Which build this is.
#pragma once

#include <string>

namespace attamba {

struct Version {
  std::string number;      ///< "0.1.0"
  std::string commit;      ///< twelve digits, "-dirty" behind them when tracked files differ; "unknown" outside a checkout
  std::string build_type;  ///< "Release", ...
  std::string compiler;    ///< "GNU 12.2.0"
};

const Version& version();

/// "attamba 0.1.0 (0123456789ab, Release, GNU 12.2.0)"
std::string version_line();

}  // namespace attamba
