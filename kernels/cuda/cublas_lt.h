// cuBLASLt, loaded when it is first needed: the library is half a gigabyte, and a program that computes on the CPU does
// without.
#pragma once

#include <cublasLt.h>

#include <string>

namespace attamba::kernels::cuda {

/// The functions of cuBLASLt that products use.
struct CublasLt {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulAlgoCheck) algorithm_check;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtGetStatusString) status_string;
  cublasLtHandle_t handle = nullptr;
};

/// Throws Error that says where it looked when the library is not there.
const CublasLt& cublas_lt();

}  // namespace attamba::kernels::cuda
