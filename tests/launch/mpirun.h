// mpirun as tests need it: more ranks than cores, as root in a container, one thread a rank.
#pragma once

#include <string>

#include "src/core/error.h"

namespace attamba {

/// What a shell starts `command` with, on so many ranks; without mpirun for one. `environment`: "NAME=VALUE ..." of the ranks.
inline std::string on_ranks(int ranks, const std::string& command, const std::string& environment = "") {
  const std::string settings = concat("env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive ", environment, ' ');
  return ranks == 1 ? settings + command
                    : concat(settings,
                             "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
                             "OMPI_MCA_rmaps_base_oversubscribe=1 mpirun --bind-to none -np ",
                             ranks, ' ', command);
}

}  // namespace attamba
