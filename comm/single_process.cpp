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

void copy(const Tensor& to, const Tensor& from) {
  if (from.bytes() != 0 && to.data != from.data) {
    std::memcpy(to.data, from.data, from.bytes());
  }
}

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
  comm_checks::is_part("all_gather", whole, part, rank(), size());
  copy(whole, part);
}

std::unique_ptr<Request> SingleProcess::start_all_gather(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("start_all_gather", whole);
  comm_checks::is_part("start_all_gather", whole, part, rank(), size());
  copy(whole, part);
  return std::make_unique<FinishedRequest>();
}

std::unique_ptr<Request> SingleProcess::start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) {
  comm_checks::in_host_memory("start_reduce_scatter_sum", whole);
  comm_checks::scatterable("start_reduce_scatter_sum", whole, part, rank(), size());
  copy(part, whole);
  return std::make_unique<FinishedRequest>();
}

void SingleProcess::abort(int exit_code) {
  std::cout.flush();
  std::fflush(nullptr);
  std::_Exit(exit_code);
}

}  // namespace attamba
