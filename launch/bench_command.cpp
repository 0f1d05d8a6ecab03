// attamba bench: how fast a model trains here, and where the time goes. Random tokens, no data needed.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "comm/launch_environment.h"
#include "launch/bench.h"
#include "launch/commands.h"
#include "launch/config_options.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/core/version.h"

namespace attamba {

namespace {

struct BenchOptions {
  ConfigOptions config;
  std::int64_t repeats = 5;
  std::string json;
  std::string compare;
  std::string python = "python3";
  bool compile = false;
};

bool is_matrix_product(const std::string& op) {
  return op == "matmul" || op == "linear_weight_gradient" || op == "linear_cross_entropy";
}

/// Runs the PyTorch peer on the same model, batch and threads, and returns what each of its variants printed.
nlohmann::json run_torch_step(const BenchOptions& options, const Config& config, Device device) {
  ModelConfig paper;
  paper.kind = config.model.kind;
  paper.ssm = config.model.ssm;
  paper.chunking = config.model.chunking;
  paper.attn_dim = config.model.attn_dim == paper.dim ? paper.dim : 0;
  require<UsageError>(paper == config.model,
                      "bench: the PyTorch peer has the paper's widths only (dim 512, 8 layers, vocabulary "
                      "32000, ...); use configs/attamba_62m.toml or configs/transformer_60m.toml");
  nlohmann::json variants = nlohmann::json::object();
  for (const nlohmann::json& result :
       run_peer(options.python, "torch_attamba.py",
                concat("--model ", config.model.kind, " --batch ", config.train.micro_batch, " --sequence ",
                       config.data.sequence_length, " --dtype ", config.train.dtype, " --threads ", thread_count(), " --steps ",
                       options.repeats, " --variants plain tuned --chunking ", config.model.chunking.strategy, " --chunk ",
                       config.model.chunking.size, " --leading ", config.model.chunking.leading_tokens, " --ssm-hidden ",
                       config.model.ssm.hidden, " --ssm-state ", config.model.ssm.state, " --device ",
                       device == Device::cpu ? "cpu" : "cuda", options.compile ? " --compile" : ""))) {
    variants[result.at("variant").get<std::string>()] = result;
  }
  return variants;
}

void bench_step(const BenchOptions& options) {
  Benchmark benchmark(options.config.load());
  const Config& config = benchmark.config();
  benchmark.print_head(std::cout);
  const std::vector<double> seconds = benchmark.steps(options.repeats);
  const double median = median_of(seconds), best = seconds.front();
  OpProfile profile;
  benchmark.programs().observe(profile.observer(), false);
  benchmark.step();
  double products = 0;
  for (const auto& [name, row] : profile.rows()) {
    products += is_matrix_product(name) ? row.seconds : 0;
  }
  const double flops = benchmark.programs().model_flops(), peak = benchmark.roofline().flops_per_s;
  std::printf("  step      median %.1f ms, best %.1f ms\n", median * 1e3, best * 1e3);
  std::printf("  tokens/s  median %.0f, best %.0f\n", benchmark.tokens() / median, benchmark.tokens() / best);
  std::printf(
      "  model FLOP/s %.1f G, %.1f%% of the matrix-product peak; %.1f%% of the step is not in matrix products and the loss\n",
      flops / median / 1e9, 100 * flops / median / peak, 100 * (1 - products / profile.seconds()));
  nlohmann::json result = benchmark.head();
  result.update({{"step_seconds", seconds},
                 {"tokens_per_s_median", benchmark.tokens() / median},
                 {"tokens_per_s_best", benchmark.tokens() / best},
                 {"model_flops_per_s", flops / median}});
  if (options.compare == "torch") {
    benchmark.release_programs();
    result["torch"] = run_torch_step(options, config, benchmark.device());
    for (const auto& [variant, peer] : result["torch"].items()) {
      const double typical = peer.at("tokens_per_s_median"), fastest = peer.at("tokens_per_s_best");
      std::printf("  %s PyTorch %s, %s: %.0f tokens/s (median), best %.0f; this program: %.2f (%.2f) times as many\n",
                  options.compile ? "compiled" : "eager", peer.value("torch", "").c_str(), variant.c_str(), typical, fastest,
                  benchmark.tokens() / median / typical, benchmark.tokens() / best / fastest);
    }
  }
  write_json(options.json, result);
}

void bench_ops(const BenchOptions& options) {
  Benchmark benchmark(options.config.load());
  benchmark.print_head(std::cout);
  const double whole = median_of(benchmark.steps(options.repeats));
  OpProfile profile(benchmark.roofline());
  benchmark.programs().observe(profile.observer(), false);
  for (std::int64_t i = 0; i < options.repeats; ++i) {
    benchmark.step();
  }
  std::cout << "  over " << options.repeats << " steps; GB/s counts each input and output once\n";
  profile.print(std::cout, benchmark.roofline().flops_per_s);
  const double ops = profile.seconds() / static_cast<double>(options.repeats);
  std::printf("  a whole step takes %.2f ms (median), its ops one by one %.2f ms: %.1f%% is outside of ops\n", whole * 1e3,
              ops * 1e3, 100 * (1 - ops / whole));
  nlohmann::json rows = nlohmann::json::object();
  for (const auto& [name, row] : profile.rows()) {
    rows[name] = {{"runs", row.runs},
                  {"seconds", row.seconds},
                  {"flops", row.flops},
                  {"bytes", row.bytes},
                  {"roofline_share", row.floor / row.seconds}};
  }
  nlohmann::json result = benchmark.head();
  result.update({{"ops", rows}, {"step_seconds_median", whole}, {"ops_seconds", ops}, {"outside_share", 1 - ops / whole}});
  write_json(options.json, result);
}

CLI::App* add_bench(CLI::App& parent, const char* name, const char* help, const std::shared_ptr<BenchOptions>& options) {
  CLI::App* command = parent.add_subcommand(name, help);
  add_config_options(*command, options->config);
  add_device_option(*command, options->config);
  command->add_option("--repeats", options->repeats, "steps to time, after those that warm up")
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
  command->add_option("--compare", step->compare, "also measure the same model in PyTorch")->check(CLI::IsMember({"torch"}));
  command->add_flag("--compile", step->compile, "... compiled by torch.compile instead of eager");
  command->add_option("--python", step->python, "interpreter that has torch")->capture_default_str();
  command->callback([step] { bench_step(*step); });
  auto ops = std::make_shared<BenchOptions>();
  add_bench(*bench, "ops", "a table of every kind of op: time, FLOP/s, bytes/s", ops)->callback([ops] { bench_ops(*ops); });
  add_bench_kernels_command(*bench);
  add_bench_matmul_command(*bench);
}

}  // namespace attamba
