#include "kernels/cuda/cublas_lt.h"

#include <dlfcn.h>

#include <array>

#include "src/core/error.h"

namespace attamba::kernels::cuda {

namespace {

void* open_library() {
  // The loader's own path first (LD_LIBRARY_PATH, ld.so.conf), then where the toolkit is installed.
  const std::string name = concat("libcublasLt.so.", CUBLAS_VER_MAJOR);
  const std::array<std::string, 4> places{name, "/usr/local/cuda/lib64/" + name, "/usr/local/cuda/lib/" + name,
                                          "/usr/lib/x86_64-linux-gnu/" + name};
  for (const std::string& place : places) {
    if (void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      return library;
    }
  }
  throw Error(concat(name, " was not found (", dlerror(),
                     "); install CUDA's cuBLAS of that version and name its folder in LD_LIBRARY_PATH"));
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  require(function != nullptr, "cuBLASLt has no function ", name,
          "; another version than the one this program was built with?");
}

CublasLt load() {
  CublasLt lt{};
  void* library = open_library();
  find(library, "cublasLtCreate", lt.create);
  find(library, "cublasLtMatmul", lt.matmul);
  find(library, "cublasLtMatmulDescCreate", lt.desc_create);
  find(library, "cublasLtMatmulDescDestroy", lt.desc_destroy);
  find(library, "cublasLtMatmulDescSetAttribute", lt.desc_set);
  find(library, "cublasLtMatrixLayoutCreate", lt.layout_create);
  find(library, "cublasLtMatrixLayoutDestroy", lt.layout_destroy);
  find(library, "cublasLtMatmulPreferenceCreate", lt.preference_create);
  find(library, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy);
  find(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set);
  find(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic);
  find(library, "cublasLtMatmulAlgoCheck", lt.algorithm_check);
  find(library, "cublasLtGetVersion", lt.version);
  find(library, "cublasLtGetStatusString", lt.status_string);
  const cublasStatus_t status = lt.create(&lt.handle);
  require(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", lt.status_string(status));
  return lt;
}

}  // namespace

const CublasLt& cublas_lt() {
  static const CublasLt lt = load();
  return lt;
}

}  // namespace attamba::kernels::cuda
