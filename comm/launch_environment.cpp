#include "comm/launch_environment.h"

#include <unistd.h>

#include <algorithm>
#include <array>
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

std::string host_name() {
  std::array<char, 64> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

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

std::string first_host(const std::string& node_list) {
  std::string host;
  for (std::size_t i = 0; i < node_list.size() && node_list[i] != ','; ++i) {
    if (node_list[i] != '[') {
      host += node_list[i];
      continue;
    }
    const std::size_t end = node_list.find(']', i);
    host += node_list.substr(i + 1, std::min(node_list.find_first_of(",-]", i), end) - i - 1);
    i = std::min(end, node_list.size() - 1);
  }
  return host;
}

namespace {

/// The launchers' own names for rank and number of ranks, ours first.
struct Numbering {
  const char *rank, *size;
};
constexpr Numbering kNumberings[] = {{"ATTAMBA_RANK", "ATTAMBA_RANKS"},
                                     {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
                                     {"PMI_RANK", "PMI_SIZE"},
                                     {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"}};

int number_in(const EnvironmentLookup& lookup, const char* name, int least) {
  const std::string text = lookup(name).value_or("");
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require<UsageError>(error == std::errc() && end == text.data() + text.size() && value >= least, name, " is \"", text,
                      "\"; it must be a number, ", least, " or more");
  return value;
}

/// Where tasks of a SLURM step meet when nobody says: on the first node, at a port and with a secret that follow from the job.
void meet_in_slurm_step(const EnvironmentLookup& lookup, TcpLaunch& tcp) {
  const std::string job = lookup("SLURM_JOB_ID").value_or("0"), step = lookup("SLURM_STEP_ID").value_or("0");
  const std::string nodes = lookup("SLURM_STEP_NODELIST").value_or(lookup("SLURM_JOB_NODELIST").value_or(""));
  if (tcp.rendezvous.empty() && !nodes.empty()) {
    const int spread = count_in(lookup, "SLURM_JOB_ID") * 37 + count_in(lookup, "SLURM_STEP_ID");
    tcp.rendezvous = concat(first_host(nodes), ':', 20000 + (spread % 10000 + 10000) % 10000);
  }
  if (tcp.secret.empty()) {
    tcp.secret = concat("slurm-", job, '.', step);
  }
  tcp.several_hosts = count_in(lookup, "SLURM_STEP_NUM_NODES") > 1;
}

LaunchEnvironment read_tcp(const EnvironmentLookup& lookup) {
  for (const Numbering& numbering : kNumberings) {
    if (!lookup(numbering.rank)) {
      continue;
    }
    TcpLaunch tcp;
    tcp.rank = number_in(lookup, numbering.rank, 0);
    tcp.size = number_in(lookup, numbering.size, 1);
    require<UsageError>(tcp.rank < tcp.size, numbering.rank, " is ", tcp.rank, ", but ranks count from 0 and ", numbering.size,
                        " is ", tcp.size);
    tcp.rendezvous = lookup("ATTAMBA_RENDEZVOUS").value_or("");
    tcp.secret = lookup("ATTAMBA_SECRET").value_or("");
    tcp.interface = lookup("ATTAMBA_INTERFACE").value_or("");
    tcp.timeout = seconds_from_environment("ATTAMBA_CONNECT_TIMEOUT", tcp.timeout, lookup);
    if (lookup("SLURM_STEP_NUM_TASKS")) {
      meet_in_slurm_step(lookup, tcp);
    }
    require<UsageError>(tcp.size == 1 || !tcp.rendezvous.empty(),
                        "ATTAMBA_RENDEZVOUS is not set, so ranks cannot find each other: set it to host:port of rank 0, or to "
                        "file:PATH on a file system that all ranks see");
    return {.size = tcp.size, .launcher = numbering.rank, .tcp = tcp};
  }
  throw UsageError("ATTAMBA_TRANSPORT is tcp, but nothing says which rank this is: set ATTAMBA_RANK and ATTAMBA_RANKS");
}

}  // namespace

LaunchEnvironment read_launch_environment(const EnvironmentLookup& lookup) {
  const std::string transport = lookup("ATTAMBA_TRANSPORT").value_or("");
  require<UsageError>(transport.empty() || transport == "mpi" || transport == "tcp", "ATTAMBA_TRANSPORT is \"", transport,
                      "\"; it must be mpi or tcp");
  if (transport == "tcp" || (transport.empty() && lookup("ATTAMBA_RANK"))) {
    return read_tcp(lookup);
  }
  // Inside a SLURM allocation mpirun starts its daemons as a SLURM step, so only mpirun's own count is right for its ranks.
  if (lookup("OMPI_COMM_WORLD_SIZE")) {
    return {true, count_in(lookup, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE", {}};
  }
  if (lookup("PMI_RANK")) {
    return {true, count_in(lookup, "PMI_SIZE"), "PMI_RANK", {}};
  }
  const int step_tasks = count_in(lookup, "SLURM_STEP_NUM_TASKS");
  if (lookup("PMIX_RANK")) {
    return {true, step_tasks, "PMIX_RANK", {}};
  }
  if (step_tasks <= 1) {
    return {};
  }
  require<UsageError>(
      transport != "mpi", "ATTAMBA_TRANSPORT is mpi, but srun started ", step_tasks,
      " tasks without an MPI interface: use srun --mpi=pmix (srun --mpi=list shows what is there), mpirun inside "
      "the allocation, or ATTAMBA_TRANSPORT=tcp");
  return read_tcp(lookup);
}

}  // namespace attamba
