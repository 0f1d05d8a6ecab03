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

/// float32: a sum of m rounded terms is off by about 2^-24 sqrt(m) of its own size, m being at most the query rows of a key.
/// bfloat16: the result is rounded, by at most 2^-9 of each element; so are P and dS before they are multiplied, and out, which
/// enters the gradients through delta. Single elements stay within four times the error of all.
void compare(const Case& c, DType dtype) {
  Problem problem(c, dtype);
  const Results got = run(problem);
  const Expected want(problem);
  const double float_rounding = 0x1p-24 * (4 + std::sqrt(static_cast<double>(c.n * c.heads / c.kv_heads)));
  const bool exact = dtype == DType::float32;
  const double value_rounding = exact ? float_rounding : 0x1p-8, gradient_rounding = exact ? float_rounding : 0x1.8p-8;
  const auto check = [&](const char* name, const DeviceTensor& tensor, const std::vector<double>& expected, double tolerance) {
    EXPECT_LT(relative_error(tensor, expected), tolerance) << name;
    EXPECT_LT(largest_error(tensor, expected), 4 * tolerance) << name;
  };
  check("out", got.out, want.out, value_rounding);
  check("lse", got.lse, want.lse, float_rounding);
  check("dv", got.dv, want.dv, value_rounding);
  if (problem.table.average_keys() > 1) {
    check("dq", got.dq, want.dq, gradient_rounding);
    check("dk", got.dk, want.dk, gradient_rounding);
  } else {  // each query sees itself alone: the weight is 1 whatever q and k are, and dS the difference of two equal sums
    for (const DeviceTensor* gradient : {&got.dq, &got.dk}) {
      for (const double value : gradient->values()) {
        EXPECT_LT(std::abs(value), 0x1p-24 * 8 * std::sqrt(static_cast<double>(c.d)));
      }
    }
  }
}

TEST_P(SimtAttention, Float32MatchesCpu) {
  compare(GetParam(), DType::float32);
}
TEST_P(SimtAttention, Bfloat16MatchesCpu) {
  compare(GetParam(), DType::bfloat16);
}

/// Blocks and warps in another order, and shuffles that order no memory.
TEST(SimtAttentionOrder, DoesNotChangeBits) {
  const Options before = options();
  for (const Case& c :
       {Case{"", 2, 200, 4, 2, 64, 16, chunks("cyclic", 8), 1, {0, 40, 41, 137}},
        Case{"", 1, 100, 2, 1, 128, 0, chunks("random", 8)}, Case{"", 1, 60, 2, 1, 5, 7, chunks("uniform", 8)}}) {
    const Problem problem(c, DType::bfloat16);
    options().seed = 0;
    const Results want = run(problem);
    for (const std::uint64_t seed : {1, 2, 3}) {
      options() = {.seed = seed};
      const Results got = run(problem);
      EXPECT_TRUE(got.out.same_bits(want.out) && got.lse.same_bits(want.lse));
      EXPECT_TRUE(got.dq.same_bits(want.dq) && got.dk.same_bits(want.dk) && got.dv.same_bits(want.dv));
    }
    options() = before;
  }
}

/// Scores near 1000: one key takes all the weight, and nothing overflows.
TEST(SimtAttentionRange, LargeScoresStayFinite) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    Problem problem({"", 1, 80, 1, 1, 64, 16, chunks("uniform", 8)}, dtype);
    problem.q = DeviceTensor::random(dtype, problem.query, 1, 300);
    const Results got = run(problem);
    const Expected want(problem);
    const double tolerance = dtype == DType::float32 ? 1e-3 : 0x1p-8;  // such scores carry errors near 1e-4
    EXPECT_LT(relative_error(got.out, want.out), tolerance);
    EXPECT_LT(relative_error(got.dv, want.dv), tolerance);
    for (const double value : got.dq.values()) {
      ASSERT_TRUE(std::isfinite(value));
    }
  }
}

TEST(SimtAttentionErrors, NameTypesAndShapes) {
  const TensorType q{DType::float32, {16, 2, 8}}, k{DType::float32, {16, 1, 8}};
  EXPECT_NO_THROW(kernels::cuda::attention_workspace(q, k, 16));
  EXPECT_THROW(kernels::cuda::attention_workspace({DType::float64, q.shape}, {DType::float64, k.shape}, 16), UsageError);
  EXPECT_THROW(kernels::cuda::attention_workspace({q.dtype, {16, 2, 264}}, {k.dtype, {16, 1, 264}}, 16), UsageError);
  EXPECT_THROW(kernels::cuda::attention_workspace({q.dtype, {16, 3, 8}}, {k.dtype, {16, 2, 8}}, 16), Error);
  EXPECT_THROW(kernels::cuda::attention_workspace(q, k, 7), Error);
}

double bytes(const Counters& c) {
  return static_cast<double>(c.global_loaded + c.global_stored + c.copied_async);
}

/// What kernels on tensor cores move and multiply, against the least: every tensor moved once, and products of the keys that
/// queries see alone. Bytes are those asked of the second-level cache, so tiles that several blocks read count again.
TEST(SimtAttentionCounts, StayNearTheLeast) {
  struct Bound {
    std::int64_t d;
    double forward, backward_tensors, backward;
  };
  // Backwards q, k, v, out and dout are read, dq, dk and dv written. The widest heads go three times over q and dout: for
  // queries, local keys and compact keys, the first two times over k and v, too.
  for (const auto& [d, most_forward, backward_tensors, most_backward] :
       {Bound{32, 1.65, 8, 1.97}, Bound{64, 1.6, 8, 1.9}, Bound{128, 1.5, 15, 1.35}}) {
    const Case c{"", 1, 1024, 1, 1, d, 16, chunks("cyclic", 8), 3};
    Problem problem(c, DType::bfloat16);
    const double n = static_cast<double>(c.n), tensor = n * 2 * static_cast<double>(c.d), lse = n * 4;
    const double product = n * problem.table.average_keys() * 2 * static_cast<double>(c.d) / 4096;
    reset_counters();
    run(problem);
    const Counters forward = counters("attention"), all = total_counters();
    const double backward_bytes = bytes(all) - bytes(forward);
    const auto forward_products = static_cast<double>(forward.matrix_products);
    const double backward_products = static_cast<double>(all.matrix_products) - forward_products;
    RecordProperty(concat("forward of ", d, ", bytes"), std::to_string(bytes(forward)));
    RecordProperty(concat("backward of ", d, ", bytes"), std::to_string(backward_bytes));
    RecordProperty(concat("forward of ", d, ", products"), std::to_string(forward_products));
    RecordProperty(concat("backward of ", d, ", products"), std::to_string(backward_products));
    EXPECT_EQ(all.matrix_load_conflicts, 0) << d;
    EXPECT_GE(forward_products, 2 * product) << d;
    EXPECT_GE(backward_products, 5 * product) << d;
    EXPECT_LT(bytes(forward), most_forward * (4 * tensor + lse)) << d;
    EXPECT_LT(forward_products, 1.4 * 2 * product) << d;
    // Scores and dP are computed for queries and again for keys: 7 products instead of 5, in whole tiles of keys that some of
    // their queries do not see.
    EXPECT_LT(backward_bytes, most_backward * (backward_tensors * tensor + lse)) << d;
    EXPECT_LT(backward_products, 1.95 * 5 * product) << d;
  }
}

/// A warp per row reads from the cache what it multiplies: forward each key and value that a query sees, backwards keys twice
/// and values once for dq, queries and their gradients twice for dk and dv.
TEST(SimtAttentionCounts, RowsReadWhatTheyMultiply) {
  Problem problem({"", 1, 256, 1, 1, 64, 16, chunks("cyclic", 8), 3}, DType::float32);
  const double row = 256 * problem.table.average_keys() * 64 * 4;
  reset_counters();
  run(problem);
  EXPECT_LT(bytes(counters("attention")), 1.2 * 2 * row);
  EXPECT_LT(bytes(counters("attention_backward: queries")), 1.2 * 3 * row);
  EXPECT_LT(bytes(counters("attention_backward: keys")), 1.2 * 4 * row);
}

INSTANTIATE_TEST_SUITE_P(Tables, SimtAttention, testing::ValuesIn(cases()),
                         [](const auto& instance) { return instance.param.name; });

}  // namespace
}  // namespace attamba::simt
