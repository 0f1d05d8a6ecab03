// CRC-32C (Castagnoli): the checksum of token blocks and checkpoint files. Uses the SSE4.2 instruction where the machine has
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace attamba {

/// The CRC-32C of `bytes`. `previous` is the CRC of the bytes before them, so that a stream can be summed in pieces:
/// crc32c(b, crc32c(a)) == crc32c(a b). The check value is crc32c("123456789") == 0xe3069283.
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t previous = 0);

/// The CRC-32C of `a b` from those of a and b and the size of b, without their bytes.
std::uint32_t crc32c_combine(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_of_b);

/// The same as crc32c(), without the instruction: what machines that lack it run, and what tests compare with.
std::uint32_t crc32c_portable(std::span<const std::byte> bytes, std::uint32_t previous = 0);

}  // namespace attamba
