// h_t = a_t h_{t-1} + b_t, column by column, from a chunk's first row on; and backwards
//
//   dh_t += a_{t+1} dh_{t+1};  db_t = dh_t;  da_t = dh_t h_{t-1}
//
// through the gates that made a and b, which are computed again. A task owns a sequence's piece of kColumns columns and walks
// its rows; the state stays in registers and cache, in the accumulator type.
#include "kernels/linear_recurrence_checks.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/vector_math.h"
#include "src/core/parallel.h"

namespace attamba::kernels::cpu {
namespace {

constexpr std::int64_t kColumns = 64;

/// 1 - e^x for x <= 0. In float32 near 0 by its series, which has no cancellation.
inline float rest_of_exp(float x) {
  const float series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))));
  return x > -0.5f ? series : 1 - fast_exp(x);
}
inline double rest_of_exp(double x) {
  return -std::expm1(x);
}

/// Elements of one row and a task's columns.
template <class T>
struct Row {
  T *a, *b, *u;
};
template <class T>
Row<T> row_of(const RecurrenceInputs& inputs, std::int64_t element) {
  return {inputs.a.as<T>() + element, inputs.b.as<T>() + element, inputs.u ? inputs.u.as<T>() + element : nullptr};
}

/// What makes a and b of a column, and their gradients' way back. `speed` is kRecurrenceRate softplus(rate), or unused.
template <RecurrenceForm kForm, class A>
struct Gates {
  A a = 0, b = 0;
  A open = 0, input = 0, root = 0, slope = 0, u = 0;  // of the gates, where there are any; slope = d root / d (root^2)

  Gates(A in_a, A in_b, A in_u, A speed) {
    if constexpr (kForm == RecurrenceForm::plain) {
      a = in_a;
      b = in_b;
    } else if constexpr (kForm == RecurrenceForm::min_gru) {
      open = sigmoid(in_a);
      input = in_b;
      a = sigmoid(-in_a);
      b = open * input;
    } else {
      open = sigmoid(in_a);
      input = sigmoid(in_b);
      u = in_u;
      a = fast_exp(speed * open);
      const A rest = rest_of_exp(2 * speed * open);
      root = std::sqrt(std::max(rest, A(kLeastRest)));
      slope = rest >= A(kLeastRest) ? 1 / (2 * root) : A(0);
      b = root * input * u;
    }
  }
  /// Gradients of the inputs from those of a and b; returns that of `speed`.
  A back(A da, A db, A speed, A& of_a, A& of_b, A& of_u) const {
    if constexpr (kForm == RecurrenceForm::plain) {
      of_a = da;
      of_b = db;
    } else if constexpr (kForm == RecurrenceForm::min_gru) {
      of_a = (db * input - da) * open * a;
      of_b = db * open;
    } else {
      const A of_log = da * a - 2 * a * a * (db * input * u * slope);
      of_a = of_log * speed * open * (1 - open);
      of_b = db * root * u * input * (1 - input);
      of_u = db * root * input;
      return of_log * open;
    }
    return A(0);
  }
};

/// kRecurrenceRate softplus(rate) of each of a task's columns.
template <RecurrenceForm kForm, class A>
void load_speeds(A (&speed)[kColumns], const RecurrenceInputs& inputs, std::int64_t first, std::int64_t count) {
  for (std::int64_t c = 0; c < count && kForm == RecurrenceForm::rg_lru; ++c) {
    speed[c] = A(kRecurrenceRate) * softplus(inputs.rate.as<A>()[(first + c) % inputs.rate.elements()]);
  }
}

/// Calls body(sequence, first column, number of columns) for every task.
template <class Body>
void for_pieces(const Tensor& h, std::int64_t sequence_length, const Body& body) {
  const std::int64_t columns = h.shape().columns(), pieces = (columns + kColumns - 1) / kColumns;
  parallel_for(h.shape().rows() / sequence_length * pieces, [&](std::int64_t task) {
    const std::int64_t first = task % pieces * kColumns;
    body(task / pieces, first, std::min(kColumns, columns - first));
  });
}

template <RecurrenceForm kForm, class T>
void forward(const Tensor& h, const RecurrenceInputs& inputs, const std::int32_t* starts, std::int64_t n) {
  using A = Accumulator<T>;
  const std::int64_t columns = h.shape().columns();
  for_pieces(h, n, [&](std::int64_t sequence, std::int64_t first, std::int64_t count) {
    A state[kColumns] = {}, speed[kColumns] = {};
    load_speeds<kForm>(speed, inputs, first, count);
    for (std::int64_t t = sequence * n; t < (sequence + 1) * n; ++t) {
      const std::int64_t element = t * columns + first;
      const Row<T> in = row_of<T>(inputs, element);
      T* const to = h.as<T>() + element;
      const bool begins = starts[t] == t;
#pragma omp simd
      for (std::int64_t c = 0; c < count; ++c) {
        const A u = kForm == RecurrenceForm::rg_lru ? convert<A>(in.u[c]) : A(0);
        const Gates<kForm, A> gates(convert<A>(in.a[c]), convert<A>(in.b[c]), u, speed[c]);
        state[c] = gates.b + (begins ? A(0) : gates.a * state[c]);
        to[c] = convert<T>(state[c]);
      }
    }
  });
}

/// `sums` [sequences, E]: gradients of speeds.
template <RecurrenceForm kForm, class T>
void backward(const RecurrenceInputs& gradients, const Tensor& dh, const Tensor& h, const RecurrenceInputs& inputs,
              const std::int32_t* starts, std::int64_t n, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const std::int64_t columns = h.shape().columns();
  for_pieces(h, n, [&](std::int64_t sequence, std::int64_t first, std::int64_t count) {
    A carry[kColumns] = {}, speed[kColumns] = {}, of_speed[kColumns] = {};
    load_speeds<kForm>(speed, inputs, first, count);
    for (std::int64_t t = (sequence + 1) * n - 1; t >= sequence * n; --t) {
      const std::int64_t element = t * columns + first;
      const Row<T> in = row_of<T>(inputs, element), to = row_of<T>(gradients, element);
      const T* const from = dh.as<T>() + element;
      const bool begins = starts[t] == t;
      const T* const before = h.as<T>() + (begins ? element : element - columns);
#pragma omp simd
      for (std::int64_t c = 0; c < count; ++c) {
        const A u = kForm == RecurrenceForm::rg_lru ? convert<A>(in.u[c]) : A(0);
        const Gates<kForm, A> gates(convert<A>(in.a[c]), convert<A>(in.b[c]), u, speed[c]);
        const A db = convert<A>(from[c]) + carry[c], da = begins ? A(0) : db * convert<A>(before[c]);
        carry[c] = begins ? A(0) : gates.a * db;
        A of_a = 0, of_b = 0, of_u = 0;
        of_speed[c] += gates.back(da, db, speed[c], of_a, of_b, of_u);
        to.a[c] = convert<T>(of_a);
        to.b[c] = convert<T>(of_b);
        if constexpr (kForm == RecurrenceForm::rg_lru) {
          to.u[c] = convert<T>(of_u);
        }
      }
    }
    if constexpr (kForm == RecurrenceForm::rg_lru) {
      std::copy_n(of_speed, count, sums + sequence * columns + first);
    }
  });
}

/// The rates' gradients += those of the speeds, columns of one rate and sequences in order.
template <class A>
void add_rates(const Tensor& drate, const Tensor& rate, const A* sums, std::int64_t sequences, std::int64_t columns) {
  const std::int64_t rates = rate.elements();
  parallel_ranges(rates, kColumns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      A sum = 0;
      for (std::int64_t c = i; c < sequences * columns; c += rates) {
        sum += sums[c];
      }
      drate.as<A>()[i] += A(kRecurrenceRate) * sigmoid(rate.as<A>()[i]) * sum;
    }
  });
}

/// Calls body.operator()<form>().
template <class Body>
void dispatch_form(RecurrenceForm form, const Body& body) {
  switch (form) {
    case RecurrenceForm::plain:
      return body.template operator()<RecurrenceForm::plain>();
    case RecurrenceForm::min_gru:
      return body.template operator()<RecurrenceForm::min_gru>();
    case RecurrenceForm::rg_lru:
      return body.template operator()<RecurrenceForm::rg_lru>();
  }
}

}  // namespace

void linear_recurrence(const Launch&, const Tensor& h, const RecurrenceInputs& inputs, const Tensor& starts,
                       RecurrenceForm form, std::int64_t sequence_length) {
  constexpr const char* kName = "linear_recurrence";
  check_recurrence(kName, h, starts, sequence_length);
  check_recurrence_inputs(kName, "input", inputs, form, h);
  dispatch_floating(h.dtype(), kName, [&]<class T>() {
    dispatch_form(form,
                  [&]<RecurrenceForm kForm>() { forward<kForm, T>(h, inputs, starts.as<std::int32_t>(), sequence_length); });
  });
}

std::size_t linear_recurrence_backward_workspace(const TensorType& h, RecurrenceForm form, std::int64_t sequence_length) {
  const auto sequences = static_cast<std::size_t>(h.shape.rows() / sequence_length);
  return form == RecurrenceForm::rg_lru
             ? ScratchAllocator::aligned_bytes<std::byte>(sequences * static_cast<std::size_t>(h.shape.columns()) *
                                                          size_of(accumulator_of(h.dtype)))
             : 0;
}

void linear_recurrence_backward(const Launch& launch, const RecurrenceInputs& gradients, const Tensor& dh, const Tensor& h,
                                const RecurrenceInputs& inputs, const Tensor& starts, RecurrenceForm form,
                                std::int64_t sequence_length) {
  constexpr const char* kName = "linear_recurrence_backward";
  check_recurrence(kName, h, starts, sequence_length);
  check_recurrence_inputs(kName, "input", inputs, form, h);
  check_recurrence_inputs(kName, "gradient of", gradients, form, h);
  require_type(dh, h.type, kName, "dh");
  dispatch_floating(h.dtype(), kName, [&]<class T>() {
    using A = Accumulator<T>;
    const std::int64_t columns = h.shape().columns(), sequences = h.shape().rows() / sequence_length;
    A* sums = nullptr;
    if (form == RecurrenceForm::rg_lru) {
      sums = ScratchAllocator(launch).take<A>(static_cast<std::size_t>(sequences * columns));
    }
    dispatch_form(form, [&]<RecurrenceForm kForm>() {
      backward<kForm, T>(gradients, dh, h, inputs, starts.as<std::int32_t>(), sequence_length, sums);
    });
    if (form == RecurrenceForm::rg_lru) {
      add_rates(gradients.rate, inputs.rate, sums, sequences, columns);
    }
  });
}

}  // namespace attamba::kernels::cpu
