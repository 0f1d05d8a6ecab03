#include "src/train/machine.h"

#include <algorithm>
#include <cctype>
#include <cmath>

#include "src/core/error.h"
#include "src/core/names.h"
#include "src/train/toml_node.h"

namespace attamba {

namespace {

constexpr double kGiga = 1e9, kTera = 1e12, kGibi = 0x1p30;
/// Of an adapter's or link's line rate, what NCCL moves: 370 of 450 GB/s (NVIDIA's answer in nccl-tests issue 212).
constexpr double kProtocol = 0.82;
/// What every collective takes besides (base latency of rings with the simple protocol in NCCL's tuning table). That table
/// also has Machine's default latencies: 3.4 us per step over NVLink, 5.7 us over PCIe, 14 us over a network.
constexpr double kCollectiveSeconds = 8.4e-6;

/// Float32 products are data sheets' (no TF32 is used). All are the 80 GB and SXM variants where there are several.
std::vector<Machine> make_machines() {
  // 794.5 TFLOP/s: largest bfloat16 product of stas00/ml-engineering's table (H100 SXM, PyTorch 2.7, CUDA 12.6).
  // 3.0 TB/s: 90% of the data sheet's 3.35, reached by QuACK's reductions. 400 Gb/s per GPU: DGX H100.
  const Machine h100{.name = "H100",
                     .memory = 79.1 * kGibi,
                     .bfloat16 = 794.5 * kTera,
                     .float32 = 67 * kTera,
                     .bandwidth = 3.0 * kTera,
                     .link = 370 * kGiga,
                     .network = kProtocol * 8 * 50 * kGiga,
                     .source =
                         "products and copies measured by others, NVLink as NVIDIA states it for rings, eight 400 Gb/s "
                         "adapters a node"};
  // Products and copies measured on one H200; links and network as those of the H100.
  Machine h200 = h100;
  h200.name = "H200";
  h200.memory = 139.8 * kGibi;
  h200.bfloat16 = 790 * kTera;
  h200.bandwidth = 4.3 * kTera;
  h200.source = "products and copies measured, NVLink as NVIDIA states it for rings, eight 400 Gb/s adapters a node";
  // 271.2 TFLOP/s: the same table (A100 SXM, PyTorch 2.6, CUDA 12.6). Memory: 90% of the data sheet's 2.04 TB/s, as the H100
  // reaches. 208 GB/s: nccl-tests issue 178. 200 Gb/s per GPU: DGX A100.
  const Machine a100{.name = "A100",
                     .memory = 79.2 * kGibi,
                     .bfloat16 = 271.2 * kTera,
                     .float32 = 19.5 * kTera,
                     .bandwidth = 0.9 * 2.04 * kTera,
                     .link = 208 * kGiga,
                     .network = kProtocol * 8 * 25 * kGiga,
                     .source =
                         "products and NVLink measured by others, memory at 90% of the data sheet, eight 200 Gb/s adapters "
                         "a node"};
  // Data sheet: 155 TFLOP/s, which its 300 W do not hold for long, and 0.768 TB/s; PCIe 4.0 x16, 31.5 GB/s.
  const Machine a6000{.name = "A6000",
                      .memory = 47.5 * kGibi,
                      .bfloat16 = 155 * kTera,
                      .float32 = 38.7 * kTera,
                      .bandwidth = 0.768 * kTera,
                      .link = kProtocol * 31.5 * kGiga,
                      .link_latency = 5.7e-6,
                      .network = kProtocol * 12.5 * kGiga,
                      .source = "data sheet; PCIe 4.0 without NVLink, one 100 Gb/s adapter a node"};
  return {h100, h200, a100, a6000};
}

const std::vector<Machine>& machines() {
  static const std::vector<Machine> kMachines = make_machines();
  return kMachines;
}

std::string upper(std::string_view text) {
  std::string result(text);
  std::transform(result.begin(), result.end(), result.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return result;
}

}  // namespace

double Machine::floor_seconds(double flops, double bytes, DType dtype) const {
  return std::max(flops / peak(dtype), bytes / bandwidth);
}

double Machine::op_time(double flops, double bytes, DType dtype) const {
  return std::max(flops / (peak(dtype) * product_share), bytes / (bandwidth * copy_share)) + op_seconds;
}

double ring_bytes(const Collective& collective, int ranks) {
  const double whole = static_cast<double>(collective.bytes) * (ranks - 1) / ranks;
  switch (collective.kind) {
    case Collective::Kind::all_reduce:
      return 2 * whole;
    case Collective::Kind::reduce_scatter:
    case Collective::Kind::all_gather:
      return whole;
    default:
      return 0;
  }
}

double Machine::collective_seconds(const Collective& collective, int ranks) const {
  const double bytes = ring_bytes(collective, ranks);
  if (bytes == 0) {
    return 0;
  }
  const double per_node = std::min<double>(ranks, static_cast<double>(gpus_per_node));
  const double nodes = std::ceil(ranks / per_node);
  // Rings go through all GPUs of a node and leave it over all of its adapters, each ring with its share of the data.
  const double speed = nodes > 1 ? std::min(link, network) : link;
  const double rounds = collective.kind == Collective::Kind::all_reduce ? 2 : 1;
  const double between = nodes > 1 ? nodes : 0;
  double latency = rounds * ((ranks - between) * link_latency + between * network_latency);
  if (collective.kind == Collective::Kind::all_reduce) {  // then NCCL also has a tree, which it takes where rings get long
    latency = std::min(latency, 2 * ((per_node - 1) * link_latency + std::log2(nodes) * network_latency));
  }
  return bytes / speed + latency + kCollectiveSeconds;
}

std::vector<std::string_view> machine_names() {
  std::vector<std::string_view> names;
  for (const Machine& machine : machines()) {
    names.push_back(machine.name);
  }
  return names;
}

Machine known_machine(std::string_view name) {
  const std::string wanted = upper(name);
  const auto found =
      std::find_if(machines().begin(), machines().end(), [&](const Machine& machine) { return machine.name == wanted; });
  if (found == machines().end()) {
    throw UsageError(concat("--gpu ", name, ": no numbers for such a GPU; ", advice_on_names(wanted, machine_names()),
                            "; describe another one with --machine FILE"));
  }
  return *found;
}

Machine load_machine(const std::filesystem::path& file, const Machine& base) {
  Machine machine = base;
  machine.name = file.stem().string();
  machine.source = file.string();
  detail::read_toml(machine, detail::read_toml_file(file, "machine", "docs/plan.md shows one"), file.string());
  require_known(concat(file.string(), ": device"), machine.device, {"gpu", "cpu"});
  const auto require_positive = [&](std::string_view key, double value) {
    require<UsageError>(value > 0, file.string(), ": ", key, " = ", value, ": must be greater than 0");
  };
  require_positive("memory", machine.memory);
  require_positive("bfloat16", machine.bfloat16);
  require_positive("float32", machine.float32);
  require_positive("bandwidth", machine.bandwidth);
  require_positive("product_share", machine.product_share);
  require_positive("copy_share", machine.copy_share);
  require_positive("gpus_per_node", static_cast<double>(machine.gpus_per_node));
  require_positive("link", machine.link);
  require_positive("network", machine.network);
  return machine;
}

}  // namespace attamba
