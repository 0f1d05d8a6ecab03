// Lists of tensors as one piece of work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/elementwise.h"

namespace attamba::kernels::cpu {

/// Blocks of kElementGrain elements over a list of tensors, so that one parallel loop covers them all and small tensors do
/// not pay a fork each.
class BlockList {
 public:
  /// `elements(i)` is the size of tensor i.
  template <class Elements>
  BlockList(std::size_t tensors, const Elements& elements) {
    first_.reserve(tensors + 1);
    first_.push_back(0);
    for (std::size_t i = 0; i < tensors; ++i) {
      first_.push_back(first_.back() + (elements(i) + kElementGrain - 1) / kElementGrain);
    }
  }

  std::int64_t count() const { return first_.back(); }
  /// Index of the tensor that block `block` belongs to.
  std::size_t tensor(std::int64_t block) const {
    return static_cast<std::size_t>(std::upper_bound(first_.begin(), first_.end(), block) - first_.begin()) - 1;
  }
  /// First element of the block inside tensor `tensor`.
  std::int64_t begin(std::int64_t block, std::size_t tensor) const { return (block - first_[tensor]) * kElementGrain; }

 private:
  std::vector<std::int64_t> first_;
};

}  // namespace attamba::kernels::cpu
