#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <sstream>

#include "kernels/kernels.h"
#include "launch/bench.h"
#include "launch/devices.h"
#include "launch/session.h"
#include "src/core/clock.h"
#include "src/core/error.h"
#include "src/core/parallel.h"
#include "src/core/random.h"
#include "src/core/version.h"
#include "src/train/metrics.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

constexpr double kPeakSeconds = 1.0, kCopySeconds = 0.5;
constexpr std::size_t kCopyBytes = std::size_t{256} << 20;  ///< beyond all caches
constexpr std::int64_t kLeastRuns = 5;
constexpr int kCallsAtOnce = 8;

/// Bytes per second, read and written ones counted, of whatever copies fastest: the runtime, or our own addition of two
/// tensors.
double measure_copies(Device device) {
  const TensorType type{DType::float32, {static_cast<std::int64_t>(kCopyBytes / sizeof(float))}};
  const Memory memory[] = {{device, kCopyBytes, "measuring copies"},
                           {device, kCopyBytes, "measuring copies"},
                           {device, kCopyBytes, "measuring copies"}};
  const Tensor out{memory[0].data(), type, device}, a{memory[1].data(), type, device}, b{memory[2].data(), type, device};
  fill_with_numbers(a);
  fill_with_numbers(b);
  DeviceRuntime& on = runtime(device);
  const Launch launch{.device = device, .stream = on.stream()};
  const Timing copy = time_calls(device, kCopySeconds, [&] { on.copy_on_device(out.data, a.data, kCopyBytes); });
  const Timing add = time_calls(device, kCopySeconds, [&] { kernels::on(device).add(launch, out, a, b); });
  return static_cast<double>(kCopyBytes) * std::max(2 / copy.best, 3 / add.best);
}

template <class T>
void fill_host(const Tensor& tensor) {
  const bool vector = tensor.shape().rank() < 2;
  const std::span<T> values = tensor.span<T>();
  parallel_ranges(tensor.elements(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float unit = static_cast<float>(i * 2654435761 % 4093) / 4093;  // of [0, 1)
      values[static_cast<std::size_t>(i)] = T(vector ? 0.5f + unit / 2 : (unit - 0.5f) / 8);
    }
  });
}

/// Beside the program, as in a package, or where it was built.
fs::path peer_script(const std::string& name) {
  std::error_code ignored;
  const fs::path beside = fs::read_symlink("/proc/self/exe", ignored).parent_path() / "tests/peers" / name;
  return fs::exists(beside, ignored) ? beside : fs::path(ATTAMBA_SOURCE_DIR) / "tests/peers" / name;
}

}  // namespace

Benchmark::Benchmark(Config config)
    : config_(std::move(config)), chunking_(make_model_chunking(config_.model, config_.data.sequence_length)) {
  set_threads(config_.train.threads, communicator_);
  device_ = open_device(config_.train.device, config_.train.compute_dtype(), communicator_);
  roofline_ = measure_roofline(device_, config_.train.compute_dtype());
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

double Benchmark::step() {
  const double begin = monotonic_seconds();
  programs_->finish_step(1e-4, updates_++, false);
  return monotonic_seconds() - begin;
}

std::vector<double> Benchmark::steps(std::int64_t repeats) {
  step();
  if (device_ != Device::cpu) {
    step();  // the second is recorded
  }
  std::vector<double> seconds;
  for (std::int64_t i = 0; i < repeats; ++i) {
    seconds.push_back(step());
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds;
}

void Benchmark::print_head(std::ostream& out) const {
  out << version_line() << "\n  " << config_.model.kind << ", " << format_integer(parameter_count(config_.model))
      << " parameters, " << config_.train.micro_batch << " x " << config_.data.sequence_length << " tokens, "
      << config_.train.dtype << " (" << kernels::on(device_).matmul_library(config_.train.compute_dtype()) << "), "
      << (device_ == Device::cpu ? concat(thread_count(), " threads") : runtime(device_).description()) << '\n'
      << "  measured here: matrix products " << format_quantity(roofline_.flops_per_s, "FLOP/s") << " on large squares, copies "
      << format_quantity(roofline_.bytes_per_s, "B/s") << '\n';
}

nlohmann::json Benchmark::head() const {
  return {{"version", version_line()},
          {"device", runtime(device_).description()},
          {"model", config_.model.kind},
          {"parameters", parameter_count(config_.model)},
          {"dtype", config_.train.dtype},
          {"threads", thread_count()},
          {"micro_batch", config_.train.micro_batch},
          {"sequence_length", config_.data.sequence_length},
          {"peak_flops_per_s", roofline_.flops_per_s},
          {"copy_bytes_per_s", roofline_.bytes_per_s}};
}

double median_of(const std::vector<double>& sorted) {
  return sorted.at(sorted.size() / 2);
}

Timing time_on(Device device, double seconds, double parts, const std::function<void()>& body) {
  DeviceRuntime& on = runtime(device);
  body();
  on.synchronize();
  const std::unique_ptr<RecordedWork> recorded = on.record(body);
  const std::function<void()> run = recorded ? [&recorded] { recorded->launch(); } : body;
  if (recorded) {
    on.seconds_of(run);  // a graph's first launch also uploads it
  }
  std::vector<double> times;
  for (const double begin = monotonic_seconds();
       monotonic_seconds() - begin < seconds || static_cast<std::int64_t>(times.size()) < kLeastRuns;) {
    times.push_back(on.seconds_of(run) / parts);
  }
  std::sort(times.begin(), times.end());
  return {times.front(), median_of(times), static_cast<std::int64_t>(times.size())};
}

Timing time_calls(Device device, double seconds, const std::function<void()>& call) {
  const int calls = device == Device::cpu ? 1 : kCallsAtOnce;  // nothing has to start on a CPU
  return time_on(device, seconds, calls, [&] {
    for (int i = 0; i < calls; ++i) {
      call();
    }
  });
}

Roofline measure_roofline(Device device, DType dtype) {
  return {.bytes_per_s = measure_copies(device), .flops_per_s = kernels::on(device).measure_matmul_peak(dtype, kPeakSeconds)};
}

void fill_with_numbers(const Tensor& tensor) {
  std::vector<std::byte> memory(tensor.device == Device::cpu ? 0 : tensor.bytes());
  const Tensor host = tensor.device == Device::cpu ? tensor : Tensor{memory.data(), tensor.type};
  dispatch_floating(tensor.dtype(), "benchmark", [&]<class T>() { fill_host<T>(host); });
  if (tensor.device != Device::cpu) {
    copy_from_host(tensor, host);
  }
}

std::vector<nlohmann::json> run_peer(const std::string& python, const std::string& script, const std::string& arguments) {
  const std::string command = concat(python, " '", peer_script(script).string(), "' ", arguments);
  std::fprintf(stderr, "  %s\n", command.c_str());
  std::string output, line;
  {
    const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
    require(pipe != nullptr, "bench: cannot start ", python);
    char buffer[4096];
    while (std::fgets(buffer, sizeof buffer, pipe.get()) != nullptr) {
      output += buffer;
    }
  }
  std::vector<nlohmann::json> results;
  std::istringstream lines(output);
  while (std::getline(lines, line)) {
    if (line.starts_with("{")) {
      results.push_back(nlohmann::json::parse(line));
    }
  }
  require(!results.empty(), "bench: ", python, " printed no result; is torch installed there? (--python PATH chooses another)");
  return results;
}

void write_json(const std::string& path, const nlohmann::json& json) {
  if (path.empty()) {
    return;
  }
  std::ofstream out(path);
  out << json.dump(1) << '\n';
  require(static_cast<bool>(out), path, ": cannot be written");
}

}  // namespace attamba
