// The one clock: it never jumps, whatever happens to the time of day.
#pragma once

#include <chrono>

namespace attamba {

/// Seconds since some moment in the past.
inline double monotonic_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace attamba
