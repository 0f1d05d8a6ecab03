// What the matrix libraries are called and what they reach, outside of our own tiling.
#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <dnnl.hpp>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/cpu/matmul_onednn.h"
#include "kernels/cpu/matmul_tile.h"
#include "kernels/kernels.h"

namespace attamba::kernels {
namespace {

constexpr std::int64_t kPeakExtent = 2048;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Best rate of `product` over about `seconds`, the first run not counted.
template <class Product>
double best_rate(double seconds, const Product& product) {
  product();
  double best = 1e300;
  const double begin = seconds_now();
  do {
    const double start = seconds_now();
    product();
    best = std::min(best, seconds_now() - start);
  } while (seconds_now() - begin < seconds);
  constexpr double kOperations = 2.0 * kPeakExtent * kPeakExtent * kPeakExtent;
  return kOperations / best;
}

template <class T>
double blas_peak(double seconds) {
  constexpr int kExtent = static_cast<int>(kPeakExtent);
  const std::vector<T> a(kPeakExtent * kPeakExtent, T(0.5)), b(a);
  std::vector<T> c(a);
  openblas_set_num_threads(thread_count());
  const double rate = best_rate(seconds, [&] {
    if constexpr (std::is_same_v<T, float>) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kExtent, kExtent, kExtent, 1.0f, a.data(), kExtent, b.data(),
                  kExtent, 0.0f, c.data(), kExtent);
    } else {
      cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kExtent, kExtent, kExtent, 1.0, a.data(), kExtent, b.data(),
                  kExtent, 0.0, c.data(), kExtent);
    }
  });
  openblas_set_num_threads(1);
  return rate;
}

double bfloat16_peak(double seconds) {
  using Memory = dnnl::memory;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const auto matrix = [](Memory::data_type type) {
    return Memory::desc({kPeakExtent, kPeakExtent}, type, Memory::format_tag::ab);
  };
  const auto in = matrix(Memory::data_type::bf16), out = matrix(Memory::data_type::f32);
  const dnnl::matmul product(dnnl::matmul::primitive_desc(dnnl::matmul::desc(in, in, out), engine));
  std::vector<bfloat16> a(kPeakExtent * kPeakExtent, bfloat16(0.5f)), b(a);
  std::vector<float> c(a.size());
  const std::unordered_map<int, Memory> arguments{{DNNL_ARG_SRC, Memory(in, engine, a.data())},
                                                  {DNNL_ARG_WEIGHTS, Memory(in, engine, b.data())},
                                                  {DNNL_ARG_DST, Memory(out, engine, c.data())}};
  return best_rate(seconds, [&] {
    product.execute(stream, arguments);
    stream.wait();
  });
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

double measure_matmul_peak(DType dtype, double seconds) {
  switch (dtype) {
    case DType::float64:
      return blas_peak<double>(seconds);
    case DType::bfloat16:
      return has_native_bfloat16() ? bfloat16_peak(seconds) : blas_peak<float>(seconds);
    case DType::float32:
      return blas_peak<float>(seconds);
    default:
      throw Error(concat("matmul peak: expected a floating-point type, got ", name_of(dtype)));
  }
}

const char* matmul_library(DType dtype) {
  static const std::string blas = blas_name();
  static const std::string native = has_native_bfloat16() ? onednn_name() : blas;
  return dtype == DType::bfloat16 ? native.c_str() : blas.c_str();
}

}  // namespace attamba::kernels
