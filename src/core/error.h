// Errors are exceptions that name the operation and the values; only the launcher exits.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace attamba {

/// A failure while running: bad data, no space, a mathematical impossibility. The program exits with 1.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A mistake in what the user asked for: configuration, flags. The program exits with 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// Concatenates its arguments with operator<<; the one way in which messages are put together.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

/// Throws `E` with the concatenated message when `condition` does not hold.
template <class E = Error, class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    throw E(concat(parts...));
  }
}

}  // namespace attamba
