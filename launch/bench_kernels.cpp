// attamba bench kernels: every kernel of a training step by itself, and attention by sequence length. Each runs over operands
// of its own that together are larger than any cache, as one recording where the device records: what is timed is the kernel
// at the bandwidth of memory, without launches and without the kernels before it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "kernels/kernels.h"
#include "launch/bench.h"
#include "launch/config_options.h"
#include "src/chunking/table.h"
#include "src/core/error.h"
#include "src/core/storage.h"

namespace attamba {

namespace {

constexpr std::size_t kBeyondCaches = std::size_t{256} << 20;  ///< the largest cache of a GPU today is half of that
constexpr std::size_t kMostSets = 64;

struct BenchKernelsOptions {
  ConfigOptions config;
  double seconds = 0.2;
  std::int64_t repeats = 10;
  std::vector<std::int64_t> lengths;
  std::int64_t tokens = 0;
  std::string json;
  std::string compare;
  std::string python = "python3";
};

/// Fresh operands of benchmarks, freed together.
class Operands {
 public:
  explicit Operands(Device device) : device_(device) {}
  Tensor make(const TensorType& type) {
    const Memory& memory = memory_.emplace_back(device_, type.bytes(), "a benchmark");
    return {memory.data(), type, device_};
  }
  Tensor filled(DType dtype, const Shape& shape) {
    const Tensor tensor = make({dtype, shape});
    fill_with_numbers(tensor);
    return tensor;
  }
  Tensor copy_of(const Tensor& from) {
    const Tensor tensor = make(from.type);
    runtime(device_).copy_on_device(tensor.data, from.data, from.bytes());
    return tensor;
  }
  Launch launch(std::size_t scratch) {
    const Memory& memory = memory_.emplace_back(device_, std::max<std::size_t>(scratch, 64), "a benchmark");
    return {.device = device_, .stream = runtime(device_).stream(), .scratch = {memory.data(), memory.size()}};
  }

 private:
  Device device_;
  std::vector<Memory> memory_;
};

bool is_floating(const Tensor& tensor) {
  return tensor.dtype() != DType::int32 && tensor.dtype() != DType::int64;
}

/// The operands of one run of an op. What it writes in place and what holds integers (tokens, tables) are the program's own
/// leaves, as they are; everything else is memory of its own, so that a run does not change what the next one reads.
struct OperandSet {
  std::vector<Tensor> inputs, outputs;

  OperandSet(Operands& operands, const Program::Step& step) : inputs(step.inputs) {
    const std::vector<int> in_place = step.op->mutated();
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const bool kept = std::find(in_place.begin(), in_place.end(), static_cast<int>(i)) != in_place.end();
      if (!kept && is_floating(inputs[i])) {
        inputs[i] = operands.filled(inputs[i].dtype(), inputs[i].shape());
      }
    }
    add_outputs(operands, step);
  }
  /// The same numbers elsewhere.
  OperandSet(Operands& operands, const Program::Step& step, const OperandSet& first) : inputs(step.inputs) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (first.inputs[i].data != inputs[i].data) {
        inputs[i] = operands.copy_of(first.inputs[i]);
      }
    }
    add_outputs(operands, step);
  }

 private:
  void add_outputs(Operands& operands, const Program::Step& step) {
    for (const Tensor& output : step.outputs) {
      outputs.push_back(operands.make(output.type));
    }
  }
};

Timing measure(const Program::Step& step, Device device, double seconds) {
  Operands operands(device);
  std::vector<OperandSet> sets;
  sets.emplace_back(operands, step);
  const std::size_t count = std::clamp<std::size_t>(kBeyondCaches / std::max<std::size_t>(step.bytes, 1) + 1, 1, kMostSets);
  while (sets.size() < count) {
    sets.emplace_back(operands, step, sets.front());
  }
  const Launch launch = operands.launch(step.scratch.size());
  return time_on(device, seconds, static_cast<double>(count), [&] {
    for (const OperandSet& set : sets) {
      step.op->run(launch, set.inputs, set.outputs);
    }
  });
}

/// One kernel at one shape.
struct Row {
  const Program::Step* step = nullptr;  ///< the first such
  std::string shapes;                   ///< of its first inputs and output, for people
  double runs = 0;                      ///< per step
  Timing timing;
};

/// What distinguishes kernels of a program: the op, the types of everything, and FLOPs for what attributes change.
std::string key_of(const Program::Step& step) {
  std::string key = concat(step.op->name(), ' ', step.flops, ' ', matmul_formula(step));
  for (const auto* tensors : {&step.inputs, &step.outputs}) {
    for (const Tensor& tensor : *tensors) {
      key += concat(' ', tensor.type);
    }
  }
  return key;
}

std::string shapes_of(const Program::Step& step) {
  std::string text = matmul_formula(step);
  for (std::size_t i = 0; i < std::min<std::size_t>(step.inputs.size(), 2); ++i) {
    text += concat(text.empty() ? "" : " ", step.inputs[i].shape());
  }
  return step.outputs.empty() ? text : concat(text, " -> ", step.outputs.front().shape());
}

std::vector<Row> kernels_of(const Program& program) {
  std::vector<Row> rows;
  std::map<std::string, std::size_t> places;
  for (const Program::Step& step : program.steps()) {
    const auto [place, fresh] = places.emplace(key_of(step), rows.size());
    if (fresh) {
      rows.push_back({&step, shapes_of(step), 0, {}});
    }
    ++rows[place->second].runs;
  }
  return rows;
}

// ---------------------------------------------------------------------------------------------------- kernels of a step
nlohmann::json bench_step_kernels(Benchmark& benchmark, const BenchKernelsOptions& options) {
  const Roofline& roofline = benchmark.roofline();
  const double whole = median_of(benchmark.steps(options.repeats));
  std::printf("  %-23s %-46s %5s %10s %10s %8s %9s %8s\n", "kernel", "shape", "runs", "best us", "median us", "GB/s", "GFLOP/s",
              "roofline");
  nlohmann::json kernels = nlohmann::json::array();
  double sum = 0, floor = 0;
  for (Row& row : kernels_of(benchmark.programs().closing_program())) {
    row.timing = measure(*row.step, benchmark.device(), options.seconds);
    const auto bytes = static_cast<double>(row.step->bytes);
    const double flops = row.step->flops, least = roofline.seconds(bytes, flops), median = row.timing.median;
    sum += row.runs * median;
    floor += row.runs * least;
    const std::string name(row.step->op->name());
    std::printf("  %-23s %-46s %5.0f %10.1f %10.1f %8.1f %9.0f %7.1f%%\n", name.c_str(), row.shapes.c_str(), row.runs,
                row.timing.best * 1e6, median * 1e6, bytes / median / 1e9, flops / median / 1e9, 100 * least / median);
    std::fflush(stdout);
    kernels.push_back({{"kernel", name},
                       {"shape", row.shapes},
                       {"first_use", row.step->scope},
                       {"runs_per_step", row.runs},
                       {"best_seconds", row.timing.best},
                       {"median_seconds", median},
                       {"timed", row.timing.runs},
                       {"bytes", bytes},
                       {"flops", flops},
                       {"bytes_per_s", bytes / median},
                       {"flops_per_s", flops / median},
                       {"roofline_share", least / median},
                       {"bound", bytes / roofline.bytes_per_s > flops / roofline.flops_per_s ? "memory" : "products"}});
  }
  std::printf(
      "  all kernels of a step %.3f ms, the roofline of each %.3f ms (%.1f%%); a whole step %.3f ms: %.1f%% outside kernels\n",
      sum * 1e3, floor * 1e3, 100 * floor / sum, whole * 1e3, 100 * (1 - sum / whole));
  return {{"kernels", kernels},
          {"kernels_seconds", sum},
          {"roofline_seconds", floor},
          {"step_seconds_median", whole},
          {"outside_share", 1 - sum / whole}};
}

// --------------------------------------------------------------------------------------------------- attention by length
struct Pattern {
  const char* name;
  const ChunkingStrategy* chunking;  ///< null: every earlier token
};

/// The table of a batch on the device, and how many keys a query sees.
struct AttentionCase {
  kernels::AttentionTable table;
  double keys = 0;

  AttentionCase(Operands& operands, const Pattern& pattern, std::int64_t leading, const BatchLayout& layout) {
    const auto rows = static_cast<std::size_t>(layout.sequences * layout.length);
    std::vector<std::int32_t> ends(rows), begin(rows), end(rows), local(rows), starts(rows);
    const ChunkTable host{ends, begin, end, local, starts};
    if (pattern.chunking != nullptr) {
      fill_chunk_table(host, *pattern.chunking, 0, leading, layout);
    } else {
      fill_causal_table(host, 0, layout);
    }
    const auto upload = [&](std::vector<std::int32_t>& values) {
      const TensorType type{DType::int32, {static_cast<std::int64_t>(rows)}};
      const Tensor tensor = operands.make(type);
      copy_from_host(tensor, {values.data(), type});
      return tensor;
    };
    table = {.ends = upload(ends), .key_begin = upload(begin), .key_end = upload(end), .local_begin = upload(local)};
    keys = average_keys(host);
  }
};

nlohmann::json bench_attention(const Benchmark& benchmark, const Pattern& pattern, const BatchLayout& layout, double seconds) {
  const ModelConfig& model = benchmark.config().model;
  const DType dtype = benchmark.config().train.compute_dtype();
  const Device device = benchmark.device();
  const std::int64_t rows = layout.sequences * layout.length, d = model.head_width();
  Operands operands(device);
  const AttentionCase masked(operands, pattern, model.chunking.leading_tokens, layout);
  const Shape queries{rows, model.n_heads, d}, keys{rows, model.kv_heads(), d};
  const Tensor q = operands.filled(dtype, queries), k = operands.filled(dtype, keys), v = operands.filled(dtype, keys);
  const Tensor dout = operands.filled(dtype, queries), out = operands.make(q.type), dq = operands.make(q.type);
  const Tensor dk = operands.make(k.type), dv = operands.make(k.type);
  const Tensor lse = operands.make({accumulator_of(dtype), {rows, model.n_heads}});
  const kernels::Backend& on = kernels::on(device);
  const Launch launch = operands.launch(std::max(on.attention_workspace(q.type, k.type, layout.length),
                                                 on.attention_backward_workspace(q.type, k.type, layout.length)));
  const auto forward = [&] { on.attention(launch, out, lse, q, k, v, masked.table, layout.length); };
  const auto backward = [&] {
    on.attention_backward(launch, dq, dk, dv, dout, out, lse, q, k, v, masked.table, layout.length);
  };
  nlohmann::json result{{"pattern", pattern.name},      {"sequence_length", layout.length}, {"sequences", layout.sequences},
                        {"heads", model.n_heads},       {"kv_heads", model.kv_heads()},     {"head_dim", d},
                        {"keys_per_query", masked.keys}};
  const double tables = 4.0 * static_cast<double>(rows) * 4;
  const auto add = [&](const char* name, double bytes, double flops, const std::function<void()>& body) {
    const Timing timing = time_calls(device, seconds, body);
    const double least = benchmark.roofline().seconds(bytes + tables, flops);
    result[name] = {{"best_seconds", timing.best},
                    {"median_seconds", timing.median},
                    {"bytes", bytes + tables},
                    {"flops", flops},
                    {"flops_per_s", flops / timing.median},
                    {"roofline_share", least / timing.median}};
    std::printf("  %-8s %8lld %9.1f  %-17s %12.1f %12.1f %9.0f %7.1f%%\n", pattern.name, static_cast<long long>(layout.length),
                masked.keys, name, timing.best * 1e6, timing.median * 1e6, flops / timing.median / 1e9,
                100 * least / timing.median);
    std::fflush(stdout);
  };
  const double pairs = static_cast<double>(q.elements()) * masked.keys;  // of a query and a key, times heads and d
  const auto reads = static_cast<double>(q.bytes() + k.bytes() + v.bytes() + lse.bytes());
  const auto written = static_cast<double>(q.bytes());
  add("forward", reads + written, 4 * pairs, forward);
  add("backward", 2 * reads + 2 * written - static_cast<double>(lse.bytes()), 10 * pairs, backward);
  add("forward_backward", 3 * reads + 3 * written - static_cast<double>(lse.bytes()), 14 * pairs, [&] {
    forward();
    backward();
  });
  return result;
}

nlohmann::json bench_lengths(const Benchmark& benchmark, const BenchKernelsOptions& options, std::int64_t tokens) {
  const ModelConfig& model = benchmark.config().model;
  require<UsageError>(model.has_attention(), "bench kernels: --lengths needs a model with attention, not ", model.kind);
  std::vector<Pattern> patterns;
  if (model.kind == "attamba" && model.chunking.strategy != "none") {
    patterns.push_back({"chunks", benchmark.chunking()});
  }
  patterns.push_back({"dense", nullptr});
  std::printf("  attention by sequence length, %lld tokens a call%s\n", static_cast<long long>(tokens),
              model.kind == "attamba"
                  ? concat("; chunks of ", model.chunking.size, ", ", model.chunking.leading_tokens, " leading tokens").c_str()
                  : "");
  std::printf("  %-8s %8s %9s  %-17s %12s %12s %9s %8s\n", "pattern", "length", "keys", "", "best us", "median us", "GFLOP/s",
              "roofline");
  nlohmann::json results = nlohmann::json::array();
  for (const std::int64_t length : options.lengths) {
    const BatchLayout layout{.sequences = std::max<std::int64_t>(1, tokens / length), .length = length};
    for (const Pattern& pattern : patterns) {
      results.push_back(bench_attention(benchmark, pattern, layout, options.seconds));
    }
  }
  return results;
}

// ------------------------------------------------------------------------------------------------------------ PyTorch
double median_seconds(const nlohmann::json& row, const char* what) {
  return row.at(what).at("median_seconds").get<double>();
}

/// The same attention in PyTorch, and how we compare with the fastest dense one that it offers.
nlohmann::json compare_attention(const Benchmark& benchmark, const BenchKernelsOptions& options, std::int64_t tokens,
                                 const nlohmann::json& ours) {
  const Config& config = benchmark.config();
  std::string lengths;
  for (const std::int64_t length : options.lengths) {
    lengths += concat(lengths.empty() ? "" : ",", length);
  }
  const std::vector<nlohmann::json> lines = run_peer(
      options.python, "torch_attention.py",
      concat("--lengths ", lengths, " --tokens ", tokens, " --heads ", config.model.n_heads, " --kv-heads ",
             config.model.kv_heads(), " --head-dim ", config.model.head_width(), " --chunk ", config.model.chunking.size,
             " --leading ", config.model.chunking.leading_tokens, " --dtype ", config.train.dtype, " --seconds ",
             options.seconds, " --device ", benchmark.device() == Device::cpu ? "cpu" : "cuda"));
  nlohmann::json result{{"lines", lines}, {"speedups", nlohmann::json::array()}};
  for (const nlohmann::json& row : ours) {
    const nlohmann::json* best = nullptr;
    for (const nlohmann::json& line : lines) {
      const bool fits =
          line.at("pattern") == "dense" && line.at("sequence_length") == row.at("sequence_length") && !line.contains("error");
      if (fits && (best == nullptr || median_seconds(line, "forward_backward") < median_seconds(*best, "forward_backward"))) {
        best = &line;
      }
    }
    if (best != nullptr) {
      const double speedup = median_seconds(*best, "forward_backward") / median_seconds(row, "forward_backward");
      const std::string how = best->at("forward_backward").value("timed_as", "single calls");
      std::printf("  %s at %lld: forward and backward %.2f times as fast as PyTorch's best dense attention (%s, as %s)\n",
                  row.at("pattern").get<std::string>().c_str(), row.at("sequence_length").get<long long>(), speedup,
                  best->at("backend").get<std::string>().c_str(), how.c_str());
      result["speedups"].push_back({{"pattern", row.at("pattern")},
                                    {"sequence_length", row.at("sequence_length")},
                                    {"against", best->at("backend")},
                                    {"forward_backward", speedup}});
    }
  }
  return result;
}

void bench_kernels(const BenchKernelsOptions& options) {
  require<UsageError>(options.compare.empty() || !options.lengths.empty(),
                      "bench kernels: --compare torch measures attention; name --lengths, such as 1024,4096");
  Benchmark benchmark(options.config.load());
  benchmark.print_head(std::cout);
  nlohmann::json result = benchmark.head();
  result.update(bench_step_kernels(benchmark, options));
  benchmark.release_programs();
  if (!options.lengths.empty()) {
    const std::int64_t longest = *std::max_element(options.lengths.begin(), options.lengths.end());
    const std::int64_t tokens =
        options.tokens > 0 ? options.tokens : std::max(longest, static_cast<std::int64_t>(benchmark.tokens()));
    result["attention"] = bench_lengths(benchmark, options, tokens);
    if (options.compare == "torch") {
      result["torch"] = compare_attention(benchmark, options, tokens, result["attention"]);
    }
  }
  write_json(options.json, result);
}

}  // namespace

void add_bench_kernels_command(CLI::App& bench) {
  auto options = std::make_shared<BenchKernelsOptions>();
  CLI::App* command = bench.add_subcommand("kernels", "each kernel of a step by itself, against what this device reaches");
  add_config_options(*command, options->config);
  add_device_option(*command, options->config);
  command->add_option("--lengths", options->lengths, "also attention over sequences of these lengths, chunked and dense")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command->add_option("--tokens", options->tokens, "tokens of each call of those (default: a micro-batch, or the longest)")
      ->check(CLI::PositiveNumber);
  command->add_option("--seconds", options->seconds, "how long each kernel is timed")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--repeats", options->repeats, "whole steps to time")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--compare", options->compare, "also measure attention in PyTorch")->check(CLI::IsMember({"torch"}));
  command->add_option("--python", options->python, "interpreter that has torch")->capture_default_str();
  command->add_option("--json", options->json, "also write the result to this file");
  command->callback([options] { bench_kernels(*options); });
}

}  // namespace attamba
