// Kernels: what they compute on, and the table of functions that a backend provides (kernels/signatures.inc says what each one
// does). Kernels see views and a launch, never the tape.
// Arguments: launch, outputs, saved values, inputs, attributes. Letters as in docs/model.md: T = B n tokens (rows of a batch,
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

/// Losses and gradients as 64-bit fixed point: integer sums do not depend on their order.
inline constexpr double kLossOne = 0x1p32;      ///< one nat; sums up to 2^31 nats fit
inline constexpr double kGradientOne = 0x1p48;  ///< gradient elements up to 2^15 fit, with a step of 3.6e-15
/// A sum of squares as an exact integer: four digits of 32 bits in units of kGradientOne^-2, and a count.
inline constexpr std::int64_t kSquareDigits = 5;

/// What the host writes once per step, a float64 tensor [kStepFields].
enum StepField : int {
  kStepLearningRate,
  kStepBias1,
  kStepBias2,
  kStepGradientNorm,
  kStepSkipped,
  kStepNormLimit,  ///< a larger gradient norm skips the step; 0: no limit
  kStepFields,
};

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

/// Which keys each query sees, as two disjoint sets under one softmax (docs/model.md, mask). All int32, all rows are packed
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

struct ScanShape {
  std::int64_t hidden = 0;  ///< E
  std::int64_t state = 0;   ///< N
  std::int64_t heads = 0;   ///< Hs, divides E
  std::int64_t groups = 1;  ///< G, divides Hs
  std::int64_t conv = 4;    ///< W taps; 0: no convolution and no SiLU on xBC
  /// No chunk has more tokens, as far as is known; 0: one may be as long as a sequence. Says how to share out the work, never
  /// what is computed.
  std::int64_t longest_chunk = 0;
  std::int64_t projection() const { return 2 * hidden + 2 * groups * state + heads; }  ///< columns of zxBCdt
};

/// Weights of one SSM (docs/model.md), all of the accumulator type, or their gradients.
struct ScanWeights {
  Tensor conv;     ///< [E + 2GN, W]; empty when W = 0
  Tensor a_log;    ///< [Hs]
  Tensor d_skip;   ///< [Hs]
  Tensor dt_bias;  ///< [Hs]; may be empty
  Tensor norm;     ///< [E]
};

/// Rows of a block of label_scan, counted from the batch's first row: as wide as those of the released code's kernels.
inline constexpr std::int64_t kLabelBlock = 64;

/// How a linear recurrence h_t = a_t h_{t-1} + b_t makes a and b of its inputs (kernels/signatures.inc).
enum class RecurrenceForm : std::uint8_t { plain, min_gru, rg_lru };

/// What a linear recurrence reads, or the gradients of it; [T, E] of the compute type but for the rate.
struct RecurrenceInputs {
  Tensor a, b;
  Tensor u;     ///< rg_lru only
  Tensor rate;  ///< rg_lru only: [E / heads], accumulator type; column c has rate c mod its size
};

namespace cpu {
#include "kernels/signatures.inc"
}
namespace cuda {
#include "kernels/signatures.inc"
}

// clang-format off
#define ATTAMBA_FOR_EACH_KERNEL(X) \
  X(matmul) \
  X(matmul_workspace) \
  X(measure_matmul_peak) \
  X(matmul_library) \
  X(embedding) \
  X(embedding_backward) \
  X(embedding_backward_workspace) \
  X(linear_cross_entropy) \
  X(linear_cross_entropy_with_gradient) \
  X(linear_cross_entropy_workspace) \
  X(rms_norm) \
  X(add_rms_norm) \
  X(rms_norm_backward) \
  X(rms_norm_backward_workspace) \
  X(add) \
  X(swiglu) \
  X(swiglu_backward) \
  X(rope) \
  X(fill) \
  X(accumulate_loss) \
  X(add_to_fixed_point) \
  X(fixed_point_to_float) \
  X(square_sum) \
  X(square_sum_workspace) \
  X(square_digits) \
  X(square_digits_workspace) \
  X(square_digits_to_float) \
  X(adamw) \
  X(attention) \
  X(attention_backward) \
  X(attention_workspace) \
  X(attention_backward_workspace) \
  X(chunk_scan) \
  X(chunk_scan_backward) \
  X(chunk_scan_workspace) \
  X(chunk_scan_backward_workspace) \
  X(label_scan) \
  X(label_scan_backward) \
  X(label_scan_workspace) \
  X(label_scan_backward_workspace) \
  X(linear_recurrence) \
  X(linear_recurrence_backward) \
  X(linear_recurrence_backward_workspace) \
  X(causal_conv_silu) \
  X(causal_conv_silu_backward) \
  X(causal_conv_silu_backward_workspace)
// clang-format on

/// One function pointer per kernel: `on(launch).rms_norm(launch, ...)`.
struct Backend {
#define ATTAMBA_KERNEL_MEMBER(name) decltype(&cpu::name) name;
  ATTAMBA_FOR_EACH_KERNEL(ATTAMBA_KERNEL_MEMBER)
#undef ATTAMBA_KERNEL_MEMBER
};

/// The backend of a device. Throws UsageError when this program has none for it.
const Backend& on(Device device);
inline const Backend& on(const Launch& launch) {
  return on(launch.device);
}
/// Makes a backend known; called by what sets up a device (src/core/device.h).
void set_backend(Device device, const Backend& backend);

}  // namespace attamba::kernels
