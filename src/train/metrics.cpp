#include "src/train/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/files.h"
#include "src/core/error.h"

namespace attamba {
namespace {

using Json = nlohmann::ordered_json;

struct NamedNumber {
  std::string_view name;
  std::optional<double> MetricsRecord::*member;
};
constexpr std::array<NamedNumber, 8> kNumbers = {{{"loss", &MetricsRecord::loss},
                                                  {"lr", &MetricsRecord::lr},
                                                  {"grad_norm", &MetricsRecord::grad_norm},
                                                  {"tokens_per_s", &MetricsRecord::tokens_per_s},
                                                  {"model_flops_per_s", &MetricsRecord::model_flops_per_s},
                                                  {"share_of_peak", &MetricsRecord::share_of_peak},
                                                  {"seconds", &MetricsRecord::seconds},
                                                  {"eval_loss", &MetricsRecord::eval_loss}}};

std::string read_all(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  require(in.good(), "metrics: cannot read ", file.string(), ": ", std::strerror(errno));
  std::ostringstream text;
  text << in.rdbuf();
  require(!in.bad(), "metrics: reading ", file.string(), " failed");
  return std::move(text).str();
}

/// Calls body(line number from 1, line without newline) for each line that has its newline.
template <class Body>
void for_each_line(std::string_view text, const Body& body) {
  std::int64_t number = 1;
  for (std::size_t end; (end = text.find('\n')) != std::string_view::npos; text.remove_prefix(end + 1), ++number) {
    body(number, text.substr(0, end));
  }
}

std::int64_t count_of(const Json& json, const char* name) {
  const auto found = json.find(name);
  require(found != json.end(), "\"", name, "\" is missing");
  require(found->is_number_integer(), "\"", name, "\" is not an integer: ", found->dump());
  return found->get<std::int64_t>();
}

/// Why the line cannot be written; nothing when it is.
std::optional<std::string> write_line(int descriptor, std::string_view line, const std::filesystem::path& file) {
  const off_t before = ::lseek(descriptor, 0, SEEK_END);
  for (std::string_view rest = line; !rest.empty();) {
    const ssize_t written = ::write(descriptor, rest.data(), rest.size());
    if (written > 0) {
      rest.remove_prefix(static_cast<std::size_t>(written));
      continue;
    }
    const int error = written < 0 ? errno : ENOSPC;
    if (error == EINTR) {
      continue;
    }
    // A torn line in the middle of a file would make all of it unreadable.
    require(rest.size() == line.size() || before < 0 || ::ftruncate(descriptor, before) == 0, "metrics: a line of ",
            file.string(), " is torn: ", std::strerror(error));
    return concat("metrics: cannot write to ", file.string(), ": ", std::strerror(error));
  }
  return std::nullopt;
}

/// The lines of `text` that stay when training goes on after `step`: no torn end, nothing later than `step`.
std::string kept_lines(std::string_view text, std::int64_t step, const std::filesystem::path& file) {
  std::string kept;
  std::string problem;  // of the malformed lines so far; harmless at the end of the file, where a crash leaves them
  for_each_line(text, [&](std::int64_t number, std::string_view line) {
    MetricsRecord record;
    try {
      record = metrics_from_json_line(line);
    } catch (const Error& error) {
      problem = concat(file.string(), ":", number, ": ", error.what(), "; remove that line or move the file away");
      return;
    }
    require(problem.empty(), problem);
    if (record.step <= step) {
      kept.append(line).push_back('\n');
    }
  });
  return kept;
}

}  // namespace

std::string to_json_line(const MetricsRecord& record) {
  Json json = {{"step", record.step}, {"tokens", record.tokens}};
  for (const NamedNumber& number : kNumbers) {
    if (const auto& value = record.*number.member) {
      json[std::string(number.name)] = *value;
    }
  }
  for (const auto& [name, value] : record.more) {
    json[name] = value;
  }
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

MetricsRecord metrics_from_json_line(std::string_view line) {
  const Json json = Json::parse(line, nullptr, false);
  require(!json.is_discarded(), "not JSON: \"", line.substr(0, 60), line.size() > 60 ? "...\"" : "\"");
  require(json.is_object(), "expected an object {\"step\": ...}, found ", json.type_name());
  MetricsRecord record;
  record.step = count_of(json, "step");
  record.tokens = count_of(json, "tokens");
  for (const auto& [name, value] : json.items()) {
    if (name == "step" || name == "tokens" || value.is_string()) {
      continue;
    }
    require(value.is_number() || value.is_null(), "\"", name, "\" is not a number: ", value.dump());
    const double number = value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.get<double>();
    bool known = false;
    for (const NamedNumber& candidate : kNumbers) {
      if (candidate.name == name) {
        record.*candidate.member = number;
        known = true;
      }
    }
    if (!known) {
      record.more.emplace_back(name, number);
    }
  }
  return record;
}

std::vector<MetricsRecord> read_metrics(const std::filesystem::path& file) {
  const std::string text = read_all(file);
  std::vector<MetricsRecord> records;
  for_each_line(text, [&](std::int64_t number, std::string_view line) {
    try {
      records.push_back(metrics_from_json_line(line));
    } catch (const Error& error) {
      throw Error(concat(file.string(), ":", number, ": ", error.what()));
    }
  });
  return records;
}

MetricsLog::MetricsLog(std::filesystem::path file, std::int64_t step) : file_(std::move(file)) {
  if (std::filesystem::exists(file_)) {
    const std::string text = read_all(file_);
    const std::string kept = kept_lines(text, step, file_);
    if (kept != text) {
      write_file_atomically(file_, kept);
    }
  }
  descriptor_ = ::open(file_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  require(descriptor_ >= 0, "metrics: cannot open ", file_.string(), " for writing: ", std::strerror(errno));
}

MetricsLog::~MetricsLog() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
}

std::optional<std::string> MetricsLog::append(const MetricsRecord& record) {
  waiting_.push_back(to_json_line(record) + "\n");
  return write_waiting();
}

std::optional<std::string> MetricsLog::write_waiting() {
  for (; !waiting_.empty(); waiting_.pop_front()) {
    if (auto reason = write_line(descriptor_, waiting_.front(), file_)) {
      return reason;
    }
  }
  return std::nullopt;
}

void MetricsLog::finish() {
  const auto reason = write_waiting();
  require(!reason, reason.value_or(""));
}

}  // namespace attamba
