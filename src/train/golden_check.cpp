#include <cmath>

#include "comm/single_process.h"
#include "src/core/error.h"
#include "src/core/random.h"
#include "src/train/golden.h"
#include "src/train/programs.h"

namespace attamba {

namespace {

/// Sums of squares behind ||a - b|| / ||b||, so that several tensors can be taken together.
struct Distance {
  double difference = 0, norm = 0;
  void add(const std::vector<double>& a, const std::vector<double>& b) {
    for (std::size_t i = 0; i < b.size(); ++i) {
      difference += (a[i] - b[i]) * (a[i] - b[i]);
      norm += b[i] * b[i];
    }
  }
  double relative() const { return std::sqrt(difference / std::max(norm, 1e-60)); }
};

/// The larger error; NaN once one of them is (std::max would forget it).
double worse(double a, double b) {
  return std::isnan(a) || a > b ? a : b;
}

double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  Distance distance;
  distance.add(a, b);
  return distance.relative();
}

double rms(const std::vector<double>& values) {
  double sum = 0;
  for (const double x : values) {
    sum += x * x;
  }
  return std::sqrt(sum / static_cast<double>(values.size()));
}

/// "layers.2.attention.v_ssm.A_log" -> "layers.*.attention.*_ssm.A_log": weights that play the same part.
std::string kind_of(const std::string& name) {
  std::string kind = name;
  if (kind.starts_with("layers.")) {
    kind.replace(7, kind.find('.', 7) - 7, "*");
  }
  if (const auto ssm = kind.find("_ssm."); ssm != std::string::npos) {
    kind[ssm - 1] = '*';
  }
  return kind;
}

/// Tolerances that come with the files, and those that follow from them (docs/numerics.md).
class Tolerances {
 public:
  Tolerances(const GoldenFile& golden, DType dtype) : golden_(golden), dtype_(dtype) {}

  double of(const std::string& quantity) const {
    switch (dtype_) {
      case DType::float32:
        return within_float32(find(golden_.float32_error, quantity));
      case DType::bfloat16:
        return find(golden_.bfloat16_error, quantity);
      default:
        return stored_as_float32(quantity) ? kFloat32Storage : kFloat64;
    }
  }
  /// A mean of T token losses whose logits are off by a relative e: each token's loss moves by (softmax - onehot) . error, of
  /// standard deviation at most sqrt(2) e rms(logits), and their mean by that over sqrt(T). The file's own figure is one draw
  /// of this, which can be near 0 by chance.
  double of_loss() const {
    const double tokens = static_cast<double>(golden_.sequences * golden_.length);
    const double expected = of("logits") * rms(golden_.logits.values) * std::sqrt(2 / tokens);
    return dtype_ == DType::bfloat16 ? std::max(of("loss"), expected) : of("loss");
  }
  double of_gradient(const GoldenTensor& gradient) const {
    switch (dtype_) {
      case DType::float32:
        return within_float32(gradient.float32_error);
      case DType::bfloat16:
        return std::max(1.5 * gradient.bfloat16_error, 5e-3);
      default:
        return kFloat32Storage;
    }
  }

 private:
  // The oracle's float64 results: logits, losses and norms are stored as float64, tensors as float32 (half a unit: 6e-8).
  static constexpr double kFloat64 = 1e-11, kFloat32Storage = 1e-7;

  static double within_float32(double error) { return std::max(8 * error, 2e-6); }
  static bool stored_as_float32(const std::string& quantity) {
    return quantity == "grads_together" || quantity == "params_after";
  }
  double find(const std::map<std::string, double>& errors, const std::string& quantity) const {
    const auto found = errors.find(quantity);
    require(found != errors.end(), golden_.path.string(), ": no tolerance for ", quantity);
    return found->second;
  }

  const GoldenFile& golden_;
  DType dtype_;
};

class Verification {
 public:
  Verification(const GoldenFile& golden, DType dtype, Device device)
      : golden_(golden), dtype_(dtype), tolerances_(golden, dtype), communicator_(std::make_unique<SingleProcess>()) {
    const ModelConfig& model = golden.model;
    chunking_ = golden.chunk_ends.empty() ? make_model_chunking(model, golden.length)
                                          : make_explicit_chunking(golden.chunk_ends, golden.length);
    programs_ = std::make_unique<ModelPrograms>(ProgramOptions{.model = model,
                                                               .chunking = chunking_.get(),
                                                               .micro_batch = {golden.sequences, golden.length},
                                                               .dtype = dtype,
                                                               .global_batch = golden.sequences,
                                                               .optimizer_settings = golden.optimizer,
                                                               .logits = true,
                                                               .device = device},
                                                *communicator_);
    load_parameters(0);
  }

  std::vector<GoldenCheck> run() {
    check_first_batch();
    if (dtype_ != DType::bfloat16) {
      check_training();
    }
    return std::move(checks_);
  }

 private:
  const GoldenTensor& find(const std::map<std::string, GoldenTensor>& tensors, const char* group,
                           const ParameterInfo& parameter) {
    const auto found = tensors.find(parameter.name);
    require(found != tensors.end(), golden_.path.string(), ": ", group, "/", parameter.name, " is missing");
    require(found->second.shape == parameter.shape, golden_.path.string(), ": ", group, "/", parameter.name, " is ",
            found->second.shape, ", the model has ", parameter.shape);
    return found->second;
  }

  /// The file's weights, each tensor moved by a random direction of relative length `perturbation`.
  void load_parameters(double perturbation) {
    require(golden_.parameters.size() == programs_->parameters().size(), golden_.path.string(), ": holds ",
            golden_.parameters.size(), " parameters, the model has ", programs_->parameters().size());
    for (const ParameterInfo& parameter : programs_->parameters()) {
      const GoldenTensor& from = find(golden_.parameters, "params", parameter);
      const Tensor to = programs_->master(parameter.name);
      RandomStream random(static_cast<std::uint64_t>(parameter.shape.elements()));
      const double scale = perturbation * rms(from.values);
      dispatch_floating(to.dtype(), "verify", [&]<class T>() {
        std::vector<T> values;
        for (const double x : from.values) {
          values.push_back(static_cast<T>(static_cast<Accumulator<T>>(x + (scale > 0 ? scale * random.normal() : 0))));
        }
        copy_from_host(to, {values.data(), to.type});
      });
    }
    for (const std::string& leaf : programs_->state_leaves()) {
      clear(programs_->storage().find(leaf));
    }
    programs_->refresh_compute_weights();
  }

  void write_batch(std::int64_t step) {
    const auto size = static_cast<std::size_t>(golden_.sequences * (golden_.length + 1));
    programs_->inputs().write(std::span(golden_.tokens).subspan(static_cast<std::size_t>(step) * size, size), {}, {}, 0, step);
  }

  void add(const std::string& quantity, double error, double tolerance) { checks_.push_back({quantity, error, tolerance}); }

  void check_first_batch() {
    write_batch(0);
    require(golden_.logits.shape.elements() == golden_.sequences * golden_.length * golden_.model.vocab_size,
            golden_.path.string(), ": logits are ", golden_.logits.shape);
    add("logits", relative_error(values_on_host(programs_->logits()), golden_.logits.values), tolerances_.of("logits"));
    const double tokens = static_cast<double>(golden_.sequences * golden_.length);
    const double loss = programs_->evaluate() / tokens;
    // Losses are summed in steps of 2^-32 nat, half of which is below every tolerance but float64's.
    const double rounding = 0.5 / kernels::kLossOne;
    add("loss", std::abs(loss - golden_.losses[0]), tolerances_.of_loss() + rounding);
    programs_->accumulate();
    Distance together;
    std::vector<GoldenCheck> each;
    std::map<std::string, GoldenCheck> kinds;
    for (const ParameterInfo& parameter : programs_->parameters()) {
      const GoldenTensor& expected = find(golden_.gradients, "grads", parameter);
      const std::vector<double> computed = values_on_host(programs_->gradient(parameter.name));
      together.add(computed, expected.values);
      const GoldenCheck check{"gradient of " + parameter.name, relative_error(computed, expected.values),
                              tolerances_.of_gradient(expected)};
      each.push_back(check);
      // Root mean squares over the weights of one kind: both the drift here and the file's are single draws per tensor, some of
      // four elements.
      GoldenCheck& kind = kinds[kind_of(parameter.name)];
      kind.quantity = "gradients of " + kind_of(parameter.name);
      kind.error = std::hypot(kind.error, check.error);
      kind.tolerance = std::hypot(kind.tolerance, check.tolerance);
    }
    programs_->discard_gradients();
    add("gradients together", together.relative(), tolerances_.of("grads_together"));
    if (dtype_ != DType::bfloat16) {
      checks_.insert(checks_.end(), each.begin(), each.end());
    } else {
      for (const auto& [name, check] : kinds) {
        checks_.push_back(check);
      }
    }
  }

  /// The optimizer steps of the file: losses and gradient norms.
  std::vector<StepResult> train() {
    std::vector<StepResult> results;
    for (std::int64_t step = 0; step < golden_.steps; ++step) {
      write_batch(step);
      results.push_back(programs_->finish_step(learning_rate(golden_.schedule, step), step, false));
    }
    return results;
  }

  double norm_error(const std::vector<StepResult>& results) const {
    double worst = 0;
    for (std::size_t i = 0; i < results.size(); ++i) {
      worst = worse(worst, std::abs(results[i].gradient_norm / golden_.gradient_norms[i] - 1));
    }
    return worst;
  }

  void check_training() {
    const std::vector<StepResult> results = train();
    double loss_error = 0, parameter_error = 0;
    for (std::size_t i = 0; i < results.size(); ++i) {
      loss_error = worse(loss_error, std::abs(results[i].loss - golden_.losses[i]));
    }
    for (const ParameterInfo& parameter : programs_->parameters()) {
      const GoldenTensor& expected = find(golden_.parameters_after, "params_after", parameter);
      parameter_error =
          worse(parameter_error, relative_error(values_on_host(programs_->master(parameter.name)), expected.values));
    }
    const double rounding = 0.5 / kernels::kLossOne;
    add("losses in training", loss_error, tolerances_.of("losses") + rounding);
    add("norms of the gradient in training", norm_error(results), norm_tolerance());
    add("parameters after training", parameter_error, tolerances_.of("params_after"));
  }

  /// The file does not say how far gradient norms may drift, and some runs are far more sensitive than others. Measured
  /// instead: the same run in float64 from weights that are off by as much as the file allows them to be after training.
  double norm_tolerance() const {
    const double drift = tolerances_.of("params_after");
    Verification moved(golden_, DType::float64, Device::cpu);
    moved.load_parameters(drift);
    return std::max(tolerances_.of("grads_together"), moved.norm_error(moved.train()));
  }

  const GoldenFile& golden_;
  DType dtype_;
  Tolerances tolerances_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<ChunkingStrategy> chunking_;
  std::unique_ptr<ModelPrograms> programs_;
  std::vector<GoldenCheck> checks_;
};

}  // namespace

std::vector<GoldenCheck> verify_golden(const GoldenFile& golden, DType dtype, Device device) {
  try {
    return Verification(golden, dtype, device).run();
  } catch (const UsageError& error) {  // a model that this program cannot make: the file's fault, not the user's
    throw Error(concat(golden.path.string(), ": ", error.what()));
  }
}

}  // namespace attamba
