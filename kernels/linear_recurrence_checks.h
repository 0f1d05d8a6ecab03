// What every backend's linear recurrence asks of its arguments before it runs.
#pragma once

#include "kernels/kernels.h"

namespace attamba::kernels {

/// Of the rate in log a = kRecurrenceRate sigmoid(...) softplus(rate), and the least of 1 - a^2 under the root: its slope stays
/// below 1000.
inline constexpr double kRecurrenceRate = -8, kLeastRest = 2.5e-7;

/// Throws unless `inputs` (or their gradients; `role` says which) fit h [T, E].
inline void check_recurrence_inputs(const char* operation, const char* role, const RecurrenceInputs& inputs,
                                    RecurrenceForm form, const Tensor& h) {
  const auto check = [&](const char* name, const Tensor& tensor) {
    require(tensor.type == h.type, operation, ": ", role, " ", name, " is ", tensor.type, ", expected ", h.type);
  };
  check("a", inputs.a);
  check("b", inputs.b);
  if (form == RecurrenceForm::rg_lru) {
    check("u", inputs.u);
    const std::int64_t rates = inputs.rate.elements();
    require(inputs.rate.dtype() == accumulator_of(h.dtype()) && rates > 0 && h.shape().columns() % rates == 0, operation, ": ",
            role, " rate is ", inputs.rate.type, ", expected elements of ", name_of(accumulator_of(h.dtype())),
            " whose number divides ", h.shape().columns());
  }
}

inline void check_recurrence(const char* operation, const Tensor& h, const Tensor& starts, std::int64_t sequence_length) {
  require(h.shape().rank() == 2, operation, ": h is ", h.type, ", expected [T, E]");
  require(starts.dtype() == DType::int32 && starts.elements() == h.shape().rows(), operation, ": starts ", starts.type,
          " does not fit h ", h.type);
  require(sequence_length > 0 && h.shape().rows() % sequence_length == 0, operation, ": h ", h.type,
          " is not made of sequences of ", sequence_length);
}

}  // namespace attamba::kernels
