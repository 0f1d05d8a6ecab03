#include "src/train/config.h"

#include <charconv>
#include <cmath>

#include "src/core/names.h"
#include "src/train/config_reader.h"

namespace attamba {

namespace {

using Texts = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------- values as text

/// The shortest text that reads back as the same double, and as a double rather than an integer.
std::string double_text(double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  std::string text(buffer, end);
  if (text.find_first_of(".en") == std::string::npos) {  // "inf" and "nan" hold an n
    text += ".0";
  }
  const std::size_t exponent = text.find('e') + 2;  // past the sign: "1e-08" is written as "1e-8"
  if (text.find('e') != std::string::npos && text[exponent] == '0') {
    text.erase(exponent, 1);
  }
  return text;
}

std::string in_quotes(std::string_view value) {
  std::string text = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      constexpr std::string_view kDigits = "0123456789ABCDEF";
      text += concat("\\u00", kDigits[static_cast<unsigned char>(c) / 16], kDigits[static_cast<unsigned char>(c) % 16]);
    } else {
      text += c;
    }
  }
  return text + '"';
}

template <class Value>
std::string toml_text(const Value& value) {
  if constexpr (std::is_same_v<Value, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::is_same_v<Value, std::int64_t>) {
    return std::to_string(value);
  } else if constexpr (std::is_same_v<Value, double>) {
    return double_text(value);
  } else if constexpr (std::is_same_v<Value, std::string>) {
    return in_quotes(value);
  } else {
    std::string text = "[";
    for (std::size_t i = 0; i < value.size(); ++i) {
      text += concat(i == 0 ? "" : ", ", in_quotes(value[i]));
    }
    return text + "]";
  }
}

/// As typed on a command line: strings bare, lists with commas.
template <class Value>
std::string bare_text(const Value& value) {
  if constexpr (std::is_same_v<Value, std::string>) {
    return value;
  } else if constexpr (std::is_same_v<Value, Texts>) {
    std::string text;
    for (std::size_t i = 0; i < value.size(); ++i) {
      text += concat(i == 0 ? "" : ",", value[i]);
    }
    return text;
  } else {
    return toml_text(value);
  }
}

template <class Value>
bool from_text(std::string_view text, Value& value) {
  if constexpr (std::is_same_v<Value, bool>) {
    value = text == "true";
    return text == "true" || text == "false";
  } else if constexpr (std::is_same_v<Value, std::string>) {
    value = text;
    return true;
  } else if constexpr (std::is_same_v<Value, Texts>) {
    value.clear();
    while (!text.empty()) {
      const std::size_t comma = std::min(text.find(','), text.size());
      if (comma > 0) {
        value.emplace_back(text.substr(0, comma));
      }
      text.remove_prefix(std::min(comma + 1, text.size()));
    }
    return true;
  } else {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc() && end == text.data() + text.size();
  }
}

template <class Value>
std::string type_text(const Field& field) {
  if constexpr (std::is_same_v<Value, bool>) {
    return "true|false";
  } else if constexpr (std::is_same_v<Value, std::int64_t>) {
    return "integer";
  } else if constexpr (std::is_same_v<Value, double>) {
    return "number";
  } else if constexpr (std::is_same_v<Value, Texts>) {
    return "list";
  } else {
    std::string text;
    for (const std::string_view choice : field.choices) {
      text += concat(text.empty() ? "" : "|", choice);
    }
    return text.empty() ? "text" : text;
  }
}

// ---------------------------------------------------------------------------------------------- visitors

/// Fields come before the sections inside a section, as TOML demands, whatever their order in the struct.
struct TomlWriter {
  std::string path;
  std::string fields;
  std::string sections;

  template <class Value>
  void field(std::string_view name, const Value& value, const Field& field) {
    std::string line = concat(name, " = ", toml_text(value));
    line.resize(std::max<std::size_t>(line.size(), 32), ' ');
    fields += concat(line, "  # ", field.help, field.unit.empty() ? "" : " [", field.unit, field.unit.empty() ? "\n" : "]\n");
  }
  template <class Section>
  void section(std::string_view name, const Section& section, std::string_view) {
    TomlWriter inner{detail::join_key(path, name), "", ""};
    Section::describe(section, inner);
    sections += concat(sections.empty() && path.empty() ? "" : "\n", "[", inner.path, "]\n", inner.fields, inner.sections);
  }
};

struct KeyLister {
  std::string path;
  std::string about;
  std::vector<ConfigKey>* keys;

  template <class Value>
  void field(std::string_view name, const Value& value, const Field& field) {
    const std::string unit = field.unit.empty() ? std::string() : concat(" [", field.unit, "]");
    keys->push_back({.key = detail::join_key(path, name),
                     .section = path,
                     .about = about,
                     .type = type_text<Value>(field),
                     .help = concat(field.help, unit),
                     .default_text = bare_text(value),
                     .list = std::is_same_v<Value, Texts>});
  }
  template <class Section>
  void section(std::string_view name, const Section& section, std::string_view what) {
    Section::describe(section, KeyLister{detail::join_key(path, name), std::string(what), keys});
  }
};

/// Finds the key `rest` (relative to the struct visited) and sets it.
struct Setter {
  std::string_view key;
  std::string_view rest;
  std::string_view text;
  bool found = false;

  template <class Value>
  void field(std::string_view name, Value& value, const Field&) {
    if (name == rest) {
      Value read{};
      require<UsageError>(from_text(text, read), "--", key, ": expected ", detail::expected_name<Value>(), ", found \"", text,
                          "\"");
      value = std::move(read);
      found = true;
    }
  }
  template <class Section>
  void section(std::string_view name, Section& section, std::string_view) {
    if (rest.starts_with(name) && rest.size() > name.size() && rest[name.size()] == '.') {
      Setter inner{key, rest.substr(name.size() + 1), text};
      Section::describe(section, inner);
      found = found || inner.found;
    }
  }
};

struct ChoiceChecker {
  std::string path;

  template <class Value>
  void field(std::string_view name, const Value& value, const Field& field) {
    if constexpr (std::is_same_v<Value, std::string>) {
      if (!field.choices.empty()) {
        require_known(detail::join_key(path, name), value, field.choices);
      }
    }
  }
  template <class Section>
  void section(std::string_view name, const Section& section, std::string_view) {
    Section::describe(section, ChoiceChecker{detail::join_key(path, name)});
  }
};

// ---------------------------------------------------------------------------------------------- checks

template <class Value, class... Advice>
void check(bool holds, std::string_view key, const Value& value, const Advice&... advice) {
  require<UsageError>(holds, key, " = ", value, ": ", advice...);
}

void check_at_least(std::string_view key, std::int64_t value, std::int64_t least, std::string_view advice = "") {
  check(value >= least, key, value, "must be at least ", least, advice);
}

void check_optim(const OptimConfig& o, std::int64_t steps) {
  const auto in = [](double value, double low, double high) { return value >= low && value <= high; };  // false for NaN
  check(std::isfinite(o.lr) && o.lr > 0, "optim.lr", o.lr, "must be a positive number; the paper uses 3e-3");
  check(in(o.beta1, 0, 1) && o.beta1 < 1, "optim.beta1", o.beta1, "must lie in [0, 1); the paper uses 0.9");
  check(in(o.beta2, 0, 1) && o.beta2 < 1, "optim.beta2", o.beta2, "must lie in [0, 1); the paper uses 0.95");
  check(std::isfinite(o.eps) && o.eps > 0, "optim.eps", o.eps, "must be a positive number; the paper uses 1e-8");
  check(std::isfinite(o.weight_decay) && o.weight_decay >= 0, "optim.weight_decay", o.weight_decay,
        "must not be negative; use 0 for none");
  check(std::isfinite(o.clip) && o.clip >= 0, "optim.clip", o.clip, "must not be negative; use 0 for no clipping");
  check(in(o.lr_min_ratio, 0, 1), "optim.lr_min_ratio", o.lr_min_ratio,
        "is the last learning rate over the peak and must lie in [0, 1]");
  check_at_least("optim.warmup", o.warmup, 0, "; use 0 for none");
  check(o.warmup <= steps, "optim.warmup", o.warmup, "longer than the run (train.steps = ", steps, "); use at most ", steps);
  if (o.schedule == "wsd") {
    check(in(o.decay, 0, 1), "optim.decay", o.decay, "is a fraction of the steps and must lie in [0, 1]");
    check(static_cast<double>(o.warmup) + o.decay * static_cast<double>(steps) <= static_cast<double>(steps), "optim.decay",
          o.decay, "warm-up (", o.warmup, " steps) and decay do not fit into train.steps = ", steps, "; shorten one of them");
  }
}

void check_train(const TrainConfig& t) {
  check_at_least("train.steps", t.steps, 1);
  check_at_least("train.micro_batch", t.micro_batch, 1);
  check_at_least("train.global_batch", t.global_batch, 1);
  check(t.global_batch % t.micro_batch == 0, "train.global_batch", t.global_batch,
        "must be a multiple of train.micro_batch = ", t.micro_batch, "; try ",
        (t.global_batch / t.micro_batch + 1) * t.micro_batch, ", or a micro_batch that divides it");
  check_at_least("train.seed", t.seed, 0);
  check(t.zero >= 0 && t.zero <= 3, "train.zero", t.zero,
        "must be 0 (every rank keeps everything), 1 (ranks divide optimizer state), 2 (gradients too) or 3 (weights too)");
  check(t.zero == 0 || !t.compare_cpu, "train.zero", t.zero,
        "goes without train.compare_cpu, which compares whole weights; use train.zero = 0 for that run");
  check_at_least("train.threads", t.threads, 0, "; use 0 for all threads that this process may use");
  check_at_least("train.log_every", t.log_every, 1);
  check(std::isfinite(t.spike_factor) && (t.spike_factor == 0 || t.spike_factor > 1), "train.spike_factor", t.spike_factor,
        "must be above 1, or 0 for none");
  check_at_least("train.skips_before_rollback", t.skips_before_rollback, 1);
  check_at_least("train.rollbacks", t.rollbacks, 0, "; use 0 to fail after the skipped steps");
}

void check_run(const RunConfig& r) {
  const auto not_negative = [](std::string_view key, double value, std::string_view advice) {
    check(std::isfinite(value) && value >= 0, key, value, "must be a number of seconds, 0 or more", advice);
  };
  not_negative("run.time_limit", r.time_limit, "; 0 for none");
  not_negative("run.stop_before_seconds", r.stop_before_seconds, "");
  not_negative("run.watchdog_patience", r.watchdog_patience, "");
  check(std::isfinite(r.watchdog_seconds) && (r.watchdog_seconds == 0 || r.watchdog_seconds >= 1), "run.watchdog_seconds",
        r.watchdog_seconds, "must be at least 1 s, as short pauses are no hang; 0 for no watchdog");
}

void check_checkpoint(const Config& config) {
  const CheckpointConfig& c = config.checkpoint;
  check_at_least("checkpoint.every", c.every, 0, "; use 0 to save only at the end");
  check_at_least("checkpoint.keep", c.keep, 0, "; use 0 to keep all");
  check_at_least("checkpoint.keep_every", c.keep_every, 0, "; use 0 to keep only the newest ones");
  check(c.every == 0 || c.keep_every % c.every == 0, "checkpoint.keep_every", c.keep_every,
        "must be a multiple of checkpoint.every = ", c.every);
  if (c.keep_best) {
    check(!config.data.valid.empty(), "checkpoint.keep_best", "true", "needs data.valid to know which one is best");
    check(config.eval.every > 0 && c.every % config.eval.every == 0, "checkpoint.keep_best", "true",
          "needs an evaluation of each checkpoint; make checkpoint.every = ", c.every,
          " a multiple of eval.every = ", config.eval.every);
  }
}

}  // namespace

std::string detail::advice_on_key(std::string_view path, std::string_view name, const std::vector<std::string_view>& names) {
  for (const ConfigKey& key : config_keys()) {
    if (key.key.ends_with(concat(".", name))) {
      return concat("did you mean ", key.key, ", that is \"", name, "\" in section [", key.section, "]?");
    }
  }
  return concat(advice_on_names(name, names), path.empty() ? std::string() : concat(" (in [", path, "])"));
}

DType TrainConfig::compute_dtype() const {
  require_known("train.dtype", dtype, {"float32", "bfloat16", "float64"});
  return dtype == "bfloat16" ? DType::bfloat16 : dtype == "float64" ? DType::float64 : DType::float32;
}

std::string to_toml(const Config& config) {
  TomlWriter writer;
  Config::describe(config, writer);
  return writer.sections;
}

std::vector<ConfigKey> config_keys() {
  std::vector<ConfigKey> keys;
  const Config defaults;
  Config::describe(defaults, KeyLister{"", "", &keys});
  return keys;
}

void set_key(Config& config, std::string_view key, std::string_view text) {
  Setter setter{key, key, text};
  Config::describe(config, setter);
  if (!setter.found) {
    const std::vector<ConfigKey> keys = config_keys();
    std::vector<std::string_view> names;
    for (const ConfigKey& known : keys) {
      names.push_back(known.key);
    }
    const std::string_view nearest = nearest_name(key, names);
    const std::string question = nearest.empty() ? std::string() : concat("did you mean --", nearest, "? ");
    throw UsageError(concat("--", key, ": no such key; ", question, "`attamba train --help` lists all"));
  }
}

std::vector<WeightedFolder> weighted_folders(const std::vector<std::string>& folders) {
  std::vector<WeightedFolder> all;
  for (const std::string& text : folders) {
    // A colon that no number follows belongs to the folder's name.
    const std::size_t colon = text.rfind(':');
    double weight = 1.0;
    const bool weighted = colon != std::string::npos && from_text(std::string_view(text).substr(colon + 1), weight);
    const std::string folder = weighted ? text.substr(0, colon) : text;
    check(!folder.empty(), "data.train", in_quotes(text), "names no folder; write \"folder\" or \"folder:weight\"");
    check(!weighted || (std::isfinite(weight) && weight > 0), "data.train", in_quotes(text),
          "a weight must be a positive number; leave the folder out to give it none");
    all.push_back({folder, weighted ? weight : 1.0});
  }
  return all;
}

void validate(const Config& config) {
  Config::describe(config, ChoiceChecker{});
  check_at_least("data.sequence_length", config.data.sequence_length, 1, "; the paper uses 1024");
  check_at_least("data.prefetch", config.data.prefetch, 1);
  weighted_folders(config.data.train);
  validate(config.model, config.data.sequence_length);
  check_train(config.train);
  check_optim(config.optim, config.train.steps);
  check_at_least("eval.every", config.eval.every, 0, "; use 0 to evaluate only after the last step");
  check_at_least("eval.windows", config.eval.windows, 0, "; use 0 for all of data.valid");
  check_checkpoint(config);
  check_run(config.run);
}

}  // namespace attamba
