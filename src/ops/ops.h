// Every op that a model, an optimizer or a parallel pass can put on a tape. Activations are [T, columns] with T = B n rows.
// Each function emits forward ops; gradients follow from the op's vjp. The arithmetic is that of the kernel of the same name
// (kernels/kernels.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "src/graph/tape.h"

namespace attamba::ops {

/// Adds `gradient` to what input i of the op has received so far.
void contribute(VjpContext& context, int i, Value gradient);

// ---------------------------------------------------------------------------------------------- matmul.cpp
/// y [T, out] = x [T, in] weight^T (+ addend [T, out]); weight [out, in].
Value linear(Tape& tape, Value x, Value weight, Value addend = {});
/// x weight^T as it was summed up, in the accumulator type: for ops that round it after their own arithmetic. Its gradient is
/// of the compute type.
Value linear_unrounded(Tape& tape, Value x, Value weight);

// ---------------------------------------------------------------------------------------------- norm.cpp
Value rms_norm(Tape& tape, Value x, Value weight, double eps);
struct Normed {
  Value sum;   ///< a + b: the residual stream
  Value norm;  ///< rms_norm(sum)
};
Normed add_rms_norm(Tape& tape, Value a, Value b, Value weight, double eps);

// ---------------------------------------------------------------------------------------------- pointwise.cpp
Value add(Tape& tape, Value a, Value b);
Value swiglu(Tape& tape, Value gate, Value up);
/// x (+ addend) [T, heads * head_dim], turned and rounded to the compute type; x may be a `linear_unrounded`. table
/// [n, head_dim] of cos, sin pairs; positions [T] int32.
Value rope(Tape& tape, Value x, Value addend, Value table, Value positions, std::int64_t head_dim, DType compute);

// ---------------------------------------------------------------------------------------------- attention.cpp
/// Leaves of kernels::AttentionTable, and how many keys a query sees on average (for FLOP counts only).
struct AttentionKeys {
  Value ends, key_begin, key_end, local_begin;
  double average_keys = 0;
};
/// q [T, heads * d], k and v [T, kv_heads * d] -> [T, heads * d].
Value attention(Tape& tape, Value q, Value k, Value v, const AttentionKeys& keys, std::int64_t heads, std::int64_t kv_heads,
                std::int64_t sequence_length);

// ---------------------------------------------------------------------------------------------- scan.cpp
struct ScanParameters {
  Value conv;  ///< empty when the scan has no convolution
  Value a_log, d_skip;
  Value dt_bias;  ///< may be empty
  Value norm;
};
/// zxbcdt [T, 2E + 2GN + Hs] -> [T, E]; starts [T] int32.
Value chunk_scan(Tape& tape, Value zxbcdt, const ScanParameters& weights, Value starts, const kernels::ScanShape& shape,
                 double eps, std::int64_t sequence_length);
/// The same with labels [T] int32 (kernels::label_scan): what the released code computes.
Value label_scan(Tape& tape, Value zxbcdt, const ScanParameters& weights, Value labels, const kernels::ScanShape& shape,
                 double eps);

// ---------------------------------------------------------------------------------------------- recurrence.cpp
/// silu of the causal convolution of x [T, E] with weight [E, W] (accumulator type), within chunks; starts [T] int32.
Value causal_conv_silu(Tape& tape, Value x, Value weight, Value starts);
struct RecurrenceGates {
  Value a, b;               ///< [T, E]
  Value u = {}, rate = {};  ///< of the form rg_lru
};
/// h [T, E] of kernels::linear_recurrence; starts [T] int32.
Value linear_recurrence(Tape& tape, const RecurrenceGates& gates, Value starts, kernels::RecurrenceForm form,
                        std::int64_t sequence_length);

// ---------------------------------------------------------------------------------------------- vocabulary.cpp
/// table [V, D], tokens [T] int32 -> [T, D].
Value embedding(Tape& tape, Value table, Value tokens);
/// Per-token losses [T] of hidden [T, D] against targets [T]; weight [V, D].
Value linear_cross_entropy(Tape& tape, Value hidden, Value weight, Value targets);
/// The same as the root of a backward pass: differentiates objective_scale * sum(losses), gradients made in the forward pass.
Value linear_cross_entropy_root(Tape& tape, Value hidden, Value weight, Value targets, double objective_scale);

// ---------------------------------------------------------------------------------------------- update.cpp
/// totals [2] int64 (fixed-point sum, count of losses that are not finite) += losses.
void accumulate_loss(Tape& tape, Value totals, Value losses);
/// accumulator int64 += gradient in fixed point; gradient = 0. Elements beyond `limit` are counted in poisoned [1] int64
/// instead.
void add_to_fixed_point(Tape& tape, Value accumulator, Value poisoned, Value gradient, double limit);
/// gradient = accumulator in floating point, NaN where anything was poisoned; accumulator = 0.
void fixed_point_to_float(Tape& tape, Value gradient, Value accumulator, Value poisoned);
/// float64 [1]: the sum of squares over all of these leaves.
Value square_sum(Tape& tape, std::span<const Value> leaves);
/// The same exactly, whatever the partition: int64 [kernels::kSquareDigits], whose sums over ranks stand for sums.
Value square_digits(Tape& tape, std::span<const Value> leaves);
Value square_digits_to_float(Tape& tape, Value digits);
struct AdamWLeaves {
  Value compute;  ///< empty when the model reads the master weights themselves
  Value master, moment1, moment2, gradient;
};
void adamw(Tape& tape, Value step, Value norm_squared, std::span<const AdamWLeaves> parameters,
           const kernels::AdamWSettings& settings);

// ---------------------------------------------------------------------------------------------- collective.cpp
/// Something in flight, between its start op and its wait op.
class PendingCollective;
/// Starts summing these leaves over all ranks; neighbours in memory travel together. They must not be touched before the wait.
std::shared_ptr<PendingCollective> start_all_reduce(Tape& tape, Communicator& communicator, std::span<const Value> leaves);
void wait_all_reduce(Tape& tape, const std::shared_ptr<PendingCollective>& pending, std::span<const Value> leaves);
/// `part` = this rank's part of the sum of the leaf `whole` over all ranks; `whole` is used up.
std::shared_ptr<PendingCollective> start_reduce_scatter(Tape& tape, Communicator& communicator, Value whole, Value part);
void wait_reduce_scatter(Tape& tape, const std::shared_ptr<PendingCollective>& pending, Value whole, Value part);
/// The leaf `whole` = all ranks' parts, one after the other; `part` may be its own place there.
std::shared_ptr<PendingCollective> start_all_gather(Tape& tape, Communicator& communicator, Value whole, Value part);
void wait_all_gather(Tape& tape, const std::shared_ptr<PendingCollective>& pending, Value whole);
/// The sum of a small value over all ranks, started and waited for in one.
Value sum_over_ranks(Tape& tape, Communicator& communicator, Value value);
/// The leaf `whole` = 0, and where rank `rank`'s part lies, `part` (which may be empty): sums that go on from it.
void begin_sum(Tape& tape, Value whole, Value part, int rank);
/// `whole` = 0 but for that part.
void clear_other_parts(Tape& tape, Value whole, int rank, int ranks);

}  // namespace attamba::ops
