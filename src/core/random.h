// Counter-based random numbers (Philox 4x32-10, Salmon et al., SC 2011): a pure function of (key, counter), so that nothing
// depends on the number of ranks or on the order of calls.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace attamba {

/// One block of four independent 32-bit words.
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 2> key, std::array<std::uint32_t, 4> counter) {
  constexpr std::uint32_t kMultiply0 = 0xD2511F53u, kMultiply1 = 0xCD9E8D57u;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMultiply0} * counter[0];
    const std::uint64_t product1 = std::uint64_t{kMultiply1} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(product0)};
    key = {key[0] + kWeyl0, key[1] + kWeyl1};
  }
  return counter;
}

/// A stream of numbers named by a seed and three coordinates (for example step, layer, sample).
class RandomStream {
 public:
  explicit RandomStream(std::uint64_t seed, std::uint32_t a = 0, std::uint32_t b = 0, std::uint32_t c = 0)
      : key_{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}, coordinates_{a, b, c} {}

  std::uint32_t next() {
    if (used_ == 4) {
      words_ = philox(key_, {block_++, coordinates_[0], coordinates_[1], coordinates_[2]});
      used_ = 0;
    }
    return words_[used_++];
  }
  /// Uniform in (0, 1), 32 bits of resolution.
  double uniform() { return (next() + 0.5) * 0x1p-32; }
  /// Uniform in [0, bound) without bias worth naming for bound < 2^31 (multiply-shift over 64 bits).
  std::uint64_t below(std::uint64_t bound) {
    const std::uint64_t word = (std::uint64_t{next()} << 32) | next();
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(word) * bound) >> 64);
  }
  /// Standard normal (Box-Muller).
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

 private:
  std::array<std::uint32_t, 2> key_;
  std::array<std::uint32_t, 3> coordinates_;
  std::uint32_t block_ = 0;
  std::array<std::uint32_t, 4> words_{};
  int used_ = 4;
};

}  // namespace attamba
