// Every kernel that a backend provides. Kernels see views and a launch, never the tape.
// Arguments: launch, outputs, saved values, inputs, attributes. Letters as in SPEC: T = B n tokens (rows of a batch,
// flattened), D model width, H heads of d, Hk key/value heads, V vocabulary, E/N/Hs/G/W the SSM's widths.
//
// Activations are of the compute type (float32, bfloat16 or float64); "accumulator type" is float64 for float64 and float32
// otherwise. Vectors of weights (norms, convolution taps, A_log, ...) and all parameters' gradients are of the accumulator
// type. Activations' gradients are written with =, parameters' gradients with +=. No result depends on the number of threads:
// work is cut by the problem's size alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "src/core/launch.h"
#include "src/core/tensor.h"

namespace attamba::kernels {

// ---------------------------------------------------------------------------------------------- matmul.cpp
/// out [M, N] = op(a) op(b) (+ addend), op transposing where asked; a stored [M, K] (or [K, M]), b [K, N] (or [N, K]). Leading
/// dimensions of a rank > 2 tensor are flattened into its rows. a and b are of one compute type; out and addend share a type,
/// the compute type or its accumulator. addend may be empty, or be out itself (then out += ...). Sums are kept in the
/// accumulator type and rounded once.
void matmul(const Launch& launch, const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
            const Tensor& addend);
std::size_t matmul_workspace(const TensorType& out, const TensorType& a, const TensorType& b, bool transpose_a,
                             bool transpose_b);
/// Best FLOP/s that the matrix library reaches on this machine with thread_count() threads, measured for about `seconds` on
/// large products of this compute type, outside of our own tiling.
double measure_matmul_peak(DType dtype, double seconds);
/// "OpenBLAS 0.3.21 (Zen)", "oneDNN 2.6.3 (amx)": what runs products of this type here.
const char* matmul_library(DType dtype);

// ---------------------------------------------------------------------------------------------- vocabulary.cpp
/// out [T, D] = rows `tokens` [T] int32 of table [V, D]. A token outside [0, V) is an Error that names it.
void embedding(const Launch& launch, const Tensor& out, const Tensor& table, const Tensor& tokens);
/// dtable [V, D] (accumulator type) += dout, row by token.
void embedding_backward(const Launch& launch, const Tensor& dtable, const Tensor& dout, const Tensor& tokens);

/// losses [T] (accumulator type) = cross-entropy of softmax(hidden weight^T) at targets [T] int32; hidden [T, D], weight [V,
/// D]. A negative target gives loss 0. Works in chunks of tokens, so that logits never exist in full.
void linear_cross_entropy(const Launch& launch, const Tensor& losses, const Tensor& hidden, const Tensor& weight,
                          const Tensor& targets);
/// The same, and in the same pass the gradients of scale * sum(losses): dhidden [T, D] is written, dweight [V, D] accumulated
/// into. Logits become their own gradient in place; they are never computed twice (DESIGN 3).
void linear_cross_entropy_with_gradient(const Launch& launch, const Tensor& losses, const Tensor& dhidden,
                                        const Tensor& dweight, const Tensor& hidden, const Tensor& weight,
                                        const Tensor& targets, double scale);
std::size_t linear_cross_entropy_workspace(const TensorType& hidden, const TensorType& weight, bool with_gradient);

// ---------------------------------------------------------------------------------------------- rms_norm.cpp
/// out = x / sqrt(mean(x^2) + eps) * weight over the last dimension; x, out [T, D], weight [D] (accumulator type).
void rms_norm(const Launch& launch, const Tensor& out, const Tensor& x, const Tensor& weight, double eps);
/// sum = a + b (rounded to the compute type), out = rms_norm(sum): the residual stream and the next block's input in one pass.
void add_rms_norm(const Launch& launch, const Tensor& sum, const Tensor& out, const Tensor& a, const Tensor& b,
                  const Tensor& weight, double eps);
/// dx = (gradient of rms_norm) + addend (may be empty), dweight [D] += ... ; dx may be dout's or addend's own memory.
void rms_norm_backward(const Launch& launch, const Tensor& dx, const Tensor& dweight, const Tensor& dout, const Tensor& x,
                       const Tensor& weight, const Tensor& addend, double eps);
std::size_t rms_norm_backward_workspace(const TensorType& x);

// ---------------------------------------------------------------------------------------------- pointwise.cpp
/// out = a + b; out may be a or b.
void add(const Launch& launch, const Tensor& out, const Tensor& a, const Tensor& b);
/// out = silu(gate) * up (SPEC 4, the feed-forward).
void swiglu(const Launch& launch, const Tensor& out, const Tensor& gate, const Tensor& up);
/// dgate may be gate's memory, dup may be up's.
void swiglu_backward(const Launch& launch, const Tensor& dgate, const Tensor& dup, const Tensor& dout, const Tensor& gate,
                     const Tensor& up);
/// Rotary embedding of x [T, H, d] (SPEC 3.1, interleaved pairs) by table[positions[t]]: table [n, d] of the accumulator type
/// holds cos, sin, cos, sin, ... per pair. `inverse` turns back: the gradient. out may be x.
void rope(const Launch& launch, const Tensor& out, const Tensor& x, const Tensor& table, const Tensor& positions, bool inverse);
/// out = value everywhere.
void fill(const Launch& launch, const Tensor& out, double value);

// ---------------------------------------------------------------------------------------------- update.cpp
/// Losses and gradients as 64-bit fixed point: integer sums do not depend on their order (DESIGN 4).
inline constexpr double kLossOne = 0x1p32;      ///< one nat; sums up to 2^31 nats fit
inline constexpr double kGradientOne = 0x1p48;  ///< gradient elements up to 2^15 fit, with a step of 3.6e-15

/// totals [2] int64: totals[0] += round(loss * kLossOne) over all losses, totals[1] += number of losses that are not finite
/// (these count 0 in totals[0]).
void accumulate_loss(const Launch& launch, const Tensor& totals, const Tensor& losses);
/// accumulator int64 += round(gradient * kGradientOne), gradient = 0. Elements that are not finite, or whose magnitude exceeds
/// `limit` (so that a step's sum cannot overflow: 2^15 over the number of additions), are left out and counted: poisoned [1]
/// int64 += their number.
void add_to_fixed_point(const Launch& launch, const Tensor& accumulator, const Tensor& poisoned, const Tensor& gradient,
                        double limit);
/// gradient = accumulator / kGradientOne, or NaN everywhere when poisoned [1] is not 0; accumulator = 0.
void fixed_point_to_float(const Launch& launch, const Tensor& gradient, const Tensor& accumulator, const Tensor& poisoned);
/// out [1] float64 = sum of squares of all elements of all tensors, in an order fixed by their sizes.
void square_sum(const Launch& launch, const Tensor& out, std::span<const Tensor> tensors);
std::size_t square_sum_workspace(std::span<const TensorType> tensors);

/// What the host writes once per step, a float64 tensor [kStepFields].
enum StepField : int { kStepLearningRate, kStepBias1, kStepBias2, kStepGradientNorm, kStepSkipped, kStepFields };

struct AdamWParameter {
  Tensor compute;  ///< copy of compute type that the model reads; empty when it reads the master itself
  Tensor master;   ///< weights, accumulator type
  Tensor moment1, moment2;
  Tensor gradient;  ///< read once and left 0 for the next step
};
struct AdamWSettings {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0;
  double clip = 0;  ///< largest global gradient norm; 0: no clipping
};
/// One AdamW step (decoupled decay, SPEC 5) on every parameter:
///   norm = sqrt(norm_squared[0]); g = gradient * (clip / (norm + 1e-6) if norm > clip else 1)
///   m = beta1 m + (1-beta1) g; v = beta2 v + (1-beta2) g^2; w -= lr (weight_decay w + (m / bias1) / (sqrt(v / bias2) + eps))
/// with lr, bias1 = 1 - beta1^i and bias2 = 1 - beta2^i read from step[kStepLearningRate..]. Writes norm to
/// step[kStepGradientNorm]. When the norm is not finite nothing but the gradients (set to 0) changes, and step[kStepSkipped]
/// = 1.
void adamw(const Launch& launch, const Tensor& step, std::span<const AdamWParameter> parameters, const Tensor& norm_squared,
           const AdamWSettings& settings);

// ---------------------------------------------------------------------------------------------- attention.cpp
/// Which keys each query sees, as two disjoint sets under one softmax (SPEC 3.2; DESIGN 3). All int32, all rows are packed
/// (row = sequence * n + position), so that a batch needs no further index:
///   compact keys: rows ends[j] for key_begin[t] <= j < key_end[t];   local keys: rows k with local_begin[t] <= k <= t.
/// key_begin, key_end and local_begin never decrease with t inside a sequence, and never point outside the query's own
/// sequence.
struct AttentionTable {
  Tensor ends;         ///< [T] rows of chunk ends; sequence s's list starts at index s*n; unused entries are undefined
  Tensor key_begin;    ///< [T] first compact key of query t, an index into ends
  Tensor key_end;      ///< [T] one past its last compact key
  Tensor local_begin;  ///< [T] its first local row
};

/// out = softmax(q k^T / sqrt(d)) v over the keys of the table; q, out [T, H, d]; k, v [T, Hk, d]; log-sum-exp lse [T, H]
/// (accumulator type). Query head h reads key/value head h / (H/Hk). `sequence_length` = n divides T.
void attention(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
               const AttentionTable& table, std::int64_t sequence_length);
void attention_backward(const Launch& launch, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                        const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionTable& table, std::int64_t sequence_length);
std::size_t attention_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length);
std::size_t attention_backward_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length);

// ---------------------------------------------------------------------------------------------- chunk_scan.cpp
struct ScanShape {
  std::int64_t hidden = 0;  ///< E
  std::int64_t state = 0;   ///< N
  std::int64_t heads = 0;   ///< Hs, divides E
  std::int64_t groups = 1;  ///< G, divides Hs
  std::int64_t conv = 4;    ///< W taps; 0: no convolution and no SiLU on xBC
  std::int64_t projection() const { return 2 * hidden + 2 * groups * state + heads; }  ///< columns of zxBCdt
};

/// Weights of one SSM (SPEC 3.3), all of the accumulator type, or their gradients.
struct ScanWeights {
  Tensor conv;     ///< [E + 2GN, W]; empty when W = 0
  Tensor a_log;    ///< [Hs]
  Tensor d_skip;   ///< [Hs]
  Tensor dt_bias;  ///< [Hs]; may be empty
  Tensor norm;     ///< [E]
};

/// out [T, E] = RMSNorm(Y * silu(z); eps) of the selective SSM of SPEC 3.3 from zxbcdt [T, 2E + 2GN + Hs], the columns being
/// z, X, B, C, dt. starts [T] int32: the row at which each token's chunk begins; state and convolution restart there, so
/// nothing passes between chunks. A chunk may be as long as a sequence.
void chunk_scan(const Launch& launch, const Tensor& out, const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts,
                const ScanShape& shape, double eps, std::int64_t sequence_length);
/// Recomputes everything from zxbcdt. dzxbcdt is written, `gradients` are accumulated into.
void chunk_scan_backward(const Launch& launch, const Tensor& dzxbcdt, const ScanWeights& gradients, const Tensor& dout,
                         const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts, const ScanShape& shape,
                         double eps, std::int64_t sequence_length);
std::size_t chunk_scan_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length);
std::size_t chunk_scan_backward_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length);

}  // namespace attamba::kernels
