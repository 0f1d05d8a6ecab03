// Sums of the scan's backward over blocks: gradients of states along a chunk, gradients of weights over all ranges.
#pragma once

#include "kernels/cpu/chunk_scan_plan.h"

namespace attamba::kernels::cpu::scan {

/// Gradients of the entry states: dstates hold what each slot's own block adds; sums them along each chunk, from its end.
template <class A>
void sum_state_gradients(const Geometry& g, const Cut& cut, const WindowScratch<A>& window) {
  constexpr std::int64_t kStripe = 4096;
  const std::int64_t stripes = (g.state_size() + kStripe - 1) / kStripe, per_head = g.state * g.head_pad;
  for_tasks(cut.slots < 2 ? 0 : stripes, stripes, [&](std::int64_t stripe, std::int64_t) {
    const std::int64_t end = std::min(g.state_size(), (stripe + 1) * kStripe);
    for (std::int64_t slot = cut.slots - 2; slot >= 0; --slot) {
      if (window.blocks[window.slot_blocks[slot]].carry_out < 0) {
        continue;
      }
      A* gradient = window.dstates + slot * g.state_size();
      const A* next = gradient + g.state_size();
      for (std::int64_t i = stripe * kStripe; i < end;) {
        const std::int64_t h = i / per_head, stop = std::min(end, (h + 1) * per_head);
        const A decay = window.decays[(slot + 1) * g.heads + h];
#pragma omp simd
        for (std::int64_t j = i; j < stop; ++j) {
          gradient[j] += decay * next[j];
        }
        i = stop;
      }
    }
  });
}

/// gradients += the partial sums, in the order of the ranges.
template <class A>
void add_partials(const Geometry& g, const ScanWeights& gradients, A* partials, std::int64_t ranges) {
  constexpr std::int64_t kStripe = 512;
  const std::int64_t size = Partial<A>::size(g);
  for_tasks((size + kStripe - 1) / kStripe, (size + kStripe - 1) / kStripe, [&](std::int64_t stripe, std::int64_t) {
    const std::int64_t begin = stripe * kStripe, end = std::min(size, begin + kStripe);
    for (std::int64_t range = 1; range < ranges; ++range) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) {
        partials[i] += partials[range * size + i];
      }
    }
  });
  const Partial<A> total(partials, g);
  if (g.conv > 0) {
    A* conv = gradients.conv.as<A>();
    for_channels(g, true, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
      for (std::int64_t c = 0; c < count; ++c) {
        for (std::int64_t tap = 0; tap < g.conv; ++tap) {
          conv[(from - g.hidden + c) * g.conv + tap] += total.conv[tap * g.columns + to + c];
        }
      }
    });
  }
  for_hidden(g, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
    for (std::int64_t c = 0; c < count; ++c) {
      gradients.norm.as<A>()[from + c] += total.norm[to + c];
    }
  });
  for (std::int64_t h = 0; h < g.heads; ++h) {
    gradients.a_log.as<A>()[h] += total.a_log[h];
    gradients.d_skip.as<A>()[h] += total.d_skip[h];
    if (gradients.dt_bias) {
      gradients.dt_bias.as<A>()[h] += total.dt_bias[h];
    }
  }
}

}  // namespace attamba::kernels::cpu::scan
