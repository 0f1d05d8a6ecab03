// A communicator around another one.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>

#include "comm/communicator.h"

namespace attamba {

/// Passes everything on. What a test wants otherwise, it overrides.
class PassingOn : public Communicator {
 public:
  explicit PassingOn(Communicator& real) : real_(real) {}

  int rank() const override { return real_.rank(); }
  int size() const override { return real_.size(); }
  int local_rank() const override { return real_.local_rank(); }
  int local_size() const override { return real_.local_size(); }
  std::string description() const override { return real_.description(); }
  std::unique_ptr<Communicator> split(int color) override { return real_.split(color); }
  void all_reduce_sum(const Tensor& data) override { real_.all_reduce_sum(data); }
  std::unique_ptr<Request> start_all_reduce_sum(const Tensor& data) override { return real_.start_all_reduce_sum(data); }
  std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor& whole, const Tensor& part) override {
    return real_.start_reduce_scatter_sum(whole, part);
  }
  std::unique_ptr<Request> start_all_gather(const Tensor& whole, const Tensor& part) override {
    return real_.start_all_gather(whole, part);
  }
  void all_reduce_max(const Tensor& data) override { real_.all_reduce_max(data); }
  void broadcast(const Tensor& data, int root) override { real_.broadcast(data, root); }
  void all_gather(const Tensor& whole, const Tensor& part) override { real_.all_gather(whole, part); }
  void barrier() override { real_.barrier(); }
  bool recordable() const override { return real_.recordable(); }
  void work_enqueued(int piece) override { real_.work_enqueued(piece); }
  CollectiveProgress& progress() override { return real_.progress(); }
  [[noreturn]] void abort(int exit_code) override {
    real_.abort(exit_code);
    std::_Exit(exit_code);
  }

 private:
  Communicator& real_;
};

}  // namespace attamba
