// Gradients of attention (attention.cu), with P recomputed from lse:
//
//   delta = rowsum(dout * out);  dS = P * (dout v^T - delta);  dq = dS k / sqrt(d);  dk = dS^T q / sqrt(d);  dv = P^T dout
//
// Every output row has one owner, so sums need no atomics and always have the same order. bfloat16, heads of up to 64:
// 1. Statistics: lse and delta of every query row.
// 2. A block owns 128 tokens: it walks the keys that their query rows see (dq), then the query rows that see them as local keys
//    (dk, dv). Its own rows and keys, most of what is local, are read once for both.
// 3. A block owns a tile of chunk ends and walks the query rows that see them as compact keys; it adds to their rows of dk, dv.
//    How many ends there are is known on the device alone: blocks beyond them have nothing to do.
// For larger heads shared memory does not hold both, and 2. is two launches, of query rows and of local keys.
// Everything else: a warp owns a row (attention_rows.h).
#include "kernels/cuda/attention_backward_tiles.h"
#include "kernels/cuda/attention_rows.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attention_parts;

// ------------------------------------------------------------------------------------------------ statistics
constexpr int kStatisticThreads = 256;
template <int kD>
constexpr int kStatisticRows = kStatisticThreads / (kD / 8);  ///< of a block; a thread takes 16 bytes of a row

template <int kD>
ATTAMBA_KERNEL(kStatisticThreads, 4)
statistics_kernel(const Backward<bf16> a, const int tiles) {
  constexpr int kChunks = kD / 8;
  const Head head(a.sizes, device::block_x() / tiles);
  const int row = device::block_x() % tiles * kStatisticRows<kD> + device::thread_index() / kChunks;
  const int chunk = device::thread_index() % kChunks;
  const bool exists = row < a.sizes.rows;
  float delta = 0;
  if (exists && chunk * 8 < a.sizes.d) {
    const std::int64_t element = head.query_element(a.sizes, row) + chunk * 8;
    const auto out = device::Pack<bf16>::read(a.out + element), dout = device::Pack<bf16>::read(a.dout + element);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      delta += out.value[i] * dout.value[i];
    }
  }
#pragma unroll
  for (int mask = kChunks / 2; mask > 0; mask /= 2) {
    delta += device::shuffle_xor(delta, mask);
  }
  if (chunk == 0 && row < padded_rows(a.sizes)) {
    const float lse = exists ? load(a.lse + head.query(a.sizes, row)) * kLog2E : 0;
    store_statistic(a.statistics + head.index * padded_rows(a.sizes) + row, {lse, delta});
  }
}

// ------------------------------------------------------------------------------------------------ query rows
/// One tile of rows against all the keys that they see before `local_end` and as compact ones, through two stages; `own_keys`
/// adds those that the block has anyway. dq leaves through `dq_tile`, the warp's own 16 rows of shared memory.
template <int kD, int kKeys, int kThreads, class OwnKeys>
ATTAMBA_DEVICE void walk_keys(const Backward<bf16>& a, const Head& head, const KeyTiles<kKeys>& tiles, int warp_row,
                              const OwnQueries<kD>& own, KeyCopier<kD, kKeys, kThreads>& copier, bf16* stages,
                              const OwnKeys& own_keys, float (&dq)[kD / 8][4]) {
  constexpr int kStage = 2 * kKeys * kD;
  WarpKeys keys(a.sizes, a.table, head, false, warp_row);
  const float scale_log2 = a.sizes.scale * kLog2E;
  own_keys(keys);
  for (int tile = 0; tile < tiles.count; ++tile) {
    if (tile + 1 < tiles.count) {
      copier.copy(stages + (tile + 1) % 2 * kStage, a.k, a.v, a.sizes, head);
      device::copy_async_commit();
      copier.look_up(tiles, tile + 2, a.table);
    }
    if (tile == tiles.local_tiles) {
      keys = WarpKeys(a.sizes, a.table, head, true, warp_row);
    }
    const bf16* const k = stages + tile % 2 * kStage;
    add_to_dq<kD, kKeys>(dq, own, k, k + kKeys * kD, tiles.first(tile), keys, scale_log2);
    device::copy_async_wait<0>();
    device::sync_block();
  }
}

template <int kD>
struct QueryPlan {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRows = 16 * kWarps, kKeys = 32;
  static constexpr int kStage = 2 * kKeys * kD;
  static constexpr std::size_t shared_bytes() {
    return device::SharedMemory::bytes_of<bf16>(2 * kRows * kD) + device::SharedMemory::bytes_of<bf16>(2 * kStage) +
           device::SharedMemory::bytes_of<device::Bytes8>(kRows);
  }
};

template <int kD>
ATTAMBA_KERNEL(QueryPlan<kD>::kThreads, 1)
query_tiles_kernel(const Backward<bf16> a, const int tiles) {
  using Plan = QueryPlan<kD>;
  const Head head(a.sizes, device::block_x() / tiles);
  const int first_row = (tiles - 1 - device::block_x() % tiles) * Plan::kRows;
  const int last_row = (first_row + Plan::kRows < a.sizes.rows ? first_row + Plan::kRows : a.sizes.rows) - 1;
  device::SharedMemory shared;
  bf16* const q_tile = shared.take<bf16>(2 * Plan::kRows * kD);
  bf16* const dout_tile = q_tile + Plan::kRows * kD;
  bf16* const stages = shared.take<bf16>(2 * Plan::kStage);
  device::Bytes8* const statistics = shared.take<device::Bytes8>(Plan::kRows);

  const auto place_of = [&](int, int row) { return place_of_row(a.sizes, head, first_row + row, last_row + 1); };
  copy_rows<kD, Plan::kRows, Plan::kThreads>(q_tile, a.q, a.sizes.d, place_of);
  copy_rows<kD, Plan::kRows, Plan::kThreads>(dout_tile, a.dout, a.sizes.d, place_of);
  copy_statistics<Plan::kRows>(statistics, a, head, first_row, last_row + 1);
  const int last_token = head.token(a.sizes, last_row);
  const KeyTiles<Plan::kKeys> keys(a.table, head.token(a.sizes, first_row), last_token, last_token + 1);
  KeyCopier<kD, Plan::kKeys, Plan::kThreads> copier;
  copier.look_up(keys, 0, a.table);
  copier.copy(stages, a.k, a.v, a.sizes, head);
  device::copy_async_commit();
  copier.look_up(keys, 1, a.table);

  const int own = 16 * device::warp_index();
  device::copy_async_wait<0>();
  device::sync_block();
  const OwnQueries<kD> queries(q_tile + own * kD, dout_tile + own * kD, statistics + own);
  float dq[kD / 8][4] = {};
  walk_keys<kD>(
      a, head, keys, first_row + own, queries, copier, stages, [](const WarpKeys&) {}, dq);
  write_rows<kD>(a.dq, q_tile + own * kD, dq, a.sizes.scale, a.sizes.scale, a.sizes.d,
                 [&](int row) { return place_of_row(a.sizes, head, first_row + own + row, a.sizes.rows); });
}

// ------------------------------------------------------------------------------------------------ keys
template <int kD>
struct KeyPlan {
  static constexpr int kWarps = kD <= 64 ? 8 : 4, kThreads = kWarps * kWarp, kKeys = 16 * kWarps;
  static constexpr int kRows = kD <= 64 ? 64 : 32;  ///< query rows of a tile
  static constexpr bool kKeepKeys = kD <= 64;       ///< in registers, as A operands
  using Stages = RowStages<kD, kRows, kThreads>;
  static constexpr std::size_t shared_bytes() {
    return device::SharedMemory::bytes_of<bf16>(2 * kKeys * kD) + device::SharedMemory::bytes_of<bf16>(2 * Stages::kStage) +
           device::SharedMemory::bytes_of<device::Bytes8>(2 * kRows) + device::SharedMemory::bytes_of<int>(2 * kKeys);
  }
};

/// Where the rows begin and end that see each of `count` keys from own_first on, into lists for WarpRows.
template <int kThreads>
ATTAMBA_DEVICE void list_rows(int* begins, int* ends, const Backward<bf16>& a, const Head& head, bool compact, int own_first,
                              int count) {
  for (int key = device::thread_index(); key < count; key += kThreads) {
    const Range rows = rows_seeing(a.sizes, a.table, head, compact, own_first + key);
    store(begins + key, rows.begin);
    store(ends + key, rows.end);
  }
}

template <int kD>
ATTAMBA_KERNEL(KeyPlan<kD>::kThreads, 1)
key_tiles_kernel(const Backward<bf16> a, const bool compact, const int tiles) {
  using Plan = KeyPlan<kD>;
  // The local keys' launch starts with the heads that the queries' launch ended with: their rows are still in cache.
  const int heads = a.sizes.sequences * a.sizes.kv_heads, index = device::block_x() / tiles;
  const Head head(a.sizes, compact ? index : heads - 1 - index);
  const int own_first = head.first_token + device::block_x() % tiles * Plan::kKeys;
  const int own_end = compact ? load(a.table.key_end + head.first_token + a.sizes.n - 1) : head.first_token + a.sizes.n;
  const int count = own_end - own_first < Plan::kKeys ? own_end - own_first : Plan::kKeys;
  if (count <= 0) {
    return;
  }
  device::SharedMemory shared;
  bf16* const k_tile = shared.take<bf16>(2 * Plan::kKeys * kD);
  bf16* const v_tile = k_tile + Plan::kKeys * kD;
  bf16* const stages = shared.take<bf16>(2 * Plan::Stages::kStage);
  device::Bytes8* const stage_statistics = shared.take<device::Bytes8>(2 * Plan::kRows);
  int* const begins = shared.take<int>(2 * Plan::kKeys);
  int* const ends = begins + Plan::kKeys;

  const auto place_of_key = [&](int key) {
    const int which = own_first + (key < count ? key : 0);
    return Place{head.key_element(a.sizes, compact ? load(a.table.ends + which) : which), key < count};
  };
  copy_rows<kD, Plan::kKeys, Plan::kThreads>(k_tile, a.k, a.sizes.d, [&](int, int row) { return place_of_key(row); });
  copy_rows<kD, Plan::kKeys, Plan::kThreads>(v_tile, a.v, a.sizes.d, [&](int, int row) { return place_of_key(row); });
  list_rows<Plan::kThreads>(begins, ends, a, head, compact, own_first, count);
  device::sync_block();
  const typename Plan::Stages queries{stages, stage_statistics, load(begins) / 2 * 2, load(ends + count - 1)};
  queries.copy(a, head, 0);
  device::copy_async_wait<0>();
  device::sync_block();

  const int own = 16 * device::warp_index();
  OwnRows<kD, Plan::kKeepKeys> k(k_tile + own * kD), v(v_tile + own * kD);
  float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
  queries.add_to(dk, dv, k, v, a, head, WarpRows(begins + own, ends + own, count - own));
  const auto place_of_own = [&](int row) { return place_of_key(own + row); };
  if (compact) {
    add_rows_to<kD>(a.dk, dk, a.sizes.scale, a.sizes.d, place_of_own);
    add_rows_to<kD>(a.dv, dv, 1, a.sizes.d, place_of_own);
  } else {
    write_rows<kD>(a.dk, k_tile + own * kD, dk, a.sizes.scale, a.sizes.scale, a.sizes.d, place_of_own);
    write_rows<kD>(a.dv, v_tile + own * kD, dv, 1, 1, a.sizes.d, place_of_own);
  }
}

// ------------------------------------------------------------------------------------------------ both of a block of tokens
template <int kD>
struct TokenPlan {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kTokens = 16 * kWarps, kStep = 64;
  using Stages = RowStages<kD, kStep, kThreads>;
  /// At d = 64 all that sm_86 has: 99 KiB.
  static constexpr std::size_t shared_bytes() {
    return 2 * device::SharedMemory::bytes_of<bf16>(2 * kTokens * kD) +
           device::SharedMemory::bytes_of<bf16>(2 * Stages::kStage) + device::SharedMemory::bytes_of<device::Bytes8>(kTokens) +
           device::SharedMemory::bytes_of<device::Bytes8>(2 * kStep) + device::SharedMemory::bytes_of<int>(2 * kTokens);
  }
};

/// A block's shared memory and its tokens.
template <int kD>
struct TokenTile {
  using Plan = TokenPlan<kD>;
  bf16 *q, *k, *stages;  ///< [2, kTokens, kD] q and dout of as many rows; k and v
  device::Bytes8 *statistics, *stage_statistics;
  int *begins, *ends;
  int first, count;        ///< tokens, as rows of the batch
  int first_row, end_row;  ///< their query rows

  ATTAMBA_DEVICE TokenTile(const Sizes& sizes, const Head& head, int tile) {
    device::SharedMemory shared;
    q = shared.take<bf16>(2 * Plan::kTokens * kD);
    k = shared.take<bf16>(2 * Plan::kTokens * kD);
    stages = shared.take<bf16>(2 * Plan::Stages::kStage);
    statistics = shared.take<device::Bytes8>(Plan::kTokens);
    stage_statistics = shared.take<device::Bytes8>(2 * Plan::kStep);
    begins = shared.take<int>(2 * Plan::kTokens);
    ends = begins + Plan::kTokens;
    const int left = sizes.n - tile * Plan::kTokens;
    first = head.first_token + tile * Plan::kTokens;
    count = left < Plan::kTokens ? left : Plan::kTokens;
    first_row = tile * Plan::kTokens * sizes.group;
    end_row = first_row + count * sizes.group;
  }
};

/// dq of the query rows from `part` on, as many as there are tokens.
template <int kD>
ATTAMBA_DEVICE void token_queries(const Backward<bf16>& a, const Head& head, const TokenTile<kD>& t, int part) {
  using Plan = TokenPlan<kD>;
  const int end = part + Plan::kTokens < t.end_row ? part + Plan::kTokens : t.end_row;
  const auto place_of = [&](int, int row) { return place_of_row(a.sizes, head, part + row, end); };
  copy_rows<kD, Plan::kTokens, Plan::kThreads>(t.q, a.q, a.sizes.d, place_of);
  copy_rows<kD, Plan::kTokens, Plan::kThreads>(t.q + Plan::kTokens * kD, a.dout, a.sizes.d, place_of);
  copy_statistics<Plan::kTokens>(t.statistics, a, head, part, end);
  const KeyTiles<Plan::kStep> keys(a.table, head.token(a.sizes, part), head.token(a.sizes, end - 1), t.first);
  KeyCopier<kD, Plan::kStep, Plan::kThreads> copier;
  copier.look_up(keys, 0, a.table);
  copier.copy(t.stages, a.k, a.v, a.sizes, head);
  device::copy_async_commit();
  copier.look_up(keys, 1, a.table);
  device::copy_async_wait<0>();
  device::sync_block();

  const int own = 16 * device::warp_index();
  const OwnQueries<kD> queries(t.q + own * kD, t.q + (Plan::kTokens + own) * kD, t.statistics + own);
  float dq[kD / 8][4] = {};
  walk_keys<kD>(
      a, head, keys, part + own, queries, copier, t.stages,
      [&](const WarpKeys& local) {
        add_to_dq<kD, Plan::kTokens>(dq, queries, t.k, t.k + Plan::kTokens * kD, t.first, local, a.sizes.scale * kLog2E);
      },
      dq);
  static_assert(Plan::kTokens * kD <= Plan::Stages::kStage);
  write_rows<kD>(a.dq, t.stages + Plan::Stages::kStage + own * kD, dq, a.sizes.scale, a.sizes.scale, a.sizes.d,
                 [&](int row) { return place_of_row(a.sizes, head, part + own + row, end); });
}

template <int kD>
ATTAMBA_KERNEL(TokenPlan<kD>::kThreads, 1)
token_tiles_kernel(const Backward<bf16> a, const int tiles) {
  using Plan = TokenPlan<kD>;
  const Head head(a.sizes, device::block_x() / tiles);
  // Late tokens see the most compact keys: they start first, so that blocks finish together.
  const TokenTile<kD> t(a.sizes, head, tiles - 1 - device::block_x() % tiles);
  const auto place_of_key = [&](int key) {
    return Place{head.key_element(a.sizes, t.first + (key < t.count ? key : 0)), key < t.count};
  };
  copy_rows<kD, Plan::kTokens, Plan::kThreads>(t.k, a.k, a.sizes.d, [&](int, int row) { return place_of_key(row); });
  copy_rows<kD, Plan::kTokens, Plan::kThreads>(t.k + Plan::kTokens * kD, a.v, a.sizes.d,
                                               [&](int, int row) { return place_of_key(row); });
  list_rows<Plan::kThreads>(t.begins, t.ends, a, head, false, t.first, t.count);
  for (int part = t.first_row; part < t.end_row; part += Plan::kTokens) {
    if (part != t.first_row) {
      device::sync_block();  // the rows before have left, and their stage
    }
    token_queries<kD>(a, head, t, part);
  }
  // A token's rows are all there where it has one; the others come again.
  const int resident = a.sizes.group == 1 ? Plan::kTokens : 0, own = 16 * device::warp_index();
  const typename Plan::Stages queries{t.stages, t.stage_statistics, t.first_row + resident, load(t.ends + t.count - 1)};
  queries.copy(a, head, 0);
  OwnRows<kD, true> k(t.k + own * kD), v(t.k + (Plan::kTokens + own) * kD);
  const WarpRows rows(t.begins + own, t.ends + own, t.count - own);
  float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
  if (resident != 0) {
    add_to_dk_dv<kD, true, Plan::kTokens>(dk, dv, k, v, t.q, t.statistics, t.first_row, rows, a.sizes.scale * kLog2E);
  }
  device::copy_async_wait<0>();
  device::sync_block();
  queries.add_to(dk, dv, k, v, a, head, rows);
  const auto place_of_own = [&](int row) { return place_of_key(own + row); };
  write_rows<kD>(a.dk, t.k + own * kD, dk, a.sizes.scale, a.sizes.scale, a.sizes.d, place_of_own);
  write_rows<kD>(a.dv, t.k + (Plan::kTokens + own) * kD, dv, 1, 1, a.sizes.d, place_of_own);
}

template <int kD>
void backward_by_tiles(const Launch& launch, const Backward<bf16>& arguments) {
  const Sizes& sizes = arguments.sizes;
  const auto tiles_of = [](std::int64_t count, int size) { return static_cast<int>((count + size - 1) / size); };
  const int statistic_tiles = tiles_of(padded_rows(sizes), kStatisticRows<kD>);
  launch_kernel("attention_backward: statistics", &statistics_kernel<kD>, launch,
                {.x = sizes.blocks(statistic_tiles), .threads = kStatisticThreads}, arguments, statistic_tiles);
  using Keys = KeyPlan<kD>;
  const int key_tiles = tiles_of(sizes.n, Keys::kKeys);
  const Grid grid = {.x = sizes.blocks(key_tiles), .threads = Keys::kThreads, .shared_bytes = Keys::shared_bytes()};
  if constexpr (kD <= 64) {
    using Tokens = TokenPlan<kD>;
    const int tiles = tiles_of(sizes.n, Tokens::kTokens);
    launch_kernel("attention_backward: tokens", &token_tiles_kernel<kD>, launch,
                  {.x = sizes.blocks(tiles), .threads = Tokens::kThreads, .shared_bytes = Tokens::shared_bytes()}, arguments,
                  tiles);
  } else {
    using Queries = QueryPlan<kD>;
    const int tiles = tiles_of(sizes.rows, Queries::kRows);
    launch_kernel("attention_backward: queries", &query_tiles_kernel<kD>, launch,
                  {.x = sizes.blocks(tiles), .threads = Queries::kThreads, .shared_bytes = Queries::shared_bytes()}, arguments,
                  tiles);
    launch_kernel("attention_backward: local keys", &key_tiles_kernel<kD>, launch, grid, arguments, false, key_tiles);
  }
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
    return Backward<T>{elements_of<T>(dq),
                       elements_of<T>(dk),
                       elements_of<T>(dv),
                       elements_of<T>(dout),
                       elements_of<T>(out),
                       elements_of<float>(lse),
                       elements_of<T>(q),
                       elements_of<T>(k),
                       elements_of<T>(v),
                       statistics,
                       sizes,
                       Table(table)};
  };
  if (fits_tiles(q.type)) {
    dispatch_width(sizes.d, [&]<int kD>() { backward_by_tiles<kD>(launch, arguments.template operator()<bf16>()); });
  } else {
    dispatch_compute(q.dtype(), "attention_backward",
                     [&]<class T>() { attention_backward_by_rows(launch, arguments.template operator()<T>()); });
  }
}

std::size_t attention_backward_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  const Sizes sizes(q, k, sequence_length);
  return ScratchAllocator::aligned_bytes<device::Bytes8>(static_cast<std::size_t>(sizes.blocks(padded_rows(sizes))));
}

}  // namespace attamba::kernels::cuda
