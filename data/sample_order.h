// The order of samples as a pure function: a keyed permutation instead of a shuffled list. Nothing is stored, any position can
// be asked for at once, and every machine gives the same answer.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "src/core/error.h"
#include "src/core/random.h"

namespace attamba {

/// A permutation of [0, count) named by (seed, epoch): a Feistel network over the smallest power of two that holds `count`,
/// walked along its cycle until it lands inside (Black and Rogaway, CT-RSA 2002); fewer than two rounds of it on average.
class KeyedPermutation {
 public:
  KeyedPermutation(std::uint64_t count, std::uint64_t seed, std::uint64_t epoch) : count_(count) {
    require(count > 0, "sample order: there is nothing to order");
    const auto bits = static_cast<unsigned>(std::bit_width(count - 1));
    low_bits_ = bits / 2;
    high_bits_ = bits - low_bits_;
    for (std::uint32_t i = 0; i < kRounds / 2; ++i) {
      const auto words = philox({static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)},
                                {static_cast<std::uint32_t>(epoch), static_cast<std::uint32_t>(epoch >> 32), i, 0x5a3b1eu});
      keys_[2 * i] = std::uint64_t{words[0]} << 32 | words[1];
      keys_[2 * i + 1] = std::uint64_t{words[2]} << 32 | words[3];
    }
  }

  /// Where `index` of [0, count) goes.
  std::uint64_t operator()(std::uint64_t index) const {
    require(index < count_, "sample order: index ", index, " is outside ", count_);
    do {
      index = encrypt(index);
    } while (index >= count_);
    return index;
  }

 private:
  static constexpr std::uint32_t kRounds = 8;

  static std::uint64_t mix(std::uint64_t value, std::uint64_t key) {
    // A 64-bit finaliser (xor-shift and multiply by odd constants): every input bit reaches every output bit.
    value = (value ^ key) * 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93u;
    value = (value ^ (value >> 29)) * 0xbf58476d1ce4e5b9u;
    return value ^ (value >> 32);
  }

  std::uint64_t encrypt(std::uint64_t value) const {
    const std::uint64_t low_mask = (std::uint64_t{1} << low_bits_) - 1;
    const std::uint64_t high_mask = (std::uint64_t{1} << high_bits_) - 1;
    std::uint64_t low = value & low_mask;
    std::uint64_t high = value >> low_bits_;
    // The halves keep their places and widths; each round changes one by a function of the other, which can be undone.
    for (std::uint32_t round = 0; round < kRounds; round += 2) {
      high ^= mix(low, keys_[round]) & high_mask;
      low ^= mix(high, keys_[round + 1]) & low_mask;
    }
    return high << low_bits_ | low;
  }

  std::uint64_t count_;
  unsigned low_bits_ = 0;
  unsigned high_bits_ = 0;
  std::array<std::uint64_t, kRounds> keys_{};
};

/// The image of `index` under the permutation of [0, count) named by (seed, epoch).
inline std::uint64_t permuted(std::uint64_t index, std::uint64_t count, std::uint64_t seed, std::uint64_t epoch) {
  return KeyedPermutation(count, seed, epoch)(index);
}

}  // namespace attamba
