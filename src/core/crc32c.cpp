#include "src/core/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace attamba {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78u;  // reflected

/// Tables for eight bytes at a time: tables[k][b] is the CRC of byte b followed by k zero bytes.
using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1u) != 0 ? kPolynomial : 0u);
    }
    tables[0][byte] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xffu];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

#if defined(__x86_64__)

/// A matrix over GF(2) in table form that advances a CRC register over `kLaneBytes` zero bytes.
using Advance = std::array<std::array<std::uint32_t, 256>, 4>;

/// Three independent lanes hide the instruction's latency of three cycles.
constexpr std::size_t kLaneBytes = 1024;

Advance make_advance() {
  // The register is linear in its start value, so 32 basis vectors define the map.
  std::array<std::uint32_t, 32> columns{};
  for (std::size_t bit = 0; bit < 32; ++bit) {
    std::uint32_t crc = 1u << bit;
    for (std::size_t i = 0; i < kLaneBytes; ++i) {
      crc = (crc >> 8) ^ kTables[0][crc & 0xffu];
    }
    columns[bit] = crc;
  }
  Advance advance{};
  for (std::size_t position = 0; position < 4; ++position) {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      for (std::size_t bit = 0; bit < 8; ++bit) {
        advance[position][byte] ^= (byte >> bit & 1u) != 0 ? columns[8 * position + bit] : 0u;
      }
    }
  }
  return advance;
}

std::uint32_t advance_lane(const Advance& advance, std::uint32_t crc) {
  return advance[0][crc & 0xffu] ^ advance[1][crc >> 8 & 0xffu] ^ advance[2][crc >> 16 & 0xffu] ^ advance[3][crc >> 24];
}

std::uint64_t load_word(const std::byte* bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

__attribute__((target("sse4.2"))) std::uint32_t crc32c_instruction(std::span<const std::byte> bytes, std::uint32_t previous) {
  static const Advance advance = make_advance();
  const std::byte* at = bytes.data();
  std::size_t left = bytes.size();
  std::uint64_t crc = ~previous;
  for (; left >= 3 * kLaneBytes; at += 3 * kLaneBytes, left -= 3 * kLaneBytes) {
    std::uint64_t second = 0;
    std::uint64_t third = 0;
    for (std::size_t i = 0; i < kLaneBytes; i += 8) {
      crc = _mm_crc32_u64(crc, load_word(at + i));
      second = _mm_crc32_u64(second, load_word(at + kLaneBytes + i));
      third = _mm_crc32_u64(third, load_word(at + 2 * kLaneBytes + i));
    }
    crc = advance_lane(advance, static_cast<std::uint32_t>(crc)) ^ second;
    crc = advance_lane(advance, static_cast<std::uint32_t>(crc)) ^ third;
  }
  for (; left >= 8; at += 8, left -= 8) {
    crc = _mm_crc32_u64(crc, load_word(at));
  }
  auto rest = static_cast<std::uint32_t>(crc);
  for (; left > 0; ++at, --left) {
    rest = _mm_crc32_u8(rest, static_cast<std::uint8_t>(*at));
  }
  return ~rest;
}

#endif

/// a b modulo the polynomial. Reflected as CRCs are: the highest bit is the coefficient of x^0.
std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    product ^= (a & bit) != 0 ? b : 0u;
    b = (b >> 1) ^ ((b & 1u) != 0 ? kPolynomial : 0u);
  }
  return product;
}

}  // namespace

std::uint32_t crc32c_portable(std::span<const std::byte> bytes, std::uint32_t previous) {
  std::uint32_t crc = ~previous;
  const std::byte* at = bytes.data();
  std::size_t left = bytes.size();
  const auto byte_at = [&](std::size_t i) { return static_cast<std::uint32_t>(at[i]); };
  for (; left >= 8; at += 8, left -= 8) {
    crc ^= byte_at(0) | byte_at(1) << 8 | byte_at(2) << 16 | byte_at(3) << 24;
    crc = kTables[7][crc & 0xffu] ^ kTables[6][crc >> 8 & 0xffu] ^ kTables[5][crc >> 16 & 0xffu] ^ kTables[4][crc >> 24] ^
          kTables[3][byte_at(4)] ^ kTables[2][byte_at(5)] ^ kTables[1][byte_at(6)] ^ kTables[0][byte_at(7)];
  }
  for (; left > 0; ++at, --left) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ byte_at(0)) & 0xffu];
  }
  return ~crc;
}

std::uint32_t crc32c_combine(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_of_b) {
  // crc(a b) = crc(a) x^(8 |b|) + crc(b); the inversions before and after cancel out.
  std::uint32_t power = 0x80000000u, square = 0x00800000u;  // x^0, x^8
  for (; bytes_of_b != 0; bytes_of_b >>= 1) {
    power = (bytes_of_b & 1u) != 0 ? multiply(power, square) : power;
    square = multiply(square, square);
  }
  return multiply(power, a) ^ b;
}

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t previous) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (has_instruction) {
    return crc32c_instruction(bytes, previous);
  }
#endif
  return crc32c_portable(bytes, previous);
}

}  // namespace attamba
