// Ranks that are threads of the test: what checkpoints ask of a communicator, without processes.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.h"

namespace attamba {

class ThreadRanks {
 public:
  explicit ThreadRanks(int size) : size_(size), barrier_(size), shared_(static_cast<std::size_t>(size)) {}

  /// Runs `body` on every rank; rethrows the first rank's exception.
  static void run(int ranks, const std::function<void(Communicator&)>& body) {
    ThreadRanks group(ranks);
    std::vector<std::exception_ptr> errors(static_cast<std::size_t>(ranks));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank) {
      threads.emplace_back([&, rank] {
        Member member(group, rank);
        try {
          body(member);
        } catch (...) {
          errors[static_cast<std::size_t>(rank)] = std::current_exception();
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (const std::exception_ptr& error : errors) {
      if (error) {
        std::rethrow_exception(error);
      }
    }
  }

 private:
  class Member final : public Communicator {
   public:
    Member(ThreadRanks& group, int rank) : group_(group), rank_(rank) {}
    int rank() const override { return rank_; }
    int size() const override { return group_.size_; }
    int local_rank() const override { return rank_; }
    int local_size() const override { return group_.size_; }
    std::string description() const override { return "threads"; }
    std::unique_ptr<Communicator> split(int) override { throw Error("not a part of this test"); }
    void all_reduce_sum(const Tensor& data) override {
      const auto values = data.span<std::int64_t>();
      const std::vector<std::int64_t> own(values.begin(), values.end());
      share(own.data());
      std::fill(values.begin(), values.end(), 0);
      for (const void* other : group_.shared_) {
        for (std::size_t i = 0; i < values.size(); ++i) {
          values[i] += static_cast<const std::int64_t*>(other)[i];
        }
      }
      barrier();
    }
    std::unique_ptr<Request> start_all_reduce_sum(const Tensor&) override { throw Error("not a part of this test"); }
    std::unique_ptr<Request> start_reduce_scatter_sum(const Tensor&, const Tensor&) override {
      throw Error("not a part of this test");
    }
    std::unique_ptr<Request> start_all_gather(const Tensor&, const Tensor&) override { throw Error("not a part of this test"); }
    void all_reduce_max(const Tensor&) override { throw Error("not a part of this test"); }
    void broadcast(const Tensor& data, int root) override {
      share(data.data);
      if (rank_ != root) {
        std::memcpy(data.data, group_.shared_[static_cast<std::size_t>(root)], data.bytes());
      }
      barrier();
    }
    void all_gather(const Tensor& whole, const Tensor& part) override {
      share(part.data);
      for (std::size_t rank = 0; rank < group_.shared_.size(); ++rank) {
        std::memcpy(static_cast<std::byte*>(whole.data) + rank * part.bytes(), group_.shared_[rank], part.bytes());
      }
      barrier();
    }
    void barrier() override { group_.barrier_.arrive_and_wait(); }
    [[noreturn]] void abort(int) override { std::terminate(); }

   private:
    void share(const void* memory) {
      group_.shared_[static_cast<std::size_t>(rank_)] = memory;
      barrier();
    }

    ThreadRanks& group_;
    int rank_;
  };

  int size_;
  std::barrier<> barrier_;
  std::vector<const void*> shared_;
};

}  // namespace attamba
