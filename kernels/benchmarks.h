// What benchmarks compare our kernels with; nothing that trains includes this.
#pragma once

#include <functional>

#include "src/core/tensor.h"

namespace attamba::kernels::cpu {

/// The type of the operands that the matrix library multiplies here for products of `dtype`: float32 instead of bfloat16 on
/// processors without bfloat16 products, otherwise `dtype` itself.
DType library_operand_type(DType dtype);

/// "OpenBLAS 0.3.21 (Zen)", "oneDNN 2.6.3 (amx)": the library for products of this type, whether or not training uses it here.
const char* library_name(DType dtype);

/// The product that `matmul` computes (out = op(a) op(b), or out += ... when `accumulate`) as one plain call of the matrix
/// library with thread_count() threads of its own, and none of our tiling. Operands are of a type that library_operand_type
/// returns; the memory must outlive the function. Must not be called inside a parallel region.
std::function<void()> library_matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
                                     bool accumulate);

}  // namespace attamba::kernels::cpu
