// The communicator of a program that runs alone: every collective is the identity, and MPI is never touched.
#pragma once

#include <memory>
#include <string>

#include "comm/communicator.h"

namespace attamba {

class SingleProcess final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  int local_rank() const override { return 0; }
  int local_size() const override { return 1; }
  std::string description() const override { return "one process, no MPI"; }
  std::unique_ptr<Communicator> split(int) override { return std::make_unique<SingleProcess>(); }

  void all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override;
  void all_reduce_max(const Tensor& data) override;
  void broadcast(const Tensor& data, int root) override;
  void all_gather(const Tensor& whole, const Tensor& part) override;
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override;
  void barrier() override {}
  [[noreturn]] void abort(int exit_code) override;
};

}  // namespace attamba
