#include "kernels/cpu/matmul_onednn.h"

#include <array>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

namespace attamba::kernels::cpu {
namespace {

/// A primitive works with the number of threads it was made for: one, whoever calls.
class OneThread {
 public:
  OneThread() : threads_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(threads_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int threads_;
};

dnnl::engine& cpu_engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::memory::data_type data_type(DType type) {
  return type == DType::bfloat16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

dnnl::memory::desc describe(DType type, std::int64_t rows, std::int64_t columns, std::int64_t stride, bool transposed) {
  const dnnl::memory::dims strides = transposed ? dnnl::memory::dims{1, stride} : dnnl::memory::dims{stride, 1};
  return {{rows, columns}, data_type(type), strides};
}

struct Primitive {
  dnnl::memory::desc source, weights, destination, scratchpad;
  dnnl::matmul run;

  explicit Primitive(const dnnl::matmul::primitive_desc& from)
      : source(from.src_desc()),
        weights(from.weights_desc()),
        destination(from.dst_desc()),
        scratchpad(from.scratchpad_desc()),
        run(from) {}
};

/// A tensor as a primitive takes it, through the library's C interface: that of C++ allocates with every call.
struct Argument {
  dnnl_memory_t memory = nullptr;

  Argument(const dnnl::memory::desc& type, const void* data) {
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_create(&memory, type.get(), cpu_engine().get(), const_cast<void*>(data));
#else
    dnnl_memory_create(&memory, &type.data, cpu_engine().get(), const_cast<void*>(data));
#endif
  }
  ~Argument() {
    dnnl_memory_destroy(memory);
  }
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
};

std::shared_ptr<const Primitive> make_primitive(const TileProduct& tile) {
  const OneThread guard;
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (tile.accumulate) {
    dnnl::post_ops operations;
    operations.append_sum(1.0f);
    attributes.set_post_ops(operations);
  }
  const dnnl::matmul::desc product(describe(tile.input, tile.m, tile.k, tile.a_stride, tile.transpose_a),
                                   describe(tile.input, tile.k, tile.n, tile.b_stride, tile.transpose_b),
                                   describe(tile.output, tile.m, tile.n, tile.c_stride, false));
  try {
    return std::make_shared<const Primitive>(dnnl::matmul::primitive_desc(product, attributes, cpu_engine()));
  } catch (const dnnl::error&) {
    return nullptr;  // no implementation for this processor: remembered, and done by conversion instead
  }
}

/// Every tile shape that was asked for, with its primitive (null: refused).
std::shared_ptr<const Primitive> cached_primitive(const TileProduct& tile) {
  static std::shared_mutex mutex;
  static std::map<TileProduct, std::shared_ptr<const Primitive>> cache;
  {
    const std::shared_lock lock(mutex);
    if (const auto found = cache.find(tile); found != cache.end()) {
      return found->second;
    }
  }
  const std::unique_lock lock(mutex);
  auto [entry, inserted] = cache.try_emplace(tile);
  if (inserted) {
    entry->second = make_primitive(tile);
  }
  return entry->second;
}

}  // namespace

const char* onednn_bfloat16_isa() {
  const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const auto has = [isa](dnnl::cpu_isa wanted) {
    return (isa & static_cast<unsigned>(wanted)) == static_cast<unsigned>(wanted);
  };
  return has(dnnl::cpu_isa::avx512_core_amx) ? "amx" : has(dnnl::cpu_isa::avx512_core_bf16) ? "avx512_bf16" : "";
}

std::size_t onednn_scratch_bytes(const TileProduct& tile) {
  const auto primitive = cached_primitive(tile);
  return primitive == nullptr ? 0 : primitive->scratchpad.get_size();
}

bool run_onednn_tile(const TileProduct& tile, void* c, const void* a, const void* b, std::byte* scratch) {
  const auto primitive = cached_primitive(tile);
  if (primitive == nullptr) {
    return false;
  }
  const OneThread guard;
  thread_local dnnl::stream stream(cpu_engine());
  const Argument source(primitive->source, a), weights(primitive->weights, b), destination(primitive->destination, c),
      scratchpad(primitive->scratchpad, scratch);
  const std::array<dnnl_exec_arg_t, 4> arguments{{{DNNL_ARG_SRC, source.memory},
                                                  {DNNL_ARG_WEIGHTS, weights.memory},
                                                  {DNNL_ARG_DST, destination.memory},
                                                  {DNNL_ARG_SCRATCHPAD, scratchpad.memory}}};
  return source.memory != nullptr && weights.memory != nullptr && destination.memory != nullptr &&
         scratchpad.memory != nullptr &&
         dnnl_primitive_execute(primitive->run.get(), stream.get(), static_cast<int>(arguments.size()), arguments.data()) ==
             dnnl_success &&
         dnnl_stream_wait(stream.get()) == dnnl_success;
}

}  // namespace attamba::kernels::cpu
