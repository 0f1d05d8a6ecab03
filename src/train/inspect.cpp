#include "src/train/inspect.h"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <map>
#include <ostream>

#include "src/core/error.h"

namespace attamba {

namespace {

bool is_floating(DType dtype) {
  return dtype != DType::int32 && dtype != DType::int64;
}

/// Calls body(name, tensor) for all that a step has written and that holds floating-point numbers.
template <class Body>
void for_each_result(const Program::Step& step, const Body& body) {
  for (std::size_t o = 0; o < step.outputs.size(); ++o) {
    if (is_floating(step.outputs[o].dtype())) {
      body(step.output_names[o], step.outputs[o]);
    }
  }
  for (const int i : step.op->mutated()) {
    const auto at = static_cast<std::size_t>(i);
    if (is_floating(step.inputs[at].dtype())) {
      body(step.input_names[at], step.inputs[at]);
    }
  }
}

OpDifference difference(const std::string& name, const Program::Step& step, const Tensor& tensor,
                        const std::vector<double>& expected) {
  const std::vector<double> found = values_on_host(tensor);
  require(found.size() == expected.size(), "compare: ", name, " has ", found.size(), " elements here, ", expected.size(),
          " on the CPU");
  OpDifference result{.name = name, .op = std::string(step.op->name())};
  double squares = 0, norm = 0, worst = -1;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double d = std::abs(found[i] - expected[i]);
    squares += d * d;
    norm += expected[i] * expected[i];
    if (!(d <= worst)) {  // also for NaN
      worst = std::isnan(d) ? std::numeric_limits<double>::infinity() : d;
      result.row = static_cast<std::int64_t>(i) / tensor.shape().columns();
      result.column = static_cast<std::int64_t>(i) % tensor.shape().columns();
      result.expected = expected[i];
      result.found = found[i];
    }
  }
  result.error = squares == 0 ? 0 : std::sqrt(squares / std::max(norm, 1e-60));
  return result;
}

/// Rounding alone explains this much after a whole backward pass: about a hundred roundings of the type in a row.
double explained_by(DType dtype) {
  return dtype == DType::bfloat16 ? 100 * 0x1p-9 : 100 * 0x1p-17;
}

}  // namespace

TensorStatistics statistics_of(const Tensor& tensor) {
  TensorStatistics s{.least = std::numeric_limits<double>::infinity(), .most = -std::numeric_limits<double>::infinity()};
  double sum = 0, squares = 0;
  std::int64_t count = 0;
  for (const double x : values_on_host(tensor)) {
    if (!std::isfinite(x)) {
      ++s.not_finite;
      continue;
    }
    s.least = std::min(s.least, x);
    s.most = std::max(s.most, x);
    sum += x;
    squares += x * x;
    ++count;
  }
  if (count == 0) {
    s.least = s.most = s.mean = s.rms = std::numeric_limits<double>::quiet_NaN();
  } else {
    s.mean = sum / static_cast<double>(count);
    s.rms = std::sqrt(squares / static_cast<double>(count));
  }
  return s;
}

Program::Observer watch_tensors(const std::string& pattern, std::ostream& out) {
  return [pattern, &out](const Program::Step& step, double) {
    for_each_result(step, [&](const std::string& name, const Tensor& tensor) {
      if (fnmatch(pattern.c_str(), name.c_str(), 0) != 0) {
        return;
      }
      const TensorStatistics s = statistics_of(tensor);
      out << "  " << name << ' ' << tensor.type << ": least " << s.least << ", most " << s.most << ", mean " << s.mean
          << ", rms " << s.rms;
      if (s.not_finite > 0) {
        out << ", " << s.not_finite << " not finite";
      }
      out << '\n';
    });
  };
}

std::vector<OpDifference> compare_devices(ModelPrograms& programs, ModelPrograms& on_cpu) {
  std::vector<std::vector<double>> expected;
  on_cpu.observe_once([&](const Program::Step& step, double) {
    for_each_result(step, [&](const std::string&, const Tensor& tensor) { expected.push_back(values_on_host(tensor)); });
  });
  on_cpu.accumulate();
  on_cpu.discard_gradients();
  std::vector<OpDifference> differences;
  programs.observe_once([&](const Program::Step& step, double) {
    for_each_result(step, [&](const std::string& name, const Tensor& tensor) {
      require(differences.size() < expected.size(), "compare: ", name, " is computed here only");
      differences.push_back(difference(name, step, tensor, expected[differences.size()]));
    });
  });
  programs.accumulate();
  programs.discard_gradients();
  return differences;
}

bool print_differences(const std::vector<OpDifference>& differences, DType dtype, std::ostream& out) {
  const double tolerance = explained_by(dtype);
  const auto first =
      std::find_if(differences.begin(), differences.end(), [&](const OpDifference& d) { return !(d.error <= tolerance); });
  const auto line = [&](const OpDifference& d) {
    out << "  " << std::left << std::setw(52) << d.name << std::right << " relative " << std::setprecision(3) << d.error
        << ", most at row " << d.row << ", column " << d.column << ": " << std::setprecision(8) << d.found << ", on the CPU "
        << d.expected << '\n';
  };
  if (first == differences.end()) {
    out << "compared with the CPU: " << differences.size() << " results agree within " << tolerance << " (relative, "
        << name_of(dtype) << "); the largest difference by kind of op:\n";
  } else {
    out << "compared with the CPU: result " << first - differences.begin() + 1 << " of " << differences.size()
        << " is the first that differs by more than " << tolerance << ":\n";
    line(*first);
    out << "the largest difference by kind of op:\n";
  }
  std::map<std::string, const OpDifference*> worst;
  for (const OpDifference& d : differences) {
    const OpDifference*& kept = worst[d.op];
    kept = kept == nullptr || !(d.error <= kept->error) ? &d : kept;
  }
  for (const auto& [op, d] : worst) {
    line(*d);
  }
  return first != differences.end();
}

}  // namespace attamba
