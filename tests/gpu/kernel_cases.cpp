// Products, the vocabulary's ends, norms, pointwise kernels and the update.
#include <cmath>

#include "src/core/error.h"
#include "tests/gpu/side.h"

namespace attamba::gpu_check {

namespace {

// One rounding to bfloat16 moves an element by at most 2^-9 of itself; the sixteenth on top is for float32's own roundings.
constexpr double kRounded = 0x1.1p-9;
constexpr double kSum = 1e-5;        // float32 sums of up to 10^4 terms of mixed sign
constexpr double kPointwise = 1e-6;  // a few float32 roundings of 2^-24, and the GPU's fast exponentials
constexpr double kNothing = 0;

std::vector<std::int32_t> spread(std::int64_t count, std::int64_t bound) {
  std::vector<std::int32_t> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(static_cast<std::int32_t>((i * i * 7 + i * 5 + 3) % bound));
  }
  return values;
}

Case product(std::int64_t m, std::int64_t n, std::int64_t k, bool transpose_a, bool transpose_b, bool add, bool to_sums,
             bool large = false) {
  const std::string name = concat("matmul ", m, 'x', n, 'x', k, transpose_a ? " a^T" : "", transpose_b ? " b^T" : "",
                                  add ? " +=" : "", to_sums ? " to sums" : "");
  return {name,
          [=](Side& s) {
            const Tensor a = s.numbers(transpose_a ? Shape{k, m} : Shape{m, k});
            const Tensor b = s.numbers(transpose_b ? Shape{n, k} : Shape{k, n});
            const DType type = to_sums ? s.sum_type() : s.type();
            const Tensor out = add ? s.constant(type, {m, n}, 0.5) : s.output(type, {m, n});
            const Launch launch = s.launch(s.on().matmul_workspace(out.type, a.type, b.type, transpose_a, transpose_b));
            s.on().matmul(launch, out, a, b, transpose_a, transpose_b, add ? out : Tensor{});
            return std::vector<Output>{{"out", out, kSum, to_sums ? kSum : kRounded}};
          },
          large};
}

Case embedding(std::int64_t rows, std::int64_t width, std::int64_t words) {
  return {concat("embedding ", rows, " of ", words, 'x', width), [=](Side& s) {
            const Tensor table = s.numbers({words, width}), tokens = s.integers(spread(rows, words));
            const Tensor out = s.output({rows, width}), dout = s.numbers({rows, width});
            const Tensor dtable = s.constant(s.sum_type(), {words, width}, 0.5);
            s.on().embedding(s.launch(), out, table, tokens);
            s.on().embedding_backward(s.launch(s.on().embedding_backward_workspace(dout.type)), dtable, dout, tokens);
            return std::vector<Output>{{"out", out, kNothing, kNothing}, {"dtable", dtable, kSum, kSum, 0.5}};
          }};
}

/// In bfloat16 logits and their gradient are rounded once each: a logit x moves by 2^-9 |x|, and with it its probability by
/// that factor; the widest logits here are about 5.
Case loss(std::int64_t rows, std::int64_t width, std::int64_t words, bool large = false) {
  const std::string name = concat("linear_cross_entropy ", rows, 'x', width, 'x', words);
  return {name,
          [=](Side& s) {
            const Tensor hidden = s.numbers({rows, width}), weight = s.numbers({words, width}, 1 / std::sqrt(width));
            std::vector<std::int32_t> words_of_targets = spread(rows, words);
            words_of_targets[static_cast<std::size_t>(rows / 2)] = -1;  // no target
            const Tensor targets = s.integers(words_of_targets);
            const Tensor alone = s.output(s.sum_type(), {rows}), losses = s.output(s.sum_type(), {rows});
            const Tensor dhidden = s.output({rows, width}), dweight = s.constant(s.sum_type(), {words, width}, 0);
            const kernels::Backend& on = s.on();
            on.linear_cross_entropy(s.launch(on.linear_cross_entropy_workspace(hidden.type, weight.type, false)), alone, hidden,
                                    weight, targets);
            on.linear_cross_entropy_with_gradient(s.launch(on.linear_cross_entropy_workspace(hidden.type, weight.type, true)),
                                                  losses, dhidden, dweight, hidden, weight, targets,
                                                  1.0 / static_cast<double>(rows));
            return std::vector<Output>{{"loss", alone, kSum, kSum},
                                       {"losses", losses, kSum, 0x1p-7},
                                       {"dhidden", dhidden, kSum, 0x1p-7},
                                       {"dweight", dweight, kSum, 0x1p-7}};
          },
          large};
}

Case norm(std::int64_t rows, std::int64_t width, bool large = false) {
  const std::string name = concat("rms_norm ", rows, 'x', width);
  return {name,
          [=](Side& s) {
            constexpr double kEps = 1e-5;
            const Tensor x = s.numbers({rows, width}), y = s.numbers({rows, width}), weight = s.sums({width}, 0.1, 1);
            const Tensor dout = s.numbers({rows, width}), addend = s.numbers({rows, width});
            const Tensor out = s.output({rows, width}), sum = s.output({rows, width}), out_of_sum = s.output({rows, width});
            const Tensor dx = s.output({rows, width}), dx_added = s.output({rows, width});
            const Tensor dweight = s.constant(s.sum_type(), {width}, 0.5), again = s.constant(s.sum_type(), {width}, 0.5);
            const kernels::Backend& on = s.on();
            on.rms_norm(s.launch(), out, x, weight, kEps);
            on.add_rms_norm(s.launch(), sum, out_of_sum, x, y, weight, kEps);
            const auto backward = [&](const Tensor& to, const Tensor& gradient, const Tensor& added) {
              on.rms_norm_backward(s.launch(on.rms_norm_backward_workspace(x.type)), to, gradient, dout, x, weight, added,
                                   kEps);
            };
            backward(dx, dweight, {});
            backward(dx_added, again, addend);
            return std::vector<Output>{{"out", out, kPointwise, kRounded},
                                       {"sum", sum, kPointwise, kRounded},
                                       {"out of sum", out_of_sum, kPointwise, 2 * kRounded},  // of a rounded sum
                                       {"dx", dx, kPointwise * 4, kRounded},
                                       {"dx + addend", dx_added, kPointwise * 4, kRounded},
                                       {"dweight", dweight, kSum, kSum, 0.5},
                                       {"dweight 2", again, kSum, kSum, 0.5}};
          },
          large};
}

Case pointwise(std::int64_t rows, std::int64_t width) {
  return {concat("add, swiglu, fill ", rows, 'x', width), [=](Side& s) {
            const Shape shape{rows, width};
            const Tensor a = s.numbers(shape), b = s.numbers(shape), dout = s.numbers(shape);
            const Tensor sum = s.output(shape), gated = s.output(shape), dgate = s.output(shape), dup = s.output(shape),
                         filled = s.output(shape);
            s.on().add(s.launch(), sum, a, b);
            s.on().swiglu(s.launch(), gated, a, b);
            s.on().swiglu_backward(s.launch(), dgate, dup, dout, a, b);
            s.on().fill(s.launch(), filled, 0.375);
            return std::vector<Output>{{"sum", sum, kPointwise, kRounded},
                                       {"swiglu", gated, kPointwise, kRounded},
                                       {"dgate", dgate, kPointwise, kRounded},
                                       {"dup", dup, kPointwise, kRounded},
                                       {"filled", filled, kNothing, kNothing}};
          }};
}

Case rotary(std::int64_t rows, std::int64_t heads, std::int64_t d) {
  return {concat("rope ", rows, 'x', heads, 'x', d), [=](Side& s) {
            const std::int64_t positions = 50;
            const Shape shape{rows, heads, d};
            const Tensor x = s.numbers(shape), product = s.sums(shape), addend = s.numbers(shape);
            const Tensor table = s.sums({positions, d}), at = s.integers(spread(rows, positions));
            const Tensor out = s.output(shape), back = s.output(shape), added = s.output(shape);
            s.on().rope(s.launch(), out, x, {}, table, at, false);
            s.on().rope(s.launch(), back, x, {}, table, at, true);
            s.on().rope(s.launch(), added, product, addend, table, at, false);
            return std::vector<Output>{{"out", out, kPointwise, kRounded},
                                       {"inverse", back, kPointwise, kRounded},
                                       {"added", added, kPointwise, kRounded}};
          }};
}

Case fixed_point(std::int64_t elements) {
  Case c{concat("fixed point ", elements), [=](Side& s) {
           const Shape shape{elements};
           const Tensor losses = s.sums(shape, 2, 8), totals = s.constant(DType::int64, {2}, 5);
           const Tensor gradient = s.sums(shape, 0.01), sums = s.constant(DType::int64, shape, 3);
           const Tensor poisoned = s.constant(DType::int64, {1}, 0), back = s.output(s.sum_type(), shape);
           s.on().accumulate_loss(s.launch(), totals, losses);
           s.on().add_to_fixed_point(s.launch(), sums, poisoned, gradient, 0.03);  // three in a thousand exceed that
           const Tensor counted = s.constant(DType::int64, {1}, 0);
           s.on().fixed_point_to_float(s.launch(), back, sums, counted);
           return std::vector<Output>{{"totals", totals, kNothing, kNothing},
                                      {"poisoned", poisoned, kNothing, kNothing},
                                      {"gradient", gradient, kNothing, kNothing},
                                      {"sums", sums, kNothing, kNothing},
                                      {"back", back, kNothing, kNothing}};
         }};
  c.in_float64 = false;
  c.types = {DType::float32};
  return c;
}

Case update(std::int64_t rows, std::int64_t width, double clip) {
  return {concat("square_sum, square_digits, adamw ", rows, 'x', width, " clip ", clip), [=](Side& s) {
            std::vector<kernels::AdamWParameter> parameters;
            std::vector<Tensor> gradients;
            std::vector<TensorType> types;
            for (const Shape& shape : {Shape{rows, width}, Shape{width}, Shape{rows, 3}}) {
              kernels::AdamWParameter p{.compute = s.type() == s.sum_type() ? Tensor{} : s.output(shape),
                                        .master = s.sums(shape),
                                        .moment1 = s.sums(shape, 0.1),
                                        .moment2 = s.sums(shape, 0.1, 1),
                                        .gradient = s.sums(shape, 0.1)};
              gradients.push_back(p.gradient);
              types.push_back(p.gradient.type);
              parameters.push_back(p);
            }
            std::vector<double> fields(kernels::kStepFields, 0.25);
            fields[kernels::kStepNormLimit] = 0;
            const Tensor step = s.float64s(fields), norm = s.output(DType::float64, {1});
            const Tensor digits = s.output(DType::int64, {kernels::kSquareDigits}), exact = s.output(DType::float64, {1});
            s.on().square_sum(s.launch(s.on().square_sum_workspace(types)), norm, gradients);
            s.on().square_digits(s.launch(s.on().square_digits_workspace(types)), digits, gradients);
            s.on().square_digits_to_float(s.launch(), exact, digits);
            s.on().adamw(s.launch(), step, parameters, norm, {.weight_decay = 0.1, .clip = clip});
            std::vector<Output> outputs{{"norm^2", norm, 1e-12, 1e-12},
                                        {"exact norm^2", exact, 1e-12, 1e-12},
                                        {"gradient", gradients[0], kNothing, kNothing}};
            for (const kernels::AdamWParameter& p : parameters) {
              const std::string of = concat(' ', p.master.shape().rank(), "d ", p.master.shape().columns());
              outputs.push_back({"master" + of, p.master, kPointwise, kPointwise});
              outputs.push_back({"moment1" + of, p.moment1, kPointwise, kPointwise});
              outputs.push_back({"moment2" + of, p.moment2, kPointwise, kPointwise});
            }
            // Where there is no copy, as in the reference, the master is what one would hold.
            const kernels::AdamWParameter& first = parameters.front();
            outputs.push_back({"copy", first.compute ? first.compute : first.master, kPointwise, kRounded});
            return outputs;
          }};
}

}  // namespace

std::vector<Case> kernel_cases() {
  return {product(64, 64, 64, false, false, false, false),
          product(96, 200, 72, false, true, false, false),
          product(96, 200, 72, true, false, true, true),
          product(33, 17, 9, false, true, false, true),
          product(1, 40, 128, false, true, false, false),
          product(2048, 1680, 512, false, true, false, false, true),
          product(1680, 512, 4096, true, false, true, true, true),
          embedding(70, 64, 50),
          embedding(33, 20, 500),
          loss(70, 64, 200),
          loss(9, 20, 33),
          loss(4500, 512, 32000, true),
          norm(37, 64),
          norm(5, 20),
          norm(3, 1000),
          norm(8192, 512, true),
          pointwise(13, 24),
          pointwise(1, 7),
          rotary(20, 4, 64),
          rotary(7, 3, 6),
          fixed_point(1000),
          update(20, 24, 0),
          update(20, 24, 0.5)};
}

}  // namespace attamba::gpu_check
