#include "src/train/op_profile.h"

#include <algorithm>
#include <iomanip>
#include <ostream>
#include <vector>

namespace attamba {

void OpProfile::add(const Program::Step& step, double seconds) {
  Row& row = rows_[std::string(step.op->name())];
  const auto bytes = static_cast<double>(step.bytes);
  ++row.runs;
  row.seconds += seconds;
  row.flops += step.flops;
  row.bytes += bytes;
  row.floor += roofline_.known() ? roofline_.seconds(bytes, step.flops) : 0;
}

double OpProfile::seconds() const {
  double sum = 0;
  for (const auto& [name, row] : rows_) {
    sum += row.seconds;
  }
  return sum;
}

void OpProfile::print(std::ostream& out, double peak_flops) const {
  std::vector<std::pair<std::string, Row>> sorted(rows_.begin(), rows_.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  const double total = seconds();
  const auto cell = [&out](bool known, int width, double value, const char* unit) {
    if (known) {
      out << std::setw(width) << std::setprecision(1) << value << unit;
    } else {
      out << std::setw(width) << '-' << (*unit != 0 ? " " : "");
    }
  };
  out << "  op                          runs        ms   share   GFLOP/s      GB/s   of peak"
      << (roofline_.known() ? "  of roofline\n" : "\n") << std::fixed;
  for (const auto& [name, row] : sorted) {
    out << "  " << std::left << std::setw(26) << name << std::right << std::setw(6) << row.runs << std::setw(10)
        << std::setprecision(2) << row.seconds * 1e3 << std::setw(7) << std::setprecision(1) << 100 * row.seconds / total
        << '%';
    cell(row.flops > 0, 10, row.flops / row.seconds / 1e9, "");
    cell(true, 10, row.bytes / row.seconds / 1e9, "");
    cell(row.flops > 0 && peak_flops > 0, 9, 100 * row.flops / row.seconds / peak_flops, "%");
    if (roofline_.known()) {
      cell(true, 12, 100 * row.floor / row.seconds, "%");
    }
    out << '\n';
  }
  out << "  " << std::left << std::setw(26) << "all" << std::right << std::setw(16) << std::setprecision(2) << total * 1e3
      << '\n';
}

}  // namespace attamba
