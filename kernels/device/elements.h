// Neighbouring elements of one thread, which travel in as few loads and stores as their alignment allows and are computed with
// in float32.
#pragma once

#include <type_traits>

#include "kernels/device/intrinsics.h"

namespace attamba::device {

/// Elements that make 16 bytes.
template <class T>
inline constexpr int kPackWidth = static_cast<int>(16 / sizeof(T));

/// kWidth elements of type T as float32. A kWidth of 4 or 8 makes pieces of 8 or 16 bytes, to which the address must be
/// aligned; 1 and 2 go element by element from any address.
template <class T, int kWidth>
struct Elements {
  static constexpr bool kPieces = kWidth % 4 == 0;
  using Piece = std::conditional_t<kWidth * sizeof(T) == 8, Bytes8, Bytes16>;
  static constexpr int kPieceWidth = static_cast<int>(sizeof(Piece) / sizeof(T));

  float value[kWidth];

  ATTAMBA_DEVICE static Elements read(const T* p) {
    Elements e;
    if constexpr (!kPieces) {
      for (int i = 0; i < kWidth; ++i) {
        e.value[i] = to_float(load(p + i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i += kPieceWidth) {
        e.unpack(load(reinterpret_cast<const Piece*>(p + i)), i);
      }
    }
    return e;
  }

  ATTAMBA_DEVICE void write(T* p) const {
    if constexpr (!kPieces) {
      for (int i = 0; i < kWidth; ++i) {
        store(p + i, from_float<T>(value[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i += kPieceWidth) {
        store(reinterpret_cast<Piece*>(p + i), pack(i));
      }
    }
  }

  ATTAMBA_DEVICE void fill(float x) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      value[i] = x;
    }
  }

 private:
  static constexpr int kWords = static_cast<int>(sizeof(Piece) / 4);

  ATTAMBA_DEVICE void unpack(const Piece& piece, int first) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        value[first + w] = std::bit_cast<float>(piece.word[w]);
      } else {
        value[first + 2 * w] = to_float(bf16{static_cast<std::uint16_t>(piece.word[w] & 0xffffu)});
        value[first + 2 * w + 1] = to_float(bf16{static_cast<std::uint16_t>(piece.word[w] >> 16)});
      }
    }
  }

  ATTAMBA_DEVICE Piece pack(int first) const {
    Piece piece;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        piece.word[w] = std::bit_cast<std::uint32_t>(value[first + w]);
      } else {
        piece.word[w] = pack_bf16(value[first + 2 * w], value[first + 2 * w + 1]);
      }
    }
    return piece;
  }
};

}  // namespace attamba::device
