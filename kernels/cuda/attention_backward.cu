// Gradients of attention (attention.cu), with P recomputed from lse:
//
//   delta = rowsum(dout * out);  dS = P * (dout v^T - delta);  dq = dS k / sqrt(d);  dk = dS^T q / sqrt(d);  dv = P^T dout
//
// Every output row has one owner, so sums need no atomics and always have the same order. bfloat16, three launches:
// 1. A block owns 128 query rows and walks the keys that they see, as in the forward pass: dq, and lse and delta as statistics.
// 2. A block owns a tile of tokens and walks the query rows that see them as local keys: dk, dv.
// 3. A block owns a tile of chunk ends and walks the query rows that see them as compact keys; it adds to their rows of dk, dv.
//    How many ends there are is known on the device alone: blocks beyond them have nothing to do.
// Scores are recomputed transposed where keys are owned, so that P and dS never leave registers either way.
// Everything else: a warp owns a row (attention_rows.h).
#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/attention_tiles.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attention_parts;

constexpr float kLog2E = 1.4426950408889634f;

// ------------------------------------------------------------------------------------------------ queries
template <int kD>
struct QueryPlan {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRows = 16 * kWarps, kKeys = kD <= 64 ? 64 : 32;
  static constexpr int kBlocks = kD <= 64 ? 2 : 1;
  static constexpr int kStage = 2 * kKeys * kD;
  static constexpr std::size_t shared_bytes() {
    return device::SharedMemory::bytes_of<bf16>(2 * kRows * kD) + device::SharedMemory::bytes_of<bf16>(2 * kStage) +
           device::SharedMemory::bytes_of<float>(kRows);
  }
};

/// deltas[r] = sum(dout * out) of the warp's 16 rows from `row` on; dout in `tile`. Also writes the statistics of these rows.
template <int kD>
ATTAMBA_DEVICE void compute_deltas(float* deltas, const bf16* tile, const Backward<bf16>& a, const Head& head, int row) {
  constexpr int kChunks = kD / 8;
  const int lane = device::lane_index(), chunk = lane % kChunks;
  device::Bytes8* const statistics = a.statistics + head.index * padded_rows(a.sizes);
  ATTAMBA_UNROLL
  for (int r = 0; r < 16; r += kWarp / kChunks) {
    const int own = r + lane / kChunks;
    const bool exists = row + own < a.sizes.rows;
    const std::int64_t query = exists ? head.query(a.sizes, row + own) : 0;
    float delta = 0;
    if (exists && chunk * 8 < a.sizes.d) {
      const auto out = device::Pack<bf16>::read(a.out + query * a.sizes.d + chunk * 8);
      const auto dout = device::Pack<bf16>::read(tile + in_tile<kD>(own, chunk));
      ATTAMBA_UNROLL
      for (int i = 0; i < 8; ++i) {
        delta += out.value[i] * dout.value[i];
      }
    }
    ATTAMBA_UNROLL
    for (int mask = kChunks / 2; mask > 0; mask /= 2) {
      delta += device::shuffle_xor(delta, mask);
    }
    if (chunk == 0) {
      store(deltas + own, delta);
      if (row + own < padded_rows(a.sizes)) {
        store_statistic(statistics + row + own, {exists ? load(a.lse + query) * kLog2E : 0, delta});
      }
    }
  }
}

/// Adds one tile of keys to dq of the warp's rows.
template <int kD, int kKeys>
ATTAMBA_DEVICE void add_to_dq(float (&dq)[kD / 8][4], const std::uint32_t (&q)[kD / 16][4],
                              const std::uint32_t (&dout)[kD / 16][4], const bf16* k, const bf16* v, int first,
                              const WarpKeys& keys, float scale_log2, const float (&lse)[2], const float (&delta)[2]) {
  const int column = device::lane_index() % 4 * 2;
  ATTAMBA_UNROLL
  for (int j = 0; j < kKeys / 16; ++j) {
    const int from = first + 16 * j;
    if (!keys.see_any(from, from + 16)) {
      continue;
    }
    float s[2][4] = {}, dp[2][4] = {};
    ATTAMBA_UNROLL
    for (int step = 0; step < kD / 16; ++step) {
      multiply_rows<kD>(s, q[step], k, 16 * j, step);
      multiply_rows<kD>(dp, dout[step], v, 16 * j, step);
    }
    const bool masked = !keys.see_all(from, from + 16);
    ATTAMBA_UNROLL
    for (int i = 0; i < 2; ++i) {
      ATTAMBA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int key = from + 8 * i + column + e % 2, r = e / 2;
        const float p = device::exp2_fast(device::fused_multiply_add(s[i][e], scale_log2, -lse[r]));
        const bool seen = !masked || (key >= keys.thread[r].begin && key < keys.thread[r].end);
        s[i][e] = seen ? p * (dp[i][e] - delta[r]) : 0.0f;
      }
    }
    std::uint32_t ds[4];
    round_to_a(ds, s);
    multiply_columns<kD>(dq, ds, k, 16 * j);
  }
}

template <int kD>
ATTAMBA_KERNEL(QueryPlan<kD>::kThreads, QueryPlan<kD>::kBlocks)
query_tiles_kernel(const Backward<bf16> a, const int tiles) {
  using Plan = QueryPlan<kD>;
  const Head head(a.sizes, device::block_x() / tiles);
  const int first_row = (tiles - 1 - device::block_x() % tiles) * Plan::kRows;
  const int last_row = (first_row + Plan::kRows < a.sizes.rows ? first_row + Plan::kRows : a.sizes.rows) - 1;
  device::SharedMemory shared;
  bf16* const q_tile = shared.take<bf16>(2 * Plan::kRows * kD);
  bf16* const dout_tile = q_tile + Plan::kRows * kD;
  bf16* const stages = shared.take<bf16>(2 * Plan::kStage);
  float* const deltas = shared.take<float>(Plan::kRows) + 16 * device::warp_index();

  const auto place_of = [&](int, int row) { return place_of_row(a.sizes, head, first_row + row, last_row + 1); };
  copy_rows<kD, Plan::kRows, Plan::kThreads>(q_tile, a.q, a.sizes.d, place_of);
  copy_rows<kD, Plan::kRows, Plan::kThreads>(dout_tile, a.dout, a.sizes.d, place_of);
  const KeyTiles<Plan::kKeys> tiles_of_keys(a.table, head.token(a.sizes, first_row), head.token(a.sizes, last_row));
  KeyCopier<kD, Plan::kKeys, Plan::kThreads> copier;
  copier.look_up(tiles_of_keys, 0, a.table);
  copier.copy(stages, a.k, a.v, a.sizes, head);
  device::copy_async_commit();
  copier.look_up(tiles_of_keys, 1, a.table);

  const int warp_row = first_row + 16 * device::warp_index();
  WarpKeys keys(a.sizes, a.table, head, false, warp_row);
  bf16* const own_q = q_tile + 16 * device::warp_index() * kD;
  bf16* const own_dout = dout_tile + 16 * device::warp_index() * kD;
  device::copy_async_wait<0>();
  device::sync_block();
  compute_deltas<kD>(deltas, own_dout, a, head, warp_row);
  device::sync_warp();
  std::uint32_t q[kD / 16][4], dout[kD / 16][4];
  ATTAMBA_UNROLL
  for (int step = 0; step < kD / 16; ++step) {
    load_a<kD>(q[step], own_q, 0, step);
    load_a<kD>(dout[step], own_dout, 0, step);
  }
  float lse[2], delta[2], dq[kD / 8][4] = {};
  ATTAMBA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int own = device::lane_index() / 4 + 8 * r;
    lse[r] = warp_row + own < a.sizes.rows ? load(a.lse + head.query(a.sizes, warp_row + own)) * kLog2E : 0;
    delta[r] = load(deltas + own);
  }
  const float scale_log2 = a.sizes.scale * kLog2E;
  for (int tile = 0; tile < tiles_of_keys.count; ++tile) {
    if (tile + 1 < tiles_of_keys.count) {
      copier.copy(stages + (tile + 1) % 2 * Plan::kStage, a.k, a.v, a.sizes, head);
      device::copy_async_commit();
      copier.look_up(tiles_of_keys, tile + 2, a.table);
    }
    if (tile == tiles_of_keys.local_tiles) {
      keys = WarpKeys(a.sizes, a.table, head, true, warp_row);
    }
    const bf16* const k = stages + tile % 2 * Plan::kStage;
    add_to_dq<kD, Plan::kKeys>(dq, q, dout, k, k + Plan::kKeys * kD, tiles_of_keys.first(tile), keys, scale_log2, lse, delta);
    device::copy_async_wait<0>();
    device::sync_block();
  }
  write_rows<kD>(a.dq, own_q, dq, a.sizes.scale, a.sizes.scale, a.sizes.d,
                 [&](int row) { return place_of_row(a.sizes, head, warp_row + row, a.sizes.rows); });
}

// ------------------------------------------------------------------------------------------------ keys
template <int kD>
struct KeyPlan {
  static constexpr int kWarps = kD <= 64 ? 8 : 4, kThreads = kWarps * kWarp, kKeys = 16 * kWarps;
  static constexpr int kRows = kD <= 64 ? 64 : 32;  ///< query rows of a tile
  static constexpr int kBlocks = 1;
  static constexpr int kStage = 2 * kRows * kD;
  static constexpr bool kKeepKeys = kD <= 64;  ///< in registers, as A operands
  static constexpr std::size_t shared_bytes() {
    return device::SharedMemory::bytes_of<bf16>(2 * kKeys * kD) + device::SharedMemory::bytes_of<bf16>(2 * kStage) +
           device::SharedMemory::bytes_of<device::Bytes8>(2 * kRows) + device::SharedMemory::bytes_of<int>(2 * kKeys);
  }
};

/// A operands of the warp's 16 keys or values: kept in registers, or read again whenever they are needed.
template <int kD, bool kKeep>
struct OwnRows {
  const bf16* tile;
  std::uint32_t kept[kKeep ? kD / 16 : 1][4];

  ATTAMBA_DEVICE explicit OwnRows(const bf16* own_tile) : tile(own_tile) {
    if constexpr (kKeep) {
      ATTAMBA_UNROLL
      for (int step = 0; step < kD / 16; ++step) {
        load_a<kD>(kept[step], tile, 0, step);
      }
    }
  }
  ATTAMBA_DEVICE void multiply(float (&sum)[2][4], const bf16* rows, int row, int step) {
    if constexpr (!kKeep) {
      load_a<kD>(kept[0], tile, 0, step);
    }
    multiply_rows<kD>(sum, kept[kKeep ? step : 0], rows, row, step);
  }
};

/// Query rows that see keys of a warp.
struct WarpRows {
  Range thread[2];  ///< this thread's keys
  Range any, all;   ///< those that see at least one of the warp's keys, those that see every one

  /// Of the warp's keys in lists of where each key's rows begin and end; `count` of these keys exist.
  ATTAMBA_DEVICE WarpRows(const int* begins, const int* ends, int count) {
    const int g = device::lane_index() / 4;
    for (int r = 0; r < 2; ++r) {
      thread[r] = g + 8 * r < count ? Range{load(begins + g + 8 * r), load(ends + g + 8 * r)} : Range{0, 0};
    }
    any = count > 0 ? Range{load(begins), load(ends + (count < 16 ? count : 16) - 1)} : Range{0, 0};
    all = count >= 16 ? Range{load(begins + 15), load(ends)} : Range{0, 0};
  }
  ATTAMBA_DEVICE bool any_sees(int from, int to) const { return from < any.end && to > any.begin; }
  ATTAMBA_DEVICE bool all_see(int from, int to) const { return from >= all.begin && to <= all.end; }
};

/// The keys that a block owns: the first one, how many exist, and the block's head.
struct KeyTile {
  bool compact;
  int first, count;
};

/// Adds a tile of query rows, [2, kRows, kD] q and dout, to dk and dv of the warp's keys.
template <int kD, bool kKeep, int kRows>
ATTAMBA_DEVICE void add_to_dk_dv(float (&dk)[kD / 8][4], float (&dv)[kD / 8][4], OwnRows<kD, kKeep>& k, OwnRows<kD, kKeep>& v,
                                 const bf16* q, const device::Bytes8* statistics, int first, const WarpRows& rows,
                                 float scale_log2) {
  const int column = device::lane_index() % 4 * 2;
  const bf16* const dout = q + kRows * kD;
  ATTAMBA_UNROLL
  for (int j = 0; j < kRows / 16; ++j) {
    const int from = first + 16 * j;
    if (!rows.any_sees(from, from + 16)) {
      continue;
    }
    float p[2][4] = {}, ds[2][4] = {};
    ATTAMBA_UNROLL
    for (int step = 0; step < kD / 16; ++step) {
      k.multiply(p, q, 16 * j, step);
      v.multiply(ds, dout, 16 * j, step);
    }
    const bool masked = !rows.all_see(from, from + 16);
    ATTAMBA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const device::Bytes8* const pair = statistics + 16 * j + 8 * i + column;
      const auto both = std::bit_cast<StatisticPair>(load(reinterpret_cast<const device::Bytes16*>(pair)));
      ATTAMBA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int row = from + 8 * i + column + e % 2, r = e / 2;
        const bool seen = !masked || (row >= rows.thread[r].begin && row < rows.thread[r].end);
        const float value = device::exp2_fast(device::fused_multiply_add(p[i][e], scale_log2, -both.row[e % 2].lse));
        p[i][e] = seen ? value : 0.0f;
        ds[i][e] = seen ? value * (ds[i][e] - both.row[e % 2].delta) : 0.0f;
      }
    }
    std::uint32_t rounded[4];
    round_to_a(rounded, p);
    multiply_columns<kD>(dv, rounded, dout, 16 * j);
    round_to_a(rounded, ds);
    multiply_columns<kD>(dk, rounded, q, 16 * j);
  }
}

/// Adds value * factor of the warp's 16 keys to what `to` holds; place_of(r) says where key r lies.
template <int kD, class PlaceOf>
ATTAMBA_DEVICE void add_rows_to(bf16* to, const float (&value)[kD / 8][4], float factor, int d, const PlaceOf& place_of) {
  const int g = device::lane_index() / 4, column = device::lane_index() % 4 * 2;
  ATTAMBA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const Place place = place_of(g + 8 * r);
    ATTAMBA_UNROLL
    for (int i = 0; i < kD / 8; ++i) {
      if (place.exists && 8 * i < d) {
        auto* const both = reinterpret_cast<std::uint32_t*>(to + place.element + 8 * i + column);
        const std::uint32_t old = load(both);
        const float low = device::to_float(bf16{static_cast<std::uint16_t>(old & 0xffffu)});
        const float high = device::to_float(bf16{static_cast<std::uint16_t>(old >> 16)});
        store(both, device::pack_bf16(low + value[i][2 * r] * factor, high + value[i][2 * r + 1] * factor));
      }
    }
  }
}

template <int kD>
ATTAMBA_KERNEL(KeyPlan<kD>::kThreads, KeyPlan<kD>::kBlocks)
key_tiles_kernel(const Backward<bf16> a, const bool compact, const int tiles) {
  using Plan = KeyPlan<kD>;
  const Head head(a.sizes, device::block_x() / tiles);
  const int own_first = head.first_token + device::block_x() % tiles * Plan::kKeys;
  const int own_end = compact ? load(a.table.key_end + head.first_token + a.sizes.n - 1) : head.first_token + a.sizes.n;
  const int count = own_end - own_first < Plan::kKeys ? own_end - own_first : Plan::kKeys;
  if (count <= 0) {
    return;
  }
  device::SharedMemory shared;
  bf16* const k_tile = shared.take<bf16>(2 * Plan::kKeys * kD);
  bf16* const v_tile = k_tile + Plan::kKeys * kD;
  bf16* const stages = shared.take<bf16>(2 * Plan::kStage);
  device::Bytes8* const stage_statistics = shared.take<device::Bytes8>(2 * Plan::kRows);
  int* const begins = shared.take<int>(2 * Plan::kKeys);
  int* const ends = begins + Plan::kKeys;

  const auto place_of_key = [&](int key) {
    const int index = own_first + (key < count ? key : 0);
    return Place{head.key_element(a.sizes, compact ? load(a.table.ends + index) : index), key < count};
  };
  copy_rows<kD, Plan::kKeys, Plan::kThreads>(k_tile, a.k, a.sizes.d, [&](int, int row) { return place_of_key(row); });
  copy_rows<kD, Plan::kKeys, Plan::kThreads>(v_tile, a.v, a.sizes.d, [&](int, int row) { return place_of_key(row); });
  for (int key = device::thread_index(); key < count; key += Plan::kThreads) {
    const Range rows = rows_seeing(a.sizes, a.table, head, compact, own_first + key);
    store(begins + key, rows.begin);
    store(ends + key, rows.end);
  }
  device::sync_block();
  const int first_row = load(begins) / 2 * 2, end_row = load(ends + count - 1);  // pairs of statistics are aligned
  const device::Bytes8* const statistics = a.statistics + head.index * padded_rows(a.sizes);
  const auto copy_stage = [&](int tile) {
    const int first = first_row + tile * Plan::kRows;
    bf16* const q = stages + tile % 2 * Plan::kStage;
    const auto place_of = [&](int, int row) { return place_of_row(a.sizes, head, first + row, end_row); };
    copy_rows<kD, Plan::kRows, Plan::kThreads>(q, a.q, a.sizes.d, place_of);
    copy_rows<kD, Plan::kRows, Plan::kThreads>(q + Plan::kRows * kD, a.dout, a.sizes.d, place_of);
    if (device::thread_index() < Plan::kRows / 2) {
      const int row = 2 * device::thread_index();
      device::copy_async_16(stage_statistics + tile % 2 * Plan::kRows + row, statistics + first + row, first + row < end_row);
    }
    device::copy_async_commit();
  };
  copy_stage(0);
  device::copy_async_wait<0>();
  device::sync_block();

  const int own = 16 * device::warp_index();
  OwnRows<kD, Plan::kKeepKeys> k(k_tile + own * kD), v(v_tile + own * kD);
  const WarpRows rows(begins + own, ends + own, count - own);
  float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
  for (int tile = 0; first_row + tile * Plan::kRows < end_row; ++tile) {
    const int first = first_row + tile * Plan::kRows;
    if (first + Plan::kRows < end_row) {
      copy_stage(tile + 1);
    }
    add_to_dk_dv<kD, Plan::kKeepKeys, Plan::kRows>(dk, dv, k, v, stages + tile % 2 * Plan::kStage,
                                                   stage_statistics + tile % 2 * Plan::kRows, first, rows,
                                                   a.sizes.scale * kLog2E);
    device::copy_async_wait<0>();
    device::sync_block();
  }
  const auto place_of_own = [&](int row) { return place_of_key(own + row); };
  if (compact) {
    add_rows_to<kD>(a.dk, dk, a.sizes.scale, a.sizes.d, place_of_own);
    add_rows_to<kD>(a.dv, dv, 1, a.sizes.d, place_of_own);
  } else {
    write_rows<kD>(a.dk, k_tile + own * kD, dk, a.sizes.scale, a.sizes.scale, a.sizes.d, place_of_own);
    write_rows<kD>(a.dv, v_tile + own * kD, dv, 1, 1, a.sizes.d, place_of_own);
  }
}

template <int kD>
void backward_by_tiles(const Launch& launch, const Backward<bf16>& arguments) {
  const Sizes& sizes = arguments.sizes;
  using Queries = QueryPlan<kD>;
  using Keys = KeyPlan<kD>;
  const int query_tiles = (sizes.rows + Queries::kRows - 1) / Queries::kRows;
  launch_kernel("attention_backward: queries", &query_tiles_kernel<kD>, launch,
                {.x = sizes.blocks(query_tiles), .threads = Queries::kThreads, .shared_bytes = Queries::shared_bytes()},
                arguments, query_tiles);
  const int key_tiles = (sizes.n + Keys::kKeys - 1) / Keys::kKeys;
  const Grid grid = {.x = sizes.blocks(key_tiles), .threads = Keys::kThreads, .shared_bytes = Keys::shared_bytes()};
  launch_kernel("attention_backward: local keys", &key_tiles_kernel<kD>, launch, grid, arguments, false, key_tiles);
  launch_kernel("attention_backward: compact keys", &key_tiles_kernel<kD>, launch, grid, arguments, true, key_tiles);
}

}  // namespace

void attention_backward(const Launch& launch, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dout,
                        const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionTable& table, std::int64_t sequence_length) {
  const Sizes sizes(q.type, k.type, sequence_length);
  check_attention_backward(dq, dk, dv, dout, out, lse, q, k, v, table, sequence_length);
  ScratchAllocator scratch(launch);
  const auto count = static_cast<std::size_t>(sizes.blocks(padded_rows(sizes)));
  auto* const statistics = scratch.take<device::Bytes8>(count);
  const auto arguments = [&]<class T>() {
    return Backward<T>{data_of<T>(dq), data_of<T>(dk), data_of<T>(dv), data_of<T>(dout), data_of<T>(out), data_of<float>(lse),
                       data_of<T>(q),  data_of<T>(k),  data_of<T>(v),  statistics,       sizes,           Table(table)};
  };
  if (q.dtype() == DType::float32) {
    attention_backward_by_rows(launch, arguments.template operator()<float>());
  } else if (!fits_tiles(q.type)) {
    attention_backward_by_rows(launch, arguments.template operator()<bf16>());
  } else {
    dispatch_width(sizes.d, [&]<int kD>() { backward_by_tiles<kD>(launch, arguments.template operator()<bf16>()); });
  }
}

std::size_t attention_backward_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  const Sizes sizes(q, k, sequence_length);
  return ScratchAllocator::aligned_bytes<device::Bytes8>(static_cast<std::size_t>(sizes.blocks(padded_rows(sizes))));
}

}  // namespace attamba::kernels::cuda
