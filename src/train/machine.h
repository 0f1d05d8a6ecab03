// Machines as the few numbers that a step's time is predicted from (docs/plan.md). Nothing here looks at the machine that it
// runs on.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/dtype.h"
#include "src/core/field.h"
#include "src/graph/op.h"

namespace attamba {

/// One kind of GPU, nodes that hold some of them, and the network between nodes. Bandwidths are what programs reach, not what
/// data sheets promise, unless `source` says otherwise.
struct Machine {
  std::string name = "";
  std::string device = "gpu";
  double memory = 0;           ///< bytes of one GPU
  double reserved = 2.0e9;     ///< of these, what driver and libraries keep, and what is measured before the first step
  double bfloat16 = 0;         ///< FLOP/s of large matrix products
  double float32 = 0;          ///< the same
  double bandwidth = 0;        ///< bytes/s of copies in its memory, read and written ones counted
  double product_share = 0.7;  ///< of these speeds, what operations reach within a step
  double copy_share = 0.85;
  double op_seconds = 1e-6;  ///< between two operations of a recorded step
  std::int64_t gpus_per_node = 8;
  double link = 0;  ///< bytes/s that a GPU sends to its neighbour in a ring within a node
  double link_latency = 3.4e-6;
  double network = 0;  ///< bytes/s that all adapters of a node send together
  double network_latency = 14e-6;
  std::string source = "";

  template <class Self, class Visitor>
  static void describe(Self& self, Visitor&& visit) {
    visit.field("name", self.name, Field{"what reports call it"});
    visit.field("device", self.device, Field{"whose kernels ask for scratch memory", "", {"gpu", "cpu"}});
    visit.field("memory", self.memory, Field{"memory of one GPU", "bytes"});
    visit.field("reserved", self.reserved, Field{"of these, what driver and libraries keep", "bytes"});
    visit.field("bfloat16", self.bfloat16, Field{"large matrix products", "FLOP/s"});
    visit.field("float32", self.float32, Field{"large matrix products", "FLOP/s"});
    visit.field("bandwidth", self.bandwidth, Field{"copies in its memory, read and written bytes", "bytes/s"});
    visit.field("product_share", self.product_share, Field{"share of the products' speed that operations reach"});
    visit.field("copy_share", self.copy_share, Field{"share of the copies' speed that operations reach"});
    visit.field("op_seconds", self.op_seconds, Field{"between two operations", "s"});
    visit.field("gpus_per_node", self.gpus_per_node, Field{"GPUs that share links", "GPUs"});
    visit.field("link", self.link, Field{"from a GPU to its neighbour in a ring within a node", "bytes/s"});
    visit.field("link_latency", self.link_latency, Field{"of a step of a ring within a node", "s"});
    visit.field("network", self.network, Field{"from a node to another, all adapters together", "bytes/s"});
    visit.field("network_latency", self.network_latency, Field{"of a step between nodes", "s"});
    visit.field("source", self.source, Field{"where the numbers come from"});
  }

  double peak(DType dtype) const { return dtype == DType::bfloat16 ? bfloat16 : float32; }
  /// The least that an operation can take (0 for one that does neither), and what it is expected to.
  double floor_seconds(double flops, double bytes, DType dtype) const;
  double op_time(double flops, double bytes, DType dtype) const;
  /// A collective over all `ranks`.
  double collective_seconds(const Collective& collective, int ranks) const;
};

/// Bytes that each rank sends in a ring.
double ring_bytes(const Collective& collective, int ranks);

/// "H100", "H200", "A100", "A6000".
std::vector<std::string_view> machine_names();
/// Throws UsageError that names the nearest one. Upper and lower case are the same.
Machine known_machine(std::string_view name);
/// A TOML file of Machine's keys, over `base`. Throws UsageError when a speed or the memory is missing.
Machine load_machine(const std::filesystem::path& file, const Machine& base);

}  // namespace attamba
