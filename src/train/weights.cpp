// The weights and the optimizer's state of one rank: how they begin, and how they come and go.
#include <algorithm>
#include <cmath>

#include "src/core/error.h"
#include "src/core/random.h"
#include "src/train/checkpoint.h"
#include "src/train/programs.h"

namespace attamba {

namespace {

std::uint64_t hash_name(const std::string& name) {
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  return hash;
}

template <class A>
void initialize_tensor(std::span<A> out, const ParameterInfo& parameter, std::uint64_t seed) {
  RandomStream random(seed ^ hash_name(parameter.name));
  const double sigma = 1.0 / std::sqrt(static_cast<double>(parameter.shape.columns()));
  for (A& x : out) {
    switch (parameter.initialization) {
      case Initialization::normal: {
        double z = random.normal();
        while (std::abs(z) > 3) {
          z = random.normal();
        }
        x = static_cast<A>(sigma * z);
        break;
      }
      case Initialization::ones:
        x = 1;
        break;
      case Initialization::zeros:
        x = 0;
        break;
      case Initialization::log_decay:
        x = static_cast<A>(std::log(0.01 + 1.99 * random.uniform()));
        break;
      case Initialization::log_rate:
        x = static_cast<A>(0.5 * std::log(0.81 + 0.188 * random.uniform()));
        break;
    }
  }
}

/// Fills a weight from values of its accumulator type, rounded where it is bfloat16.
template <class A>
void write_weights(const Tensor& to, std::span<const A> values) {
  if (to.dtype() == DType::bfloat16) {
    std::vector<bfloat16> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), [](A x) { return bfloat16(static_cast<float>(x)); });
    copy_from_host(to, {rounded.data(), to.type});
  } else {
    copy_from_host(to, {const_cast<A*>(values.data()), to.type});  // a view has no const; it is only read
  }
}

Tensor flat(const Tensor& tensor) {
  return part_of(tensor, {tensor.dtype(), {tensor.elements()}}, 0);
}

}  // namespace

Tensor ModelPrograms::master(const std::string& name) const {
  require(!sharding_, name, ": this rank keeps a part of it at most");
  return storage_.contains("master/" + name) ? storage_.find("master/" + name) : storage_.find(name);
}

std::vector<ModelPrograms::KeptWeights> ModelPrograms::kept_weights() const {
  std::vector<KeptWeights> kept;
  for (std::size_t p = 0; p < parameters_.size() && !sharding_; ++p) {
    const std::string& name = parameters_[p].name;
    const bool copy = storage_.contains("master/" + name);
    kept.push_back({.parameter = p,
                    .begin = 0,
                    .end = parameters_[p].shape.elements(),
                    .master = flat(master(name)),
                    .compute = copy ? flat(storage_.find(name)) : Tensor{}});
  }
  if (!sharding_) {
    return kept;
  }
  for (const ShardLayout::Slice& slice : sharding_->layout().slices(sharding_->sharers().rank())) {
    const ShardLayout::Bucket& bucket = sharding_->layout().buckets()[slice.bucket];
    const bool copy = sharding_->has_master_copy(bucket);
    const std::string whole = Sharding::weights(slice.bucket);
    const Tensor weights = sharding_->stage() == 3
                               ? part_of(storage_.find(Sharding::own(whole)), {bucket.dtype, {slice.elements()}}, slice.at)
                               : part_of(storage_.find(whole), {bucket.dtype, {slice.elements()}},
                                         bucket.part * sharding_->sharers().rank() + slice.at);
    kept.push_back({.parameter = slice.parameter,
                    .begin = slice.begin,
                    .end = slice.end,
                    .master = copy ? storage_.find("master/" + parameters_[slice.parameter].name) : weights,
                    .compute = copy ? weights : Tensor{}});
  }
  return kept;
}

void ModelPrograms::initialize(std::uint64_t seed) {
  for (const KeptWeights& kept : kept_weights()) {
    const ParameterInfo& parameter = parameters_[kept.parameter];
    const auto fill = [&]<class A>(A) {
      std::vector<A> values(static_cast<std::size_t>(parameter.shape.elements()));
      initialize_tensor(std::span(values), parameter, seed);
      write_weights(kept.master, std::span<const A>(values).subspan(static_cast<std::size_t>(kept.begin),
                                                                    static_cast<std::size_t>(kept.end - kept.begin)));
    };
    if (kept.master.dtype() == DType::float64) {
      fill(double{});
    } else {
      fill(float{});
    }
  }
  refresh_compute_weights();
}

void ModelPrograms::load_weights(const std::function<void(const std::vector<NamedTensor>&)>& read) {
  Storage temporary;
  std::vector<NamedTensor> tensors;
  for (const ParameterInfo& parameter : parameters_) {
    Tensor tensor = master(parameter.name);
    if (tensor.dtype() == DType::bfloat16) {
      tensor = temporary.get(parameter.name, {DType::float32, parameter.shape});
    }
    tensors.push_back({"parameters/" + parameter.name, tensor});
  }
  read(tensors);
  for (const auto& [name, tensor] : temporary.tensors()) {
    write_weights(storage_.find(name), std::span<const float>(tensor.span<float>()));
  }
  refresh_compute_weights();
}

void ModelPrograms::refresh_compute_weights() {
  for (const KeptWeights& kept : kept_weights()) {
    if (kept.compute) {
      const HostCopy weights(kept.master);
      write_weights(kept.compute, std::span<const float>(weights.tensor().span<float>()));
    }
  }
  for (std::size_t b = 0; sharding_ && sharding_->stage() < 3 && b < sharding_->layout().buckets().size(); ++b) {
    const ShardLayout::Bucket& bucket = sharding_->layout().buckets()[b];
    const Tensor whole = storage_.find(Sharding::weights(b));
    Communicator& sharers = sharding_->sharers();
    sharers.all_gather(whole, part_of(whole, {bucket.dtype, {bucket.part}}, bucket.part * sharers.rank()));
  }
}

std::vector<StateSlice> ModelPrograms::kept_state() const {
  std::vector<StateSlice> slices;
  for (const KeptWeights& kept : kept_weights()) {
    const ParameterInfo& parameter = parameters_[kept.parameter];
    const TensorType whole{kept.master.dtype(), parameter.shape};
    slices.push_back(
        {.name = "parameters/" + parameter.name, .whole = whole, .begin = kept.begin, .end = kept.end, .values = kept.master});
    for (const std::string_view state : optimizer_->state_names()) {
      const std::string name = concat(state, "/", parameter.name);
      slices.push_back(
          {.name = name, .whole = whole, .begin = kept.begin, .end = kept.end, .values = flat(storage_.find(name))});
    }
  }
  return slices;
}

std::vector<StateSlice> ModelPrograms::saved_state() const {
  if (sharding_) {
    std::vector<StateSlice> saved;
    for (StateSlice slice : kept_state()) {  // those who own the same divide it evenly
      const std::int64_t elements = slice.end - slice.begin;
      const std::int64_t first = elements * sharding_->copy() / sharding_->copies();
      const std::int64_t last = elements * (sharding_->copy() + 1) / sharding_->copies();
      if (first < last) {
        slice.values = part_of(slice.values, {slice.values.dtype(), {last - first}}, first);
        slice.end = slice.begin + last;
        slice.begin += first;
        saved.push_back(slice);
      }
    }
    return saved;
  }
  std::vector<NamedTensor> tensors;
  for (const StateSlice& slice : kept_state()) {
    Tensor tensor = slice.values;
    tensor.type = slice.whole;
    tensors.push_back({slice.name, tensor});
  }
  return even_share(tensors, communicator_.rank(), communicator_.size());
}

std::vector<std::string> ModelPrograms::state_leaves() const {
  std::vector<std::string> names;
  for (const std::string_view state : optimizer_->state_names()) {
    for (const ParameterInfo& parameter : parameters_) {
      names.push_back(concat(state, "/", parameter.name));
    }
  }
  return names;
}

}  // namespace attamba
