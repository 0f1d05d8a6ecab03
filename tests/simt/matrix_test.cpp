// Functions of a warp: shuffles, matrix loads and products, against their definitions.
#include <bit>
#include <cmath>

#include "src/core/dtype.h"
#include "src/core/random.h"
#include "tests/simt/small_kernels.h"

namespace attamba::simt {
namespace {

using namespace attamba::device;
using ::testing::HasSubstr;

TEST(EmulatedWarps, Shuffle) {
  run({.threads = 64}, [] {
    const int lane = lane_index();
    const auto value = static_cast<float>(thread_index());
    const auto base = static_cast<float>(thread_index() - lane);
    EXPECT_EQ(shuffle(value, 7), base + 7);
    EXPECT_EQ(shuffle(value, (lane + 3) % 32), base + static_cast<float>((lane + 3) % 32));
    EXPECT_EQ(shuffle_xor(value, 5), base + static_cast<float>(lane ^ 5));
    EXPECT_EQ(shuffle_up(value, 4), lane < 4 ? value : value - 4);
    EXPECT_EQ(shuffle_down(value, 4), lane > 27 ? value : value + 4);
    EXPECT_EQ(shuffle(static_cast<std::uint32_t>(lane), 40), 8u);
    EXPECT_EQ(ballot(lane % 3 == 0), 0x49249249u);
    EXPECT_EQ(warp_sum(1.0f), 32.0f);
    EXPECT_EQ(warp_max(value), base + 31);
  });
}

std::uint16_t bits(double value) {
  return bfloat16(static_cast<float>(value)).bits;
}
double real(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

TEST(EmulatedWarps, MatrixLoadsHandOutElementsAsPtxSays) {
  run({.threads = 32, .shared_bytes = 512}, [] {
    // Element (row, column) of matrix i is 64 i + 8 row + column.
    auto* shared = reinterpret_cast<std::uint16_t*>(dynamic_shared());
    for (int i = thread_index(); i < 256; i += 32) {
      store(shared + i, static_cast<std::uint16_t>(i));
    }
    sync_block();
    const std::uint32_t r = static_cast<std::uint32_t>(lane_index() / 4), c = static_cast<std::uint32_t>(lane_index() % 4);
    std::uint32_t plain[4], transposed[4];
    load_matrix_x4(plain, shared + 8 * lane_index());
    load_matrix_x4_transposed(transposed, shared + 8 * lane_index());
    for (std::uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(plain[i] & 0xffffu, 64 * i + 8 * r + 2 * c);
      EXPECT_EQ(plain[i] >> 16, 64 * i + 8 * r + 2 * c + 1);
      EXPECT_EQ(transposed[i] & 0xffffu, 64 * i + 8 * (2 * c) + r);
      EXPECT_EQ(transposed[i] >> 16, 64 * i + 8 * (2 * c + 1) + r);
    }
  });
}

struct Matrices {
  Matrices() {
    RandomStream random(7);
    for (auto* matrix : {&a, &b}) {
      for (auto& x : *matrix) {
        x = bits(random.normal());
      }
    }
    for (auto& x : d) {
      x = static_cast<float>(random.normal());
    }
  }
  /// A sum of 17 terms in float32, each partial sum rounded.
  void expect_product(const std::vector<float>& actual) const {
    for (std::size_t row = 0; row < 16; ++row) {
      for (std::size_t column = 0; column < 8; ++column) {
        double sum = d[row * 8 + column], size = std::abs(sum);
        for (std::size_t k = 0; k < 16; ++k) {
          const double term = real(a[row * 16 + k]) * real(b[column * 16 + k]);
          sum += term, size += std::abs(term);
        }
        EXPECT_NEAR(actual[row * 8 + column], sum, 16 * 0x1p-24 * size) << row << ", " << column;
      }
    }
  }

  std::vector<std::uint16_t> a = std::vector<std::uint16_t>(256), b = std::vector<std::uint16_t>(128);  ///< b by columns
  std::vector<float> d = std::vector<float>(128);
};

/// Gives each lane its elements of d, calls product(lane's d), and puts them back.
template <class Product>
void with_accumulator(float* d, const Product& product) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  float mine[4];
  for (int i = 0; i < 4; ++i) {
    mine[i] = load(d + (g + 8 * (i / 2)) * 8 + 2 * q + i % 2);
  }
  product(mine);
  for (int i = 0; i < 4; ++i) {
    store(d + (g + 8 * (i / 2)) * 8 + 2 * q + i % 2, mine[i]);
  }
}

TEST(EmulatedWarps, MatrixProductTakesFragmentsAsPtxSays) {
  const Matrices m;
  const Global<std::uint16_t> a(m.a), b(m.b);
  const Global<float> d(m.d);
  run({.threads = 32}, [&] {
    const int g = lane_index() / 4, q = lane_index() % 4;
    const auto pair = [](const std::uint16_t* p) { return load(reinterpret_cast<const std::uint32_t*>(p)); };
    const std::uint32_t x[4] = {pair(a.data() + g * 16 + 2 * q), pair(a.data() + (g + 8) * 16 + 2 * q),
                                pair(a.data() + g * 16 + 2 * q + 8), pair(a.data() + (g + 8) * 16 + 2 * q + 8)};
    const std::uint32_t y[2] = {pair(b.data() + g * 16 + 2 * q), pair(b.data() + g * 16 + 2 * q + 8)};
    with_accumulator(d.data(), [&](float(&mine)[4]) { mma_16x8x16(mine, x, y); });
  });
  m.expect_product(d.values());
}

TEST(EmulatedWarps, MatrixLoadsFeedMatrixProducts) {
  const Matrices m;
  const Global<std::uint16_t> a(m.a), b(m.b);
  for (const bool by_rows : {false, true}) {  // how b lies in shared memory: [8, 16] or [16, 8]
    const Global<float> d(m.d);
    run({.threads = 32, .shared_bytes = 768}, [&] {
      auto* shared_a = reinterpret_cast<std::uint16_t*>(dynamic_shared());
      auto* shared_b = shared_a + 256;
      for (int i = thread_index(); i < 256; i += 32) {
        store(shared_a + i, load(a.data() + i));
      }
      for (int i = thread_index(); i < 128; i += 32) {
        store(shared_b + (by_rows ? i % 16 * 8 + i / 16 : i), load(b.data() + i));
      }
      sync_block();
      const int lane = lane_index();
      std::uint32_t x[4], y[4];
      load_matrix_x4(x, shared_a + lane % 16 * 16 + lane / 16 * 8);
      if (by_rows) {
        load_matrix_x4_transposed(y, shared_b + lane % 16 * 8);
      } else {
        load_matrix_x4(y, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
      }
      with_accumulator(d.data(), [&](float(&mine)[4]) { mma_16x8x16(mine, x, {y[0], y[1]}); });
    });
    m.expect_product(d.values());
  }
}

TEST(EmulatedWarps, MatrixLoadsCheckTheirRows) {
  const auto load_rows = [](int stride, int written) {
    return [=] {
      auto* shared = reinterpret_cast<std::uint16_t*>(dynamic_shared());
      for (int i = thread_index(); i < written; i += 32) {
        store(shared + i, std::uint16_t{0});
      }
      sync_block();
      std::uint32_t r[4];
      load_matrix_x4(r, shared + stride * lane_index());
    };
  };
  expect_error({.threads = 32, .shared_bytes = 512}, load_rows(7, 256), HasSubstr("misaligned"));
  expect_error({.threads = 32, .shared_bytes = 512}, load_rows(8, 255), HasSubstr("never written"));
  expect_error({.threads = 32, .shared_bytes = 496}, load_rows(8, 248), HasSubstr("out of bounds"));
  const Global<Bytes16> global(std::vector<Bytes16>(32));
  expect_error(
      {.threads = 32},
      [&] {
        std::uint32_t r[4];
        load_matrix_x4(r, global.data() + lane_index());
      },
      HasSubstr("not in shared memory"));
}

TEST(EmulatedWarps, MatrixLoadsCountBankConflicts) {
  const auto conflicts = [](auto column_of_row) {
    reset_counters();
    run({.threads = 32, .shared_bytes = 32 * 128}, [&] {
      auto* rows = reinterpret_cast<Bytes16*>(dynamic_shared());
      for (int i = thread_index(); i < 256; i += 32) {
        store(rows + i, Bytes16{});
      }
      sync_block();
      std::uint32_t r[4];
      load_matrix_x4(r, rows + 8 * lane_index() + column_of_row(lane_index()));
    });
    EXPECT_EQ(counters("small_kernel").matrix_loads, 1);
    return counters("small_kernel").matrix_load_conflicts;
  };
  EXPECT_EQ(conflicts([](int) { return 3; }), 4 * 7);                // rows of 128 bytes, all in the same banks
  EXPECT_EQ(conflicts([](int row) { return (row ^ 3) % 8; }), 0);    // swizzled
  EXPECT_EQ(conflicts([](int row) { return row / 2 % 4; }), 4 * 1);  // two by two
}

}  // namespace
}  // namespace attamba::simt
