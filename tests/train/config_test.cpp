#include "src/train/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "src/core/error.h"

namespace attamba {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

/// The message of the UsageError that `action` throws.
std::string usage_error(const std::function<void()>& action) {
  try {
    action();
  } catch (const UsageError& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no UsageError was thrown";
  return "";
}

std::string error_of(std::string_view toml) {
  return usage_error([&] { parse_config(toml, "run.toml"); });
}

/// A configuration in which every member differs from its default.
Config everything_changed() {
  Config c;
  c.model.kind = "transformer";
  c.model.vocab_size = 61;
  c.model.dim = 32;
  c.model.n_layers = 3;
  c.model.n_heads = 4;
  c.model.n_kv_heads = 2;
  c.model.head_dim = 16;
  c.model.ffn_dim = 48;
  c.model.norm_eps = 0.1;
  c.model.rope_theta = 1e22;
  c.model.tie_embeddings = c.model.kv_proj = c.model.document_mask = true;
  c.model.ssm = {.hidden = 16, .state = 8, .heads = 4, .groups = 2, .conv = 0, .dt_bias = true, .residual = false};
  c.model.chunking = {.strategy = "explicit", .size = 3, .leading_tokens = 0, .ends_file = "ends.txt"};
  c.model.attn_dim = 24;
  c.model.sliding_window = 5;
  c.model.hidden = 40;
  c.model.conv = 2;
  c.model.semantics = "released";
  c.data = {
      .train = {"a b", "c:2.5", "quote\" back\\slash\ttab\x01"}, .valid = "naïve/Ω", .sequence_length = 77, .prefetch = 9};
  c.optim = {.name = "other",
             .lr = 0.1 + 0.2,
             .beta1 = 1.0 / 3,
             .beta2 = std::nextafter(1.0, 0.0),
             .eps = std::numeric_limits<double>::denorm_min(),
             .weight_decay = 3,
             .clip = 1e-300,
             .schedule = "wsd",
             .warmup = 1,
             .lr_min_ratio = -0.0,
             .decay = 123456789.125};
  c.train = {.steps = 5,
             .micro_batch = 2,
             .global_batch = 6,
             .seed = std::numeric_limits<std::int64_t>::max(),
             .dtype = "float64",
             .device = "cpu",
             .transport = "staged",
             .recompute = true,
             .deterministic = true,
             .zero = 2,
             .zero_group = "node",
             .threads = 3,
             .spike_factor = 7.5,
             .skips_before_rollback = 5,
             .rollbacks = 4,
             .log_every = 7,
             .debug = true,
             .watch = "layers.0.*",
             .compare_cpu = true};
  c.eval = {.every = 11, .windows = 12};
  c.checkpoint = {.every = 13, .background = false, .keep = 14, .keep_every = 26, .keep_best = true};
  c.run = {.folder = "runs/x",
           .resume = "never",
           .time_limit = 3600,
           .stop_before_seconds = 90,
           .watchdog_seconds = 20,
           .watchdog_patience = 700};
  return c;
}

// ---------------------------------------------------------------------------------------------- reading

TEST(ConfigToml, EmptyTextIsTheDefault) {
  EXPECT_EQ(parse_config("", "run.toml"), Config());
  EXPECT_NO_THROW(validate(Config()));
}

TEST(ConfigToml, ReadsKeysOfEverySectionAndType) {
  const Config c = parse_config(
      "[model]\ndim = 1_024\nkv_proj = true\nrope_theta = 500000\n[model.ssm]\nhidden = 128\n"
      "[model.chunking]\nstrategy = \"uniform\"\n[data]\ntrain = [\"a\", \"b:2\"]\n[optim]\nlr = 1e-3\n",
      "run.toml");
  EXPECT_EQ(c.model.dim, 1024);
  EXPECT_TRUE(c.model.kv_proj);
  EXPECT_EQ(c.model.rope_theta, 500000.0);
  EXPECT_EQ(c.model.ssm.hidden, 128);
  EXPECT_EQ(c.model.chunking.strategy, "uniform");
  EXPECT_EQ(c.data.train, (std::vector<std::string>{"a", "b:2"}));
  EXPECT_EQ(c.optim.lr, 1e-3);
  EXPECT_EQ(c.model.n_layers, Config().model.n_layers);
}

TEST(ConfigToml, OneFolderNeedsNoList) {
  EXPECT_EQ(parse_config("data.train = \"a\"", "run.toml").data.train, std::vector<std::string>{"a"});
}

TEST(ConfigToml, UnknownKeysNamePlaceAndNearestKey) {
  EXPECT_THAT(error_of("[model]\ndim = 64\ndmi = 32\n"), AllOf(StartsWith("run.toml:3:1: "), HasSubstr("\"model.dmi\""),
                                                               HasSubstr("did you mean \"dim\"?"), HasSubstr("[model]")));
  EXPECT_THAT(error_of("[model.ssm]\n  sate = 3\n"),
              AllOf(StartsWith("run.toml:2:3: "), HasSubstr("\"model.ssm.sate\""), HasSubstr("\"state\"?")));
  EXPECT_THAT(error_of("[modle]\ndim = 3\n"), AllOf(HasSubstr("\"modle\""), HasSubstr("did you mean \"model\"?")));
}

TEST(ConfigToml, KeysInTheWrongSectionAreFound) {
  EXPECT_THAT(error_of("[train]\nlr = 1e-3\n"),
              AllOf(StartsWith("run.toml:2:1: "), HasSubstr("optim.lr"), HasSubstr("section [optim]")));
  EXPECT_THAT(error_of("steps = 5\n"), AllOf(StartsWith("run.toml:1:1: "), HasSubstr("train.steps")));
}

TEST(ConfigToml, WrongTypesNameExpectedAndFound) {
  EXPECT_THAT(
      error_of("[model]\ndim = \"512\"\n"),
      AllOf(StartsWith("run.toml:2:7: "), HasSubstr("model.dim: expected an integer"), HasSubstr("found the string \"512\"")));
  EXPECT_THAT(error_of("[model]\ndim = 512.5\n"), HasSubstr("expected an integer, found the number 512.5"));
  EXPECT_THAT(error_of("[model]\nkv_proj = 1\n"), HasSubstr("model.kv_proj: expected true or false, found the integer 1"));
  EXPECT_THAT(error_of("[optim]\nlr = true\n"), HasSubstr("optim.lr: expected a number, found true"));
  EXPECT_THAT(error_of("[model]\nkind = [1]\n"), HasSubstr("model.kind: expected a string, found a list"));
  EXPECT_THAT(error_of("[data]\ntrain = [\"a\", 3]\n"), AllOf(StartsWith("run.toml:2:15: "), HasSubstr("found the integer 3")));
  EXPECT_THAT(error_of("[data]\ntrain = 3\n"), HasSubstr("data.train: expected a list of strings, found the integer 3"));
  EXPECT_THAT(error_of("model = 3\n"), AllOf(StartsWith("run.toml:1:9: "), HasSubstr("model is a section")));
  EXPECT_THAT(error_of("[model.dim]\n"), HasSubstr("expected an integer, found a section"));
  EXPECT_THAT(error_of("[train]\nsteps = 2026-01-01\n"), HasSubstr("found a date or time"));
}

TEST(ConfigToml, SyntaxErrorsNameThePlace) {
  EXPECT_THAT(error_of("[model]\ndim = \n"), AllOf(StartsWith("run.toml:2:"), HasSubstr("not valid TOML")));
  EXPECT_THAT(error_of("[model]\ndim = 1\ndim = 2\n"), StartsWith("run.toml:3:"));
}

TEST(ConfigToml, FilesThatCannotBeReadAreNamed) {
  EXPECT_THAT(usage_error([] { load_config("/nowhere/x.toml"); }), AllOf(HasSubstr("/nowhere/x.toml"), HasSubstr("configs/")));
  EXPECT_THAT(usage_error([] { load_config(std::filesystem::temp_directory_path()); }), HasSubstr("is a folder"));
}

// ---------------------------------------------------------------------------------------------- writing

TEST(ConfigToml, RoundTripsEveryBit) {
  for (const Config& config : {Config(), everything_changed()}) {
    const std::string text = to_toml(config);
    const Config again = parse_config(text, "resolved.toml");
    EXPECT_EQ(again, config) << text;
    EXPECT_EQ(to_toml(again), text);
  }
  EXPECT_TRUE(std::signbit(parse_config(to_toml(everything_changed()), "resolved.toml").optim.lr_min_ratio));
}

TEST(ConfigToml, EveryKeyTakesPartInTheRoundTrip) {
  // Guards the test above: a key added to the configuration must be changed in everything_changed().
  const std::vector<ConfigKey> keys = config_keys();
  const nlohmann::json before = to_json(Config()), after = to_json(everything_changed());
  for (const ConfigKey& key : keys) {
    std::string pointer = "/" + key.key;
    std::replace(pointer.begin(), pointer.end(), '.', '/');
    const nlohmann::json::json_pointer at(pointer);
    EXPECT_NE(before.at(at), after.at(at)) << key.key;
  }
}

// ---------------------------------------------------------------------------------------------- keys and overrides

TEST(ConfigKeys, AreUniqueAndHaveHelpAndDefaults) {
  std::set<std::string> seen;
  for (const ConfigKey& key : config_keys()) {
    EXPECT_TRUE(seen.insert(key.key).second) << key.key;
    EXPECT_FALSE(key.help.empty()) << key.key;
    EXPECT_TRUE(key.key.starts_with(key.section + ".")) << key.key;
    Config config;  // the default's text, given as an override, changes nothing
    set_key(config, key.key, key.default_text);
    EXPECT_EQ(config, Config()) << key.key;
  }
  EXPECT_TRUE(seen.contains("model.ssm.hidden"));
  EXPECT_TRUE(seen.contains("run.resume"));
}

TEST(SetKey, OverridesTheFile) {
  Config config = parse_config("[optim]\nlr = 1e-3\nwarmup = 7\n[model.ssm]\nhidden = 64\n", "run.toml");
  set_key(config, "optim.lr", "2.5e-4");
  set_key(config, "model.ssm.hidden", "128");
  set_key(config, "model.ssm.dt_bias", "true");
  set_key(config, "data.train", "a:2,b");
  set_key(config, "run.folder", "runs/with space");
  EXPECT_EQ(config.optim.lr, 2.5e-4);
  EXPECT_EQ(config.optim.warmup, 7);
  EXPECT_EQ(config.model.ssm.hidden, 128);
  EXPECT_TRUE(config.model.ssm.dt_bias);
  EXPECT_EQ(config.data.train, (std::vector<std::string>{"a:2", "b"}));
  EXPECT_EQ(config.run.folder, "runs/with space");
  set_key(config, "optim.lr", "1");
  EXPECT_EQ(config.optim.lr, 1.0);
}

TEST(SetKey, RefusesUnknownKeysWithTheNearest) {
  Config config;
  EXPECT_THAT(usage_error([&] { set_key(config, "model.dmi", "3"); }),
              AllOf(HasSubstr("--model.dmi"), HasSubstr("--model.dim?")));
  EXPECT_THAT(usage_error([&] { set_key(config, "lr", "3"); }), HasSubstr("did you mean --optim.lr?"));
  EXPECT_THAT(usage_error([&] { set_key(config, "model.ssm", "3"); }), HasSubstr("--model.ssm: no such key"));
  EXPECT_THAT(usage_error([&] { set_key(config, "model.dim.x", "3"); }), HasSubstr("no such key"));
  EXPECT_EQ(config, Config());
}

TEST(SetKey, RefusesTextOfTheWrongType) {
  Config config;
  EXPECT_THAT(usage_error([&] { set_key(config, "model.dim", "5x"); }),
              AllOf(HasSubstr("--model.dim"), HasSubstr("an integer"), HasSubstr("\"5x\"")));
  EXPECT_THAT(usage_error([&] { set_key(config, "model.dim", ""); }), HasSubstr("an integer"));
  EXPECT_THAT(usage_error([&] { set_key(config, "model.dim", "99999999999999999999"); }), HasSubstr("an integer"));
  EXPECT_THAT(usage_error([&] { set_key(config, "optim.lr", "fast"); }), HasSubstr("a number"));
  EXPECT_THAT(usage_error([&] { set_key(config, "train.debug", "yes"); }), HasSubstr("true or false"));
  EXPECT_EQ(config, Config());
}

// ---------------------------------------------------------------------------------------------- JSON

TEST(ConfigJson, RoundTrips) {
  for (const Config& config : {Config(), everything_changed()}) {
    EXPECT_EQ(config_from_json(nlohmann::json::parse(to_json(config).dump()), "manifest"), config);
    EXPECT_EQ(model_config_from_json(nlohmann::json::parse(to_json(config.model).dump()), "golden"), config.model);
  }
}

TEST(ConfigJson, ReadsTheKeysOfGoldenFiles) {
  const auto json = nlohmann::json::parse(R"({"chunking": {"leading_tokens": 3, "size": 4, "strategy": "cyclic"}, "dim": 32,
      "ffn_dim": 48, "head_dim": 8, "kind": "attamba", "kv_proj": false, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3,
      "norm_eps": 1e-05, "rope_theta": 10000.0, "ssm": {"conv": 4, "dt_bias": false, "groups": 1, "heads": 4, "hidden": 16,
      "residual": true, "state": 8}, "tie_embeddings": false, "vocab_size": 61})");
  const ModelConfig config = model_config_from_json(json, "golden.h5");
  EXPECT_EQ(config.dim, 32);
  EXPECT_EQ(config.ssm.state, 8);
  EXPECT_EQ(config.chunking.leading_tokens, 3);
  EXPECT_EQ(config.norm_eps, 1e-5);
  EXPECT_EQ(config.semantics, "paper");
  EXPECT_NO_THROW(validate(config, 24));
}

TEST(ConfigJson, RefusesWhatItDoesNotKnow) {
  const auto refuse = [](const char* text) {
    return usage_error([&] { model_config_from_json(nlohmann::json::parse(text), "golden.h5"); });
  };
  EXPECT_THAT(refuse(R"({"ssm": {"sate": 3}})"),
              AllOf(HasSubstr("golden.h5"), HasSubstr("model.ssm.sate"), HasSubstr("\"state\"?")));
  EXPECT_THAT(refuse(R"({"dim": "32"})"), AllOf(HasSubstr("model.dim: expected an integer"), HasSubstr("string \"32\"")));
  EXPECT_THAT(refuse(R"({"dim": 32.5})"), HasSubstr("number 32.5"));
  EXPECT_THAT(refuse(R"({"ssm": 3})"), HasSubstr("model.ssm is a section"));
  EXPECT_THAT(refuse("[1]"), HasSubstr("expected a JSON object"));
}

// ---------------------------------------------------------------------------------------------- cross checks

struct BadRun {
  const char* key;
  const char* value;
  const char* key_and_value;
  const char* advice;
};

TEST(ValidateConfig, NamesKeyValueAndAdvice) {
  const std::vector<BadRun> cases = {
      {"data.sequence_length", "0", "data.sequence_length = 0", "at least 1"},
      {"data.sequence_length", "8", "model.chunking.leading_tokens = 16", "use at most 8"},
      {"data.prefetch", "0", "data.prefetch = 0", "at least 1"},
      {"data.train", "a:-1", "data.train = \"a:-1\"", "positive"},
      {"data.train", ":2", "data.train = \":2\"", "names no folder"},
      {"model.chunking.strategy", "explicit", "model.chunking.strategy = \"explicit\"", "model.chunking.ends_file"},
      {"model.chunking.strategy", "unifrom", "model.chunking.strategy = \"unifrom\"", "\"uniform\"?"},
      {"optim.name", "adam", "optim.name = \"adam\"", "\"adamw\"?"},
      {"optim.schedule", "cosin", "optim.schedule = \"cosin\"", "\"cosine\"?"},
      {"optim.lr", "0", "optim.lr = 0", "positive"},
      {"optim.lr", "nan", "optim.lr = nan", "positive"},
      {"optim.lr", "inf", "optim.lr = inf", "positive"},
      {"optim.beta1", "1", "optim.beta1 = 1", "[0, 1)"},
      {"optim.beta2", "-0.5", "optim.beta2 = -0.5", "[0, 1)"},
      {"optim.eps", "0", "optim.eps = 0", "positive"},
      {"optim.weight_decay", "-1", "optim.weight_decay = -1", "use 0"},
      {"optim.clip", "-1", "optim.clip = -1", "use 0"},
      {"optim.lr_min_ratio", "2", "optim.lr_min_ratio = 2", "[0, 1]"},
      {"optim.warmup", "-1", "optim.warmup = -1", "use 0"},
      {"optim.warmup", "60001", "optim.warmup = 60001", "use at most 60000"},
      {"train.steps", "0", "train.steps = 0", "at least 1"},
      {"train.micro_batch", "0", "train.micro_batch = 0", "at least 1"},
      {"train.global_batch", "24", "train.global_batch = 24", "try 32"},
      {"train.global_batch", "8", "train.global_batch = 8", "multiple of train.micro_batch = 16"},
      {"train.seed", "-1", "train.seed = -1", "at least 0"},
      {"train.dtype", "bf16", "train.dtype = \"bf16\"", "Known: float32, bfloat16, float64"},
      {"train.device", "gpu", "train.device = \"gpu\"", "Known: auto, cpu, cuda"},
      {"train.zero", "4", "train.zero = 4", "must be 0 (every rank keeps everything), 1"},
      {"train.zero", "-1", "train.zero = -1", "must be 0"},
      {"train.zero_group", "host", "train.zero_group = \"host\"", "Known: all, node"},
      {"train.threads", "-2", "train.threads = -2", "use 0"},
      {"train.log_every", "0", "train.log_every = 0", "at least 1"},
      {"eval.every", "-1", "eval.every = -1", "use 0"},
      {"eval.windows", "-1", "eval.windows = -1", "use 0"},
      {"checkpoint.every", "-1", "checkpoint.every = -1", "use 0"},
      {"checkpoint.keep", "-1", "checkpoint.keep = -1", "use 0"},
      {"checkpoint.keep_every", "-1", "checkpoint.keep_every = -1", "use 0"},
      {"checkpoint.keep_every", "7500", "checkpoint.keep_every = 7500", "multiple of checkpoint.every = 5000"},
      {"checkpoint.keep_best", "true", "checkpoint.keep_best = true", "data.valid"},
      {"run.resume", "always", "run.resume = \"always\"", "Known: auto, must, never"},
  };
  for (const BadRun& bad : cases) {
    Config config;
    set_key(config, bad.key, bad.value);
    EXPECT_THAT(usage_error([&] { validate(config); }), AllOf(HasSubstr(bad.key_and_value), HasSubstr(bad.advice)));
  }
}

TEST(ValidateConfig, WarmUpAndDecayMustFit) {
  Config config;
  config.optim.schedule = "wsd";
  config.train.steps = 1000;
  config.optim.warmup = 200;
  config.optim.decay = 0.8;
  EXPECT_NO_THROW(validate(config));
  config.optim.decay = 0.9;
  EXPECT_THAT(usage_error([&] { validate(config); }), AllOf(HasSubstr("optim.decay = 0.9"), HasSubstr("shorten")));
  config.optim.decay = 1.5;
  EXPECT_THAT(usage_error([&] { validate(config); }), HasSubstr("[0, 1]"));
  config.optim.schedule = "cosine";  // which does not read optim.decay
  EXPECT_NO_THROW(validate(config));
}

TEST(WeightedFolders, TakesWeightsOff) {
  const std::vector<WeightedFolder> expected = {{"a", 1.0}, {"b", 2.5}, {"host:data/c", 1.0}, {"d:x", 3.0}};
  EXPECT_EQ(weighted_folders({"a", "b:2.5", "host:data/c", "d:x:3"}), expected);
}

TEST(TrainConfig, NamesTheComputeType) {
  TrainConfig config;
  EXPECT_EQ(config.compute_dtype(), DType::float32);
  config.dtype = "bfloat16";
  EXPECT_EQ(config.compute_dtype(), DType::bfloat16);
  config.dtype = "float64";
  EXPECT_EQ(config.compute_dtype(), DType::float64);
  config.dtype = "int32";
  EXPECT_THROW(config.compute_dtype(), UsageError);
}

// ---------------------------------------------------------------------------------------------- configs/

TEST(ConfigFiles, AllParseAndValidate) {
  std::set<std::string> folders;
  int files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(ATTAMBA_SOURCE_DIR "/configs")) {
    if (entry.path().extension() != ".toml") {
      continue;
    }
    ++files;
    SCOPED_TRACE(entry.path().string());
    Config config;
    ASSERT_NO_THROW(config = load_config(entry.path()));
    EXPECT_NO_THROW(validate(config));
    EXPECT_FALSE(config.data.train.empty());
    EXPECT_EQ(config.run.folder, "runs/" + entry.path().stem().string());
    EXPECT_TRUE(folders.insert(config.run.folder).second) << "two files share a run folder";
  }
  EXPECT_GE(files, 12);
}

TEST(ConfigFiles, PublishedRunsHaveTheirParametersAndTokens) {
  struct Published {
    std::int64_t parameters, tokens_per_step, steps;
  };
  constexpr std::int64_t kUnused = 8192;  // norm weights that the released code counts and never uses
  const std::map<std::string, Published> published = {
      {"attamba_62m", {62'759'680 - kUnused, 16 * 1024, 60'000}},
      {"attamba_62m_long_8l16", {62'759'680 - kUnused, 80 * 1024, 100'000}},
      {"attamba_62m_long_4l32", {62'759'680 - kUnused, 80 * 1024, 100'000}},
      {"attamba_released", {62'759'680 - kUnused, 16 * 1024, 60'000}},
      {"attamba_kv_proj", {68'539'136 - kUnused, 16 * 1024, 60'000}},
      {"attamba_random", {64'344'832 - kUnused, 16 * 1024, 60'000}},
      {"attamba_uniform", {64'344'832 - kUnused, 16 * 1024, 60'000}},
      {"attamba_pseudo", {64'344'832 - kUnused, 16 * 1024, 60'000}},
      {"transformer_60m", {60'039'680, 16 * 1024, 60'000}},
      {"transformer_kvc128", {53'748'224, 16 * 1024, 60'000}},
  };
  for (const auto& [name, run] : published) {
    SCOPED_TRACE(name);
    const Config config = load_config(ATTAMBA_SOURCE_DIR "/configs/" + name + ".toml");
    EXPECT_EQ(parameter_count(config.model), run.parameters);
    EXPECT_EQ(config.train.global_batch * config.data.sequence_length, run.tokens_per_step);
    EXPECT_EQ(config.train.steps, run.steps);
    EXPECT_EQ(config.optim, OptimConfig()) << "the published recipe is the default";
    EXPECT_EQ(config.train.dtype, "bfloat16");
  }
}

TEST(ConfigFiles, SmallModelsAreComparable) {
  Config attamba = load_config(ATTAMBA_SOURCE_DIR "/configs/attamba_small.toml");
  const Config transformer = load_config(ATTAMBA_SOURCE_DIR "/configs/transformer_small.toml");
  const auto count = static_cast<double>(parameter_count(attamba.model));
  EXPECT_GT(count, 5e6);
  EXPECT_LT(count, 8e6);
  EXPECT_NEAR(static_cast<double>(parameter_count(transformer.model)), count, 0.005 * count);
  attamba.model = transformer.model;
  attamba.run = transformer.run;
  EXPECT_EQ(attamba, transformer) << "they differ in more than the model";
}

TEST(ConfigFiles, ReadFromDisk) {
  const std::filesystem::path file =
      std::filesystem::temp_directory_path() / ("attamba_config_test_" + std::to_string(getpid()) + ".toml");
  std::ofstream(file) << "[train]\nstep = 3\n";
  EXPECT_THAT(usage_error([&] { load_config(file); }), AllOf(StartsWith(file.string() + ":2:1: "), HasSubstr("\"steps\"?")));
  std::filesystem::remove(file);
}

}  // namespace
}  // namespace attamba
