// Private to the CPU kernels: tiles as oneDNN primitives. Used for bfloat16 where the processor multiplies it (AMX,
// AVX512-BF16); float32 works too, which is how the same code is tested on any machine.
#pragma once

#include <cstddef>

#include "kernels/cpu/matmul_tile.h"

namespace attamba::kernels::cpu {

/// "amx", "avx512_bf16" or "": what bfloat16 products would run on, by the processor and the limits that oneDNN was given
/// (ONEDNN_MAX_CPU_ISA).
const char* onednn_bfloat16_isa();
/// Scratch of one run of this tile; 0 when oneDNN refuses it. Builds the primitive when it is not cached yet.
std::size_t onednn_scratch_bytes(const TileProduct& tile);
/// False, with c untouched, when oneDNN refuses the tile. One-threaded, and safe to call from many threads at once.
bool run_onednn_tile(const TileProduct& tile, void* c, const void* a, const void* b, std::byte* scratch);

}  // namespace attamba::kernels::cpu
