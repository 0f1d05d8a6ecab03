#include "tests/simt/emulator.h"

#include <cstdlib>
#include <map>
#include <mutex>

#include "tests/simt/emulated_stream.h"
#include "tests/simt/machine.h"

namespace attamba::simt {

namespace {

Options initial_options() {
  Options options;
  if (const char* seed = std::getenv("ATTAMBA_SIMT_SEED"); seed != nullptr) {
    options.seed = std::strtoull(seed, nullptr, 10);
  }
  return options;
}

std::map<std::string, Counters>& all_counters() {
  static std::map<std::string, Counters> counters;
  return counters;
}

}  // namespace

Options& options() {
  static Options options = initial_options();
  return options;
}

Counters counters(const std::string& kernel) {
  return all_counters()[kernel];
}

Counters total_counters() {
  Counters sum;
  for (const auto& [name, one] : all_counters()) {
    sum.launches += one.launches, sum.blocks += one.blocks;
    sum.global_loaded += one.global_loaded, sum.global_stored += one.global_stored;
    sum.shared_loaded += one.shared_loaded, sum.shared_stored += one.shared_stored;
    sum.copied_async += one.copied_async, sum.atomics += one.atomics;
    sum.matrix_products += one.matrix_products, sum.matrix_loads += one.matrix_loads;
    sum.matrix_load_conflicts += one.matrix_load_conflicts;
    sum.block_barriers += one.block_barriers, sum.warp_functions += one.warp_functions;
  }
  return sum;
}

void reset_counters() {
  all_counters().clear();
}

Counters& counters_of(const std::string& kernel) {
  return all_counters()[kernel];
}

std::map<LaunchShape, std::int64_t>& all_launches() {
  static std::map<LaunchShape, std::int64_t> launches;
  return launches;
}

const std::map<LaunchShape, std::int64_t>& launches() {
  return all_launches();
}

}  // namespace attamba::simt

namespace attamba::kernels::cuda {

void emulate(const char* name, const void* kernel, void* stream, const Grid& grid, std::function<void()> body) {
  simt::run_on(static_cast<simt::EmulatedStream*>(stream), [name = std::string(name), kernel, grid, body = std::move(body)] {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    if (kernel != nullptr) {
      ++simt::all_launches()[{kernel, grid.x, grid.y, grid.z, grid.threads, grid.shared_bytes}];
    }
    simt::machine.run(name, grid, body);
  });
}

}  // namespace attamba::kernels::cuda
