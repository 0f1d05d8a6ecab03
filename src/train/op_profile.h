// Where the time of a program goes, by kind of op.
#pragma once

#include <iosfwd>
#include <map>
#include <string>

#include "src/graph/program.h"

namespace attamba {

class OpProfile {
 public:
  struct Row {
    std::int64_t runs = 0;
    double seconds = 0, flops = 0, bytes = 0;
  };

  void add(const Program::Step& step, double seconds);
  Program::Observer observer() {
    return [this](const Program::Step& step, double seconds) { add(step, seconds); };
  }
  const std::map<std::string, Row>& rows() const { return rows_; }
  double seconds() const;
  void clear() { rows_.clear(); }

  /// A table by share of time: calls, milliseconds, GFLOP/s, GB/s (least traffic), share of `peak_flops` where that is known.
  void print(std::ostream& out, double peak_flops) const;

 private:
  std::map<std::string, Row> rows_;
};

}  // namespace attamba
