// Shuffles, barriers and matrix functions of a warp; arithmetic.
#include <bit>
#include <cmath>

#include "src/core/dtype.h"
#include "tests/simt/machine.h"

namespace attamba::simt {

void check_row(Thread& thread, const void* row, const Site& site);

namespace {

float upper(std::uint32_t word) {
  return std::bit_cast<float>(word & 0xffff0000u);
}
float lower(std::uint32_t word) {
  return std::bit_cast<float>(word << 16);
}

template <class Source>
void exchange(Warp& warp, Source source) {
  std::uint32_t values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    values[lane] = warp.lanes[static_cast<std::size_t>(source(lane, warp.lanes[static_cast<std::size_t>(lane)].operand))].value;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    warp.lanes[static_cast<std::size_t>(lane)].value = values[lane];
  }
}

/// Eight rows are read at a time; the 32 banks hold eight of them only if no two start in the same 16 of 128 bytes. Rows at one
/// address are one read.
int conflicts(const Warp& warp) {
  int extra = 0;
  for (std::size_t first = 0; first < kWarp; first += 8) {
    int most = 1;
    for (std::size_t i = first; i < first + 8; ++i) {
      int here = 1;
      for (std::size_t j = first; j < i; ++j) {
        const auto a = reinterpret_cast<std::uintptr_t>(warp.lanes[i].row),
                   b = reinterpret_cast<std::uintptr_t>(warp.lanes[j].row);
        here += a != b && a % 128 == b % 128;
      }
      most = std::max(most, here);
    }
    extra += most - 1;
  }
  return extra;
}

void load_matrix(Warp& warp, Thread* lane0, const Site& site, bool transposed) {
  for (std::size_t lane = 0; lane < kWarp; ++lane) {
    check_row(lane0[lane], warp.lanes[lane].row, site);
  }
  for (std::size_t lane = 0; lane < kWarp; ++lane) {
    const std::size_t r = lane / 4, c = lane % 4;
    for (std::size_t i = 0; i < 4; ++i) {
      if (transposed) {
        const auto* first = static_cast<const std::uint16_t*>(warp.lanes[8 * i + 2 * c].row);
        const auto* second = static_cast<const std::uint16_t*>(warp.lanes[8 * i + 2 * c + 1].row);
        warp.lanes[lane].loaded[i] = static_cast<std::uint32_t>(first[r]) | static_cast<std::uint32_t>(second[r]) << 16;
      } else {
        warp.lanes[lane].loaded[i] = static_cast<const std::uint32_t*>(warp.lanes[8 * i + r].row)[c];
      }
    }
  }
  machine.counters().shared_loaded += kWarp * 16;
  ++machine.counters().matrix_loads;
  machine.counters().matrix_load_conflicts += conflicts(warp);
}

/// d = (((d + a_0 b_0) + a_1 b_1) + ...) + a_15 b_15, each sum rounded to float32; products of bfloat16 are exact in it. The
/// hardware adds in another order, and truncates.
void matrix_product(Warp& warp) {
  float a[16][16], b[16][8], d[16][8];
  for (std::size_t lane = 0; lane < kWarp; ++lane) {
    const Lane& x = warp.lanes[lane];
    const std::size_t g = lane / 4, q = 2 * (lane % 4);
    for (std::size_t i = 0; i < 4; ++i) {
      const std::size_t row = g + 8 * (i % 2), column = q + 8 * (i / 2);
      a[row][column] = lower(x.a[i]);
      a[row][column + 1] = upper(x.a[i]);
    }
    for (std::size_t i = 0; i < 2; ++i) {
      b[q + 8 * i][g] = lower(x.b[i]);
      b[q + 8 * i + 1][g] = upper(x.b[i]);
      d[g + 8 * i][q] = x.d[2 * i];
      d[g + 8 * i][q + 1] = x.d[2 * i + 1];
    }
  }
  for (std::size_t row = 0; row < 16; ++row) {
    for (std::size_t k = 0; k < 16; ++k) {
      for (std::size_t column = 0; column < 8; ++column) {
        d[row][column] += a[row][k] * b[k][column];
      }
    }
  }
  for (std::size_t lane = 0; lane < kWarp; ++lane) {
    const std::size_t g = lane / 4, q = 2 * (lane % 4);
    for (std::size_t i = 0; i < 2; ++i) {
      warp.lanes[lane].d[2 * i] = d[g + 8 * i][q];
      warp.lanes[lane].d[2 * i + 1] = d[g + 8 * i][q + 1];
    }
  }
  ++machine.counters().matrix_products;
}

}  // namespace

void compute(WarpFunction function, Warp& warp, Thread* lane0, const Site& site) {
  switch (function) {
    case WarpFunction::shuffle:
      return exchange(warp, [](int, int from) { return from & (kWarp - 1); });
    case WarpFunction::shuffle_xor:
      return exchange(warp, [](int lane, int mask) { return (lane ^ mask) & (kWarp - 1); });
    case WarpFunction::shuffle_up:
      return exchange(warp, [](int lane, int delta) { return lane < delta ? lane : lane - delta; });
    case WarpFunction::shuffle_down:
      return exchange(warp, [](int lane, int delta) { return lane + delta < kWarp ? lane + delta : lane; });
    case WarpFunction::ballot: {
      std::uint32_t set = 0;
      for (std::size_t lane = 0; lane < kWarp; ++lane) {
        set |= warp.lanes[lane].value << lane;
      }
      for (Lane& lane : warp.lanes) {
        lane.value = set;
      }
      return;
    }
    case WarpFunction::sync_warp:
      return;
    case WarpFunction::load_matrix_x4:
      return load_matrix(warp, lane0, site, false);
    case WarpFunction::load_matrix_x4_transposed:
      return load_matrix(warp, lane0, site, true);
    case WarpFunction::mma_16x8x16:
      return matrix_product(warp);
  }
}

}  // namespace attamba::simt

namespace attamba::device {

using simt::machine;
using simt::WarpFunction;

namespace {

std::uint32_t meet(WarpFunction function, Site site, std::uint32_t value, int operand) {
  simt::Thread& thread = machine.current();
  simt::Lane arguments;
  arguments.value = value;
  arguments.operand = operand;
  machine.meet(function, site, arguments);
  return thread.warp->lanes[static_cast<std::size_t>(thread.lane)].value;
}

float meet(WarpFunction function, Site site, float value, int operand) {
  return std::bit_cast<float>(meet(function, site, std::bit_cast<std::uint32_t>(value), operand));
}

void load_matrix(WarpFunction function, Site site, std::uint32_t (&r)[4], const void* row) {
  simt::Lane arguments;
  arguments.loaded = r;
  arguments.row = row;
  machine.meet(function, site, arguments);
}

}  // namespace

float shuffle(float value, int lane, Site site) {
  return meet(WarpFunction::shuffle, site, value, lane);
}
std::uint32_t shuffle(std::uint32_t value, int lane, Site site) {
  return meet(WarpFunction::shuffle, site, value, lane);
}
float shuffle_xor(float value, int mask, Site site) {
  return meet(WarpFunction::shuffle_xor, site, value, mask);
}
std::uint32_t shuffle_xor(std::uint32_t value, int mask, Site site) {
  return meet(WarpFunction::shuffle_xor, site, value, mask);
}
float shuffle_up(float value, int delta, Site site) {
  return meet(WarpFunction::shuffle_up, site, value, delta);
}
float shuffle_down(float value, int delta, Site site) {
  return meet(WarpFunction::shuffle_down, site, value, delta);
}
std::uint32_t ballot(bool predicate, Site site) {
  return meet(WarpFunction::ballot, site, std::uint32_t{predicate}, 0);
}
void sync_warp(Site site) {
  meet(WarpFunction::sync_warp, site, 0u, 0);
}
void sync_block(Site site) {
  machine.sync_block(site);
}

void load_matrix_x4(std::uint32_t (&r)[4], const void* row, Site site) {
  load_matrix(WarpFunction::load_matrix_x4, site, r, row);
}
void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row, Site site) {
  load_matrix(WarpFunction::load_matrix_x4_transposed, site, r, row);
}
void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Site site) {
  simt::Lane arguments;
  arguments.d = d;
  arguments.a = a;
  arguments.b = b;
  machine.meet(WarpFunction::mma_16x8x16, site, arguments);
}

float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
bf16 to_bf16(float x) {
  return {bfloat16(x).bits};
}
std::uint32_t pack_bf16(float low, float high) {
  return static_cast<std::uint32_t>(to_bf16(low).bits) | static_cast<std::uint32_t>(to_bf16(high).bits) << 16;
}
float exp(float x) {
  return std::exp(x);
}
float log(float x) {
  return std::log(x);
}
float expm1(float x) {
  return std::expm1(x);
}
float log1p(float x) {
  return std::log1p(x);
}
float exp2_fast(float x) {
  return std::exp2(x);
}
float rsqrt(float x) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(x)));
}
float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}

}  // namespace attamba::device
