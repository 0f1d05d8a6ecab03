#include "tests/faults/training.h"

#include <algorithm>
#include <fstream>
#include <memory>
#include <regex>

#include "src/core/error.h"
#include "tests/core/temporary_folder.h"
#include "tests/launch/small_training.h"

namespace attamba::faults {

namespace fs = std::filesystem;

namespace {

/// Ranks that find each other over TCP. Nobody ends the others when one is gone: they have to notice.
constexpr const char* kStartRanks = R"(
ranks=$1 pids=() worst=0; shift
for ((rank = 0; rank < ranks; rank++)); do ATTAMBA_RANK=$rank "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code <= worst)) || worst=$code; done
exit $worst)";

}  // namespace

Training::Training(const Laboratory& laboratory, const fs::path& folder) : laboratory_(laboratory), folder_(folder) {
  fs::create_directories(folder_ / "shared");
  fs::create_directories(folder_ / "tmp");
}

std::vector<std::string> Training::command(const Start& start) const {
  std::vector<std::string> words;
  const std::string ranks = std::to_string(start.ranks);
  if (start.transport == Transport::mpi) {
    words = {"mpirun", "-np", ranks};
  } else if (start.transport == Transport::tcp) {
    words = {"bash", "-c", kStartRanks, "start_ranks", ranks};
  }
  words.push_back(laboratory_.program);
  words.emplace_back("train");
  for (const auto& [key, value] : small_training()) {
    words.push_back(concat("--", key, '=', value));
  }
  for (const std::string& more :
       {std::string("--train.global_batch=5"), std::string("--train.deterministic=true"), std::string("--eval.every=12"),
        concat("--train.steps=", Laboratory::kSteps), concat("--checkpoint.every=", Laboratory::kEvery),
        concat("--checkpoint.keep=", Laboratory::kKeep),
        concat("--checkpoint.background=", start.background ? "true" : "false"), concat("--train.zero=", start.zero),
        concat("--data.train=", (laboratory_.data / "train").string()),
        concat("--data.valid=", (laboratory_.data / "valid").string()), concat("--run.folder=", run().string())}) {
    words.push_back(more);
  }
  return words;
}

std::unique_ptr<Session> Training::start(const Start& start) {
  Environment more{{"OMP_NUM_THREADS", "1"}, {"OMP_WAIT_POLICY", "passive"}, {"TMPDIR", folder_ / "tmp"}};
  if (start.transport == Transport::mpi) {
    const Environment mpi{{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                          {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                          {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
                          {"OMPI_MCA_hwloc_base_binding_policy", "none"},
                          {"OMPI_MCA_mpi_yield_when_idle", "1"},
                          {"OMPI_MCA_odls_base_sigkill_timeout", "0"},
                          {"OMPI_MCA_btl_vader_backing_directory", folder_ / "shared"}};
    more.insert(more.end(), mpi.begin(), mpi.end());
  } else if (start.transport == Transport::tcp) {
    const Environment tcp{{"ATTAMBA_RANKS", std::to_string(start.ranks)},
                          {"ATTAMBA_RENDEZVOUS", concat("file:", (folder_ / "rendezvous").string())},
                          {"ATTAMBA_INTERFACE", "lo"},
                          {"ATTAMBA_CONNECT_TIMEOUT", "20"}};
    more.insert(more.end(), tcp.begin(), tcp.end());
  }
  if (!start.faults.empty()) {
    more.emplace_back("LD_PRELOAD", laboratory_.preload);
    more.emplace_back("ATTAMBA_FAULT_FOLDER", run());
    more.insert(more.end(), start.faults.begin(), start.faults.end());
  }
  return std::make_unique<Session>(command(start), more, folder_ / concat("log-", ++starts_));
}

fs::path Training::fault_log(int start) const {
  return folder_ / concat("faults-", start);
}

std::string Training::log() const {
  return read_file(folder_ / concat("log-", starts_));
}

std::optional<std::int64_t> Training::resumed_after() const {
  std::smatch match;
  const std::string text = log();
  return std::regex_search(text, match, std::regex("resuming after step ([0-9]+)")) ? std::optional(std::stoll(match[1]))
                                                                                    : std::nullopt;
}

std::int64_t Training::logged_step() const {
  std::ifstream in(run() / "metrics.jsonl");
  std::int64_t step = 0;
  std::smatch match;
  const std::regex pattern("^\\{\"step\":([0-9]+),.*\\}$");
  for (std::string line; std::getline(in, line) && !in.eof();) {
    if (std::regex_match(line, match, pattern)) {
      step = std::stoll(match[1]);
    }
  }
  return step;
}

std::vector<std::string> Training::curve() const {
  std::ifstream in(run() / "metrics.jsonl");
  std::vector<std::string> points;
  std::smatch match;
  const std::regex pattern("^\\{\"step\":([0-9]+),.*?\"((?:eval_)?loss)\":([^,}]+)");
  for (std::string line; std::getline(in, line);) {
    if (std::regex_search(line, match, pattern)) {
      points.push_back(concat(match[1].str(), ' ', match[2].str(), ' ', match[3].str()));
    }
  }
  return points;
}

std::vector<fs::path> Training::checkpoints() const {
  std::vector<fs::path> found;
  if (fs::exists(run() / "checkpoints")) {
    for (const fs::directory_entry& entry : fs::directory_iterator(run() / "checkpoints")) {
      if (std::regex_match(entry.path().filename().string(), std::regex("step-[0-9]+"))) {
        found.push_back(entry.path());
      }
    }
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

std::string Training::final_state() const {
  const std::string digits = std::to_string(Laboratory::kSteps);
  const std::string text =
      read_file(run() / "checkpoints" / concat("step-", std::string(9 - digits.size(), '0'), digits) / "manifest.json");
  std::smatch match;
  return std::regex_search(text, match, std::regex("\"state_crc32c\": ?([^,}\\s]+)")) ? match[1].str() : "";
}

std::vector<std::string> Training::leftovers() const {
  std::vector<std::string> found;
  if (fs::exists(run())) {
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(run())) {
      const std::string name = entry.path().filename();
      if (std::regex_search(name, std::regex("\\.tmp.*$"))) {
        found.push_back(fs::relative(entry.path(), run()));
      }
    }
  }
  return found;
}

std::vector<std::string> Training::broken_checkpoints() const {
  std::vector<std::string> broken;
  const std::regex file("\"file\": ?\"([^\"]+)\", ?\"bytes\": ?([0-9]+)");
  for (const fs::path& checkpoint : checkpoints()) {
    const std::string manifest = read_file(checkpoint / "manifest.json"), name = checkpoint.filename();
    const auto begin = std::sregex_iterator(manifest.begin(), manifest.end(), file), end = std::sregex_iterator();
    if (begin == end) {
      broken.push_back(name + " without a manifest that names files");
    }
    for (auto match = begin; match != end; ++match) {
      std::error_code gone;
      if (fs::file_size(checkpoint / (*match)[1].str(), gone) != std::stoull((*match)[2]) || gone) {
        broken.push_back(concat(name, " without a whole ", (*match)[1].str()));
      }
    }
  }
  return broken;
}

}  // namespace attamba::faults
