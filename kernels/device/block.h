// Block primitives on top of the intrinsics: shared memory cut into arrays, sums over a warp and a block.
#pragma once

#include "kernels/device/intrinsics.h"

namespace attamba::device {

/// Cuts the block's shared memory into arrays, in the order of calls. The host sums up the same sizes with `bytes_of`.
class SharedMemory {
 public:
  ATTAMBA_DEVICE SharedMemory() : next_(dynamic_shared()) {}

  template <class T>
  ATTAMBA_DEVICE T* take(int count) {
    auto* piece = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return piece;
  }
  template <class T>
  ATTAMBA_HOST_DEVICE static constexpr std::size_t bytes_of(int count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
  }

 private:
  std::byte* next_;
};

/// The sum over the warp's lanes, in all lanes, in an order that does not depend on the lane.
template <class T>
ATTAMBA_DEVICE T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value += shuffle_xor(value, mask);
  }
  return value;
}

ATTAMBA_DEVICE float warp_max(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = value > other ? value : other;
  }
  return value;
}

/// The sum over the block's threads, in all threads, always in the same order. `partials` holds one number per warp; the block
/// must not touch it between calls without a barrier.
template <class T>
ATTAMBA_DEVICE T block_sum(T value, T* partials) {
  value = warp_sum(value);
  sync_block();  // an earlier sum's readers are done
  if (lane_index() == 0) {
    store(partials + warp_index(), value);
  }
  sync_block();
  T sum = 0;
  for (int w = 0; w < block_threads() / kWarp; ++w) {
    sum += load(partials + w);
  }
  return sum;
}

ATTAMBA_DEVICE float block_max(float value, float* partials) {
  value = warp_max(value);
  sync_block();
  if (lane_index() == 0) {
    store(partials + warp_index(), value);
  }
  sync_block();
  float most = load(partials);
  for (int w = 1; w < block_threads() / kWarp; ++w) {
    const float other = load(partials + w);
    most = most > other ? most : other;
  }
  return most;
}

/// The sum of a column of values [rows, columns], in lanes of the block's first warp: a lane per column, a warp per kWarps-th
/// row. All threads call it once; `partials` [kWarps, kWarp] is shared memory. A column outside sums up to 0.
template <int kWarps>
ATTAMBA_DEVICE float column_sum(const float* values, std::int64_t rows, std::int64_t columns, std::int64_t column,
                                float* partials) {
  float sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (std::int64_t row = warp_index(); row < rows; row += kWarps) {
      sum += load(values + row * columns + column);
    }
  }
  store(partials + thread_index(), sum);
  sync_block();
  float total = 0;
  if (warp_index() == 0) {
    for (int w = 0; w < kWarps; ++w) {
      total += load(partials + w * kWarp + lane_index());
    }
  }
  return total;
}

/// Eight bfloat16 or four float32 elements that travel as 16 bytes.
template <class T>
struct Pack {
  static constexpr int kSize = static_cast<int>(16 / sizeof(T));
  float value[kSize];

  /// p aligned to 16 bytes.
  ATTAMBA_DEVICE static Pack read(const T* p);
  ATTAMBA_DEVICE void write(T* p) const;
};

template <>
ATTAMBA_DEVICE Pack<float> Pack<float>::read(const float* p) {
  union {
    Bytes16 bytes;
    float value[4];
  } u;
  u.bytes = load(reinterpret_cast<const Bytes16*>(p));
  Pack pack;
  for (int i = 0; i < 4; ++i) {
    pack.value[i] = u.value[i];
  }
  return pack;
}

template <>
ATTAMBA_DEVICE void Pack<float>::write(float* p) const {
  union {
    Bytes16 bytes;
    float value[4];
  } u;
  for (int i = 0; i < 4; ++i) {
    u.value[i] = value[i];
  }
  store(reinterpret_cast<Bytes16*>(p), u.bytes);
}

template <>
ATTAMBA_DEVICE Pack<bf16> Pack<bf16>::read(const bf16* p) {
  const Bytes16 bytes = load(reinterpret_cast<const Bytes16*>(p));
  Pack pack;
  for (int i = 0; i < 4; ++i) {
    pack.value[2 * i] = to_float(bf16{static_cast<std::uint16_t>(bytes.word[i] & 0xffffu)});
    pack.value[2 * i + 1] = to_float(bf16{static_cast<std::uint16_t>(bytes.word[i] >> 16)});
  }
  return pack;
}

template <>
ATTAMBA_DEVICE void Pack<bf16>::write(bf16* p) const {
  Bytes16 bytes;
  for (int i = 0; i < 4; ++i) {
    bytes.word[i] = pack_bf16(value[2 * i], value[2 * i + 1]);
  }
  store(reinterpret_cast<Bytes16*>(p), bytes);
}

}  // namespace attamba::device
