// The CUDA kernels of attention, emulated, against the CPU's in float64, with tables that src/chunking makes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "src/chunking/table.h"
#include "tests/simt/device_tensor.h"
#include "tests/simt/emulator.h"

namespace attamba::simt {
namespace {

using Strategy = std::shared_ptr<const ChunkingStrategy>;

struct Case {
  std::string name;
  std::int64_t sequences = 1, n = 0, heads = 1, kv_heads = 1, d = 64;
  std::int64_t leading = 0;  ///< L; of causal attention: the window, 0 for none
  Strategy strategy = {};    ///< none: causal attention
  std::int64_t layer = 0;
  std::vector<std::int32_t> documents = {};  ///< at which positions documents begin, the same for every sequence
};

Strategy chunks(const char* name, std::int64_t size) {
  return make_chunking(name, size);
}
Strategy ragged(std::vector<std::int32_t> ends) {
  const std::int64_t n = ends.back() + 1;
  return make_explicit_chunking({std::move(ends)}, n);
}

/// A table on the host, and the same in device memory, where unused chunk ends are never written.
struct Tables {
  std::vector<std::int32_t> ends, key_begin, key_end, local_begin, starts, document_starts;
  DeviceTensor device[4];

  explicit Tables(const Case& c) {
    const std::int64_t tokens = c.sequences * c.n;
    for (auto* list : {&ends, &key_begin, &key_end, &local_begin, &starts}) {
      list->assign(static_cast<std::size_t>(tokens), 0);
    }
    for (std::int64_t t = 0; t < tokens && !c.documents.empty(); ++t) {
      document_starts.push_back(*(std::upper_bound(c.documents.begin(), c.documents.end(), t % c.n) - 1));
    }
    const ChunkTable table{ends, key_begin, key_end, local_begin, starts};
    const BatchLayout layout{.sequences = c.sequences, .length = c.n, .document_starts = document_starts, .seed = 5};
    if (c.strategy) {
      fill_chunk_table(table, *c.strategy, c.layer, c.leading, layout);
    } else {
      fill_causal_table(table, c.leading, layout);
    }
    const std::vector<std::int32_t>* lists[] = {&ends, &key_begin, &key_end, &local_begin};
    for (int i = 0; i < 4; ++i) {
      device[i] = DeviceTensor(DType::int32, {tokens});
      for (std::int64_t s = 0; s < c.sequences; ++s) {
        const auto first = static_cast<std::size_t>(s * c.n), last = first + static_cast<std::size_t>(c.n - 1);
        const std::size_t count = i == 0 ? static_cast<std::size_t>(key_end[last]) - first : last + 1 - first;
        copy_to_device(device[i].view<std::int32_t>().data() + first, lists[i]->data() + first, count * sizeof(std::int32_t));
      }
    }
  }
  kernels::AttentionTable on_device() const { return {device[0], device[1], device[2], device[3]}; }
  kernels::AttentionTable on_host() {
    const TensorType type{DType::int32, {static_cast<std::int64_t>(ends.size())}};
    return {{ends.data(), type}, {key_begin.data(), type}, {key_end.data(), type}, {local_begin.data(), type}};
  }
  double average_keys() { return attamba::average_keys({ends, key_begin, key_end, local_begin, starts}); }
};

struct Problem {
  Case c;
  DType dtype;
  Tables table;
  Shape query, key;
  DeviceTensor q, k, v, dout;

  Problem(const Case& shape, DType type)
      : c(shape),
        dtype(type),
        table(shape),
        query{c.sequences * c.n, c.heads, c.d},
        key{c.sequences * c.n, c.kv_heads, c.d},
        q(DeviceTensor::random(type, query, 1)),
        k(DeviceTensor::random(type, key, 2)),
        v(DeviceTensor::random(type, key, 3)),
        dout(DeviceTensor::random(type, query, 4)) {}
};

struct Results {
  DeviceTensor out, lse, dq, dk, dv;
};

Results run(const Problem& p) {
  namespace cuda = kernels::cuda;
  Results r{
      {p.dtype, p.query}, {DType::float32, {p.query[0], p.c.heads}}, {p.dtype, p.query}, {p.dtype, p.key}, {p.dtype, p.key}};
  const TensorType q = p.q.tensor().type, k = p.k.tensor().type;
  cuda::attention(device_launch(cuda::attention_workspace(q, k, p.c.n)), r.out, r.lse, p.q, p.k, p.v, p.table.on_device(),
                  p.c.n);
  cuda::attention_backward(device_launch(cuda::attention_backward_workspace(q, k, p.c.n)), r.dq, r.dk, r.dv, p.dout, r.out,
                           r.lse, p.q, p.k, p.v, p.table.on_device(), p.c.n);
  return r;
}

/// The CPU's results in float64.
struct Expected {
  std::vector<double> out, lse, dq, dk, dv;

  explicit Expected(Problem& p) {
    namespace cpu = kernels::cpu;
    std::vector<double> q = p.q.values(), k = p.k.values(), v = p.v.values(), dout = p.dout.values();
    const auto of = [](std::vector<double>& values, const Shape& shape) {
      values.resize(static_cast<std::size_t>(shape.elements()));
      return Tensor{values.data(), {DType::float64, shape}};
    };
    const Tensor tq = of(q, p.query), tk = of(k, p.key), tv = of(v, p.key), tout = of(out, p.query),
                 tlse = of(lse, {p.query[0], p.c.heads});
    std::vector<std::byte> scratch(std::max(cpu::attention_workspace(tq.type, tk.type, p.c.n),
                                            cpu::attention_backward_workspace(tq.type, tk.type, p.c.n)) +
                                   64);
    const std::size_t shift = 64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64;
    const Launch launch{.scratch = std::span(scratch).subspan(shift)};
    cpu::attention(launch, tout, tlse, tq, tk, tv, p.table.on_host(), p.c.n);
    cpu::attention_backward(launch, of(dq, p.query), of(dk, p.key), of(dv, p.key), of(dout, p.query), tout, tlse, tq, tk, tv,
                            p.table.on_host(), p.c.n);
  }
};

std::vector<Case> cases() {
  return {
      {"one_token", 2, 1, 2, 2, 64, 16, chunks("uniform", 8)},
      {"one_token_own_chunk", 1, 1, 1, 1, 32, 0, chunks("uniform", 8)},
      {"uniform", 2, 200, 2, 2, 64, 16, chunks("uniform", 8)},
      {"uniform_long", 1, 700, 1, 1, 64, 16, chunks("uniform", 4)},
      {"cyclic_own_chunk", 2, 65, 2, 2, 32, 0, chunks("cyclic", 8), 3},
      {"cyclic_grouped", 1, 200, 4, 2, 64, 16, chunks("cyclic", 8), 5},
      {"random_every_sequence_its_own", 3, 130, 2, 1, 64, 5, chunks("random", 8)},
      {"ragged", 1, 200, 2, 2, 64, 0, ragged({0, 1, 2, 3, 50, 51, 120, 199})},
      {"ragged_wide", 1, 200, 2, 1, 128, 3, ragged({0, 1, 2, 3, 50, 51, 120, 199})},
      {"every_token_ends_a_chunk", 1, 200, 1, 1, 64, 0, chunks("uniform", 1)},
      {"every_token_with_leading", 1, 130, 2, 1, 128, 7, chunks("uniform", 1)},
      {"chunk_longer_than_sequence", 1, 64, 2, 2, 64, 0, chunks("uniform", 100)},
      {"chunk_longer_leading_one", 1, 65, 2, 2, 64, 1, chunks("uniform", 100)},
      {"leading_longer_than_sequence", 2, 65, 2, 2, 32, 1000, chunks("uniform", 8)},
      {"pseudo", 1, 140, 2, 2, 64, 16, chunks("none", 8)},
      {"causal", 1, 300, 2, 2, 64},
      {"causal_wide", 1, 150, 1, 1, 128},
      {"sliding_window", 1, 400, 2, 2, 32, 37},
      {"sliding_window_grouped", 1, 200, 4, 1, 64, 100},
      {"packed_documents", 2, 200, 4, 2, 64, 16, chunks("uniform", 8), 0, {0, 1, 40, 41, 137}},
      {"packed_documents_own_chunk", 1, 200, 2, 2, 64, 0, chunks("cyclic", 8), 2, {0, 3, 77, 150}},
      {"packed_causal", 1, 200, 2, 2, 64, 0, {}, 0, {0, 33, 99, 198}},
      {"eight_queries_per_key", 1, 130, 8, 1, 64, 16, chunks("uniform", 8)},
      {"three_queries_per_key", 1, 100, 6, 2, 32, 9, chunks("uniform", 6)},
      {"many_queries_per_key", 1, 17, 140, 1, 16, 4, chunks("uniform", 6)},
      {"head_size_4", 2, 65, 2, 1, 4, 16, chunks("uniform", 8)},
      {"head_size_5", 1, 61, 3, 3, 5, 7, chunks("uniform", 5)},
      {"head_size_8", 2, 65, 2, 1, 8, 16, chunks("uniform", 8)},
      {"head_size_16", 1, 200, 2, 2, 16, 16, chunks("random", 8)},
      {"head_size_40", 1, 100, 2, 2, 40, 16, chunks("uniform", 8)},
      {"head_size_72", 1, 100, 2, 2, 72, 0, chunks("uniform", 8)},
      {"head_size_256", 1, 40, 2, 1, 256, 7, chunks("uniform", 5)},
  };
}

double relative_error(const DeviceTensor& got, const std::vector<double>& want) {
  const std::vector<double> values = got.values();
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (values[i] - want[i]) * (values[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}
double largest_error(const DeviceTensor& got, const std::vector<double>& want) {
  const std::vector<double> values = got.values();
  double largest = 0, magnitude = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double difference = std::abs(values[i] - want[i]);
    largest = difference <= largest ? largest : difference;
    magnitude = std::max(magnitude, std::abs(want[i]));
  }
  return largest / magnitude;
}

class SimtAttention : public testing::TestWithParam<Case> {};

void compare(const Case& c, DType dtype) {
  Problem problem(c, dtype);
  const Results got = run(problem);
  const Expected want(problem);
  const auto check = [&](const char* name, const DeviceTensor& tensor, const std::vector<double>& expected) {
    printf("%s %s %s %.3e %.3e\n", c.name.c_str(), std::string(name_of(dtype)).c_str(), name, relative_error(tensor, expected),
           largest_error(tensor, expected));
  };
  check("out", got.out, want.out);
  check("lse", got.lse, want.lse);
  check("dv", got.dv, want.dv);
  check("dq", got.dq, want.dq);
  check("dk", got.dk, want.dk);
}

TEST_P(SimtAttention, Float32MatchesCpu) {
  compare(GetParam(), DType::float32);
}
TEST_P(SimtAttention, Bfloat16MatchesCpu) {
  compare(GetParam(), DType::bfloat16);
}

INSTANTIATE_TEST_SUITE_P(Tables, SimtAttention, testing::ValuesIn(cases()),
                         [](const auto& instance) { return instance.param.name; });

}  // namespace
}  // namespace attamba::simt
