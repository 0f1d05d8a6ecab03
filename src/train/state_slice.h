// What checkpoints are made of: pieces of named tensors. A rank writes those it owns and reads those it wants, whatever other
// ranks, or another number of them, wrote.
#pragma once

#include <cstdint>
#include <string>

#include "src/core/tensor.h"

namespace attamba {

/// Elements [begin, end) of a tensor, flattened. Over all ranks, slices that are written cover each tensor exactly once.
struct StateSlice {
  std::string name;  ///< of the whole tensor: "parameters/NAME", "moment1/NAME", ...
  TensorType whole;
  std::int64_t begin = 0, end = 0;
  Tensor values;  ///< end - begin elements, in memory of any device

  std::int64_t elements() const { return end - begin; }
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * size_of(whole.dtype); }
};

}  // namespace attamba
