// Every kernel that a backend provides. Kernels see views and a launch, never the tape.
// Arguments: launch, outputs, saved values, inputs, attributes. Letters as in SPEC: T = B n tokens (rows of a batch, flattened),
// D model width, H heads of d, Hk key/value heads, V vocabulary, E/N/Hs/G/W the SSM's widths.
//
// Activations are of the compute type (float32, bfloat16 or float64); "accumulator type" is float64 for float64 and float32
// otherwise. Vectors of weights (norms, convolution taps, A_log, ...) and all parameters' gradients are of the accumulator type.
// Activations' gradients are written with =, parameters' gradients with +=.
// No result depends on the number of threads: work is cut by the problem's size alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/core/launch.h"
#include "src/core/tensor.h"

namespace attamba::kernels {

// ---------------------------------------------------------------------------------------------- attention.cpp
/// Which keys each query sees, as two disjoint sets under one softmax (SPEC 3.2; DESIGN 3). All int32, all rows are packed
/// (row = sequence * n + position), so that a batch needs no further index:
///   compact keys: rows ends[j] for key_begin[t] <= j < key_end[t];   local keys: rows k with local_begin[t] <= k <= t.
/// key_begin, key_end and local_begin never decrease with t inside a sequence, and never point outside the query's own sequence.
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
                         const Tensor& zxbcdt, const ScanWeights& weights, const Tensor& starts, const ScanShape& shape, double eps,
                         std::int64_t sequence_length);
std::size_t chunk_scan_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length);
std::size_t chunk_scan_backward_workspace(const TensorType& zxbcdt, const ScanShape& shape, std::int64_t sequence_length);

}  // namespace attamba::kernels
