// How a job ends when one rank cannot go on. Run under mpirun with one of the cases below; the exit code is the verdict.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <thread>
#include <vector>

#include "comm/communicator.h"

namespace attamba {
namespace {

/// Rank 0 never comes back to these collectives, so the other ranks would wait for ever.
void wait_for_everybody(Communicator& comm) {
  std::vector<float> behind(1 << 20);
  std::vector<float> front(16);
  const auto request = comm.start_all_reduce_sum({behind.data(), {DType::float32, {1 << 20}}});
  comm.all_reduce_sum({front.data(), {DType::float32, {16}}});
}

/// Returns only when something went wrong.
int run(const std::string& name) {
  const auto comm = make_communicator();
  comm->barrier();
  if (comm->rank() != 0) {
    wait_for_everybody(*comm);
    std::cerr << "rank " << comm->rank() << " got through\n";
    return 99;
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  if (name == "abort") {
    comm->abort(7);
  }
  if (name == "abort-in-flight") {
    // The background thread is inside MPI, waiting for nobody's answer, when the job is aborted.
    std::vector<float> data(3);
    const auto request = comm->start_all_reduce_sum({data.data(), {DType::float32, {3}}});
    const auto second = comm->start_all_reduce_sum({data.data(), {DType::float32, {3}}});
    comm->abort(7);
  }
  if (name == "unwind") {
    throw Error("rank 0 has failed");
  }
  throw UsageError(concat("unknown case ", name));
}

}  // namespace
}  // namespace attamba

int main(int argc, char** argv) {
  try {
    return attamba::run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    // In the case "unwind" the communicator's destructor has ended the job before this line.
    std::cerr << "caught after the communicator was gone: " << error.what() << '\n';
    return 97;
  }
}
