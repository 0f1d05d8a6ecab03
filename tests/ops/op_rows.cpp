// The rows: every op with a gradient, in all of its variants. A new op gets a row here and is then checked by all op tests.
#include <algorithm>
#include <cmath>

#include "tests/ops/op_case.h"

namespace attamba::testing_support {

namespace {

constexpr double kEps = 1e-5;

// ---------------------------------------------------------------------------------------------- tables of attention and scans

/// One document: how long, and the positions (from its start) of its chunks' last tokens.
struct Document {
  std::int32_t length;
  std::vector<std::int32_t> ends;
};

struct Table {
  std::vector<std::int32_t> ends, key_begin, key_end, local_begin, starts;
};

/// The mask of docs/model.md by definition, sequence by sequence. leading = 0: the query's own chunk stays visible.
Table make_table(const std::vector<std::vector<Document>>& sequences, std::int32_t leading) {
  Table table;
  std::int32_t first = 0;
  for (const auto& documents : sequences) {
    std::vector<std::int32_t> listed;
    const auto base = static_cast<std::int32_t>(table.local_begin.size());
    std::int32_t length = 0;
    first = base;
    for (const Document& document : documents) {
      for (std::int32_t t = 0; t < document.length; ++t) {
        const auto earlier = static_cast<std::int32_t>(
            std::count_if(document.ends.begin(), document.ends.end(), [&](std::int32_t end) { return end < t; }));
        const std::int32_t own_chunk = earlier == 0 ? 0 : document.ends[static_cast<std::size_t>(earlier - 1)] + 1;
        const std::int32_t window = leading == 0 ? own_chunk : std::max(0, t - leading + 1);
        const auto visible =
            std::count_if(document.ends.begin(), document.ends.end(), [&](std::int32_t end) { return end < window; });
        const auto list_begin = base + static_cast<std::int32_t>(listed.size());
        table.key_begin.push_back(list_begin);
        table.key_end.push_back(list_begin + static_cast<std::int32_t>(visible));
        table.local_begin.push_back(first + window);
        table.starts.push_back(first + own_chunk);
      }
      for (const std::int32_t end : document.ends) {
        listed.push_back(first + end);
      }
      first += document.length;
      length += document.length;
    }
    listed.resize(static_cast<std::size_t>(length), base);  // unused entries
    table.ends.insert(table.ends.end(), listed.begin(), listed.end());
  }
  return table;
}

constexpr std::int32_t kLength = 13;
const std::vector<std::int32_t> kUniform4{3, 7, 11, 12}, kCyclic4{1, 5, 9, 12}, kRandom{0, 1, 6, 12}, kExplicit{4, 5, 10, 12};

Table two_sequences(const std::vector<std::int32_t>& ends, const std::vector<std::int32_t>& other, std::int32_t leading) {
  return make_table({{{kLength, ends}}, {{kLength, other}}}, leading);
}

/// Three documents in the first sequence (one of a single token), two in the second.
Table packed(std::int32_t leading) {
  return make_table({{{5, {1, 3, 4}}, {1, {0}}, {7, {2, 6}}}, {{9, {3, 8}}, {4, {3}}}}, leading);
}

/// Every earlier token, or a sliding window, without compact keys.
Table causal(std::int32_t window) {
  return make_table({{{kLength, {}}}, {{kLength, {}}}}, window);
}

/// Heads of four channels at seven positions.
Value rotated(OpCase& c, Value x, Value addend) {
  std::vector<double> table;
  for (int t = 0; t < 6; ++t) {
    for (const double frequency : {1.0, 0.1}) {
      table.push_back(std::cos(t * frequency));
      table.push_back(std::sin(t * frequency));
    }
  }
  return ops::rope(c.tape, x, addend, c.constants("table", {6, 4}, table), c.integers("positions", {0, 1, 2, 3, 0, 5, 4}), 4,
                   c.dtype);
}

// ---------------------------------------------------------------------------------------------- rows by family

void add_matmul_rows(std::vector<OpRow>& rows) {
  rows.push_back({.name = "linear", .op = "linear", .declare = [](OpCase& c) {
                    return std::vector{ops::linear(c.tape, c.input("x", {7, 6}), c.matrix("w", {5, 6}, 0.4))};
                  }});
  rows.push_back(
      {.name = "linear_with_addend", .op = "linear", .declare = [](OpCase& c) {
         return std::vector{ops::linear(c.tape, c.input("x", {7, 6}), c.matrix("w", {5, 6}, 0.4), c.input("addend", {7, 5}))};
       }});
  rows.push_back({.name = "linear_of_one_input_three_times",
                  .op = "linear",
                  .declare =
                      [](OpCase& c) {
                        const Value x = c.input("x", {7, 6});
                        return std::vector{ops::linear(c.tape, x, c.matrix("w1", {5, 6}, 0.4)),
                                           ops::linear(c.tape, x, c.matrix("w2", {3, 6}, 0.4)),
                                           ops::linear(c.tape, x, c.matrix("w3", {6, 6}, 0.4), x)};
                      },
                  .roundings = 4});
  rows.push_back({.name = "linear_unrounded", .op = "linear_unrounded", .declare = [](OpCase& c) {
                    const Value x = ops::linear_unrounded(c.tape, c.input("x", {7, 6}), c.matrix("w", {4, 6}, 0.4));
                    return std::vector{rotated(c, x, {})};
                  }});
  rows.push_back({.name = "linear_with_a_weight_used_twice", .op = "linear", .declare = [](OpCase& c) {
                    const Value w = c.matrix("w", {6, 6}, 0.4);
                    return std::vector{ops::linear(c.tape, ops::linear(c.tape, c.input("x", {7, 6}), w), w)};
                  }});
}

void add_norm_rows(std::vector<OpRow>& rows) {
  rows.push_back({.name = "rms_norm", .op = "rms_norm", .declare = [](OpCase& c) {
                    return std::vector{ops::rms_norm(c.tape, c.input("x", {5, 8}), c.vector("w", {8}, 1, 0.3), kEps)};
                  }});
  rows.push_back({.name = "rms_norm_beside_other_uses", .op = "rms_norm", .declare = [](OpCase& c) {
                    const Value x = c.input("x", {5, 8}), w = c.vector("w", {8}, 1, 0.3);
                    return std::vector{ops::rms_norm(c.tape, x, w, kEps), ops::add(c.tape, x, c.input("y", {5, 8})),
                                       ops::rms_norm(c.tape, x, w, 0.5)};
                  }});
  const auto summands = [](OpCase& c, bool same) {
    const Value a = c.input("a", {5, 8}), b = same ? a : c.input("b", {5, 8});
    return ops::add_rms_norm(c.tape, a, b, c.vector("w", {8}, 1, 0.3), kEps);
  };
  rows.push_back({.name = "add_rms_norm_both_outputs", .op = "add_rms_norm", .declare = [=](OpCase& c) {
                    const ops::Normed normed = summands(c, false);
                    return std::vector{normed.sum, normed.norm};
                  }});
  rows.push_back({.name = "add_rms_norm_norm_only", .op = "add_rms_norm", .declare = [=](OpCase& c) {
                    return std::vector{summands(c, false).norm};
                  }});
  rows.push_back({.name = "add_rms_norm_of_one_value", .op = "add_rms_norm", .declare = [=](OpCase& c) {
                    const ops::Normed normed = summands(c, true);
                    return std::vector{normed.sum, normed.norm};
                  }});
}

void add_pointwise_rows(std::vector<OpRow>& rows) {
  rows.push_back({.name = "add", .op = "add", .declare = [](OpCase& c) {
                    return std::vector{ops::add(c.tape, c.input("a", {3, 9}), c.input("b", {3, 9}))};
                  }});
  rows.push_back({.name = "add_to_itself", .op = "add", .declare = [](OpCase& c) {
                    const Value a = c.input("a", {3, 9});
                    return std::vector{ops::add(c.tape, a, a)};
                  }});
  rows.push_back({.name = "swiglu", .op = "swiglu", .declare = [](OpCase& c) {
                    return std::vector{ops::swiglu(c.tape, c.input("gate", {3, 9}, 2), c.input("up", {3, 9}))};
                  }});
  rows.push_back({.name = "swiglu_of_one_value", .op = "swiglu", .declare = [](OpCase& c) {
                    const Value x = c.input("x", {3, 9});
                    return std::vector{ops::swiglu(c.tape, x, x)};
                  }});
  rows.push_back({.name = "rope", .op = "rope", .declare = [](OpCase& c) {
                    return std::vector{rotated(c, c.input("x", {7, 12}), {})};
                  }});
  rows.push_back({.name = "rope_of_a_sum", .op = "rope", .declare = [](OpCase& c) {
                    return std::vector{rotated(c, c.input("x", {7, 12}), c.input("addend", {7, 12}))};
                  }});
  rows.push_back({.name = "rope_of_a_product_and_its_input", .op = "rope", .declare = [](OpCase& c) {
                    const Value x = c.input("x", {7, 8});
                    return std::vector{rotated(c, ops::linear_unrounded(c.tape, x, c.matrix("w", {8, 8}, 0.4)), x)};
                  }});
}

void add_attention_rows(std::vector<OpRow>& rows) {
  const auto add = [&](const std::string& name, const Table& table, std::int64_t heads, std::int64_t kv_heads) {
    rows.push_back({.name = "attention_" + name,
                    .op = "attention",
                    .declare =
                        [=](OpCase& c) {
                          constexpr std::int64_t kHeadDim = 4, kRows = 2 * kLength;
                          const ops::AttentionKeys keys{.ends = c.integers("ends", table.ends),
                                                        .key_begin = c.integers("key_begin", table.key_begin),
                                                        .key_end = c.integers("key_end", table.key_end),
                                                        .local_begin = c.integers("local_begin", table.local_begin)};
                          return std::vector{ops::attention(
                              c.tape, c.input("q", {kRows, heads * kHeadDim}), c.input("k", {kRows, kv_heads * kHeadDim}),
                              c.input("v", {kRows, kv_heads * kHeadDim}), keys, heads, kv_heads, kLength)};
                        },
                    .roundings = 4});
  };
  add("uniform", two_sequences(kUniform4, kUniform4, 1), 2, 2);
  add("cyclic_window", two_sequences(kCyclic4, kCyclic4, 3), 2, 2);
  add("random", two_sequences(kRandom, kExplicit, 2), 2, 2);
  add("own_chunk", two_sequences(kExplicit, kRandom, 0), 2, 2);
  add("packed", packed(2), 2, 2);
  add("packed_own_chunk", packed(0), 2, 1);
  add("grouped", two_sequences(kUniform4, kRandom, 2), 4, 2);
  add("one_kv_head", two_sequences(kCyclic4, kUniform4, 1), 4, 1);
  add("causal", causal(kLength), 2, 2);
  add("sliding", causal(4), 2, 2);
}

ops::ScanParameters scan_weights(OpCase& c, const kernels::ScanShape& shape, bool dt_bias) {
  ops::ScanParameters weights;
  if (shape.conv > 0) {
    weights.conv = c.vector("conv", {shape.hidden + 2 * shape.groups * shape.state, shape.conv}, 0.2, 0.5);
  }
  weights.a_log = c.vector("A_log", {shape.heads}, -0.5, 0.7);
  weights.d_skip = c.vector("D", {shape.heads}, 1, 0.3);
  if (dt_bias) {
    weights.dt_bias = c.vector("dt_bias", {shape.heads}, 0, 0.5);
  }
  weights.norm = c.vector("norm", {shape.hidden}, 1, 0.3);
  return weights;
}

void add_scan_rows(std::vector<OpRow>& rows) {
  const auto add = [&](const std::string& name, const Table& table, const kernels::ScanShape& shape, bool dt_bias) {
    rows.push_back({.name = "chunk_scan_" + name,
                    .op = "chunk_scan",
                    .declare =
                        [=](OpCase& c) {
                          const ops::ScanParameters weights = scan_weights(c, shape, dt_bias);
                          return std::vector{ops::chunk_scan(c.tape, c.input("zxbcdt", {2 * kLength, shape.projection()}),
                                                             weights, c.integers("starts", table.starts), shape, kEps,
                                                             kLength)};
                        },
                    .roundings = 4});
  };
  const Table uniform = two_sequences(kUniform4, kCyclic4, 1);
  add("conv", uniform, {.hidden = 8, .state = 3, .heads = 2, .groups = 1, .conv = 4}, false);
  add("conv_dt_bias", uniform, {.hidden = 8, .state = 3, .heads = 2, .groups = 1, .conv = 4}, true);
  add("no_conv", uniform, {.hidden = 8, .state = 3, .heads = 2, .groups = 1, .conv = 0}, false);
  add("no_conv_dt_bias", uniform, {.hidden = 8, .state = 3, .heads = 2, .groups = 1, .conv = 0}, true);
  add("groups", two_sequences(kRandom, kExplicit, 1), {.hidden = 8, .state = 4, .heads = 4, .groups = 2, .conv = 2}, true);
  add("one_head", uniform, {.hidden = 4, .state = 2, .heads = 1, .groups = 1, .conv = 1}, false);
  add("packed", packed(1), {.hidden = 8, .state = 3, .heads = 2, .groups = 2, .conv = 3}, true);
  add("whole_sequence", causal(0), {.hidden = 8, .state = 5, .heads = 2, .groups = 1, .conv = 4}, false);
  // Rows of two labels, then of three; the first block of 64 hands on the state of label 1.
  const auto add_labels = [&](const std::string& name, std::int32_t count, const kernels::ScanShape& shape, bool dt_bias) {
    rows.push_back({.name = "label_scan_" + name,
                    .op = "label_scan",
                    .declare =
                        [=](OpCase& c) {
                          std::vector<std::int32_t> labels;
                          for (std::int32_t t = 0; t < count; ++t) {
                            labels.push_back(t < 66 ? t % 2 : t % 3);
                          }
                          const ops::ScanParameters weights = scan_weights(c, shape, dt_bias);
                          return std::vector{ops::label_scan(c.tape, c.input("zxbcdt", {count, shape.projection()}), weights,
                                                             c.integers("labels", labels), shape, kEps)};
                        },
                    .roundings = 4});
  };
  add_labels("conv", 70, {.hidden = 4, .state = 2, .heads = 2, .groups = 1, .conv = 4}, true);
  add_labels("no_conv_groups", 13, {.hidden = 8, .state = 3, .heads = 4, .groups = 2, .conv = 0}, false);
}

void add_recurrence_rows(std::vector<OpRow>& rows) {
  for (const std::int64_t taps : {1, 4}) {
    rows.push_back({.name = concat("causal_conv_silu_of_", taps, "_taps"), .op = "causal_conv_silu", .declare = [=](OpCase& c) {
                      return std::vector{ops::causal_conv_silu(c.tape, c.input("x", {2 * kLength, 6}),
                                                               c.vector("w", {6, taps}, 0.2, 0.5),
                                                               c.integers("starts", packed(1).starts))};
                    }});
  }
  using kernels::RecurrenceForm;
  const auto add = [&](const std::string& name, const Table& table, RecurrenceForm form) {
    rows.push_back({.name = "linear_recurrence_" + name,
                    .op = "linear_recurrence",
                    .declare =
                        [=](OpCase& c) {
                          const Shape shape{2 * kLength, 6};
                          ops::RecurrenceGates gates{.a = c.input("a", shape, form == RecurrenceForm::plain ? 0.5 : 1.0),
                                                     .b = c.input("b", shape)};
                          if (form == RecurrenceForm::rg_lru) {
                            gates.u = c.input("u", shape);
                            gates.rate = c.vector("rate", {3}, -0.05, 0.5);
                          }
                          return std::vector{
                              ops::linear_recurrence(c.tape, gates, c.integers("starts", table.starts), form, kLength)};
                        },
                    .roundings = 4});
  };
  for (const auto& [name, form] :
       {std::pair{"plain", RecurrenceForm::plain}, {"min_gru", RecurrenceForm::min_gru}, {"rg_lru", RecurrenceForm::rg_lru}}) {
    add(name + std::string("_whole_sequence"), causal(0), form);
    add(name + std::string("_packed"), packed(1), form);
  }
}

void add_vocabulary_rows(std::vector<OpRow>& rows) {
  rows.push_back(
      {.name = "embedding", .op = "embedding", .declare = [](OpCase& c) {
         return std::vector{ops::embedding(c.tape, c.matrix("table", {6, 5}), c.integers("tokens", {0, 5, 2, 2, 2, 0, 4}))};
       }});
  const auto add_loss = [&](const std::string& name, bool same_weight) {
    constexpr double kScale = 0.25;
    rows.push_back({.name = name,
                    .op = "linear_cross_entropy_root",
                    .declare =
                        [=](OpCase& c) {
                          const Value w = c.matrix("w", {11, 5});
                          const Value tokens = c.integers("tokens", {1, 10, 3, 3, 0, 7});
                          const Value hidden = same_weight ? ops::embedding(c.tape, w, tokens) : c.input("hidden", {6, 5});
                          const Value targets = c.integers("targets", {3, 10, -1, 0, 3, 5});  // a negative target has no loss
                          return std::vector{c.purpose == Purpose::gradient
                                                 ? ops::linear_cross_entropy_root(c.tape, hidden, w, targets, kScale)
                                                 : ops::linear_cross_entropy(c.tape, hidden, w, targets)};
                        },
                    .root_scale = kScale});
  };
  add_loss("linear_cross_entropy_root", false);
  add_loss("linear_cross_entropy_root_with_tied_embeddings", true);
}

}  // namespace

const std::vector<OpRow>& op_rows() {
  static const std::vector<OpRow> kRows = [] {
    std::vector<OpRow> rows;
    add_matmul_rows(rows);
    add_norm_rows(rows);
    add_pointwise_rows(rows);
    add_attention_rows(rows);
    add_scan_rows(rows);
    add_recurrence_rows(rows);
    add_vocabulary_rows(rows);
    return rows;
  }();
  return kRows;
}

}  // namespace attamba::testing_support
