// Who started this process, read from the environment alone.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace attamba {

struct LaunchEnvironment {
  bool mpi = false;
  int size = 0;          ///< number of ranks that the launcher claims, 0 when it does not say
  std::string launcher;  ///< the variable that decided, for messages
};

using EnvironmentLookup = std::function<std::optional<std::string>(const std::string& name)>;

/// The process's own environment.
std::optional<std::string> environment_variable(const std::string& name);

/// Seconds that ranks wait for each other before they give up, unless ATTAMBA_TIMEOUT says otherwise; 0 is for ever.
constexpr double kDefaultTimeout = 600;

/// A number of seconds, 0 or more; throws UsageError when the variable holds something else.
double seconds_from_environment(const std::string& name, double otherwise,
                                const EnvironmentLookup& lookup = environment_variable);

/// A launcher that speaks PMI or PMIx sets OMPI_COMM_WORLD_SIZE, PMIX_RANK or PMI_RANK; SLURM's own variables alone also exist
/// in a batch shell and decide nothing. Throws UsageError in a SLURM step of several tasks without PMI: the tasks could not
/// find each other, and would all train the same run alone.
LaunchEnvironment read_launch_environment(const EnvironmentLookup& lookup = environment_variable);

}  // namespace attamba
