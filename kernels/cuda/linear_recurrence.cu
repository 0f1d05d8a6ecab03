// h_t = a_t h_{t-1} + b_t, column by column, and its gradient (kernels/cpu/linear_recurrence.cpp has the equations).
//
// A block owns a sequence's piece of columns, a lane kWidth of them, and walks the rows, kWarps warps by kSteps rows at a time:
// a warp combines its rows to the map h -> decay h + end, the block exchanges these maps through shared memory, and each warp
// applies those before its own to the state. So every row is read once and written once, and sums have a fixed order. A chunk
// that begins makes its first row's decay 0. Backwards the same from the last row on, the state being a_t dh_t.
#include "kernels/linear_recurrence_checks.h"

#include "kernels/cuda/arguments.h"
#include "kernels/cuda/launch_kernel.h"
#include "kernels/device/activations.h"
#include "kernels/device/block.h"
#include "kernels/device/elements.h"

namespace attamba::kernels::cuda {
namespace {

using namespace attamba::device;

constexpr int kWarps = 16, kThreads = kWarps * kWarp;

struct Extents {
  int n, columns, pieces, rates;
};

template <class T>
struct Arrays {
  T *a, *b, *u;
  float* rate;
};
template <class T>
Arrays<T> arrays_of(const RecurrenceInputs& inputs) {
  return {elements_of<T>(inputs.a), elements_of<T>(inputs.b), optional_elements_of<T>(inputs.u),
          optional_elements_of<float>(inputs.rate)};
}

/// A thread's columns.
struct Place {
  int sequence, column, width;
  bool exists;

  ATTAMBA_DEVICE Place(const Extents& e, int of_lane)
      : sequence(block_x() / e.pieces),
        column((block_x() % e.pieces * kWarp + lane_index()) * of_lane),
        width(of_lane),
        exists(column < e.columns) {}
  ATTAMBA_DEVICE std::int64_t element(const Extents& e, int t) const {
    return (static_cast<std::int64_t>(sequence) * e.n + t) * e.columns + column;
  }
};

/// As on the CPU.
template <RecurrenceForm kForm>
struct Gates {
  float a = 0, b = 0, open = 0, input = 0, root = 0, slope = 0, u = 0;

  ATTAMBA_DEVICE void make(float in_a, float in_b, float in_u, float speed) {
    if constexpr (kForm == RecurrenceForm::plain) {
      a = in_a;
      b = in_b;
    } else if constexpr (kForm == RecurrenceForm::min_gru) {
      open = sigmoid<float>(in_a);
      input = in_b;
      a = sigmoid<float>(-in_a);
      b = open * input;
    } else {
      open = sigmoid<float>(in_a);
      input = sigmoid<float>(in_b);
      u = in_u;
      a = device::exp(speed * open);
      const float rest = -device::expm1(2.0f * speed * open), least = static_cast<float>(kLeastRest);
      root = device::sqrt(rest > least ? rest : least);
      slope = rest >= least ? 0.5f / root : 0.0f;
      b = root * input * u;
    }
  }
  ATTAMBA_DEVICE float back(float da, float db, float speed, float& of_a, float& of_b, float& of_u) const {
    if constexpr (kForm == RecurrenceForm::plain) {
      of_a = da;
      of_b = db;
    } else if constexpr (kForm == RecurrenceForm::min_gru) {
      of_a = (db * input - da) * open * a;
      of_b = db * open;
    } else {
      const float of_log = da * a - 2.0f * a * a * (db * input * u * slope);
      of_a = of_log * speed * open * (1.0f - open);
      of_b = db * root * u * input * (1.0f - input);
      of_u = db * root * input;
      return of_log * open;
    }
    return 0;
  }
};

/// softplus, whose derivative is sigmoid.
ATTAMBA_DEVICE float speed_of(float rate) {
  const float size = rate < 0.0f ? -rate : rate;
  return static_cast<float>(kRecurrenceRate) * ((rate > 0.0f ? rate : 0.0f) + device::log1p(device::exp(-size)));
}

template <RecurrenceForm kForm, class T, int kWidth>
ATTAMBA_DEVICE void make_gates(Gates<kForm> (&gates)[kWidth], const Arrays<T>& in, std::int64_t element,
                               const float (&speed)[kWidth]) {
  using Own = Elements<T, kWidth>;
  const Own a = Own::read(in.a + element), b = Own::read(in.b + element);
  Own u;
  if constexpr (kForm == RecurrenceForm::rg_lru) {
    u = Own::read(in.u + element);
  } else {
    u.fill(0);
  }
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    gates[c].make(a.value[c], b.value[c], u.value[c], speed[c]);
  }
}

/// One bit for each of the warp's rows [first, first + steps) that begins a chunk. Called by whole warps.
ATTAMBA_DEVICE std::uint32_t begins_of(const std::int32_t* starts, const Extents& e, int sequence, int first, int steps) {
  const int t = first + lane_index(), row = sequence * e.n + t;
  return ballot(lane_index() < steps && t < e.n && load(starts + row) == row);
}

template <int kWidth>
struct Map {
  float decay[kWidth], end[kWidth];

  ATTAMBA_DEVICE Map() {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      decay[c] = 1;
      end[c] = 0;
    }
  }
  ATTAMBA_DEVICE void then(int c, float a, float b) {
    end[c] = a * end[c] + b;
    decay[c] *= a;
  }
};

/// Exchanges the warps' maps, through `shared` [2, kWarps, 32 kWidth]: returns in `entry` the state at this warp's entry, and
/// passes `state` on through all of them, the warps from the first to the last or, backwards, from the last to the first.
template <int kWidth>
ATTAMBA_DEVICE void exchange(float* shared, const Map<kWidth>& map, bool backwards, float (&state)[kWidth],
                             float (&entry)[kWidth]) {
  using Own = Elements<float, kWidth>;
  constexpr int kRow = kWarp * kWidth;
  float* const decays = shared + lane_index() * kWidth;
  float* const ends = decays + kWarps * kRow;
  Own decay, end;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    decay.value[c] = map.decay[c];
    end.value[c] = map.end[c];
    entry[c] = 0;
  }
  decay.write(decays + warp_index() * kRow);
  end.write(ends + warp_index() * kRow);
  sync_block();
  for (int i = 0; i < kWarps; ++i) {
    const int warp = backwards ? kWarps - 1 - i : i;
    decay = Own::read(decays + warp * kRow);
    end = Own::read(ends + warp * kRow);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      entry[c] = warp == warp_index() ? state[c] : entry[c];
      state[c] = decay.value[c] * state[c] + end.value[c];
    }
  }
  sync_block();
}
template <int kWidth>
constexpr std::size_t shared_bytes() {
  return SharedMemory::bytes_of<float>(2 * kWarps * kWarp * kWidth);
}

template <RecurrenceForm kForm, int kWidth>
ATTAMBA_DEVICE void load_speeds(float (&speed)[kWidth], const float* rate, const Place& place, const Extents& e) {
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    speed[c] = kForm == RecurrenceForm::rg_lru && place.exists ? speed_of(load(rate + (place.column + c) % e.rates)) : 0.0f;
  }
}

template <RecurrenceForm kForm, class T, int kWidth>
ATTAMBA_KERNEL(kThreads, 1)
linear_recurrence_kernel(T* h, Arrays<T> in, const std::int32_t* starts, Extents e) {
  constexpr int kSteps = 4;
  const Place place(e, kWidth);
  float* const shared = SharedMemory().take<float>(2 * kWarps * kWarp * kWidth);
  float speed[kWidth], state[kWidth] = {}, own[kWidth];
  load_speeds<kForm>(speed, in.rate, place, e);
  for (int begin = 0; begin < e.n; begin += kWarps * kSteps) {
    const int first = begin + warp_index() * kSteps;
    const std::uint32_t begins = begins_of(starts, e, place.sequence, first, kSteps);
    float a[kSteps][kWidth], b[kSteps][kWidth];
    Map<kWidth> map;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        a[i][c] = 1;
        b[i][c] = 0;
      }
      if (place.exists && first + i < e.n) {
        Gates<kForm> gates[kWidth];
        make_gates(gates, in, place.element(e, first + i), speed);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          a[i][c] = (begins >> i & 1u) != 0 ? 0.0f : gates[c].a;
          b[i][c] = gates[c].b;
          map.then(c, a[i][c], b[i][c]);
        }
      }
    }
    exchange(shared, map, false, state, own);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      Elements<T, kWidth> row;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        own[c] = a[i][c] * own[c] + b[i][c];
        row.value[c] = own[c];
      }
      if (place.exists && first + i < e.n) {
        row.write(h + place.element(e, first + i));
      }
    }
  }
}

/// `sums` [sequences, E]: gradients of speeds, for rg_lru.
template <RecurrenceForm kForm, class T, int kWidth>
ATTAMBA_KERNEL(kThreads, 1)
linear_recurrence_backward_kernel(Arrays<T> gradients, const T* dh, const T* h, Arrays<T> in, const std::int32_t* starts,
                                  float* sums, Extents e) {
  using Own = Elements<T, kWidth>;
  constexpr int kSteps = 2, kRows = kWarps * kSteps;
  const Place place(e, kWidth);
  float* const shared = SharedMemory().take<float>(2 * kWarps * kWarp * kWidth);
  float speed[kWidth], of_speed[kWidth] = {}, state[kWidth] = {}, own[kWidth];
  load_speeds<kForm>(speed, in.rate, place, e);
  for (int begin = (e.n - 1) / kRows * kRows; begin >= 0; begin -= kRows) {
    const int first = begin + warp_index() * kSteps;
    const std::uint32_t begins = begins_of(starts, e, place.sequence, first, kSteps);
    Gates<kForm> gates[kSteps][kWidth];
    Own of_h[kSteps];
    Map<kWidth> map;
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      of_h[i].fill(0);
      if (place.exists && first + i < e.n) {
        const std::int64_t element = place.element(e, first + i);
        make_gates(gates[i], in, element, speed);
        of_h[i] = Own::read(dh + element);
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float a = (begins >> i & 1u) != 0 ? 0.0f : gates[i][c].a;
          map.then(c, a, a * of_h[i].value[c]);
        }
      }
    }
    exchange(shared, map, true, state, own);
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      if (place.exists && first + i < e.n) {
        const std::int64_t element = place.element(e, first + i);
        const bool chunk = (begins >> i & 1u) != 0;
        Own before, of_a, of_b, of_u;
        before.fill(0);
        if (!chunk) {
          before = Own::read(h + element - e.columns);
        }
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float db = of_h[i].value[c] + own[c];
          own[c] = chunk ? 0.0f : gates[i][c].a * db;
          of_u.value[c] = 0;
          of_speed[c] += gates[i][c].back(db * before.value[c], db, speed[c], of_a.value[c], of_b.value[c], of_u.value[c]);
        }
        of_a.write(gradients.a + element);
        of_b.write(gradients.b + element);
        if constexpr (kForm == RecurrenceForm::rg_lru) {
          of_u.write(gradients.u + element);
        }
      }
    }
  }
  if constexpr (kForm == RecurrenceForm::rg_lru) {
    const int column = lane_index() * kWidth;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      store(shared + warp_index() * kWarp * kWidth + column + c, of_speed[c]);
    }
    sync_block();
    if (warp_index() == 0 && place.exists) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) {
          sum += load(shared + w * kWarp * kWidth + column + c);
        }
        store(sums + static_cast<std::int64_t>(place.sequence) * e.columns + place.column + c, sum);
      }
    }
  }
}

constexpr int kRateThreads = 128;

ATTAMBA_KERNEL(kRateThreads, 1)
recurrence_rates_kernel(float* drate, const float* rate, const float* sums, int rates, std::int64_t count) {
  const int i = block_x() * kRateThreads + thread_index();
  if (i >= rates) {
    return;
  }
  float sum = 0;
  for (std::int64_t c = i; c < count; c += rates) {
    sum += load(sums + c);
  }
  store(drate + i, load(drate + i) + static_cast<float>(kRecurrenceRate) * sigmoid<float>(load(rate + i)) * sum);
}

/// Calls body.operator()<form, kWidth>().
template <class Body>
void dispatch_form(RecurrenceForm form, bool packed, const Body& body) {
  const auto run = [&]<RecurrenceForm kForm>() {
    packed ? body.template operator()<kForm, 4>() : body.template operator()<kForm, 1>();
  };
  switch (form) {
    case RecurrenceForm::plain:
      return run.template operator()<RecurrenceForm::plain>();
    case RecurrenceForm::min_gru:
      return run.template operator()<RecurrenceForm::min_gru>();
    case RecurrenceForm::rg_lru:
      return run.template operator()<RecurrenceForm::rg_lru>();
  }
}

Extents extents_of(const Tensor& h, const RecurrenceInputs& inputs, std::int64_t n, int width) {
  const auto columns = static_cast<int>(h.shape().columns());
  return {.n = static_cast<int>(n),
          .columns = columns,
          .pieces = static_cast<int>(ceil_div(columns, kWarp * width)),
          .rates = inputs.rate ? static_cast<int>(inputs.rate.elements()) : 1};
}

/// Rows that lanes may read four columns at a time, of all tensors.
bool four_columns(const Tensor& h, std::initializer_list<const void*> addresses) {
  return h.shape().columns() % 4 == 0 && aligned_16(addresses);
}

}  // namespace

void linear_recurrence(const Launch& launch, const Tensor& h, const RecurrenceInputs& inputs, const Tensor& starts,
                       RecurrenceForm form, std::int64_t sequence_length) {
  constexpr const char* kName = "linear_recurrence";
  check_recurrence(kName, h, starts, sequence_length);
  check_recurrence_inputs(kName, "input", inputs, form, h);
  const bool packed = four_columns(h, {h.data, inputs.a.data, inputs.b.data, inputs.u.data});
  dispatch_compute(h.dtype(), kName, [&]<class T>() {
    dispatch_form(form, packed, [&]<RecurrenceForm kForm, int kWidth>() {
      const Extents e = extents_of(h, inputs, sequence_length, kWidth);
      launch_kernel(
          kName, linear_recurrence_kernel<kForm, T, kWidth>, launch,
          {.x = h.shape().rows() / sequence_length * e.pieces, .threads = kThreads, .shared_bytes = shared_bytes<kWidth>()},
          elements_of<T>(h), arrays_of<T>(inputs), starts.as<std::int32_t>(), e);
    });
  });
}

std::size_t linear_recurrence_backward_workspace(const TensorType& h, RecurrenceForm form, std::int64_t sequence_length) {
  const auto sums = static_cast<std::size_t>(h.shape.rows() / sequence_length * h.shape.columns());
  return form == RecurrenceForm::rg_lru ? ScratchAllocator::aligned_bytes<float>(sums) : 0;
}

void linear_recurrence_backward(const Launch& launch, const RecurrenceInputs& gradients, const Tensor& dh, const Tensor& h,
                                const RecurrenceInputs& inputs, const Tensor& starts, RecurrenceForm form,
                                std::int64_t sequence_length) {
  constexpr const char* kName = "linear_recurrence_backward";
  check_recurrence(kName, h, starts, sequence_length);
  check_recurrence_inputs(kName, "input", inputs, form, h);
  check_recurrence_inputs(kName, "gradient of", gradients, form, h);
  require_type(dh, h.type, kName, "dh");
  const std::int64_t sequences = h.shape().rows() / sequence_length, sums_size = sequences * h.shape().columns();
  float* sums = nullptr;
  if (form == RecurrenceForm::rg_lru) {
    sums = ScratchAllocator(launch).take<float>(static_cast<std::size_t>(sums_size));
  }
  const bool packed = four_columns(
      h, {h.data, dh.data, inputs.a.data, inputs.b.data, inputs.u.data, gradients.a.data, gradients.b.data, gradients.u.data});
  dispatch_compute(h.dtype(), kName, [&]<class T>() {
    dispatch_form(form, packed, [&]<RecurrenceForm kForm, int kWidth>() {
      const Extents e = extents_of(h, inputs, sequence_length, kWidth);
      launch_kernel(kName, linear_recurrence_backward_kernel<kForm, T, kWidth>, launch,
                    {.x = sequences * e.pieces, .threads = kThreads, .shared_bytes = shared_bytes<kWidth>()},
                    arrays_of<T>(gradients), elements_of<T>(dh), elements_of<T>(h), arrays_of<T>(inputs),
                    starts.as<std::int32_t>(), sums, e);
    });
  });
  if (form == RecurrenceForm::rg_lru) {
    const auto rates = static_cast<int>(inputs.rate.elements());
    launch_kernel("linear_recurrence_backward: rates", recurrence_rates_kernel, launch,
                  {.x = ceil_div(rates, kRateThreads), .threads = kRateThreads}, gradients.rate.as<float>(),
                  inputs.rate.as<float>(), sums, rates, sums_size);
  }
}

}  // namespace attamba::kernels::cuda
