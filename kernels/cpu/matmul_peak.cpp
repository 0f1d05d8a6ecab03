// What the matrix libraries are called and what they reach, outside of our own tiling.
#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <dnnl.hpp>
#include <string>
#include <type_traits>
#include <unordered_map>

#include "kernels/benchmarks.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/matmul_onednn.h"
#include "kernels/cpu/matmul_tile.h"
#include "kernels/kernels.h"
#include "src/core/storage.h"

namespace attamba::kernels::cpu {
namespace {

constexpr std::int64_t kPeakExtent = 2048;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// The extents of a product as its operands are stored.
struct Extents {
  std::int64_t m, n, k;

  Extents(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b)
      : m(transpose_a ? a.shape().columns() : a.shape().rows()),
        n(transpose_b ? b.shape().rows() : b.shape().columns()),
        k(transpose_a ? a.shape().rows() : a.shape().columns()) {}
};

/// OpenBLAS with all threads for the moment. An OpenBLAS built on OpenMP also sets the number of OpenMP's threads.
class BlasThreads {
 public:
  BlasThreads() : threads_(thread_count()) { openblas_set_num_threads(threads_); }
  ~BlasThreads() {
    openblas_set_num_threads(1);
    omp_set_num_threads(threads_);
  }
  BlasThreads(const BlasThreads&) = delete;
  BlasThreads& operator=(const BlasThreads&) = delete;

 private:
  int threads_;
};

template <class T>
std::function<void()> blas_matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
                                  bool accumulate) {
  const Extents extents(a, b, transpose_a, transpose_b);
  const auto order_a = transpose_a ? CblasTrans : CblasNoTrans, order_b = transpose_b ? CblasTrans : CblasNoTrans;
  const int m = static_cast<int>(extents.m), n = static_cast<int>(extents.n), k = static_cast<int>(extents.k);
  const int a_stride = static_cast<int>(a.shape().columns()), b_stride = static_cast<int>(b.shape().columns());
  return [=, to = out.as<T>(), left = a.as<T>(), right = b.as<T>(), beta = accumulate ? T(1) : T(0)] {
    const BlasThreads threads;
    if constexpr (std::is_same_v<T, float>) {
      cblas_sgemm(CblasRowMajor, order_a, order_b, m, n, k, 1.0f, left, a_stride, right, b_stride, beta, to, n);
    } else {
      cblas_dgemm(CblasRowMajor, order_a, order_b, m, n, k, 1.0, left, a_stride, right, b_stride, beta, to, n);
    }
  };
}

std::function<void()> onednn_matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
                                    bool accumulate) {
  using Memory = dnnl::memory;
  const Extents extents(a, b, transpose_a, transpose_b);
  const auto describe = [](const Tensor& tensor, std::int64_t rows, std::int64_t columns, bool transposed) {
    const std::int64_t stride = tensor.shape().columns();
    return Memory::desc({rows, columns}, tensor.dtype() == DType::bfloat16 ? Memory::data_type::bf16 : Memory::data_type::f32,
                        transposed ? Memory::dims{1, stride} : Memory::dims{stride, 1});
  };
  const auto left = describe(a, extents.m, extents.k, transpose_a), right = describe(b, extents.k, extents.n, transpose_b);
  const auto to = describe(out, extents.m, extents.n, false);
  dnnl::primitive_attr attributes;
  if (accumulate) {
    dnnl::post_ops operations;
    operations.append_sum(1.0f);
    attributes.set_post_ops(operations);
  }
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const dnnl::matmul product(dnnl::matmul::primitive_desc(dnnl::matmul::desc(left, right, to), attributes, engine));
  const std::unordered_map<int, Memory> arguments{{DNNL_ARG_SRC, Memory(left, engine, a.data)},
                                                  {DNNL_ARG_WEIGHTS, Memory(right, engine, b.data)},
                                                  {DNNL_ARG_DST, Memory(to, engine, out.data)}};
  return [product, arguments, stream = dnnl::stream(engine)]() mutable {
    product.execute(stream, arguments);
    stream.wait();
  };
}

std::string blas_name() {
  std::string version(openblas_get_config());  // "OpenBLAS 0.3.21 NO_LAPACKE ..."
  const std::size_t end = version.find(' ', version.find(' ') + 1);
  return version.substr(0, end) + " (" + openblas_get_corename() + ")";
}

std::string onednn_name() {
  const auto* version = dnnl_version();
  return concat("oneDNN ", version->major, ".", version->minor, ".", version->patch, " (", onednn_bfloat16_isa(), ")");
}

}  // namespace

DType library_operand_type(DType dtype) {
  require(dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float64,
          "matmul: expected a floating-point type, got ", name_of(dtype));
  return dtype == DType::bfloat16 && !has_native_bfloat16() ? DType::float32 : dtype;
}

std::function<void()> library_matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b,
                                     bool accumulate) {
  require(a.dtype() == library_operand_type(a.dtype()), "matmul: the library multiplies no ", name_of(a.dtype()), " here");
  const auto make = a.dtype() == DType::float32   ? blas_matmul<float>
                    : a.dtype() == DType::float64 ? blas_matmul<double>
                                                  : onednn_matmul;
  return make(out, a, b, transpose_a, transpose_b, accumulate);
}

double measure_matmul_peak(DType dtype, double seconds) {
  const DType type = library_operand_type(dtype);
  const TensorType operand{type, {kPeakExtent, kPeakExtent}}, result{accumulator_of(type), operand.shape};
  const Memory a(Device::cpu, operand.bytes(), "a benchmark"), b(Device::cpu, operand.bytes(), "a benchmark"),
      c(Device::cpu, result.bytes(), "a benchmark"),
      scratch(Device::cpu, matmul_workspace(result, operand, operand, false, false), "a benchmark");
  const Tensor left{a.data(), operand}, right{b.data(), operand}, out{c.data(), result};
  fill({}, left, 0.5);
  fill({}, right, 0.5);
  const auto library = library_matmul(out, left, right, false, false, false);
  const auto own = [&] { matmul({.scratch = {scratch.data(), scratch.size()}}, out, left, right, false, false, {}); };
  library();
  own();
  double best = 1e300;
  const auto measure = [&](const auto& product) {
    const double start = seconds_now();
    product();
    best = std::min(best, seconds_now() - start);
  };
  const double begin = seconds_now();
  do {
    measure(library);
    measure(own);
  } while (seconds_now() - begin < seconds);
  constexpr double kOperations = 2.0 * kPeakExtent * kPeakExtent * kPeakExtent;
  return kOperations / best;
}

const char* library_name(DType dtype) {
  static const std::string blas = blas_name();
  static const std::string native = has_native_bfloat16() ? onednn_name() : blas;
  return dtype == DType::bfloat16 ? native.c_str() : blas.c_str();
}

const char* matmul_library(DType dtype) {
  const bool own = has_own_gemm() && library_operand_type(dtype) == DType::float32;
  return !own ? library_name(dtype) : gemm_uses_avx512() ? "own kernels for AVX-512" : "own kernels for AVX2";
}

}  // namespace attamba::kernels::cpu
