# The GPU backend, where the CUDA toolkit is. Without it the same sources build the CPU program.
#
#   ATTAMBA_CUDA            AUTO (when nvcc is found), ON (an error when it is not) or OFF
#   CMAKE_CUDA_ARCHITECTURES  GPUs to build for; one makes the build quicker
set(ATTAMBA_CUDA AUTO CACHE STRING "Build the GPU backend: AUTO, ON or OFF")
set(ATTAMBA_CUDA_FOUND OFF)

if(ATTAMBA_CUDA)
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
    set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 90a-real 100-real)
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit 12.4)
    if(CUDAToolkit_FOUND)
      set(ATTAMBA_CUDA_FOUND ON)
    endif()
  endif()
  if(NOT ATTAMBA_CUDA_FOUND AND ATTAMBA_CUDA STREQUAL ON)
    message(FATAL_ERROR "ATTAMBA_CUDA is ON, but no CUDA toolkit of version 12.4 or newer was found; put nvcc in PATH")
  endif()
endif()

if(ATTAMBA_CUDA_FOUND)
  # CMake before 3.26 does not know nvcc's flag for C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  if(CCACHE_PROGRAM)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  endif()
  string(REGEX REPLACE "[^0-9;]" "" numbers "${CMAKE_CUDA_ARCHITECTURES}")
  string(REPLACE ";" ", " ATTAMBA_ARCHITECTURE_LIST "${numbers}")
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/generated/kernels/cuda/architectures.h CONTENT
"// Made by CMake: the GPU architectures that kernels are compiled for, 90 for sm_90a.
#pragma once

namespace attamba::kernels::cuda {
inline constexpr int kArchitectures[] = {@ATTAMBA_ARCHITECTURE_LIST@};
}
" @ONLY)
endif()

# attamba_cuda: kernels for GPUs, and the host's side of running them.
function(attamba_cuda_library)
  file(GLOB kernel_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/kernels/cuda/*.cu)
  file(GLOB host_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/kernels/cuda/*.cpp)
  # Kernels are a library of their own: nvcc takes other flags than the host's compiler.
  add_library(attamba_cuda_kernels OBJECT ${kernel_sources})
  target_include_directories(attamba_cuda_kernels PRIVATE ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR}/generated)
  target_compile_options(attamba_cuda_kernels PRIVATE --expt-relaxed-constexpr -lineinfo -Xcompiler=-Wall,-Wextra)
  # A kernel that spills registers or keeps arrays in local memory does not build: launch bounds are budgets.
  target_compile_options(attamba_cuda_kernels PRIVATE -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error)
  # The checks of tests/cuda read machine code as it is.
  target_compile_options(attamba_cuda_kernels PRIVATE --no-compress)
  add_library(attamba_cuda STATIC ${host_sources})
  target_sources(attamba_cuda PRIVATE $<TARGET_OBJECTS:attamba_cuda_kernels>)
  target_link_libraries(attamba_cuda PUBLIC attamba_options attamba_kernels CUDA::cudart_static ${CMAKE_DL_LIBS})
endfunction()

# attamba_nccl: ranks with a GPU each. Only NCCL's header is needed here; the library is loaded when it is used.
function(attamba_nccl_library)
  find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
  if(NOT NCCL_INCLUDE_DIR)
    message(STATUS "nccl.h was not found: several GPUs can only be used with train.transport = staged")
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/comm/nccl/*.cpp)
  add_library(attamba_nccl STATIC ${sources})
  target_include_directories(attamba_nccl SYSTEM PRIVATE ${NCCL_INCLUDE_DIR})
  target_link_libraries(attamba_nccl PUBLIC attamba_options attamba_comm CUDA::cudart_static ${CMAKE_DL_LIBS})
endfunction()
