// Attention in plain arithmetic, for float32 and for head sizes that tensor core tiles do not hold: a warp owns a row. Each
// lane takes one of 32 keys (or query rows) through the dot products, then some of the columns through the sums.
#pragma once

#include <limits>

#include "kernels/cuda/attention_places.h"

namespace attamba::kernels::cuda::attention_parts {

struct RowPlan {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kColumns = kMaxHeadSize / kWarp;
  /// Floats of shared memory of each warp: two rows of d, and two values of each lane.
  static int floats(const Sizes& sizes) { return 2 * sizes.d + 2 * kWarp; }
  static std::int64_t blocks(std::int64_t rows) { return (rows + kWarps - 1) / kWarps; }
  static std::size_t shared_bytes(const Sizes& sizes) { return device::SharedMemory::bytes_of<float>(kWarps * floats(sizes)); }
};

/// A warp's own shared memory.
struct RowMemory {
  float *row[2], *lanes[2];

  ATTAMBA_DEVICE explicit RowMemory(const Sizes& sizes) {
    device::SharedMemory shared;
    const int floats = 2 * sizes.d + 2 * kWarp;
    float* const own = shared.take<float>(RowPlan::kWarps * floats) + device::warp_index() * floats;
    row[0] = own;
    row[1] = own + sizes.d;
    lanes[0] = own + 2 * sizes.d;
    lanes[1] = lanes[0] + kWarp;
  }
};

/// to[c] = from[c], c < d, by the whole warp.
template <class T>
ATTAMBA_DEVICE void read_row(float* to, const T* from, int d) {
  for (int c = device::lane_index(); c < d; c += kWarp) {
    store(to + c, device::to_float(load(from + c)));
  }
}

/// Of this lane alone.
template <class T>
ATTAMBA_DEVICE float dot(const float* x, const T* y, int d) {
  float sum = 0;
  for (int c = 0; c < d; ++c) {
    sum = device::fused_multiply_add(load(x + c), device::to_float(load(y + c)), sum);
  }
  return sum;
}

/// sum[i] += factors[j] * row j, at the lane's columns, over j < count; row j begins at element `element_at(j)`.
template <class T, class ElementAt>
ATTAMBA_DEVICE void add_rows(float (&sum)[RowPlan::kColumns], const float* factors, const T* from, int count, int d,
                             const ElementAt& element_at) {
  for (int j = 0; j < count; ++j) {
    const float factor = load(factors + j);
    const T* row = from + element_at(j);
    for (int i = 0; i < RowPlan::kColumns; ++i) {
      const int c = device::lane_index() + i * kWarp;
      if (c < d) {
        sum[i] = device::fused_multiply_add(factor, device::to_float(load(row + c)), sum[i]);
      }
    }
  }
}

template <class T>
ATTAMBA_DEVICE void write_row(T* to, const float (&sum)[RowPlan::kColumns], float factor, int d) {
  for (int i = 0; i < RowPlan::kColumns; ++i) {
    const int c = device::lane_index() + i * kWarp;
    if (c < d) {
      store(to + c, device::from_float<T>(sum[i] * factor));
    }
  }
}

/// The warp's row of the launch; rows of one head follow each other. Warps beyond the last row have none.
struct OwnRow {
  int head, row;
  bool exists;
  ATTAMBA_DEVICE OwnRow(const Sizes& sizes, int rows_of_head) {
    const std::int64_t index = static_cast<std::int64_t>(device::block_x()) * RowPlan::kWarps + device::warp_index();
    head = static_cast<int>(index / rows_of_head);
    row = static_cast<int>(index % rows_of_head);
    exists = head < sizes.sequences * sizes.kv_heads;
  }
};

/// Calls body(compact, first, count) for each up to 32 keys that token t sees.
template <class Body>
ATTAMBA_DEVICE void for_each_keys(const Table& table, int t, const Body& body) {
  for (int compact = 0; compact < 2; ++compact) {
    const Range keys = keys_of(table, compact != 0, t);
    for (int first = keys.begin; first < keys.end; first += kWarp) {
      body(compact != 0, first, keys.end - first < kWarp ? keys.end - first : kWarp);
    }
  }
}

template <class T>
ATTAMBA_KERNEL(RowPlan::kThreads, 1)
attention_rows_kernel(const Forward<T> a) {
  const OwnRow own(a.sizes, a.sizes.rows);
  if (!own.exists) {
    return;
  }
  const RowMemory memory(a.sizes);
  const Head head(a.sizes, own.head);
  const int d = a.sizes.d, lane = device::lane_index();
  const std::int64_t query = head.query(a.sizes, own.row);
  read_row(memory.row[0], a.q + query * d, d);
  device::sync_warp();
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float highest = kNothing, sum = 0, out[RowPlan::kColumns] = {};
  for_each_keys(a.table, head.token(a.sizes, own.row), [&](bool compact, int first, int count) {
    const auto element_at = [&](int j) {
      return head.key_element(a.sizes, compact ? load(a.table.ends + first + j) : first + j);
    };
    const float score = lane < count ? dot(memory.row[0], a.k + element_at(lane), d) * a.sizes.scale : kNothing;
    const float here = device::warp_max(score), raised = here > highest ? here : highest;
    const float rescale = device::exp(highest - raised), p = device::exp(score - raised);
    highest = raised;
    sum = sum * rescale + device::warp_sum(p);
    for (int i = 0; i < RowPlan::kColumns; ++i) {
      out[i] *= rescale;
    }
    device::sync_warp();  // the last keys' readers are done
    store(memory.lanes[0] + lane, p);
    device::sync_warp();
    add_rows(out, memory.lanes[0], a.v, count, d, element_at);
  });
  write_row(a.out + query * d, out, 1 / sum, d);
  if (lane == 0) {
    store(a.lse + query, highest + device::log(sum));
  }
}

/// dq, and the statistics of each query row.
template <class T>
ATTAMBA_KERNEL(RowPlan::kThreads, 1)
attention_query_rows_kernel(const Backward<T> a) {
  const OwnRow own(a.sizes, a.sizes.rows);
  if (!own.exists) {
    return;
  }
  const RowMemory memory(a.sizes);
  const Head head(a.sizes, own.head);
  const int d = a.sizes.d, lane = device::lane_index();
  const std::int64_t query = head.query(a.sizes, own.row);
  read_row(memory.row[0], a.q + query * d, d);
  read_row(memory.row[1], a.dout + query * d, d);
  device::sync_warp();
  float delta = 0, dq[RowPlan::kColumns] = {};
  for (int c = lane; c < d; c += kWarp) {
    delta += load(memory.row[1] + c) * device::to_float(load(a.out + query * d + c));
  }
  delta = device::warp_sum(delta);
  const float lse = load(a.lse + query);
  for_each_keys(a.table, head.token(a.sizes, own.row), [&](bool compact, int first, int count) {
    const auto element_at = [&](int j) {
      return head.key_element(a.sizes, compact ? load(a.table.ends + first + j) : first + j);
    };
    float ds = 0;
    if (lane < count) {
      const std::int64_t element = element_at(lane);
      const float p = device::exp(dot(memory.row[0], a.k + element, d) * a.sizes.scale - lse);
      ds = p * (dot(memory.row[1], a.v + element, d) - delta);
    }
    device::sync_warp();
    store(memory.lanes[0] + lane, ds);
    device::sync_warp();
    add_rows(dq, memory.lanes[0], a.k, count, d, element_at);
  });
  write_row(a.dq + query * d, dq, a.sizes.scale, d);
  if (lane == 0) {
    store_statistic(a.statistics + head.index * padded_rows(a.sizes) + own.row, {lse, delta});
  }
}

/// dk and dv of each key, from all queries that see it, as a local key or as a chunk's end.
template <class T>
ATTAMBA_KERNEL(RowPlan::kThreads, 1)
attention_key_rows_kernel(const Backward<T> a) {
  const OwnRow own(a.sizes, a.sizes.n);
  if (!own.exists) {
    return;
  }
  const RowMemory memory(a.sizes);
  const Head head(a.sizes, own.head);
  const int d = a.sizes.d, lane = device::lane_index(), token = head.first_token + own.row;
  const std::int64_t key = head.key_element(a.sizes, token);
  const device::Bytes8* const statistics = a.statistics + head.index * padded_rows(a.sizes);
  read_row(memory.row[0], a.k + key, d);
  read_row(memory.row[1], a.v + key, d);
  float dk[RowPlan::kColumns] = {}, dv[RowPlan::kColumns] = {};
  const auto add = [&](const Range& rows) {
    for (int first = rows.begin; first < rows.end; first += kWarp) {
      const int count = rows.end - first < kWarp ? rows.end - first : kWarp;
      const auto element_at = [&](int j) { return head.query_element(a.sizes, first + j); };
      float p = 0, ds = 0;
      device::sync_warp();
      if (lane < count) {
        const std::int64_t element = element_at(lane);
        const Statistic statistic = load_statistic(statistics + first + lane);
        p = device::exp(dot(memory.row[0], a.q + element, d) * a.sizes.scale - statistic.lse);
        ds = p * (dot(memory.row[1], a.dout + element, d) - statistic.delta);
      }
      store(memory.lanes[0] + lane, p);
      store(memory.lanes[1] + lane, ds);
      device::sync_warp();
      add_rows(dv, memory.lanes[0], a.dout, count, d, element_at);
      add_rows(dk, memory.lanes[1], a.q, count, d, element_at);
    }
  };
  add(rows_seeing(a.sizes, a.table, head, false, token));
  const int ends = load(a.table.key_end + head.first_token + a.sizes.n - 1);
  const int end = first_above(a.table.ends, head.first_token, ends, token - 1);
  if (end < ends && load(a.table.ends + end) == token) {
    add(rows_seeing(a.sizes, a.table, head, true, end));
  }
  write_row(a.dk + key, dk, a.sizes.scale, d);
  write_row(a.dv + key, dv, 1, d);
}

template <class T>
void attention_by_rows(const Launch& launch, const Forward<T>& arguments) {
  const Sizes& sizes = arguments.sizes;
  launch_kernel("attention", &attention_rows_kernel<T>, launch,
                {.x = RowPlan::blocks(sizes.blocks(sizes.rows)),
                 .threads = RowPlan::kThreads,
                 .shared_bytes = RowPlan::shared_bytes(sizes)},
                arguments);
}

template <class T>
void attention_backward_by_rows(const Launch& launch, const Backward<T>& arguments) {
  const Sizes& sizes = arguments.sizes;
  Grid grid = {.x = RowPlan::blocks(sizes.blocks(sizes.rows)),
               .threads = RowPlan::kThreads,
               .shared_bytes = RowPlan::shared_bytes(sizes)};
  launch_kernel("attention_backward: queries", &attention_query_rows_kernel<T>, launch, grid, arguments);
  grid.x = RowPlan::blocks(sizes.blocks(sizes.n));
  launch_kernel("attention_backward: keys", &attention_key_rows_kernel<T>, launch, grid, arguments);
}

}  // namespace attamba::kernels::cuda::attention_parts
