// Switches of the CPU kernels, for as long as a test needs them.
#pragma once

namespace attamba::kernels::cpu {

/// Sets what `assume` (of gemm.h, matmul_tile.h) switches, which returns what it was, and sets it back at the end.
class Assumed {
 public:
  Assumed(bool (*assume)(bool), bool value) : assume_(assume), before_(assume(value)) {}
  ~Assumed() { assume_(before_); }
  Assumed(const Assumed&) = delete;
  Assumed& operator=(const Assumed&) = delete;

 private:
  bool (*assume_)(bool);
  bool before_;
};

}  // namespace attamba::kernels::cpu
