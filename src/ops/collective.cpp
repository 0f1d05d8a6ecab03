#include "src/ops/ops.h"

namespace attamba::ops {

/// Between start and wait; programs run one at a time, so one reduction of this pair is in flight at most.
class PendingReduction {
 public:
  explicit PendingReduction(Communicator& communicator) : communicator_(communicator) {}

  void start(std::span<const Tensor> leaves) {
    for (std::size_t i = 0; i < leaves.size();) {
      // Neighbours in memory (padding included, it stays zero) travel as one piece.
      auto* const begin = static_cast<std::byte*>(leaves[i].data);
      const DType dtype = leaves[i].dtype();
      const Device device = leaves[i].device;
      std::byte* end = begin;
      for (; i < leaves.size() && leaves[i].dtype() == dtype; ++i) {
        auto* const data = static_cast<std::byte*>(leaves[i].data);
        if (end != begin && (data < end || data - end >= 64)) {
          break;
        }
        end = data + leaves[i].bytes();
      }
      const auto elements = (end - begin) / static_cast<std::ptrdiff_t>(size_of(dtype));
      requests_.push_back(communicator_.start_all_reduce_sum({begin, {dtype, {elements}}, device}));
    }
  }

  void wait() {
    for (const auto& request : requests_) {
      request->wait();
    }
    requests_.clear();
  }

 private:
  Communicator& communicator_;
  std::vector<std::unique_ptr<Request>> requests_;
};

namespace {

class StartAllReduce final : public Op {
 public:
  StartAllReduce(std::shared_ptr<PendingReduction> pending, std::size_t leaves)
      : pending_(std::move(pending)), leaves_(leaves) {}
  std::string_view name() const override { return "start_all_reduce"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override { pending_->start(in); }
  std::vector<int> mutated() const override {
    std::vector<int> indices(leaves_);
    for (std::size_t i = 0; i < leaves_; ++i) {
      indices[i] = static_cast<int>(i);
    }
    return indices;
  }
  std::size_t traffic(std::span<const TensorType>, std::span<const TensorType>) const override { return 0; }
  Collective collective(std::span<const TensorType> in) const override {
    std::size_t bytes = 0;
    for (const TensorType& leaf : in) {
      bytes += leaf.bytes();
    }
    return {.kind = Collective::Kind::all_reduce, .bytes = bytes};
  }

 private:
  std::shared_ptr<PendingReduction> pending_;
  std::size_t leaves_;
};

class WaitAllReduce final : public Op {
 public:
  explicit WaitAllReduce(std::shared_ptr<PendingReduction> pending) : pending_(std::move(pending)) {}
  std::string_view name() const override { return "wait_all_reduce"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  void run(const Launch&, std::span<const Tensor>, std::span<const Tensor>) const override { pending_->wait(); }
  std::vector<int> mutated() const override { return {0}; }
  std::size_t traffic(std::span<const TensorType>, std::span<const TensorType>) const override { return 0; }
  Collective collective(std::span<const TensorType>) const override { return {.kind = Collective::Kind::wait}; }

 private:
  std::shared_ptr<PendingReduction> pending_;
};

}  // namespace

std::shared_ptr<PendingReduction> start_all_reduce(Tape& tape, Communicator& communicator, std::span<const Value> leaves) {
  auto pending = std::make_shared<PendingReduction>(communicator);
  tape.emit(std::make_shared<StartAllReduce>(pending, leaves.size()), leaves);
  return pending;
}

void wait_all_reduce(Tape& tape, const std::shared_ptr<PendingReduction>& pending, std::span<const Value> leaves) {
  tape.emit(std::make_shared<WaitAllReduce>(pending), leaves);
}

}  // namespace attamba::ops
