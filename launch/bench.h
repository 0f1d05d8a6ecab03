// The parts of `attamba bench` that have a file of their own.
#pragma once

#include <CLI/App.hpp>

namespace attamba {

void add_bench_matmul_command(CLI::App& bench);  ///< bench_matmul.cpp: our matrix products against the library alone

}  // namespace attamba
