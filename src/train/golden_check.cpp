#include <cmath>

#include "comm/single_process.h"
#include "src/core/error.h"
#include "src/train/golden.h"
#include "src/train/programs.h"

namespace attamba {

namespace {

std::vector<double> values_of(const Tensor& tensor) {
  return dispatch_floating(tensor.dtype(), "verify", [&]<class T>() {
    std::vector<double> values;
    for (const T x : tensor.span<T>()) {
      values.push_back(static_cast<double>(static_cast<Accumulator<T>>(x)));
    }
    return values;
  });
}

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

double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  Distance distance;
  distance.add(a, b);
  return distance.relative();
}

/// Tolerances of SPEC 9.
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
  Verification(const GoldenFile& golden, DType dtype)
      : golden_(golden), dtype_(dtype), tolerances_(golden, dtype), communicator_(std::make_unique<SingleProcess>()) {
    const ModelConfig& model = golden.model;
    if (model.kind == "attamba") {
      chunking_ =
          golden.chunk_ends.empty() ? make_model_chunking(model) : make_explicit_chunking(golden.chunk_ends, golden.length);
    }
    programs_ = std::make_unique<ModelPrograms>(ProgramOptions{.model = model,
                                                               .chunking = chunking_.get(),
                                                               .micro_batch = {golden.sequences, golden.length},
                                                               .dtype = dtype,
                                                               .global_batch = golden.sequences,
                                                               .optimizer_settings = golden.optimizer,
                                                               .logits = true},
                                                *communicator_);
    load_parameters();
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

  void load_parameters() {
    require(golden_.parameters.size() == programs_->parameters().size(), golden_.path.string(), ": holds ",
            golden_.parameters.size(), " parameters, the model has ", programs_->parameters().size());
    for (const ParameterInfo& parameter : programs_->parameters()) {
      const GoldenTensor& from = find(golden_.parameters, "params", parameter);
      const Tensor to = programs_->master(parameter.name);
      dispatch_floating(to.dtype(), "verify", [&]<class T>() {
        for (std::size_t i = 0; i < from.values.size(); ++i) {
          to.as<T>()[i] = static_cast<T>(static_cast<Accumulator<T>>(from.values[i]));
        }
      });
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
    add("logits", relative_error(values_of(programs_->logits()), golden_.logits.values), tolerances_.of("logits"));
    const double tokens = static_cast<double>(golden_.sequences * golden_.length);
    const double loss = programs_->evaluate() / tokens;
    // Losses are summed in steps of 2^-32 nat, half of which is below every tolerance but float64's.
    const double rounding = 0.5 / kernels::kLossOne;
    add("loss", std::abs(loss - golden_.losses[0]), tolerances_.of("loss") + rounding);
    programs_->accumulate();
    Distance together;
    std::vector<GoldenCheck> each;
    for (const ParameterInfo& parameter : programs_->parameters()) {
      const GoldenTensor& expected = find(golden_.gradients, "grads", parameter);
      const std::vector<double> computed = values_of(programs_->gradient(parameter.name));
      together.add(computed, expected.values);
      each.push_back(
          {"gradient " + parameter.name, relative_error(computed, expected.values), tolerances_.of_gradient(expected)});
    }
    programs_->discard_gradients();
    add("gradients together", together.relative(), tolerances_.of("grads_together"));
    checks_.insert(checks_.end(), each.begin(), each.end());
  }

  /// The optimizer steps of the file, from the initial parameters.
  void check_training() {
    double loss_error = 0, norm_error = 0;
    for (std::int64_t step = 0; step < golden_.steps; ++step) {
      write_batch(step);
      const StepResult result = programs_->finish_step(learning_rate(golden_.schedule, step), step, false);
      const auto i = static_cast<std::size_t>(step);
      loss_error = std::max(loss_error, std::abs(result.loss - golden_.losses[i]));
      norm_error = std::max(norm_error, std::abs(result.gradient_norm / golden_.gradient_norms[i] - 1));
    }
    const double rounding = 0.5 / kernels::kLossOne;
    add("losses of training", loss_error, tolerances_.of("losses") + rounding);
    // A norm is as good as the gradients it is made of, in a run whose losses have drifted as far as the file allows.
    add("gradient norms of training", norm_error,
        dtype_ == DType::float64 ? tolerances_.of("losses")
                                 : std::max(tolerances_.of("grads_together"), tolerances_.of("losses")));
    double worst = 0;
    for (const ParameterInfo& parameter : programs_->parameters()) {
      const GoldenTensor& expected = find(golden_.parameters_after, "params_after", parameter);
      worst = std::max(worst, relative_error(values_of(programs_->master(parameter.name)), expected.values));
    }
    add("parameters after training", worst, tolerances_.of("params_after"));
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

std::vector<GoldenCheck> verify_golden(const GoldenFile& golden, DType dtype) {
  return Verification(golden, dtype).run();
}

}  // namespace attamba
