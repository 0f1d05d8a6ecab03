// attamba bench: how fast a model trains here, and where the time goes. Random tokens, no data needed.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "comm/launch_environment.h"
#include "comm/single_process.h"
#include "launch/bench.h"
#include "launch/commands.h"
#include "launch/config_options.h"
#include "launch/devices.h"
#include "launch/session.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/core/random.h"
#include "src/core/version.h"
#include "src/train/metrics.h"
#include "src/train/op_profile.h"
#include "src/train/programs.h"

namespace attamba {

namespace {

constexpr double kPeakSeconds = 1.0;

struct BenchOptions {
  ConfigOptions config;
  std::int64_t repeats = 5;
  std::string json;
  std::string compare;
  std::string python = "python3";
};

/// A model with random weights, fed with one random batch; every step is a whole optimizer step of one micro-batch.
class Benchmark {
 public:
  explicit Benchmark(Config config)
      : config_(std::move(config)), chunking_(make_model_chunking(config_.model, config_.data.sequence_length)) {
    set_threads(config_.train.threads, communicator_);
    device_ = open_device(config_.train.device, config_.train.compute_dtype(), communicator_);
    peak_ = kernels::on(device_).measure_matmul_peak(config_.train.compute_dtype(), kPeakSeconds);
    ProgramOptions options = program_options(config_, chunking_.get(), device_);
    options.global_batch = config_.train.micro_batch;  // every step is one micro-batch
    programs_ = std::make_unique<ModelPrograms>(options, communicator_);
    programs_->initialize(0);
    RandomStream random(1);
    std::vector<std::int32_t> windows(static_cast<std::size_t>(config_.train.micro_batch * (config_.data.sequence_length + 1)));
    for (std::int32_t& token : windows) {
      token = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(config_.model.vocab_size)));
    }
    programs_->inputs().write(windows, {}, {}, 0, 0);
  }

  /// Seconds of one optimizer step.
  double step() {
    const double begin = monotonic_seconds();
    programs_->finish_step(1e-4, updates_++, false);
    return monotonic_seconds() - begin;
  }

  ModelPrograms& programs() { return *programs_; }
  double peak() const { return peak_; }
  double tokens() const { return static_cast<double>(config_.train.micro_batch * config_.data.sequence_length); }

  void print_head(std::ostream& out) const {
    out << version_line() << "\n  " << config_.model.kind << ", " << format_integer(parameter_count(config_.model))
        << " parameters, " << config_.train.micro_batch << " x " << config_.data.sequence_length << " tokens, "
        << config_.train.dtype << " (" << kernels::on(device_).matmul_library(config_.train.compute_dtype()) << "), "
        << (device_ == Device::cpu ? concat(thread_count(), " threads") : runtime(device_).description()) << '\n'
        << "  matrix products reach " << format_quantity(peak_, "FLOP/s") << " here, measured on large squares\n";
  }

 private:
  Config config_;
  std::unique_ptr<ChunkingStrategy> chunking_;
  SingleProcess communicator_;
  Device device_ = Device::cpu;
  std::unique_ptr<ModelPrograms> programs_;
  double peak_ = 0;
  std::int64_t updates_ = 0;
};

bool is_matrix_product(const std::string& op) {
  return op == "matmul" || op == "linear_weight_gradient" || op == "linear_cross_entropy";
}

/// Runs the PyTorch peer on the same model, batch and threads, and returns what each of its variants printed.
nlohmann::json run_peer(const BenchOptions& options, const Config& config) {
  ModelConfig paper;
  paper.kind = config.model.kind;
  paper.ssm = config.model.ssm;
  paper.chunking = config.model.chunking;
  paper.attn_dim = config.model.attn_dim == paper.dim ? paper.dim : 0;
  require<UsageError>(paper == config.model,
                      "bench: the PyTorch peer has the paper's widths only (dim 512, 8 layers, vocabulary "
                      "32000, ...); use configs/attamba_62m.toml or configs/transformer_60m.toml");
  const std::string script = ATTAMBA_SOURCE_DIR "/tests/peers/torch_attamba.py";
  const std::string command =
      concat(options.python, " '", script, "' --model ", config.model.kind, " --batch ", config.train.micro_batch,
             " --sequence ", config.data.sequence_length, " --dtype ", config.train.dtype, " --threads ", thread_count(),
             " --steps ", options.repeats, " --variants plain tuned --chunking ", config.model.chunking.strategy, " --chunk ",
             config.model.chunking.size, " --leading ", config.model.chunking.leading_tokens, " --ssm-hidden ",
             config.model.ssm.hidden, " --ssm-state ", config.model.ssm.state);
  std::cerr << "  " << command << '\n';
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  require(pipe != nullptr, "bench: cannot start ", options.python);
  std::string output, line;
  char buffer[4096];
  while (std::fgets(buffer, sizeof buffer, pipe.get()) != nullptr) {
    output += buffer;
  }
  std::istringstream lines(output);
  nlohmann::json variants = nlohmann::json::object();
  while (std::getline(lines, line)) {
    if (line.starts_with("{")) {
      const nlohmann::json result = nlohmann::json::parse(line);
      variants[result.at("variant").get<std::string>()] = result;
    }
  }
  require(!variants.empty(), "bench: ", options.python,
          " printed no result; is torch installed there? (--python PATH chooses another)");
  return variants;
}

void write_json(const std::string& path, const nlohmann::json& json) {
  if (path.empty()) {
    return;
  }
  std::ofstream out(path);
  out << json.dump(1) << '\n';
  require(static_cast<bool>(out), path, ": cannot be written");
}

void bench_step(const BenchOptions& options) {
  const Config config = options.config.load();
  Benchmark benchmark(config);
  benchmark.print_head(std::cout);
  benchmark.step();
  std::vector<double> seconds;
  for (std::int64_t i = 0; i < options.repeats; ++i) {
    seconds.push_back(benchmark.step());
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2], best = seconds.front();
  OpProfile profile;
  benchmark.programs().observe(profile.observer(), false);
  benchmark.step();
  double products = 0;
  for (const auto& [name, row] : profile.rows()) {
    products += is_matrix_product(name) ? row.seconds : 0;
  }
  const double flops = benchmark.programs().model_flops();
  std::printf("  step      median %.1f ms, best %.1f ms\n", median * 1e3, best * 1e3);
  std::printf("  tokens/s  median %.0f, best %.0f\n", benchmark.tokens() / median, benchmark.tokens() / best);
  std::printf(
      "  model FLOP/s %.1f G, %.1f%% of the matrix-product peak; %.1f%% of the step is not in matrix products and the loss\n",
      flops / median / 1e9, 100 * flops / median / benchmark.peak(), 100 * (1 - products / profile.seconds()));
  nlohmann::json result{{"version", version_line()},
                        {"model", config.model.kind},
                        {"parameters", parameter_count(config.model)},
                        {"dtype", config.train.dtype},
                        {"threads", thread_count()},
                        {"micro_batch", config.train.micro_batch},
                        {"sequence_length", config.data.sequence_length},
                        {"step_seconds", seconds},
                        {"tokens_per_s_median", benchmark.tokens() / median},
                        {"tokens_per_s_best", benchmark.tokens() / best},
                        {"model_flops_per_s", flops / median},
                        {"peak_flops_per_s", benchmark.peak()}};
  if (options.compare == "torch") {
    result["torch"] = run_peer(options, config);
    for (const auto& [variant, peer] : result["torch"].items()) {
      const double typical = peer.at("tokens_per_s_median"), fastest = peer.at("tokens_per_s_best");
      std::printf("  eager PyTorch %s, %s: %.0f tokens/s (median), best %.0f; this program: %.2f (%.2f) times as many\n",
                  peer.value("torch", "").c_str(), variant.c_str(), typical, fastest, benchmark.tokens() / median / typical,
                  benchmark.tokens() / best / fastest);
    }
  }
  write_json(options.json, result);
}

void bench_ops(const BenchOptions& options) {
  const Config config = options.config.load();
  Benchmark benchmark(config);
  benchmark.print_head(std::cout);
  benchmark.step();
  OpProfile profile;
  benchmark.programs().observe(profile.observer(), false);
  for (std::int64_t i = 0; i < options.repeats; ++i) {
    benchmark.step();
  }
  std::cout << "  over " << options.repeats << " steps; GB/s counts each input and output once\n";
  profile.print(std::cout, benchmark.peak());
  nlohmann::json rows = nlohmann::json::object();
  for (const auto& [name, row] : profile.rows()) {
    rows[name] = {{"runs", row.runs}, {"seconds", row.seconds}, {"flops", row.flops}, {"bytes", row.bytes}};
  }
  write_json(options.json, {{"version", version_line()}, {"peak_flops_per_s", benchmark.peak()}, {"ops", rows}});
}

CLI::App* add_bench(CLI::App& parent, const char* name, const char* help, const std::shared_ptr<BenchOptions>& options) {
  CLI::App* command = parent.add_subcommand(name, help);
  add_config_options(*command, options->config);
  command->add_option("--repeats", options->repeats, "steps to time, after one to warm up")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--json", options->json, "also write the result to this file");
  return command;
}

}  // namespace

void add_bench_command(CLI::App& program) {
  CLI::App* bench = program.add_subcommand("bench", "measure training speed on random tokens");
  bench->parse_complete_callback([] {
    require<UsageError>(!read_launch_environment().mpi, "bench: measures one process; start it without mpirun or srun");
  });
  bench->require_subcommand(1);
  auto step = std::make_shared<BenchOptions>();
  CLI::App* command = add_bench(*bench, "step", "tokens per second of whole optimizer steps", step);
  command->add_option("--compare", step->compare, "also measure the same model in eager PyTorch")
      ->check(CLI::IsMember({"torch"}));
  command->add_option("--python", step->python, "interpreter that has torch")->capture_default_str();
  command->callback([step] { bench_step(*step); });
  auto ops = std::make_shared<BenchOptions>();
  add_bench(*bench, "ops", "a table of every kind of op: time, FLOP/s, bytes/s", ops)->callback([ops] { bench_ops(*ops); });
  add_bench_matmul_command(*bench);
}

}  // namespace attamba
