// Ranks that do not exist: who would take part, for programs that are planned and never run.
#pragma once

#include <algorithm>
#include <memory>
#include <string>

#include "comm/communicator.h"

namespace attamba {

class PlannedRanks final : public Communicator {
 public:
  PlannedRanks(int rank, int size, int per_node = 1) : rank_(rank), size_(size), per_node_(per_node) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int local_rank() const override { return rank_ % per_node_; }
  int local_size() const override { return std::min(size_, per_node_); }
  std::string description() const override { return "ranks of a plan"; }

  /// None of these has anybody to talk to: each throws Error.
  std::unique_ptr<Communicator> split(int color) override;
  void all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override;
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override;
  void all_reduce_max(const Tensor& data) override;
  void broadcast(const Tensor& data, int root) override;
  void all_gather(const Tensor& whole, const Tensor& part) override;
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override;
  void barrier() override;
  [[noreturn]] void abort(int exit_code) override;

 private:
  int rank_, size_, per_node_;
};

}  // namespace attamba
