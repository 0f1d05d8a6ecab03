#include "src/core/storage.h"
#include "src/ops/ops.h"

namespace attamba::ops {

namespace {

Collective collective_of(const Communicator& communicator, Collective::Kind kind, std::size_t bytes, bool waits = false) {
  return {
      .kind = kind, .bytes = bytes, .waits = waits, .ranks = communicator.size(), .ranks_per_node = communicator.local_size()};
}

}  // namespace

/// Between start and wait; programs run one at a time, so what a pair of ops has in flight is one collective at most.
class PendingCollective {
 public:
  explicit PendingCollective(Communicator& communicator) : communicator_(communicator) {}

  void all_reduce(std::span<const Tensor> leaves) {
    for (std::size_t i = 0; i < leaves.size();) {
      // Neighbours in memory (padding included, it stays zero) travel as one piece.
      auto* const begin = static_cast<std::byte*>(leaves[i].data);
      const DType dtype = leaves[i].dtype();
      const Device device = leaves[i].device;
      std::byte* end = begin;
      for (; i < leaves.size() && leaves[i].dtype() == dtype; ++i) {
        auto* const data = static_cast<std::byte*>(leaves[i].data);
        if (end != begin && (data < end || data - end >= static_cast<std::ptrdiff_t>(kAlignment))) {
          break;
        }
        end = data + leaves[i].bytes();
      }
      const auto elements = (end - begin) / static_cast<std::ptrdiff_t>(size_of(dtype));
      requests_.push_back(communicator_.start_all_reduce_sum({begin, {dtype, {elements}}, device}));
    }
  }
  void reduce_scatter(const Tensor& whole, const Tensor& part) {
    requests_.push_back(communicator_.start_reduce_scatter_sum(whole, part));
  }
  void all_gather(const Tensor& whole, const Tensor& part) { requests_.push_back(communicator_.start_all_gather(whole, part)); }

  Collective describe(Collective::Kind kind, std::size_t bytes) const { return collective_of(communicator_, kind, bytes); }

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

/// Ops on leaves that other ranks see too: they run wherever they stand, whoever uses the results.
class CollectiveOp : public Op {
 public:
  CollectiveOp(std::shared_ptr<PendingCollective> pending, std::size_t mutated)
      : pending_(std::move(pending)), mutated_(mutated) {}
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  bool has_effect() const override { return true; }
  std::size_t traffic(std::span<const TensorType>, std::span<const TensorType>) const override { return 0; }
  /// The first ones.
  std::vector<int> mutated() const override {
    std::vector<int> indices(mutated_);
    for (std::size_t i = 0; i < mutated_; ++i) {
      indices[i] = static_cast<int>(i);
    }
    return indices;
  }

 protected:
  PendingCollective& pending() const { return *pending_; }

 private:
  std::shared_ptr<PendingCollective> pending_;
  std::size_t mutated_;
};

class StartAllReduce final : public CollectiveOp {
 public:
  using CollectiveOp::CollectiveOp;
  std::string_view name() const override { return "start_all_reduce"; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override { pending().all_reduce(in); }
  Collective collective(std::span<const TensorType> in) const override {
    std::size_t bytes = 0;
    for (const TensorType& leaf : in) {
      bytes += leaf.bytes();
    }
    return pending().describe(Collective::Kind::all_reduce, bytes);
  }
};

/// Inputs: whole, part.
class StartReduceScatter final : public CollectiveOp {
 public:
  using CollectiveOp::CollectiveOp;
  std::string_view name() const override { return "start_reduce_scatter"; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override {
    pending().reduce_scatter(in[0], in[1]);
  }
  Collective collective(std::span<const TensorType> in) const override {
    return pending().describe(Collective::Kind::reduce_scatter, in[0].bytes());
  }
};

/// Inputs: whole, part. What `whole` holds before the wait is nobody's business, so it does not count as written here.
class StartAllGather final : public CollectiveOp {
 public:
  using CollectiveOp::CollectiveOp;
  std::string_view name() const override { return "start_all_gather"; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override {
    pending().all_gather(in[0], in[1]);
  }
  Collective collective(std::span<const TensorType> in) const override {
    return pending().describe(Collective::Kind::all_gather, in[0].bytes());
  }
};

/// Inputs: all that the collective touches, the results first: they are alive until here.
class Wait final : public CollectiveOp {
 public:
  Wait(std::string_view name, std::shared_ptr<PendingCollective> pending, std::size_t results)
      : CollectiveOp(std::move(pending), results), name_(name) {}
  std::string_view name() const override { return name_; }
  void run(const Launch&, std::span<const Tensor>, std::span<const Tensor>) const override { pending().wait(); }
  Collective collective(std::span<const TensorType>) const override { return {.kind = Collective::Kind::wait}; }

 private:
  std::string_view name_;
};

class SumOverRanks final : public Op {
 public:
  explicit SumOverRanks(Communicator& communicator) : communicator_(communicator) {}
  std::string_view name() const override { return "sum_over_ranks"; }
  std::vector<TensorType> infer(std::span<const TensorType> in) const override { return {in[0]}; }
  bool has_effect() const override { return true; }
  int reusable_input(int) const override { return 0; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor> out) const override {
    if (out[0].data != in[0].data) {
      runtime(launch.device).copy_on_device(out[0].data, in[0].data, in[0].bytes());
    }
    communicator_.start_all_reduce_sum(out[0])->wait();
  }
  Collective collective(std::span<const TensorType> in) const override {
    return collective_of(communicator_, Collective::Kind::all_reduce, in[0].bytes(), true);
  }

 private:
  Communicator& communicator_;
};

/// Inputs: whole, part?
class BeginSum final : public Op {
 public:
  explicit BeginSum(int rank) : rank_(rank) {}
  std::string_view name() const override { return "begin_sum"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  std::vector<int> mutated() const override { return {0}; }
  void run(const Launch& launch, std::span<const Tensor> in, std::span<const Tensor>) const override {
    clear(in[0]);
    if (in.size() > 1) {
      const Tensor own = part_of(in[0], in[1].type, rank_ * in[1].elements());
      runtime(launch.device).copy_on_device(own.data, in[1].data, own.bytes());
    }
  }
  /// Written only.
  std::size_t traffic(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return in[0].bytes() + (in.size() > 1 ? 2 * in[1].bytes() : 0);
  }

 private:
  int rank_;
};

class ClearOtherParts final : public Op {
 public:
  ClearOtherParts(int rank, int ranks) : rank_(rank), ranks_(ranks) {}
  std::string_view name() const override { return "clear_other_parts"; }
  std::vector<TensorType> infer(std::span<const TensorType>) const override { return {}; }
  std::vector<int> mutated() const override { return {0}; }
  void run(const Launch&, std::span<const Tensor> in, std::span<const Tensor>) const override {
    const std::int64_t part = in[0].elements() / ranks_;
    clear(part_of(in[0], {in[0].dtype(), {part * rank_}}, 0));
    clear(part_of(in[0], {in[0].dtype(), {part * (ranks_ - rank_ - 1)}}, part * (rank_ + 1)));
  }
  std::size_t traffic(std::span<const TensorType> in, std::span<const TensorType>) const override {
    return in[0].bytes() / static_cast<std::size_t>(ranks_) * static_cast<std::size_t>(ranks_ - 1);
  }

 private:
  int rank_, ranks_;
};

}  // namespace

std::shared_ptr<PendingCollective> start_all_reduce(Tape& tape, Communicator& communicator, std::span<const Value> leaves) {
  auto pending = std::make_shared<PendingCollective>(communicator);
  tape.emit(std::make_shared<StartAllReduce>(pending, leaves.size()), leaves);
  return pending;
}

void wait_all_reduce(Tape& tape, const std::shared_ptr<PendingCollective>& pending, std::span<const Value> leaves) {
  tape.emit(std::make_shared<Wait>("wait_all_reduce", pending, leaves.size()), leaves);
}

std::shared_ptr<PendingCollective> start_reduce_scatter(Tape& tape, Communicator& communicator, Value whole, Value part) {
  auto pending = std::make_shared<PendingCollective>(communicator);
  tape.emit(std::make_shared<StartReduceScatter>(pending, 1), {{whole, part}});
  return pending;
}

void wait_reduce_scatter(Tape& tape, const std::shared_ptr<PendingCollective>& pending, Value whole, Value part) {
  tape.emit(std::make_shared<Wait>("wait_reduce_scatter", pending, 1), {{part, whole}});
}

std::shared_ptr<PendingCollective> start_all_gather(Tape& tape, Communicator& communicator, Value whole, Value part) {
  auto pending = std::make_shared<PendingCollective>(communicator);
  tape.emit(std::make_shared<StartAllGather>(pending, 0), {{whole, part}});
  return pending;
}

void wait_all_gather(Tape& tape, const std::shared_ptr<PendingCollective>& pending, Value whole) {
  tape.emit(std::make_shared<Wait>("wait_all_gather", pending, 1), {{whole}});
}

Value sum_over_ranks(Tape& tape, Communicator& communicator, Value value) {
  return tape.emit_one(std::make_shared<SumOverRanks>(communicator), {{value}});
}

void begin_sum(Tape& tape, Value whole, Value part, int rank) {
  std::vector<Value> inputs{whole};
  if (part) {
    inputs.push_back(part);
  }
  tape.emit(std::make_shared<BeginSum>(rank), inputs);
}

void clear_other_parts(Tape& tape, Value whole, int rank, int ranks) {
  tape.emit(std::make_shared<ClearOtherParts>(rank, ranks), {{whole}});
}

}  // namespace attamba::ops
