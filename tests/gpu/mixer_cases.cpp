// Attention, scans, recurrences.
#include <algorithm>
#include <cmath>

#include "src/chunking/table.h"
#include "src/core/error.h"
#include "tests/gpu/side.h"

namespace attamba::gpu_check {

namespace {

/// A batch of sequences with one chunking.
struct Layout {
  std::string name;
  std::int64_t sequences = 1, n = 0;
  std::string strategy = {};                 ///< empty: plain causal attention, and one chunk per sequence for scans
  std::int64_t size = 8, leading = 0;        ///< of causal attention: the window
  std::vector<std::int32_t> documents = {};  ///< where documents begin, alike in every sequence
};

struct HostTable {
  std::vector<std::int32_t> ends, key_begin, key_end, local_begin, starts, labels, document_starts;

  explicit HostTable(const Layout& layout) {
    const std::int64_t rows = layout.sequences * layout.n;
    for (auto* list : {&ends, &key_begin, &key_end, &local_begin, &starts, &labels}) {
      list->assign(static_cast<std::size_t>(rows), 0);
    }
    for (std::int64_t t = 0; t < rows && !layout.documents.empty(); ++t) {
      document_starts.push_back(*(std::upper_bound(layout.documents.begin(), layout.documents.end(), t % layout.n) - 1));
    }
    const ChunkTable table{ends, key_begin, key_end, local_begin, starts, labels};
    const BatchLayout batch{.sequences = layout.sequences, .length = layout.n, .document_starts = document_starts, .seed = 5};
    if (layout.strategy.empty()) {
      fill_causal_table(table, layout.leading, batch);
    } else {
      fill_chunk_table(table, *make_chunking(layout.strategy, layout.size), 3, layout.leading, batch);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ attention
// float32: sums over up to n keys of rounded terms, about 1e-6 sqrt(n). bfloat16: results are rounded once (at most 2^-9 of an
// element), probabilities and their gradients once more before they are multiplied, and `out`, rounded, enters the gradients.
constexpr double kOut = 0x1p-8, kGradient = 0x1.8p-8;

Case attention(const Layout& layout, std::int64_t heads, std::int64_t kv_heads, std::int64_t d, bool large = false) {
  const std::string name =
      concat("attention ", layout.name, ", ", layout.sequences, 'x', layout.n, ", ", heads, '/', kv_heads, " heads of ", d);
  return {name,
          [=](Side& s) {
            const HostTable host(layout);
            const kernels::AttentionTable table{.ends = s.integers(host.ends),
                                                .key_begin = s.integers(host.key_begin),
                                                .key_end = s.integers(host.key_end),
                                                .local_begin = s.integers(host.local_begin)};
            const std::int64_t rows = layout.sequences * layout.n;
            const Shape query{rows, heads, d}, key{rows, kv_heads, d};
            const Tensor q = s.numbers(query), k = s.numbers(key), v = s.numbers(key), dout = s.numbers(query);
            const Tensor out = s.output(query), lse = s.output(s.sum_type(), {rows, heads});
            const Tensor dq = s.output(query), dk = s.output(key), dv = s.output(key);
            const kernels::Backend& on = s.on();
            on.attention(s.launch(on.attention_workspace(q.type, k.type, layout.n)), out, lse, q, k, v, table, layout.n);
            on.attention_backward(s.launch(on.attention_backward_workspace(q.type, k.type, layout.n)), dq, dk, dv, dout, out,
                                  lse, q, k, v, table, layout.n);
            const double sums = 1e-6 * std::sqrt(static_cast<double>(std::max<std::int64_t>(layout.n, 16)));
            std::vector<Output> outputs{{"out", out, sums, kOut}, {"lse", lse, sums, sums}, {"dv", dv, sums, kOut}};
            if (layout.n > 1) {  // one key's weight is 1 whatever q and k are: their gradients are 0 but for rounding
              outputs.push_back({"dq", dq, sums, kGradient});
              outputs.push_back({"dk", dk, sums, kGradient});
            }
            return outputs;
          },
          large};
}

// ----------------------------------------------------------------------------------------------------------------- scan
// float32 arithmetic throughout, except in the fused kernels of bfloat16, whose products take operands rounded to bfloat16:
// then two roundings of 2^-9 in a row stand between a result and the exact one, and reach the weights' gradients too. Those of
// the heads are eight numbers or so, sums over all rows of terms of either sign, as their errors are: squares of two such
// vectors' lengths have a ratio like F(8, 8). It is above 2.2^2 times its middle in one of 60 problems, and above 4.5^2 in one
// of 7,000; in the middle errors are 0.0035.
Case scan(const Layout& layout, const kernels::ScanShape& widths, bool bias, bool fused, bool large = false,
          bool by_label = false) {
  kernels::ScanShape shape = widths;
  shape.longest_chunk = layout.strategy.empty() ? 0 : make_chunking(layout.strategy, layout.size)->longest_chunk(layout.n);
  const std::string name = concat(by_label ? "label_scan " : "chunk_scan ", layout.name, ", ", layout.sequences, 'x', layout.n,
                                  ", ", shape.hidden, '/', shape.state, "/", shape.heads, '/', shape.groups, '/', shape.conv);
  return {
      name,
      [=](Side& s) {
        constexpr double kEps = 1e-5, kBefore = 0.5, kSums = 1e-5;
        const HostTable host(layout);
        const std::int64_t rows = layout.sequences * layout.n, channels = shape.hidden + 2 * shape.groups * shape.state;
        const DType sum = s.sum_type();
        const kernels::ScanWeights weights{
            .conv = shape.conv > 0 ? s.sums({channels, shape.conv}, 1 / std::sqrt(static_cast<double>(shape.conv))) : Tensor{},
            .a_log = s.sums({shape.heads}, 1, -1),
            .d_skip = s.sums({shape.heads}, 0.1, 1),
            .dt_bias = bias ? s.sums({shape.heads}, 0.5) : Tensor{},
            .norm = s.sums({shape.hidden}, 0.1, 1)};
        const kernels::ScanWeights gradients{
            .conv = shape.conv > 0 ? s.constant(sum, {channels, shape.conv}, kBefore) : Tensor{},
            .a_log = s.constant(sum, {shape.heads}, kBefore),
            .d_skip = s.constant(sum, {shape.heads}, kBefore),
            .dt_bias = bias ? s.constant(sum, {shape.heads}, kBefore) : Tensor{},
            .norm = s.constant(sum, {shape.hidden}, kBefore)};
        const Tensor table = s.integers(by_label ? host.labels : host.starts), zxbcdt = s.numbers({rows, shape.projection()});
        const Tensor dout = s.numbers({rows, shape.hidden}), out = s.output({rows, shape.hidden});
        const Tensor dzxbcdt = s.output({rows, shape.projection()});
        const kernels::Backend& on = s.on();
        if (by_label) {
          on.label_scan(s.launch(on.label_scan_workspace(zxbcdt.type, shape)), out, zxbcdt, weights, table, shape, kEps);
          on.label_scan_backward(s.launch(on.label_scan_backward_workspace(zxbcdt.type, shape)), dzxbcdt, gradients, dout,
                                 zxbcdt, weights, table, shape, kEps);
        } else {
          on.chunk_scan(s.launch(on.chunk_scan_workspace(zxbcdt.type, shape, layout.n)), out, zxbcdt, weights, table, shape,
                        kEps, layout.n);
          on.chunk_scan_backward(s.launch(on.chunk_scan_backward_workspace(zxbcdt.type, shape, layout.n)), dzxbcdt, gradients,
                                 dout, zxbcdt, weights, table, shape, kEps, layout.n);
        }
        const double rounded = fused ? 0x1p-7 : 0x1p-8, accumulated = fused ? 0x1p-7 : kSums, of_heads = fused ? 0x1p-6 : kSums;
        std::vector<Output> outputs{{"out", out, kSums, rounded},
                                    {"dzxbcdt", dzxbcdt, kSums, rounded},
                                    {"dA_log", gradients.a_log, kSums, of_heads, kBefore},
                                    {"dD", gradients.d_skip, kSums, of_heads, kBefore},
                                    {"dnorm", gradients.norm, kSums, accumulated, kBefore}};
        if (shape.conv > 0) {
          outputs.push_back({"dconv", gradients.conv, kSums, accumulated, kBefore});
        }
        if (bias) {
          outputs.push_back({"ddt_bias", gradients.dt_bias, kSums, of_heads, kBefore});
        }
        return outputs;
      },
      large};
}

// ----------------------------------------------------------------------------------------------------------- recurrences
/// Float32 arithmetic: up to a hundred roundings lie behind a row. In bfloat16 each result is rounded once, but the backward
/// pass reads a state that was.
Case recurrence(const Layout& layout, kernels::RecurrenceForm form, std::int64_t columns, bool large = false) {
  const char* const names[] = {"plain", "minGRU", "RG-LRU"};
  const std::string name = concat("linear_recurrence ", names[static_cast<int>(form)], ", ", layout.name, ", ",
                                  layout.sequences, 'x', layout.n, 'x', columns);
  return {name,
          [=](Side& s) {
            constexpr double kBefore = 0.5, kSums = 1e-5;
            const bool all = form == kernels::RecurrenceForm::rg_lru;
            const Shape shape{layout.sequences * layout.n, columns}, rates{columns / 2};
            const Tensor starts = s.integers(HostTable(layout).starts);
            const kernels::RecurrenceInputs in{.a = s.numbers(shape, form == kernels::RecurrenceForm::plain ? 0.5 : 2),
                                               .b = s.numbers(shape),
                                               .u = all ? s.numbers(shape) : Tensor{},
                                               .rate = all ? s.sums(rates, 0.5) : Tensor{}};
            const Tensor dh = s.numbers(shape), h = s.output(shape);
            const kernels::RecurrenceInputs gradients{.a = s.output(shape),
                                                      .b = s.output(shape),
                                                      .u = all ? s.output(shape) : Tensor{},
                                                      .rate = all ? s.constant(s.sum_type(), rates, kBefore) : Tensor{}};
            const kernels::Backend& on = s.on();
            on.linear_recurrence(s.launch(), h, in, starts, form, layout.n);
            on.linear_recurrence_backward(s.launch(on.linear_recurrence_backward_workspace(h.type, form, layout.n)), gradients,
                                          dh, h, in, starts, form, layout.n);
            std::vector<Output> outputs{
                {"h", h, kSums, 0x1p-8}, {"da", gradients.a, kSums, 0x1p-7}, {"db", gradients.b, kSums, 0x1p-8}};
            if (all) {
              outputs.push_back({"du", gradients.u, kSums, 0x1p-8});
              outputs.push_back({"drate", gradients.rate, 4 * kSums, 0x1p-7, kBefore});
            }
            return outputs;
          },
          large};
}

Case convolution(const Layout& layout, std::int64_t columns, std::int64_t taps, bool large = false) {
  return {concat("causal_conv_silu ", layout.name, ", ", layout.sequences, 'x', layout.n, 'x', columns, ", ", taps, " taps"),
          [=](Side& s) {
            constexpr double kBefore = 0.5, kSums = 1e-5;
            const Shape shape{layout.sequences * layout.n, columns};
            const Tensor starts = s.integers(HostTable(layout).starts), x = s.numbers(shape), dout = s.numbers(shape);
            const Tensor weight = s.sums({columns, taps}), out = s.output(shape), dx = s.output(shape);
            const Tensor dweight = s.constant(s.sum_type(), {columns, taps}, kBefore);
            const kernels::Backend& on = s.on();
            on.causal_conv_silu(s.launch(), out, x, weight, starts);
            on.causal_conv_silu_backward(s.launch(on.causal_conv_silu_backward_workspace(x.type, weight.type)), dx, dweight,
                                         dout, x, weight, starts);
            return std::vector<Output>{
                {"out", out, kSums, 0x1p-8}, {"dx", dx, kSums, 0x1p-8}, {"dweight", dweight, kSums, 1e-4, kBefore}};
          },
          large};
}

}  // namespace

std::vector<Case> mixer_cases() {
  using Form = kernels::RecurrenceForm;
  const Layout chunks{"chunks of 8", 2, 90, "uniform", 8, 16}, own{"own chunk", 1, 65, "cyclic", 8, 0},
      random{"random", 3, 70, "random", 8, 5}, causal{"causal", 1, 130}, window{"window of 37", 1, 150, "", 8, 37},
      pseudo{"pseudo-chunks", 1, 80, "none", 8, 16}, documents{"documents", 2, 120, "uniform", 8, 16, {0, 1, 40, 41, 99}},
      one{"one token", 2, 1, "uniform", 8, 16}, long_chunks{"chunks of 70", 1, 150, "uniform", 70, 16},
      paper{"paper", 4, 1024, "cyclic", 8, 8}, paper_long{"paper, long", 1, 8192, "uniform", 8, 16}, dense{"dense", 2, 2048};
  const kernels::ScanShape small{.hidden = 32, .state = 8, .heads = 4},
      odd{.hidden = 21, .state = 5, .heads = 3, .groups = 3, .conv = 3},
      plain{.hidden = 32, .state = 8, .heads = 2, .groups = 1, .conv = 0}, papers{.hidden = 256, .state = 32, .heads = 8},
      large{.hidden = 256, .state = 128, .heads = 8}, wide{.hidden = 1024, .state = 32, .heads = 16},
      wide_large{.hidden = 512, .state = 128, .heads = 8}, mamba{.hidden = 1024, .state = 128, .heads = 16, .groups = 16};
  return {attention(chunks, 2, 2, 64),
          attention(chunks, 4, 2, 128),
          attention(own, 2, 1, 32),
          attention(random, 2, 2, 64),
          attention(causal, 2, 2, 64),
          attention(window, 4, 1, 64),
          attention(pseudo, 1, 1, 64),
          attention(documents, 2, 1, 64),
          attention(chunks, 2, 2, 5),
          attention(chunks, 1, 1, 40),
          attention(paper, 8, 8, 64, true),
          attention(paper_long, 8, 8, 64, true),
          attention(dense, 8, 8, 64, true),
          scan(chunks, small, true, false),
          scan(random, odd, true, false),
          scan(long_chunks, small, false, false),
          scan(causal, plain, true, false),
          scan(one, small, false, false),
          scan(chunks, papers, true, true),
          scan(long_chunks, papers, false, true),
          scan(own, large, true, true),
          scan(chunks, wide, true, true),
          scan(long_chunks, wide, false, true),
          scan(paper, papers, false, true, true),
          scan(dense, papers, false, true, true),
          scan(chunks, wide_large, true, true),
          scan(causal, mamba, true, true),
          scan(paper, wide, false, true, true),
          scan(dense, wide, false, true, true),
          scan(dense, mamba, false, true, true),
          scan(chunks, small, true, false, false, true),
          scan(own, papers, false, true, false, true),
          scan(chunks, large, true, true, false, true),
          scan(paper, papers, false, true, true, true),
          scan(paper, large, false, true, true, true),
          recurrence(causal, Form::plain, 40),
          recurrence(documents, Form::min_gru, 132),
          recurrence(random, Form::rg_lru, 34),
          recurrence(dense, Form::min_gru, 1280, true),
          recurrence(dense, Form::rg_lru, 768, true),
          convolution(documents, 40, 4),
          convolution(random, 33, 8),
          convolution(dense, 1280, 4, true)};
}

}  // namespace attamba::gpu_check
