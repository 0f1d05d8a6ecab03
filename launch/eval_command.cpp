// attamba eval and attamba generate: what a trained run is worth, and what it writes.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>

#include "comm/single_process.h"
#include "data/prepare.h"
#include "launch/commands.h"
#include "launch/devices.h"
#include "launch/session.h"
#include "src/core/error.h"
#include "src/train/checkpoint.h"
#include "src/train/evaluate.h"
#include "src/train/run_folder.h"
#include "src/train/sampler.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

struct RunOptions {
  std::string run;
  std::int64_t step = -1;
  std::string dtype;
  std::string device = "auto";
  std::int64_t threads = 0;
};

struct EvalOptions : RunOptions {
  std::string data;
  std::vector<std::string> text;
  std::int64_t windows = 0;
  std::string strategy;
  std::string chunk_ends;
  std::int64_t chunk_size = 0;
  std::int64_t leading_tokens = -1;
  std::int64_t sliding_window = -1;
};

struct GenerateOptions : RunOptions {
  std::string prompt;
  SamplingOptions sampling;
};

/// A run's model with the weights of one checkpoint, for forward programs only.
struct LoadedRun {
  FoundRun found;
  std::unique_ptr<ChunkingStrategy> chunking;
  std::unique_ptr<ModelPrograms> programs;
};

LoadedRun load_run(FoundRun found, const RunOptions& options, std::int64_t sequences, bool logits, Communicator& communicator) {
  LoadedRun run{.found = std::move(found), .chunking = nullptr, .programs = nullptr};
  Config& config = run.found.config;
  config.train.dtype = options.dtype.empty() ? config.train.dtype : options.dtype;
  validate(config.model, config.data.sequence_length);
  run.chunking = make_model_chunking(config.model, config.data.sequence_length);
  const Device device = open_device(options.device, config.train.compute_dtype(), communicator, true);
  run.programs = std::make_unique<ModelPrograms>(ProgramOptions{.model = config.model,
                                                                .chunking = run.chunking.get(),
                                                                .micro_batch = {sequences, config.data.sequence_length},
                                                                .dtype = config.train.compute_dtype(),
                                                                .training = false,
                                                                .logits = logits,
                                                                .device = device},
                                                 communicator);
  run.programs->load_weights(
      [&](const std::vector<NamedTensor>& tensors) { load_slices(run.found.checkpoint, whole_slices(tensors)); });
  return run;
}

/// Text given on the command line becomes a data set in a temporary folder, made with the run's tokenizer.
class PreparedText {
 public:
  PreparedText(const std::vector<std::string>& inputs, const fs::path& tokenizer) {
    std::string pattern = (fs::temp_directory_path() / "attamba-eval-XXXXXX").string();
    require(mkdtemp(pattern.data()) != nullptr, "eval: cannot make a folder in ", fs::temp_directory_path().string());
    folder_ = pattern;
    PrepareOptions options;
    options.inputs.assign(inputs.begin(), inputs.end());
    options.output = folder_ / "data";
    options.tokenizer = tokenizer;
    prepare(options);
  }
  ~PreparedText() {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }
  PreparedText(const PreparedText&) = delete;
  PreparedText& operator=(const PreparedText&) = delete;
  fs::path data() const { return folder_ / "data"; }

 private:
  fs::path folder_;
};

void evaluate(const EvalOptions& options) {
  run_on_ranks([&](Communicator& communicator) {
    set_threads(options.threads, communicator);
    FoundRun found = find_run(options.run, options.step, communicator);
    ChunkingConfig& chunking = found.config.model.chunking;
    chunking.strategy = options.strategy.empty() ? chunking.strategy : options.strategy;
    chunking.ends_file = !options.chunk_ends.empty()       ? options.chunk_ends
                         : chunking.strategy == "explicit" ? chunking.ends_file
                                                           : std::string();
    chunking.size = options.chunk_size > 0 ? options.chunk_size : chunking.size;
    chunking.leading_tokens = options.leading_tokens >= 0 ? options.leading_tokens : chunking.leading_tokens;
    found.config.model.sliding_window =
        options.sliding_window >= 0 ? options.sliding_window : found.config.model.sliding_window;
    std::optional<PreparedText> text;
    fs::path folder = options.data.empty() ? fs::path(found.config.data.valid) : fs::path(options.data);
    if (!options.text.empty()) {
      text.emplace(options.text, fs::path(options.run) / kRunTokenizer);
      folder = text->data();
    }
    require<UsageError>(!folder.empty(), "eval: the run has no data.valid; name a data set with --data or text with --text");
    const Dataset dataset = Dataset::open(folder);
    dataset.require_vocabulary(found.config.model.vocab_size);
    constexpr std::int64_t kSequences = 4;
    const LoadedRun run = load_run(std::move(found), options, kSequences, false, communicator);
    const Evaluator evaluator(dataset, {kSequences, run.found.config.data.sequence_length}, options.windows, communicator);
    const EvaluationResult result = evaluator.run(*run.programs, {}).value();
    if (communicator.rank() == 0) {
      std::printf("%s on %s\n", run.found.checkpoint.folder.c_str(),
                  options.text.empty() ? folder.c_str() : options.text.front().c_str());
      std::printf("  loss               %.4f nats per token\n", result.loss);
      std::printf("  token perplexity   %.3f over %lld predicted tokens\n", result.perplexity(),
                  static_cast<long long>(result.tokens));
      std::printf("  word perplexity    %.3f over %.0f whitespace-separated words\n", result.word_perplexity(), result.words);
      std::printf("  bits per byte      %.4f over %.0f bytes of UTF-8\n", result.bits_per_byte(), result.bytes);
    }
  });
}

void generate(const GenerateOptions& options) {
  SingleProcess communicator;
  set_threads(options.threads, communicator);
  const LoadedRun run = load_run(find_run(options.run, options.step, communicator), options, 1, true, communicator);
  const Tokenizer tokenizer = Tokenizer::load(fs::path(options.run) / kRunTokenizer);
  std::vector<std::int32_t> tokens{tokenizer.bos()};
  const std::vector<std::int32_t> prompt = tokenizer.encode(options.prompt);
  tokens.insert(tokens.end(), prompt.begin(), prompt.end());
  SamplingOptions sampling = options.sampling;
  sampling.stop_token = tokenizer.eos();
  // Pieces are decoded together, since one character may be several of them; what is certain is printed at once.
  std::vector<std::int32_t> text(tokens.begin() + 1, tokens.end());
  std::size_t printed = 0;
  const auto print_new = [&](bool last) {
    const std::string decoded = tokenizer.decode(text);
    if (last || (!decoded.empty() && (decoded.back() & 0x80) == 0)) {
      std::cout << decoded.substr(std::min(printed, decoded.size())) << std::flush;
      printed = decoded.size();
    }
  };
  print_new(false);
  sample(*run.programs, run.found.config.data.sequence_length, tokens, sampling, [&](std::int32_t token) {
    text.push_back(token);
    print_new(false);
  });
  print_new(true);
  std::cout << '\n';
}

void add_run_options(CLI::App& command, RunOptions& options) {
  command.add_option("run", options.run, "folder of a run")->required();
  command.add_option("--step", options.step, "checkpoint of this step; by default the newest");
  command.add_option("--dtype", options.dtype, "compute type; by default the run's")
      ->check(CLI::IsMember({"float32", "bfloat16", "float64"}));
  command.add_option("--device", options.device, "where to compute; auto = cuda when present")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command.add_option("--threads", options.threads, "threads per rank; 0 = all that this process may use")
      ->capture_default_str();
}

}  // namespace

void add_eval_command(CLI::App& program) {
  auto eval = std::make_shared<EvalOptions>();
  CLI::App* command = program.add_subcommand(
      "eval", "perplexity and bits per byte of a run, also with other chunking than it was trained with");
  add_run_options(*command, *eval);
  command->add_option("--data", eval->data, "data set made by `attamba data prepare`; by default the run's data.valid");
  command->add_option("--text", eval->text, "text files instead of a data set");
  command->add_option("--windows", eval->windows, "windows to evaluate; 0 = all")->capture_default_str();
  command->add_option("--chunking", eval->strategy, "chunking strategy instead of the run's");
  command->add_option("--chunk-ends", eval->chunk_ends, "file of chunk ends, with --chunking explicit");
  command->add_option("--chunk-size", eval->chunk_size, "chunk size P instead of the run's");
  command->add_option("--leading-tokens", eval->leading_tokens, "leading tokens L instead of the run's");
  command->add_option("--sliding-window", eval->sliding_window,
                      "transformer: keys each query sees, instead of the run's; 0 = all");
  command->callback([eval] { evaluate(*eval); });

  auto gen = std::make_shared<GenerateOptions>();
  command = program.add_subcommand("generate", "let a run continue a text");
  add_run_options(*command, *gen);
  command->add_option("--prompt", gen->prompt, "text to continue");
  command->add_option("--tokens", gen->sampling.tokens, "tokens to draw")->capture_default_str();
  command->add_option("--temperature", gen->sampling.temperature, "0 = always the likeliest token")->capture_default_str();
  command->add_option("--top-k", gen->sampling.top_k, "draw among the k likeliest tokens; 0 = all")->capture_default_str();
  command->add_option("--seed", gen->sampling.seed, "seed of the draws")->capture_default_str();
  command->callback([gen] { generate(*gen); });
}

}  // namespace attamba
