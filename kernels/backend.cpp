#include <array>

#include "kernels/kernels.h"
#include "src/core/error.h"

namespace attamba::kernels {

namespace {

constexpr Backend kCpu{
#define ATTAMBA_CPU_MEMBER(name) .name = &cpu::name,
    ATTAMBA_FOR_EACH_KERNEL(ATTAMBA_CPU_MEMBER)
#undef ATTAMBA_CPU_MEMBER
};

std::array<const Backend*, 2> backends{&kCpu, nullptr};

}  // namespace

const Backend& on(Device device) {
  const Backend* backend = backends[static_cast<std::size_t>(device)];
  require<UsageError>(backend != nullptr, "no kernels for this device: this program computes on the CPU only");
  return *backend;
}

void set_backend(Device device, const Backend& backend) {
  backends[static_cast<std::size_t>(device)] = &backend;
}

}  // namespace attamba::kernels
