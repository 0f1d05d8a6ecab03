// One op (or a few) on a small tape, with inputs that a test makes up: what the rows of op_rows.cpp are written in.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "src/core/random.h"
#include "src/graph/program.h"
#include "src/ops/ops.h"

namespace attamba::testing_support {

/// What the declaration of a row is for.
enum class Purpose : std::uint8_t {
  forward,   ///< outputs only
  gradient,  ///< outputs, then the gradients of `objective`
};

/// Declares a row's leaves and remembers what they start with. All compute-type values are multiples of a bfloat16 unit, so
/// that every compute type starts from the same numbers.
class OpCase {
 public:
  OpCase(Tape& on_tape, DType compute_type, Purpose declared_for) : tape(on_tape), dtype(compute_type), purpose(declared_for) {}

  /// An activation-like input in the compute type, whose gradient is wanted.
  Value input(const std::string& name, const Shape& shape, double scale = 1.0);
  /// Parameters: matrices in the compute type, vectors in the accumulator type, centred at `offset`.
  Value matrix(const std::string& name, const Shape& shape, double scale = 1.0);
  Value vector(const std::string& name, const Shape& shape, double offset = 0.0, double scale = 1.0);
  /// An input of the accumulator type without a gradient.
  Value constants(const std::string& name, const Shape& shape, std::vector<double> values);
  Value integers(const std::string& name, const std::vector<std::int32_t>& values);

  Tape& tape;
  const DType dtype;
  const Purpose purpose;

  const std::vector<Value>& differentiated() const { return differentiated_; }
  const std::map<std::string, std::vector<double>>& initial() const { return initial_; }

 private:
  Value floating(const std::string& name, const TensorType& type, Role role, double offset, double scale);

  std::vector<Value> differentiated_;
  std::map<std::string, std::vector<double>> initial_;
};

struct OpRow {
  std::string name;  ///< unique
  std::string op;    ///< the function of src/ops/ops.h that the row covers
  /// Declares the op; returns its outputs.
  std::function<std::vector<Value>(OpCase&)> declare;
  /// 0: the objective is the sum of seed * output with random seeds. Otherwise the op is a root of the backward pass, and the
  /// objective is this multiple of the sum of its one output.
  double root_scale = 0;
  /// Roundings to the compute type that a result has behind it, at most; scales the tolerance of bfloat16.
  double roundings = 3;
};

/// How GoogleTest shows a row.
inline void PrintTo(const OpRow& row, std::ostream* out) {
  *out << row.name;
}

/// Every op that has a gradient, in all of its variants.
const std::vector<OpRow>& op_rows();

/// A row in one compute type, ready to run: the forward program, and the one with gradients.
class RunnableRow {
 public:
  RunnableRow(const OpRow& row, DType dtype);

  /// The objective at the leaves' present values.
  double objective();
  /// Runs forward and backward from zero parameters' gradients.
  void run_gradients();

  /// Outputs after `objective`, gradients after `run_gradients`; both programs share an arena, so the last one's results hold.
  std::vector<double> output(std::size_t o) const;
  std::vector<double> gradient(const std::string& leaf) const;

  /// Names of the leaves that have gradients.
  const std::vector<std::string>& differentiated() const { return names_; }
  /// How many outputs the row has.
  std::size_t outputs() const { return outputs_.size() - (root_scale_ == 0 ? 1 : 0); }
  Tensor leaf(const std::string& name) const { return storage_.find(name); }

 private:
  Storage storage_;
  Arena arena_;
  Program forward_, backward_;
  std::vector<Value> outputs_, backward_outputs_;
  std::vector<std::string> names_;
  std::map<std::string, Value> gradients_;             ///< of inputs
  std::map<std::string, std::string> leaf_gradients_;  ///< of inputs whose gradient is itself a leaf
  double root_scale_;
};

/// Elements as double, whatever their floating-point type.
std::vector<double> values_of(const Tensor& tensor);
/// Writes doubles into a tensor of any floating-point type.
void assign(const Tensor& tensor, const std::vector<double>& values);
/// ||a - b|| / ||b||.
double relative_error(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace attamba::testing_support
