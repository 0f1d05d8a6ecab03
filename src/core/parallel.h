// Threads inside a rank: OpenMP behind two functions. Work is cut by the problem's size, never by the number of threads, so
// that results do not depend on it.
#pragma once

#include <omp.h>

#include <cstdint>

namespace attamba {

inline int thread_count() {
  return omp_get_max_threads();
}

/// Runs body(i) for i in [0, count). The iterations must be independent and must not throw.
template <class Body>
void parallel_for(std::int64_t count, const Body& body) {
  if (count == 1 || omp_in_parallel()) {
    for (std::int64_t i = 0; i < count; ++i) {
      body(i);
    }
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t i = 0; i < count; ++i) {
    body(i);
  }
}

/// Runs body(begin, end) over consecutive ranges of `grain` items.
template <class Body>
void parallel_ranges(std::int64_t count, std::int64_t grain, const Body& body) {
  const std::int64_t ranges = (count + grain - 1) / grain;
  parallel_for(ranges, [&](std::int64_t r) {
    const std::int64_t begin = r * grain;
    body(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace attamba
