// ZeRO as passes over a tape (docs/architecture.md, Sharding): what a rank keeps of gradients, optimizer state and weights, and
// the collectives that bring the rest.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/ops/ops.h"
#include "src/optim/optimizer.h"
#include "src/train/shard_layout.h"
#include "src/train/step_leaves.h"

namespace attamba {

/// One tape goes through these in the order in which they are declared here. The communicator is referred to by the tape's ops
/// and asked for nothing else than who takes part.
class Sharding {
 public:
  struct Options {
    int stage = 1;  ///< 1: optimizer state is divided; 2: gradients too; 3: weights too
    DType accumulator = DType::float32;
    bool deterministic = false;
  };
  /// `sharers` divide things among them; `copies`, if any, are the ranks of other such groups that own the same parts.
  Sharding(std::vector<ParameterInfo> parameters, ShardLayout layout, const Options& options, Communicator& sharers,
           Communicator* copies)
      : parameters_(std::move(parameters)),
        layout_(std::move(layout)),
        options_(options),
        communicator_(sharers),
        copies_(copies) {}

  /// Before the model is declared: makes its parameters, and their gradients where asked, parts of buckets.
  void declare(Tape& tape, bool gradients) const;
  /// After the backward pass: gradients go where they are kept. `add_up(sum, gradient)` emits the addition to a sum in fixed
  /// point, in deterministic mode.
  void collect_gradients(Tape& tape, bool last, const std::function<void(Value sum, Value gradient)>& add_up) const;
  /// Stage 3: weights are gathered block by block ahead of their use, and forgotten. `boundary`: the value that the forward
  /// pass comes to.
  void gather_weights(Tape& tape, Value boundary) const;
  /// In a step's end, the sums over ranks being complete: this rank's part of all gradients, by bucket. `to_float(gradient,
  /// sum)` emits the way back from fixed point.
  std::vector<Value> own_gradients(Tape& tape, const std::function<void(Value gradient, Value sum)>& to_float) const;
  /// What this rank updates; the names are the parameters', master weights without a compute copy are the weights themselves.
  std::vector<OptimizedParameter> own_parameters(Tape& tape) const;
  /// After the update: other ranks learn of it, and gradients are 0 again.
  void spread_weights(Tape& tape) const;

  const ShardLayout& layout() const { return layout_; }
  int stage() const { return options_.stage; }
  Communicator& sharers() const { return communicator_; }
  /// Rank and number of those that own the same parts.
  int copy() const { return copies_ == nullptr ? 0 : copies_->rank(); }
  int copies() const { return copies_ == nullptr ? 1 : copies_->size(); }
  /// Whether a bucket's weights are rounded copies of master weights.
  bool has_master_copy(const ShardLayout::Bucket& bucket) const { return bucket.dtype != options_.accumulator; }

  /// Names of leaves.
  static std::string weights(std::size_t bucket) { return concat(kWeightsPrefix, "bucket.", bucket); }
  static std::string gradients(std::size_t bucket) { return concat("gradient/bucket.", bucket); }
  static std::string sums(std::size_t bucket) { return kFixedPointPrefix + gradients(bucket); }
  static std::string own(const std::string& whole) { return whole + ".own"; }

 private:
  using Bucket = ShardLayout::Bucket;

  TensorType whole_type(const Bucket& bucket, DType dtype) const { return {dtype, {bucket.total}}; }
  TensorType part_type(const Bucket& bucket, DType dtype) const { return {dtype, {bucket.part}}; }
  DType sum_type() const { return options_.deterministic ? DType::int64 : options_.accumulator; }
  Value weights_whole(Tape& tape, std::size_t bucket) const;
  Value weights_part(Tape& tape, std::size_t bucket) const;
  Value gradients_whole(Tape& tape, std::size_t bucket) const;
  Value gradients_part(Tape& tape, std::size_t bucket) const;
  Value sums_whole(Tape& tape, std::size_t bucket) const;
  Value sums_part(Tape& tape, std::size_t bucket) const;
  /// Where this rank's part is kept: in the whole, or alone.
  Value part_of_leaf(Tape& tape, Value whole, const std::string& name, const TensorType& type, Role role, bool alone) const;
  /// `part` (a view itself, or a leaf) may lie in `whole`.
  Value slice_of(Tape& tape, Value part, const std::string& name, const ShardLayout::Slice& slice) const;
  std::vector<std::size_t> by_completion(const Tape& tape, const std::vector<Value>& wholes) const;

  std::vector<ParameterInfo> parameters_;
  ShardLayout layout_;
  Options options_;
  Communicator& communicator_;
  Communicator* copies_;
};

}  // namespace attamba
