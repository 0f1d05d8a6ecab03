// What all CUDA kernels of attention share: sizes, the table, and where a block works.
//
// The query rows of one sequence and one key/value head are numbered through: row r is token r / group, query head r % group of
// the `group` heads that read that key/value head. Which keys a row sees depends on its token alone, so tiles of rows need not
// care where tokens begin, and query heads share the tiles of their key/value head whatever their number.
#pragma once

#include <bit>
#include <cmath>

#include "kernels/attention_checks.h"
#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/block.h"

namespace attamba::kernels::cuda::attention_parts {

using device::bf16;
using device::kWarp;
using device::load;
using device::store;

/// Largest head size of the kernels that give a row to a warp.
inline constexpr int kMaxHeadSize = 256;

struct Sizes {
  std::int32_t sequences, n, heads, kv_heads, group, d;
  std::int32_t rows;                      ///< query rows of one sequence and key/value head: n * group
  std::int32_t query_stride, key_stride;  ///< elements from one token to the next
  float scale;                            ///< 1 / sqrt(d)

  Sizes(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
    check_attention_shapes(q, k, sequence_length);
    dispatch_compute(q.dtype, "attention", [&]<class T>() {});
    require<UsageError>(q.shape[2] <= kMaxHeadSize, "attention: head size ", q.shape[2], ", CUDA kernels reach ", kMaxHeadSize);
    require<UsageError>(q.shape.rows() < (std::int64_t{1} << 31) && q.shape[1] * q.shape[2] < (std::int64_t{1} << 31),
                        "attention: q ", q, " has 2^31 rows, or elements of a token, or more");
    sequences = static_cast<std::int32_t>(q.shape[0] / sequence_length);
    n = static_cast<std::int32_t>(sequence_length);
    heads = static_cast<std::int32_t>(q.shape[1]);
    kv_heads = static_cast<std::int32_t>(k.shape[1]);
    group = heads / kv_heads;
    d = static_cast<std::int32_t>(q.shape[2]);
    rows = n * group;
    query_stride = heads * d;
    key_stride = kv_heads * d;
    scale = 1 / std::sqrt(static_cast<float>(d));
  }
  /// Blocks of a launch that gives each head `tiles` of them.
  std::int64_t blocks(std::int64_t tiles) const { return tiles * sequences * kv_heads; }
};

struct Table {
  const std::int32_t *ends, *key_begin, *key_end, *local_begin;

  explicit Table(const AttentionTable& table)
      : ends(table.ends.as<std::int32_t>()),
        key_begin(table.key_begin.as<std::int32_t>()),
        key_end(table.key_end.as<std::int32_t>()),
        local_begin(table.local_begin.as<std::int32_t>()) {}
};

/// One sequence and key/value head.
struct Head {
  std::int32_t index, first_token, kv_head;

  ATTAMBA_DEVICE Head(const Sizes& sizes, int index_of_head)
      : index(index_of_head), first_token(index_of_head / sizes.kv_heads * sizes.n), kv_head(index_of_head % sizes.kv_heads) {}

  /// Token of a query row, as a row of the batch.
  ATTAMBA_DEVICE int token(const Sizes& sizes, int row) const {
    return first_token + (sizes.group == 1 ? row : row / sizes.group);
  }
  /// Which of all query heads a query row of `token` belongs to.
  ATTAMBA_DEVICE int query_head(const Sizes& sizes, int row, int token) const {
    return kv_head * sizes.group + row - (token - first_token) * sizes.group;
  }
  /// Index of a query row in a [T, H] tensor.
  ATTAMBA_DEVICE std::int64_t query(const Sizes& sizes, int row) const {
    const int t = token(sizes, row);
    return static_cast<std::int64_t>(t) * sizes.heads + query_head(sizes, row, t);
  }
  /// First element of a query row in a [T, H, d] tensor.
  ATTAMBA_DEVICE std::int64_t query_element(const Sizes& sizes, int row) const {
    const int t = token(sizes, row);
    return static_cast<std::int64_t>(t) * sizes.query_stride + query_head(sizes, row, t) * sizes.d;
  }
  /// First element of a key's row in a [T, Hk, d] tensor.
  ATTAMBA_DEVICE std::int64_t key_element(const Sizes& sizes, int token) const {
    return static_cast<std::int64_t>(token) * sizes.key_stride + kv_head * sizes.d;
  }
};

/// Keys, or query rows, from `begin` to before `end`.
struct Range {
  std::int32_t begin, end;
};

/// Keys that token t sees: indices into `ends` or rows of the batch.
ATTAMBA_DEVICE Range keys_of(const Table& table, bool compact, int t) {
  return compact ? Range{load(table.key_begin + t), load(table.key_end + t)} : Range{load(table.local_begin + t), t + 1};
}

/// First t in [from, to) with list[t] > value, or `to`. The list does not decrease.
ATTAMBA_DEVICE int first_above(const std::int32_t* list, int from, int to, int value) {
  while (from < to) {
    const int middle = from + (to - from) / 2;
    if (load(list + middle) > value) {
      to = middle;
    } else {
      from = middle + 1;
    }
  }
  return from;
}

/// Query rows of `head` that see the compact key ends[key], or the local key in row `key`. They are neighbours, because the
/// table does not decrease.
ATTAMBA_DEVICE Range rows_seeing(const Sizes& sizes, const Table& table, const Head& head, bool compact, int key) {
  const int first = head.first_token, last = first + sizes.n;
  const int begin = compact ? first_above(table.key_end, first, last, key) : key;
  const int end = first_above(compact ? table.key_begin : table.local_begin, begin, last, key);
  return {(begin - first) * sizes.group, (end - first) * sizes.group};
}

/// What the backward pass needs to know of each query row: log-sum-exp and delta = sum(dout * out). Row r of head i is element
/// i * padded_rows + r; padded so that pairs of them are aligned to 16 bytes.
struct Statistic {
  float lse, delta;  ///< the tensor core kernels keep lse * log2(e)
};
struct StatisticPair {
  Statistic row[2];
};
ATTAMBA_HOST_DEVICE std::int64_t padded_rows(const Sizes& sizes) {
  return (static_cast<std::int64_t>(sizes.rows) + 1) / 2 * 2;
}
ATTAMBA_DEVICE void store_statistic(device::Bytes8* statistics, const Statistic& statistic) {
  store(statistics, std::bit_cast<device::Bytes8>(statistic));
}
ATTAMBA_DEVICE Statistic load_statistic(const device::Bytes8* statistics) {
  return std::bit_cast<Statistic>(load(statistics));
}

/// Arguments of the forward kernels; T is float or bf16.
template <class T>
struct Forward {
  T* out;
  float* lse;
  const T *q, *k, *v;
  Sizes sizes;
  Table table;
};

template <class T>
struct Backward {
  T *dq, *dk, *dv;
  const T *dout, *out;
  const float* lse;
  const T *q, *k, *v;
  device::Bytes8* statistics;
  Sizes sizes;
  Table table;
};

/// Whether the tensor core kernels take this problem; the others go to those that give a row to a warp.
inline bool fits_tiles(const TensorType& q) {
  return q.dtype == DType::bfloat16 && q.shape[2] % 8 == 0 && q.shape[2] <= 128;
}

/// Calls body.operator()<kD>() with the tile width that holds heads of size d.
template <class Body>
void dispatch_width(std::int64_t d, const Body& body) {
  if (d <= 32) {
    body.template operator()<32>();
  } else if (d <= 64) {
    body.template operator()<64>();
  } else {
    body.template operator()<128>();
  }
}

}  // namespace attamba::kernels::cuda::attention_parts
