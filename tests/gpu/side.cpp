#include "tests/gpu/side.h"

#include <algorithm>
#include <cstring>

#include "src/core/random.h"

namespace attamba::gpu_check {

namespace {

template <class T>
void write(std::byte* to, const std::vector<double>& values) {
  auto* elements = reinterpret_cast<T*>(to);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      elements[i] = bfloat16(static_cast<float>(values[i]));
    } else {
      elements[i] = static_cast<T>(values[i]);
    }
  }
}

}  // namespace

Tensor Side::poisoned(const TensorType& type) {
  const Memory& memory = memory_.emplace_back(device_, type.bytes(), "a check");
  const Tensor tensor{memory.data(), type, device_};
  std::vector<std::byte> bytes(type.bytes(), std::byte{0xff});
  copy_from_host(tensor, {bytes.data(), type});
  return tensor;
}

Tensor Side::make(DType type, const Shape& shape, const std::vector<double>& values) {
  std::vector<std::byte> bytes(TensorType{type, shape}.bytes());
  switch (type) {
    case DType::float32:
      write<float>(bytes.data(), values);
      break;
    case DType::bfloat16:
      write<bfloat16>(bytes.data(), values);
      break;
    case DType::float64:
      write<double>(bytes.data(), values);
      break;
    case DType::int32:
      write<std::int32_t>(bytes.data(), values);
      break;
    case DType::int64:
      write<std::int64_t>(bytes.data(), values);
      break;
  }
  const Memory& memory = memory_.emplace_back(device_, bytes.size(), "a check");
  const Tensor tensor{memory.data(), {type, shape}, device_};
  copy_from_host(tensor, {bytes.data(), tensor.type});
  return tensor;
}

Tensor Side::random(DType type, const Shape& shape, double deviation, double mean) {
  RandomStream random(20240229, next_++);
  std::vector<double> values(static_cast<std::size_t>(shape.elements()));
  for (double& value : values) {
    value = static_cast<double>(static_cast<float>(bfloat16(static_cast<float>(mean + deviation * random.normal()))));
  }
  return make(type, shape, values);
}

Tensor Side::constant(DType type, const Shape& shape, double value) {
  return make(type, shape, std::vector<double>(static_cast<std::size_t>(shape.elements()), value));
}

Tensor Side::integers(const std::vector<std::int32_t>& values) {
  return make(DType::int32, {static_cast<std::int64_t>(values.size())}, {values.begin(), values.end()});
}

Tensor Side::float64s(const std::vector<double>& values) {
  return make(DType::float64, {static_cast<std::int64_t>(values.size())}, values);
}

Tensor Side::output(DType type, const Shape& shape) {
  return poisoned({type, shape});
}

Launch Side::launch(std::size_t scratch) {
  const auto words = static_cast<std::int64_t>(std::max<std::size_t>(scratch, 64) / sizeof(float) + 1);
  const Tensor memory = poisoned({DType::float32, {words}});
  return {.device = device_,
          .stream = runtime(device_).stream(),
          .scratch = {static_cast<std::byte*>(memory.data), std::max<std::size_t>(scratch, 64)}};
}

}  // namespace attamba::gpu_check
