// Measures, on the ranks that mpirun started: sums of float32 in the foreground (bytes / time of the slowest rank), what a
// computation loses to a sum in the background, and the latency of small sums. Prints one table on rank 0.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "comm/communicator.h"

namespace attamba {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The largest of all ranks' values.
double slowest(Communicator& comm, double value) {
  comm.all_reduce_max({&value, {DType::float64, {1}}});
  return value;
}

/// A dependent chain of multiplications: needs the core and no memory.
double compute(double units) {
  volatile double result = 1.0;
  double x = 1.0;
  for (long i = 0; i < static_cast<long>(units * 1e6); ++i) {
    x = x * 0.999999 + 1e-9;
  }
  result = x;
  return result;
}

void measure(Communicator& comm, int mebibytes) {
  constexpr int kRounds = 12;
  std::vector<float> values(static_cast<std::size_t>(mebibytes) << 18, 1.0f);
  const Tensor data{values.data(), {DType::float32, {static_cast<std::int64_t>(values.size())}}};
  double best = 1e9;
  double total = 0.0;
  for (int round = -2; round < kRounds; ++round) {  // two rounds to page memory in
    std::fill(values.begin(), values.end(), 1.0f);
    comm.barrier();
    const double start = seconds();
    comm.all_reduce_sum(data);
    const double took = slowest(comm, seconds() - start);
    if (round >= 0) {
      best = std::min(best, took);
      total += took;
    }
  }
  constexpr double kUnits = 30.0;
  double alone = 1e9;
  double computing = 1e9;
  double both = 1e9;
  for (int round = 0; round < 5; ++round) {
    comm.barrier();
    double start = seconds();
    compute(kUnits);
    alone = std::min(alone, slowest(comm, seconds() - start));
    comm.barrier();
    start = seconds();
    const auto request = comm.start_all_reduce_sum(data);
    compute(kUnits);
    const double computed = seconds() - start;
    request->wait();
    both = std::min(both, slowest(comm, seconds() - start));
    computing = std::min(computing, slowest(comm, computed));
  }
  if (comm.rank() == 0) {
    const double bytes = static_cast<double>(data.bytes());
    std::printf(
        "%3d MiB: best %6.2f ms %5.2f GB/s, mean %5.2f GB/s | compute %6.1f ms, during a sum %6.1f ms, both done %6.1f ms\n",
        mebibytes, best * 1e3, bytes / best / 1e9, bytes * kRounds / total / 1e9, alone * 1e3, computing * 1e3, both * 1e3);
  }
}

void measure_latency(Communicator& comm) {
  constexpr int kRounds = 2000;
  float value = 0.0f;
  comm.barrier();
  const double start = seconds();
  for (int round = 0; round < kRounds; ++round) {
    comm.all_reduce_sum({&value, {DType::float32, {1}}});
  }
  const double took = slowest(comm, seconds() - start);
  if (comm.rank() == 0) {
    std::printf("4 bytes: %.1f us\n", took / kRounds * 1e6);
  }
}

}  // namespace
}  // namespace attamba

int main() {
  const auto comm = attamba::make_communicator();
  if (comm->rank() == 0) {
    std::printf("%s\n", comm->description().c_str());
  }
  for (const int mebibytes : {1, 4, 16, 64}) {
    attamba::measure(*comm, mebibytes);
  }
  attamba::measure_latency(*comm);
}
