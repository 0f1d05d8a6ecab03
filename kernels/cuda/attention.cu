// Attention over compact and local keys (kernels::AttentionTable), forward, with online softmax:
//
//   S = q k^T / sqrt(d);  P = exp(S - lse);  out = P v
//
// bfloat16: a block owns 128 query rows (attention_places.h) and walks the tiles of keys that they see, local ones first; a
// warp owns 16 of the rows, and skips the groups of 16 keys that none of them sees. Scores and P never leave registers.
// Everything else: a warp owns a row (attention_rows.h).
#include "kernels/cuda/attention_rows.h"
#include "kernels/cuda/attention_tiles.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attention_parts;

/// Tiles of the forward kernel.
template <int kD>
struct ForwardPlan {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRows = 16 * kWarps, kKeys = 64;
  static constexpr int kBlocks = kD <= 64 ? 2 : 1;  ///< per multiprocessor, by registers
  static constexpr int kStage = 2 * kKeys * kD;     ///< elements of a tile of keys and of values
  static constexpr std::size_t shared_bytes() {
    return device::SharedMemory::bytes_of<bf16>(kRows * kD) + device::SharedMemory::bytes_of<bf16>(2 * kStage);
  }
};

/// Scores start here, so that differences are finite even while a row has seen no key yet.
constexpr float kNoScore = -1e30f;
constexpr float kLog2E = 1.4426950408889634f;

/// Softmax over the tiles so far, of this thread's two rows.
template <int kD>
struct Running {
  float highest[2] = {kNoScore, kNoScore};  ///< score, not scaled
  float sum[2] = {0, 0};                    ///< this thread's share
  float out[kD / 8][4] = {};

  /// Takes the tile's highest scores into account; returns through `offset` what to subtract from scaled scores.
  ATTAMBA_DEVICE void raise(const float (&tile_highest)[2], float scale_log2, float (&offset)[2]) {
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float value = tile_highest[r];
#pragma unroll
      for (int mask = 1; mask <= 2; mask *= 2) {
        const float other = device::shuffle_xor(value, mask);
        value = value > other ? value : other;
      }
      value = value > highest[r] ? value : highest[r];
      rescale[r] = device::exp2_fast((highest[r] - value) * scale_log2);
      highest[r] = value;
      offset[r] = value * scale_log2;
      sum[r] *= rescale[r];
    }
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[i][e] *= rescale[e / 2];
      }
    }
  }
};

/// One warp's rows, in `q`, against one tile of keys.
template <int kD, int kKeys>
ATTAMBA_DEVICE void attend(Running<kD>& running, const bf16* q, const bf16* k, const bf16* v, int first, const WarpKeys& keys,
                           float scale_log2) {
  constexpr int kGroups = kKeys / 16;
  constexpr float kMasked = -std::numeric_limits<float>::infinity();
  float s[kGroups][2][4] = {}, highest[2] = {kMasked, kMasked}, offset[2];
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    std::uint32_t a[4];
    load_a<kD>(a, q, 0, step);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (keys.see_any(first + 16 * j, first + 16 * j + 16)) {
        multiply_rows<kD>(s[j], a, k, 16 * j, step);
      }
    }
  }
  const int column = first + device::lane_index() % 4 * 2;
  if (!keys.see_all(first, first + kKeys)) {
#pragma unroll
    for (int c = 0; c < kKeys / 4; ++c) {  // columns of the tile that this thread holds
      const int i = c / 2, key = column + 8 * i + c % 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& score = s[i / 2][i % 2][2 * r + c % 2];
        score = key >= keys.thread[r].begin && key < keys.thread[r].end ? score : kMasked;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float score = s[i / 2][i % 2][e];
      highest[e / 2] = score > highest[e / 2] ? score : highest[e / 2];
    }
  }
  running.raise(highest, scale_log2, offset);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    if (!keys.see_any(first + 16 * j, first + 16 * j + 16)) {
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float p = device::exp2_fast(device::fused_multiply_add(s[j][i][e], scale_log2, -offset[e / 2]));
        running.sum[e / 2] += p;
        s[j][i][e] = p;
      }
    }
    std::uint32_t p[4];
    round_to_a(p, s[j]);
    multiply_columns<kD>(running.out, p, v, 16 * j);
  }
}

template <int kD>
ATTAMBA_KERNEL(ForwardPlan<kD>::kThreads, ForwardPlan<kD>::kBlocks)
attention_tiles_kernel(const Forward<bf16> a, const int tiles) {
  using Plan = ForwardPlan<kD>;
  const Head head(a.sizes, device::block_x() / tiles);
  // Late rows see the most keys: they start first, so that blocks finish together.
  const int first_row = (tiles - 1 - device::block_x() % tiles) * Plan::kRows;
  const int last_row = (first_row + Plan::kRows < a.sizes.rows ? first_row + Plan::kRows : a.sizes.rows) - 1;
  device::SharedMemory shared;
  bf16* const q_tile = shared.take<bf16>(Plan::kRows * kD);
  bf16* const stages = shared.take<bf16>(2 * Plan::kStage);

  copy_rows<kD, Plan::kRows, Plan::kThreads>(
      q_tile, a.q, a.sizes.d, [&](int, int row) { return place_of_row(a.sizes, head, first_row + row, last_row + 1); });
  const int last_token = head.token(a.sizes, last_row);
  const KeyTiles<Plan::kKeys> tiles_of_keys(a.table, head.token(a.sizes, first_row), last_token, last_token + 1);
  KeyCopier<kD, Plan::kKeys, Plan::kThreads> copier;
  copier.look_up(tiles_of_keys, 0, a.table);
  copier.copy(stages, a.k, a.v, a.sizes, head);
  device::copy_async_commit();
  copier.look_up(tiles_of_keys, 1, a.table);

  const int warp_row = first_row + 16 * device::warp_index();
  bf16* const own = q_tile + 16 * device::warp_index() * kD;
  WarpKeys keys(a.sizes, a.table, head, false, warp_row);
  device::copy_async_wait<0>();
  device::sync_block();
  Running<kD> running;
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
    const int first = tiles_of_keys.first(tile);
    if (keys.see_any(first, first + Plan::kKeys)) {
      const bf16* const k = stages + tile % 2 * Plan::kStage;
      attend<kD, Plan::kKeys>(running, own, k, k + Plan::kKeys * kD, first, keys, scale_log2);
    }
    device::copy_async_wait<0>();
    device::sync_block();
  }

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = running.sum[r];
    sum += device::shuffle_xor(sum, 1);
    sum += device::shuffle_xor(sum, 2);
    factor[r] = 1 / sum;
    const int row = warp_row + device::lane_index() / 4 + 8 * r;
    if (device::lane_index() % 4 == 0 && row < a.sizes.rows) {
      store(a.lse + head.query(a.sizes, row), running.highest[r] * a.sizes.scale + device::log(sum));
    }
  }
  write_rows<kD>(a.out, own, running.out, factor[0], factor[1], a.sizes.d,
                 [&](int row) { return place_of_row(a.sizes, head, warp_row + row, a.sizes.rows); });
}

template <class T>
Forward<T> arguments_of(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionTable& table, const Sizes& sizes) {
  return {elements_of<T>(out), elements_of<float>(lse), elements_of<T>(q), elements_of<T>(k), elements_of<T>(v), sizes,
          Table(table)};
}

}  // namespace

void attention(const Launch& launch, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
               const AttentionTable& table, std::int64_t sequence_length) {
  const Sizes sizes(q.type, k.type, sequence_length);
  check_attention(out, lse, q, k, v, table, sequence_length);
  if (!fits_tiles(q.type)) {
    dispatch_compute(q.dtype(), "attention",
                     [&]<class T>() { attention_by_rows(launch, arguments_of<T>(out, lse, q, k, v, table, sizes)); });
    return;
  }
  const Forward<bf16> arguments = arguments_of<bf16>(out, lse, q, k, v, table, sizes);
  dispatch_width(sizes.d, [&]<int kD>() {
    using Plan = ForwardPlan<kD>;
    const int tiles = (sizes.rows + Plan::kRows - 1) / Plan::kRows;
    launch_kernel("attention", &attention_tiles_kernel<kD>, launch,
                  {.x = sizes.blocks(tiles), .threads = Plan::kThreads, .shared_bytes = Plan::shared_bytes()}, arguments,
                  tiles);
  });
}

std::size_t attention_workspace(const TensorType& q, const TensorType& k, std::int64_t sequence_length) {
  Sizes(q, k, sequence_length);
  return 0;
}

}  // namespace attamba::kernels::cuda
