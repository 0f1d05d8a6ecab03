// What every communicator asks of its arguments before anything moves.
#pragma once

#include <string_view>

#include "src/core/tensor.h"

namespace attamba::comm_checks {

/// What transports of the host ask first: they read and write the memory themselves.
inline void in_host_memory(std::string_view operation, const Tensor& data) {
  require(data.device == Device::cpu, operation, ": ", data.type,
          " is in a device's memory, which this transport cannot reach");
}

/// Reductions know float32, float64, int32 and int64; bfloat16 gradients are accumulated and reduced in float32.
inline void reducible(std::string_view operation, const Tensor& data) {
  require(data.dtype() != DType::bfloat16, operation, ": cannot reduce ", data.type, "; reduce the float32 accumulator");
  require(data.data != nullptr || data.bytes() == 0, operation, ": ", data.type, " has no memory");
}

inline void broadcastable(const Tensor& data, int root, int size) {
  require(root >= 0 && root < size, "broadcast: root ", root, " is not one of ", size, " ranks");
  require(data.data != nullptr || data.bytes() == 0, "broadcast: ", data.type, " has no memory");
}

/// `part` must lie outside of `whole`, or exactly at its place there.
inline void is_part(std::string_view operation, const Tensor& whole, const Tensor& part, int rank, int size) {
  require(whole.bytes() == part.bytes() * static_cast<std::size_t>(size) && whole.device == part.device, operation, ": ", size,
          " parts of ", part.type, " do not make ", whole.type);
  if (part.bytes() == 0) {
    return;
  }
  require(whole.data != nullptr && part.data != nullptr, operation, ": ", whole.type, " or ", part.type, " has no memory");
  const auto* whole_begin = static_cast<const std::byte*>(whole.data);
  const auto* part_begin = static_cast<const std::byte*>(part.data);
  const bool apart = part_begin + part.bytes() <= whole_begin || whole_begin + whole.bytes() <= part_begin;
  require(apart || part_begin == whole_begin + part.bytes() * static_cast<std::size_t>(rank), operation, ": the part of rank ",
          rank, " overlaps ", whole.type, " at a place that is not its own");
}

inline void scatterable(std::string_view operation, const Tensor& whole, const Tensor& part, int rank, int size) {
  reducible(operation, whole);
  require(whole.dtype() == part.dtype(), operation, ": a part of ", part.type, " of a sum of ", whole.type);
  is_part(operation, whole, part, rank, size);
}

}  // namespace attamba::comm_checks
