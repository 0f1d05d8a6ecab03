#include "src/core/version.h"

#include "src/core/error.h"
#include "version.inc"  // written at build time by launch/cmake/version.cmake

namespace attamba {

const Version& version() {
  static const Version kVersion = {ATTAMBA_VERSION, ATTAMBA_COMMIT, ATTAMBA_BUILD_TYPE, ATTAMBA_COMPILER};
  return kVersion;
}

std::string version_line() {
  const Version& v = version();
  return concat("attamba ", v.number, " (", v.commit, ", ", v.build_type, ", ", v.compiler, ")");
}

}  // namespace attamba
