// The op contract (docs/architecture.md): an op infers types, says how much scratch it needs, runs over views, and gives its
// vector-Jacobian product by emitting further ops.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "src/core/launch.h"
#include "src/core/tensor.h"

namespace attamba {

class VjpContext;

/// What an op asks of the network. One that starts something leaves it to a later `wait` over the same inputs.
struct Collective {
  enum class Kind : std::uint8_t { none, all_reduce, reduce_scatter, all_gather, wait };
  Kind kind = Kind::none;
  std::size_t bytes = 0;  ///< of the whole: what all-reduce sums, reduce-scatter divides, all-gather comes to
  bool waits = false;     ///< also for its own end
};

class Op {
 public:
  virtual ~Op() = default;

  virtual std::string_view name() const = 0;

  /// Output types for these inputs. Throws UsageError naming the op and the types that do not fit.
  virtual std::vector<TensorType> infer(std::span<const TensorType> inputs) const = 0;

  /// Scratch bytes of one run on a device.
  virtual std::size_t workspace(Device, std::span<const TensorType>, std::span<const TensorType>) const { return 0; }

  virtual void run(const Launch& launch, std::span<const Tensor> inputs, std::span<const Tensor> outputs) const = 0;

  /// Emits the ops that turn the outputs' gradients into the inputs'. The default refuses.
  virtual void vjp(VjpContext& context) const;

  /// Indices of the inputs that run() writes in place; these must be leaves (parameters' gradients, optimizer state, metrics).
  virtual std::vector<int> mutated() const { return {}; }

  /// Whether run() does something that its outputs do not show, so that it must run even if nobody uses them.
  virtual bool has_effect() const { return !mutated().empty(); }

  /// The input whose memory output `o` may take over when that input is not needed afterwards; -1: none.
  virtual int reusable_input(int /*output*/) const { return -1; }

  /// Floating-point operations of one run (a multiply-add counts two), for reports.
  virtual double flops(std::span<const TensorType>, std::span<const TensorType>) const { return 0; }

  /// Bytes that one run has to move at least, for reports. The default: every input is read and every output written once, and
  /// what is written in place is both.
  virtual std::size_t traffic(std::span<const TensorType> inputs, std::span<const TensorType> outputs) const;

  /// For predictions of a step's time.
  virtual Collective collective(std::span<const TensorType> /*inputs*/) const { return {}; }
};

}  // namespace attamba
