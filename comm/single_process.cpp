#include "comm/single_process.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "comm/checks.h"

namespace attamba {
namespace {

class FinishedRequest final : public Request {
 public:
  void wait() override {}
};

}  // namespace

void SingleProcess::all_reduce_sum(const Tensor& data) {
  comm_checks::reducible("all_reduce_sum", data);
}

std::unique_ptr<Request> SingleProcess::start_all_reduce_sum(const Tensor& data) {
  comm_checks::reducible("start_all_reduce_sum", data);
  return std::make_unique<FinishedRequest>();
}

void SingleProcess::all_reduce_max(const Tensor& data) {
  comm_checks::reducible("all_reduce_max", data);
}

void SingleProcess::broadcast(const Tensor& data, int root) {
  comm_checks::broadcastable(data, root, size());
}

void SingleProcess::all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("all_gather", whole);
  comm_checks::in_host_memory("all_gather", part);
  comm_checks::gatherable(whole, part, rank(), size());
  if (part.bytes() != 0 && whole.data != part.data) {
    std::memcpy(whole.data, part.data, part.bytes());
  }
}

void SingleProcess::abort(int exit_code) {
  std::cout.flush();
  std::fflush(nullptr);
  std::_Exit(exit_code);
}

}  // namespace attamba
