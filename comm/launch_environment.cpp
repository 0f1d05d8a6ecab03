#include "comm/launch_environment.h"

#include <charconv>
#include <cstdlib>

#include "src/core/error.h"

namespace attamba {
namespace {

/// 0 when the variable is absent or not a positive number.
int count_in(const EnvironmentLookup& lookup, const std::string& name) {
  const std::optional<std::string> text = lookup(name);
  int value = 0;
  if (text) {
    std::from_chars(text->data(), text->data() + text->size(), value);
  }
  return value > 0 ? value : 0;
}

}  // namespace

std::optional<std::string> environment_variable(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

double seconds_from_environment(const std::string& name, double otherwise, const EnvironmentLookup& lookup) {
  const std::optional<std::string> text = lookup(name);
  if (!text) {
    return otherwise;
  }
  double value = -1;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  require<UsageError>(error == std::errc() && end == text->data() + text->size() && value >= 0 && value < 1e9, name, " is \"",
                      *text, "\"; it must be a number of seconds, 0 for no limit");
  return value;
}

LaunchEnvironment read_launch_environment(const EnvironmentLookup& lookup) {
  // Inside a SLURM allocation mpirun starts its daemons as a SLURM step, so only mpirun's own count is right for its ranks.
  if (lookup("OMPI_COMM_WORLD_SIZE")) {
    return {true, count_in(lookup, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"};
  }
  if (lookup("PMI_RANK")) {
    return {true, count_in(lookup, "PMI_SIZE"), "PMI_RANK"};
  }
  const int step_tasks = count_in(lookup, "SLURM_STEP_NUM_TASKS");
  if (lookup("PMIX_RANK")) {
    return {true, step_tasks, "PMIX_RANK"};
  }
  require<UsageError>(step_tasks <= 1, "srun started ", step_tasks,
                      " tasks without an MPI interface, so they cannot find each other: use srun --mpi=pmix (srun --mpi=list "
                      "shows what is there), or mpirun inside the allocation");
  return {};
}

}  // namespace attamba
