// The middle of some values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace attamba {

/// The median: the mean of both middle values where their number is even, 0 of none.
inline double median(std::vector<double> values) {
  if (values.empty()) {
    return 0;
  }
  const std::size_t half = values.size() / 2;
  std::sort(values.begin(), values.end());
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace attamba
