// What the parts of `attamba bench` share.
#pragma once

#include <CLI/App.hpp>
#include <functional>
#include <iosfwd>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "comm/single_process.h"
#include "src/train/config.h"
#include "src/train/op_profile.h"
#include "src/train/programs.h"

namespace attamba {

void add_bench_kernels_command(CLI::App& bench);  ///< bench_kernels.cpp: kernels one by one, attention by sequence length
void add_bench_matmul_command(CLI::App& bench);   ///< bench_matmul.cpp: our matrix products against the library alone

/// "a b^T + c" for a matmul of a program, empty for other ops.
std::string matmul_formula(const Program::Step& step);

/// A model with random weights, fed with one random batch; every step is a whole optimizer step of one micro-batch.
class Benchmark {
 public:
  /// Opens the device that the configuration names, and measures its roofline.
  explicit Benchmark(Config config);

  /// Seconds of one optimizer step, until its loss is known to the host.
  double step();
  /// The same, `repeats` times after one that is not counted; sorted.
  std::vector<double> steps(std::int64_t repeats);

  const Config& config() const { return config_; }
  const ChunkingStrategy* chunking() const { return chunking_.get(); }
  Device device() const { return device_; }
  ModelPrograms& programs() { return *programs_; }
  /// Gives back the device's memory, to whoever is measured next; there are no programs and no steps any more.
  void release_programs() { programs_.reset(); }
  const Roofline& roofline() const { return roofline_; }
  double tokens() const { return static_cast<double>(config_.train.micro_batch * config_.data.sequence_length); }

  void print_head(std::ostream& out) const;
  /// What every report begins with: version, device, model, shapes, roofline.
  nlohmann::json head() const;

 private:
  Config config_;
  std::unique_ptr<ChunkingStrategy> chunking_;
  SingleProcess communicator_;
  Device device_ = Device::cpu;
  std::unique_ptr<ModelPrograms> programs_;
  Roofline roofline_;
  std::int64_t updates_ = 0;
};

/// The middle of a sorted list.
double median_of(const std::vector<double>& sorted);

struct Timing {
  double best = 0, median = 0;  ///< seconds
  std::int64_t runs = 0;
};

/// What `body` enqueues, timed for about `seconds` by the device's own clock, after a first time that is not counted; as one
/// recording where the device records. Times are divided by `parts`.
Timing time_on(Device device, double seconds, double parts, const std::function<void()>& body);
/// Of one `call`, in rows of several: on a device the start of a row takes microseconds, which are no part of a call.
Timing time_calls(Device device, double seconds, const std::function<void()>& call);

/// Copies and matrix products at their best.
Roofline measure_roofline(Device device, DType dtype);

/// Sets elements to numbers of both signs that are small, but not denormal; vectors, which hold scales and steps, to numbers
/// from 0.5 to 1.
void fill_with_numbers(const Tensor& tensor);

/// Starts `python SCRIPT arguments...`, a script of tests/peers, and returns the lines of JSON that it prints.
std::vector<nlohmann::json> run_peer(const std::string& python, const std::string& script, const std::string& arguments);

/// Nothing without a path.
void write_json(const std::string& path, const nlohmann::json& json);

}  // namespace attamba
