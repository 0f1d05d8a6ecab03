// Problems of the scan and what kernels make of them, in float64.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/kernels.h"
#include "src/core/random.h"

namespace attamba::kernels {

using Vector = std::vector<double>;

/// Weights of one SSM, or their gradients, in float64.
struct Weights {
  Vector conv, a_log, d_skip, dt_bias, norm;
};

struct Problem {
  ScanShape shape;
  std::int64_t n = 0, rows = 0;
  std::vector<std::int32_t> table;  ///< of rows: chunk starts, or labels
  Weights weights;
  Vector zxbcdt, dout;
  double eps = 1e-5;

  std::int64_t channels() const { return shape.hidden + 2 * shape.groups * shape.state; }
};

/// Values that bfloat16 represents exactly, so that every compute type gets the same problem.
inline Vector normals(RandomStream& random, std::int64_t count, double scale, double mean = 0) {
  Vector values(static_cast<std::size_t>(count));
  for (double& value : values) {
    value = static_cast<float>(bfloat16(static_cast<float>(mean + scale * random.normal())));
  }
  return values;
}

/// `a_log`: its mean. At -1 a state is gone after some ten tokens, at -5 it outlives hundreds.
inline Problem make_problem(const ScanShape& shape, std::int64_t n, std::vector<std::int32_t> table, bool bias,
                            std::uint64_t seed, double a_log = -1) {
  RandomStream random(seed);
  Problem p;
  p.shape = shape;
  p.n = n;
  p.rows = static_cast<std::int64_t>(table.size());
  p.table = std::move(table);
  p.weights.conv = normals(random, p.channels() * shape.conv, shape.conv > 0 ? 1 / std::sqrt(shape.conv) : 1);
  p.weights.a_log = normals(random, shape.heads, 1.0, a_log);
  p.weights.d_skip = normals(random, shape.heads, 0.1, 1.0);
  p.weights.dt_bias = bias ? normals(random, shape.heads, 0.5) : Vector();
  p.weights.norm = normals(random, shape.hidden, 0.1, 1.0);
  p.zxbcdt = normals(random, p.rows * shape.projection(), 1.0);
  p.dout = normals(random, p.rows * shape.hidden, 1.0);
  return p;
}

struct Result {
  Vector out, dzxbcdt;
  Weights gradients;
};

inline void expect_equal(const Result& a, const Result& b) {
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.dzxbcdt, b.dzxbcdt);
  EXPECT_EQ(a.gradients.conv, b.gradients.conv);
  EXPECT_EQ(a.gradients.a_log, b.gradients.a_log);
  EXPECT_EQ(a.gradients.d_skip, b.gradients.d_skip);
  EXPECT_EQ(a.gradients.dt_bias, b.gradients.dt_bias);
  EXPECT_EQ(a.gradients.norm, b.gradients.norm);
}

}  // namespace attamba::kernels
