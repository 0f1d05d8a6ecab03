// Where the time of a program goes, by kind of op.
#pragma once

#include <algorithm>
#include <iosfwd>
#include <map>
#include <string>

#include "src/graph/program.h"

namespace attamba {

/// What a device reaches at best; 0: not measured. Nothing runs in less time than its traffic and its arithmetic take at these.
struct Roofline {
  double bytes_per_s = 0;  ///< copies in its memory, read and written bytes counted
  double flops_per_s = 0;  ///< matrix products

  bool known() const { return bytes_per_s > 0 && flops_per_s > 0; }
  double seconds(double bytes, double flops) const { return std::max(bytes / bytes_per_s, flops / flops_per_s); }
};

class OpProfile {
 public:
  struct Row {
    std::int64_t runs = 0;
    double seconds = 0, flops = 0, bytes = 0;
    double floor = 0;  ///< seconds that the roofline allows, summed up run by run; 0 without one
  };

  OpProfile() = default;
  explicit OpProfile(const Roofline& roofline) : roofline_(roofline) {}

  void add(const Program::Step& step, double seconds);
  Program::Observer observer() {
    return [this](const Program::Step& step, double seconds) { add(step, seconds); };
  }
  const std::map<std::string, Row>& rows() const { return rows_; }
  double seconds() const;
  void clear() { rows_.clear(); }

  /// A table by share of time: calls, milliseconds, GFLOP/s, GB/s (least traffic); share of `peak_flops` and of the roofline
  /// where these are known.
  void print(std::ostream& out, double peak_flops) const;

 private:
  Roofline roofline_;
  std::map<std::string, Row> rows_;
};

}  // namespace attamba
