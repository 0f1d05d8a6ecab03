// Leaves of a step beside weights, gradients and the optimizer's state.
#pragma once

#include "kernels/kernels.h"
#include "src/core/tensor.h"

namespace attamba {

inline constexpr const char* kStepLeaf = "step.state";         ///< float64 [kStepFields], written by the host once per step
inline constexpr const char* kTotalsLeaf = "step.totals";      ///< int64 [2]: losses in fixed point, losses that are not finite
inline constexpr const char* kNewsLeaf = "step.news";          ///< int64 [ranks, kNewsWords]: what each rank tells (RankNews)
inline constexpr const char* kPoisonedLeaf = "step.poisoned";  ///< int64 [1]: gradient elements that fixed point cannot hold
inline constexpr const char* kEvaluationLeaf = "evaluate.totals";  ///< as step.totals
inline constexpr const char* kFixedPointPrefix = "fixed_point/";   ///< int64 sums of gradients
inline constexpr const char* kWeightsPrefix = "weights/";          ///< of buckets of weights

inline const TensorType kTotalsType{DType::int64, {2}};
inline const TensorType kPoisonedType{DType::int64, {1}};
inline constexpr std::int64_t kNewsWords = 4;
inline TensorType news_type(int ranks) {
  return {DType::int64, {ranks, kNewsWords}};
}
inline const TensorType kStepType{DType::float64, {kernels::kStepFields}};

}  // namespace attamba
