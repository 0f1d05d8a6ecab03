// attamba bench matmul: every matrix product of a training step, by our tiles and by the matrix library alone.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <compare>
#include <cstdio>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "comm/single_process.h"
#include "kernels/benchmarks.h"
#include "kernels/kernels.h"
#include "launch/bench.h"
#include "launch/config_options.h"
#include "launch/session.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/core/version.h"
#include "src/train/metrics.h"
#include "src/train/programs.h"

namespace attamba {

namespace {

constexpr double kBlockSeconds = 0.05;                        ///< least time that one side runs before the other's turn
constexpr auto kPause = std::chrono::milliseconds(100);       ///< waiting threads of either library spin for 30 and more
constexpr std::int64_t kLossChunk = 512, kLossTokens = 1024;  ///< tokens of the loss's products, and of the loss itself
constexpr double kQuiet = 0.1;                                ///< turns of an idle machine differ by less
constexpr double kNever = std::numeric_limits<double>::infinity();

struct BenchMatmulOptions {
  ConfigOptions config;
  std::int64_t repeats = 5;
  std::string json;
};

enum class Addend : std::uint8_t { none, separate, in_place };

/// out [M, N] = op(a) op(b) (+ addend): what distinguishes one call of kernels::matmul from another.
struct Product {
  std::int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false, transpose_b = false;
  Addend addend = Addend::none;
  DType input = DType::float32, output = DType::float32;

  double flops() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k); }
  std::string formula() const {
    return concat(transpose_a ? "a^T" : "a", transpose_b ? " b^T" : " b",
                  addend == Addend::none       ? ""
                  : addend == Addend::separate ? " + c"
                                               : " +=");
  }
  friend auto operator<=>(const Product&, const Product&) = default;
};

struct Use {
  double runs = 0;    ///< per micro-batch of a step
  std::string where;  ///< the first place
};

/// Seconds of one run on both sides.
struct Times {
  double library = 0, ours = 0;
  double ratio() const { return library / ours; }
  void add(double runs, const Times& times) {
    library += runs * times.library;
    ours += runs * times.ours;
  }
};

/// The best run of all turns is what the machine can do; the median of the turns tells whether it was left alone meanwhile.
struct Measured {
  Times best, median;
};

/// The loss's two operands, found in the program: hidden [T, D], weight [V, D].
struct Loss {
  TensorType hidden, weight;
  bool found = false;
};

using Products = std::map<Product, Use>;

void count(Products& products, const Product& product, double runs, const std::string& where) {
  Use& use = products[product];
  use.runs += runs;
  use.where = use.where.empty() ? where : use.where;
}

/// Which operands a matmul op transposes: extents that fit only one way tell, square ones of the model would not.
std::pair<bool, bool> transpositions(const Op& op, bool has_addend) {
  const Shape out{2, 5};
  for (const bool a : {false, true}) {
    for (const bool b : {false, true}) {
      std::vector<TensorType> types{{DType::float32, a ? Shape{3, 2} : Shape{2, 3}},
                                    {DType::float32, b ? Shape{5, 3} : Shape{3, 5}}};
      if (has_addend) {
        types.push_back({DType::float32, out});
      }
      try {
        if (op.infer(types).at(0).shape == out) {
          return {a, b};
        }
      } catch (const UsageError&) {  // not this way
      }
    }
  }
  throw Error("bench matmul: an op named matmul multiplies no matrices");
}

Product product_of_matmul(const Program::Step& step) {
  const bool has_addend = step.inputs.size() > 2;
  const auto [transpose_a, transpose_b] = transpositions(*step.op, has_addend);
  const Shape &a = step.inputs[0].shape(), &out = step.outputs[0].shape();
  return {.m = out.rows(),
          .n = out.columns(),
          .k = transpose_a ? a.rows() : a.columns(),
          .transpose_a = transpose_a,
          .transpose_b = transpose_b,
          .addend = !has_addend                                   ? Addend::none
                    : step.inputs[2].data == step.outputs[0].data ? Addend::in_place
                                                                  : Addend::separate,
          .input = step.inputs[0].dtype(),
          .output = step.outputs[0].dtype()};
}

/// gradient [N, K] += dy [T, N]^T x [T, K].
Product product_of_weight_gradient(const Program::Step& step) {
  return {.m = step.inputs[0].shape().columns(),
          .n = step.inputs[1].shape().columns(),
          .k = step.inputs[0].shape().rows(),
          .transpose_a = true,
          .addend = Addend::in_place,
          .input = step.inputs[0].dtype(),
          .output = step.inputs[2].dtype()};
}

/// logits = hidden weight^T, dhidden = dlogits weight, dweight += dlogits^T hidden, a chunk of tokens at a time.
Loss add_loss_products(Products& products, const Program::Step& step) {
  const Loss loss{step.inputs[0].type, step.inputs[1].type, true};
  const std::int64_t tokens = loss.hidden.shape.rows(), width = loss.hidden.shape.columns(), words = loss.weight.shape.rows();
  const std::int64_t chunks = (tokens + kLossChunk - 1) / kLossChunk, chunk = (tokens + chunks - 1) / chunks;
  const double runs = static_cast<double>(tokens) / static_cast<double>(chunk);
  const DType input = loss.hidden.dtype, output = accumulator_of(input);
  count(products, {.m = chunk, .n = words, .k = width, .transpose_b = true, .input = input, .output = output}, runs,
        "loss: logits");
  count(products, {.m = chunk, .n = width, .k = words, .input = input, .output = output}, runs, "loss: dhidden");
  count(products,
        {.m = words, .n = width, .k = chunk, .transpose_a = true, .addend = Addend::in_place, .input = input, .output = output},
        runs, "loss: dweight");
  return loss;
}

/// Owned tensors with values that are neither all alike nor denormal.
class Operands {
 public:
  Tensor make(DType dtype, const Shape& shape) {
    const Tensor tensor{buffers_.emplace_back(Device::cpu, TensorType{dtype, shape}.bytes(), "a benchmark").data(),
                        {dtype, shape}};
    switch (dtype) {
      case DType::bfloat16:
        fill<bfloat16>(tensor);
        break;
      case DType::float64:
        fill<double>(tensor);
        break;
      case DType::float32:
        fill<float>(tensor);
        break;
      default:  // tokens: 0
        break;
    }
    return tensor;
  }

  Launch launch(std::size_t scratch) {
    const Memory& buffer = buffers_.emplace_back(Device::cpu, std::max<std::size_t>(scratch, 64), "a benchmark");
    return {.scratch = {buffer.data(), buffer.size()}};
  }

 private:
  template <class T>
  static void fill(const Tensor& tensor) {
    T* values = tensor.as<T>();
    parallel_ranges(tensor.elements(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        values[i] = T((static_cast<float>(i * 2654435761 % 4093) / 4093 - 0.5f) / 8);
      }
    });
  }

  std::vector<Memory> buffers_;
};

/// out, a and b of one product, and what is added.
struct ProductTensors {
  Tensor out, a, b, addend;

  ProductTensors(Operands& operands, const Product& product, DType input, DType output)
      : out(operands.make(output, {product.m, product.n})),
        a(operands.make(input, product.transpose_a ? Shape{product.k, product.m} : Shape{product.m, product.k})),
        b(operands.make(input, product.transpose_b ? Shape{product.n, product.k} : Shape{product.k, product.n})),
        addend(product.addend == Addend::none       ? Tensor{}
               : product.addend == Addend::in_place ? out
                                                    : operands.make(output, out.shape())) {}
};

/// Runs for a while after the other side's threads have gone to sleep; the best seconds of one run.
template <class Body>
double best_of_block(const Body& body) {
  std::this_thread::sleep_for(kPause);
  double best = kNever;
  const double begin = monotonic_seconds();
  do {
    const double start = monotonic_seconds();
    body();
    best = std::min(best, monotonic_seconds() - start);
  } while (monotonic_seconds() - begin < kBlockSeconds);
  return best;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Both sides in turn, so that what disturbs the machine disturbs both. On a processor without bfloat16 products the library
/// multiplies float32 copies.
Measured measure(const Product& product, std::int64_t repeats) {
  Operands operands;
  const ProductTensors ours(operands, product, product.input, product.output);
  const DType type = kernels::cpu::library_operand_type(product.input);
  const ProductTensors theirs = type == product.input ? ours : ProductTensors(operands, product, type, accumulator_of(type));
  const Launch launch = operands.launch(
      kernels::cpu::matmul_workspace(ours.out.type, ours.a.type, ours.b.type, product.transpose_a, product.transpose_b));
  const auto library = kernels::cpu::library_matmul(theirs.out, theirs.a, theirs.b, product.transpose_a, product.transpose_b,
                                                    product.addend != Addend::none);
  std::vector<double> library_turns, our_turns;
  for (std::int64_t i = 0; i < repeats; ++i) {
    library_turns.push_back(best_of_block(library));
    our_turns.push_back(best_of_block([&] {
      kernels::cpu::matmul(launch, ours.out, ours.a, ours.b, product.transpose_a, product.transpose_b, ours.addend);
    }));
  }
  const auto best = [](const std::vector<double>& turns) { return *std::min_element(turns.begin(), turns.end()); };
  return {{best(library_turns), best(our_turns)}, {median(library_turns), median(our_turns)}};
}

/// Seconds of the loss with its gradient as it trains, softmax included, for all tokens of the micro-batch.
double measure_loss(const Loss& loss, std::int64_t repeats) {
  Operands operands;
  const std::int64_t all = loss.hidden.shape.rows(), tokens = std::min(all, kLossTokens);
  const DType type = loss.hidden.dtype, sum = accumulator_of(type);
  const Shape shape{tokens, loss.hidden.shape.columns()};
  const Tensor hidden = operands.make(type, shape), dhidden = operands.make(type, shape);
  const Tensor weight = operands.make(type, loss.weight.shape), dweight = operands.make(sum, loss.weight.shape);
  const Tensor losses = operands.make(sum, {tokens}), targets = operands.make(DType::int32, {tokens});
  const Launch launch = operands.launch(kernels::cpu::linear_cross_entropy_workspace(hidden.type, weight.type, true));
  double best = kNever;
  for (std::int64_t i = 0; i < repeats; ++i) {
    best = std::min(best, best_of_block([&] {
                      kernels::cpu::linear_cross_entropy_with_gradient(launch, losses, dhidden, dweight, hidden, weight,
                                                                       targets, 1.0 / static_cast<double>(tokens));
                    }));
  }
  return best * static_cast<double>(all) / static_cast<double>(tokens);
}

/// The program is planned but never run: its list of ops is all that is wanted.
Loss collect(Products& products, const Config& config, Communicator& communicator) {
  const auto chunking = make_model_chunking(config.model, config.data.sequence_length);
  const ModelPrograms programs(program_options(config, chunking.get(), Device::cpu), communicator);
  Loss loss;
  for (const Program::Step& step : programs.closing_program().steps()) {
    if (step.op->name() == "matmul") {
      count(products, product_of_matmul(step), 1, step.scope);
    } else if (step.op->name() == "linear_weight_gradient") {
      count(products, product_of_weight_gradient(step), 1, concat("gradient of ", step.scope));
    } else if (step.op->name() == "linear_cross_entropy") {
      loss = add_loss_products(products, step);
    }
  }
  return loss;
}

class Report {
 public:
  explicit Report(const Config& config) : dtype_(config.train.compute_dtype()) {
    const char* library = kernels::cpu::library_name(dtype_);
    std::cout << version_line() << "\n  " << config.model.kind << ", " << format_integer(parameter_count(config.model))
              << " parameters, " << config.train.micro_batch << " x " << config.data.sequence_length << " tokens, "
              << config.train.dtype << ", " << thread_count() << " threads; library: " << library << '\n';
    if (compared_type() != dtype_) {
      std::cout
          << "  no bfloat16 products on this processor: the library multiplies float32 matrices, ours converts and adds up "
             "bfloat16 ones\n";
    }
    std::printf("  %7s %7s %7s  %-9s %9s %9s %9s %7s  %s\n", "M", "N", "K", "product", "runs/step", "library", "ours", "ratio",
                "GFLOP/s; first use");
    json_ = {{"version", version_line()},
             {"model", config.model.kind},
             {"dtype", config.train.dtype},
             {"threads", thread_count()},
             {"micro_batch", config.train.micro_batch},
             {"sequence_length", config.data.sequence_length},
             {"library", library},
             {"library_dtype", name_of(compared_type())},
             {"products", nlohmann::json::array()}};
  }

  void add(const Product& product, const Use& use, const Measured& times) {
    const std::string formula = product.formula();
    std::printf("  %7lld %7lld %7lld  %-9s %9.4g %9.1f %9.1f %6.1f%%  %s\n", static_cast<long long>(product.m),
                static_cast<long long>(product.n), static_cast<long long>(product.k), formula.c_str(), use.runs,
                product.flops() / times.best.library / 1e9, product.flops() / times.best.ours / 1e9, 100 * times.best.ratio(),
                use.where.c_str());
    std::fflush(stdout);
    json_["products"].push_back({{"m", product.m},
                                 {"n", product.n},
                                 {"k", product.k},
                                 {"product", formula},
                                 {"input", name_of(product.input)},
                                 {"output", name_of(product.output)},
                                 {"runs_per_step", use.runs},
                                 {"first_use", use.where},
                                 {"library_seconds", times.best.library},
                                 {"seconds", times.best.ours},
                                 {"ratio", times.best.ratio()},
                                 {"median_library_seconds", times.median.library},
                                 {"median_seconds", times.median.ours}});
    total_.add(use.runs, times.best);
    typical_.add(use.runs, times.median);
    if (use.where.starts_with("loss: ")) {
      loss_products_.add(use.runs, times.best);
    }
  }

  void finish(double loss_seconds) {
    print_total("all products of a step", "ratio", total_);
    print_total("  median turns instead of best runs", "median_ratio", typical_);
    if (loss_seconds > 0) {
      print_total("  the loss as it trains, softmax included", "loss_ratio", {loss_products_.library, loss_seconds});
      print_total("all, with the loss as it trains", "ratio_with_loss",
                  {total_.library, total_.ours - loss_products_.ours + loss_seconds});
    }
    const double disturbance = std::max(typical_.library / total_.library, typical_.ours / total_.ours) - 1;
    json_["disturbance"] = disturbance;
    if (disturbance > kQuiet) {
      std::printf("  turns differ by %.0f%%: something else uses this machine's cores, and these numbers say little\n",
                  100 * disturbance);
    }
  }

  const nlohmann::json& json() const { return json_; }

 private:
  DType compared_type() const { return kernels::cpu::library_operand_type(dtype_); }

  void print_total(const char* what, const char* key, const Times& times) {
    std::printf("  %-41s library %9.2f ms, ours %9.2f ms, ratio %5.1f%%\n", what, times.library * 1e3, times.ours * 1e3,
                100 * times.ratio());
    json_[key] = times.ratio();
  }

  DType dtype_;
  Times total_, typical_, loss_products_;  ///< of a step
  nlohmann::json json_;
};

void bench_matmul(const BenchMatmulOptions& options) {
  const Config config = options.config.load();
  SingleProcess communicator;
  set_threads(config.train.threads, communicator);
  Products products;
  const Loss loss = collect(products, config, communicator);
  std::vector<std::pair<Product, Use>> rows(products.begin(), products.end());
  std::stable_sort(rows.begin(), rows.end(), [](const auto& x, const auto& y) {
    return x.second.runs * x.first.flops() > y.second.runs * y.first.flops();
  });
  Report report(config);
  for (const auto& [product, use] : rows) {
    report.add(product, use, measure(product, options.repeats));
  }
  report.finish(loss.found ? measure_loss(loss, options.repeats) : 0);
  write_json(options.json, report.json());
}

}  // namespace

std::string matmul_formula(const Program::Step& step) {
  return step.op->name() == "matmul" ? product_of_matmul(step).formula() : std::string();
}

void add_bench_matmul_command(CLI::App& bench) {
  auto options = std::make_shared<BenchMatmulOptions>();
  CLI::App* command = bench.add_subcommand("matmul", "matrix products of a step, against the matrix library alone");
  add_config_options(*command, options->config);
  add_device_option(*command, options->config);
  command->add_option("--repeats", options->repeats, "turns of each side; the best run counts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--json", options->json, "also write the result to this file");
  command->callback([options] { bench_matmul(*options); });
}

}  // namespace attamba
