// Python's view of the CPU backend: pointers as integers, sizes checked, the GIL released while it works.
#include "python/bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "call/region.h"
#include "dispatch.h"
#include "python/own_rows.h"
#include "python/python_types.h"
#include "qpilots/interface.h"

namespace py = pybind11;

namespace qpilots::cpu {
namespace {

// One Linear of one member: sources of (pointer, row stride, column stride, dtype): weight, bias, then weight and bias
// of each norm.
using Table = py::array_t<std::int64_t, py::array::c_style>;
constexpr int kParts = 2 + 2 * kMostNorms;
constexpr py::ssize_t kTableColumns = 4 * kParts;

std::vector<LayerSource> read_table(const Network& net, const Table& table) {
  const py::ssize_t rows = static_cast<py::ssize_t>(net.shape().members) * net.layers();
  require(table.ndim() == 2 && table.shape(0) == rows && table.shape(1) == kTableColumns,
          "weight table: expected [" + std::to_string(rows) + ", " + std::to_string(kTableColumns) + "] int64");
  std::vector<LayerSource> sources(rows);
  for (py::ssize_t i = 0; i < rows; ++i) {
    const std::int64_t* entry = table.data(i, 0);
    Source* parts[kParts] = {&sources[i].weight, &sources[i].bias};
    for (int n = 0; n < kMostNorms; ++n) {
      parts[2 + 2 * n] = &sources[i].gamma[n];
      parts[3 + 2 * n] = &sources[i].beta[n];
    }
    for (int p = 0; p < kParts; ++p, entry += 4) {
      require(entry[3] >= 0 && entry[3] <= 3, "weight table: unknown dtype code " + std::to_string(entry[3]));
      *parts[p] = {pointer<const void>(static_cast<std::uintptr_t>(entry[0])), entry[1], entry[2],
                   static_cast<DType>(entry[3])};
    }
    require(sources[i].weight.data != nullptr, "weight table: a weight pointer is null");
  }
  return sources;
}

template <class Enum>
Enum enumerator(const std::string& name, const char* what) {
  const std::vector<std::string> names = names_of<Enum>();
  const auto found = std::find(names.begin(), names.end(), name);
  require(found != names.end(), std::string(what) + " is '" + name + "', which this backend does not know");
  return static_cast<Enum>(found - names.begin());
}

HiddenShape read_hidden(const py::dict& layer) {
  HiddenShape hidden;
  if (!layer.contains("chain")) {
    hidden.activation = enumerator<Activation>(layer["activation"].cast<std::string>(), "activation");
    hidden.norm =
        enumerator<NormPlacement>(layer["norm"].is_none() ? "none" : layer["norm"].cast<std::string>(), "norm");
    hidden.layer_norm_eps = layer["layer_norm_eps"].cast<float>();
    if (hidden.activation < kFirstUnfused) return hidden;
    ChainOp activation{}, norm{};
    activation.kind = RowOpKind::kActivation;
    activation.activation = hidden.activation;
    norm.kind = RowOpKind::kLayerNorm;
    norm.numbers[0] = hidden.layer_norm_eps;
    if (hidden.norm == NormPlacement::kPre) hidden.chain.push_back(norm);
    hidden.chain.push_back(activation);
    if (hidden.norm == NormPlacement::kPost) hidden.chain.push_back(norm);
    hidden.norm = NormPlacement::kNone;
    hidden.is_chain = true;
    return hidden;
  }
  hidden.is_chain = true;
  int norms = 0;
  for (const auto& [kind, activation, numbers] :
       layer["chain"].cast<std::vector<std::tuple<std::string, std::string, std::vector<float>>>>()) {
    ChainOp op{};
    op.kind = enumerator<RowOpKind>(kind, "chain");
    if (op.kind == RowOpKind::kActivation) op.activation = enumerator<Activation>(activation, "activation");
    require(numbers.size() <= 2, "chain: at most two numbers");
    std::copy(numbers.begin(), numbers.end(), op.numbers);
    norms += op.kind == RowOpKind::kLayerNorm || op.kind == RowOpKind::kRmsNorm;
    hidden.chain.push_back(op);
  }
  require(norms <= kMostNorms, "chain: too many norms in a layer");
  return hidden;
}

// Every "add" has a "keep" of its width before it: the network's passes go by it.
void check_kept(const NetworkShape& shape) {
  int kept = -1;
  for (std::size_t l = 0; l < shape.hidden.size(); ++l) {
    for (const ChainOp& op : shape.hidden[l].chain) {
      if (op.kind == RowOpKind::kKeep) kept = shape.widths[l];
      require(op.kind != RowOpKind::kAdd || kept == shape.widths[l], "chain: add without a row kept, as wide");
    }
  }
}

std::shared_ptr<const Network> make_network(const py::dict& spec, const std::string& precision,
                                            const std::string& isa) {
  require(precision == "float32" || precision == "bfloat16",
          "precision is '" + precision + "'; expected float32 or bfloat16");
  NetworkShape shape;
  shape.members = spec["members"].cast<int>();
  shape.widths = spec["widths"].cast<std::vector<int>>();
  require(shape.members >= 1 && !shape.widths.empty(), "a network needs a member and an output");
  for (int width : shape.widths) require(width >= 1, "widths must be at least 1");
  for (const py::handle layer : spec["hidden"]) shape.hidden.push_back(read_hidden(layer.cast<py::dict>()));
  require(shape.hidden.size() + 1 == shape.widths.size(), "hidden: expected one entry per hidden layer");
  check_kept(shape);
  shape.scalar_head = spec["scalar_head"].cast<bool>();
  for (const py::handle entry : spec["inputs"]) {  // (kind, first column, width)
    const auto [kind, column, dim] = entry.cast<std::tuple<int, int, int>>();
    require(kind >= 0 && kind < kInputKinds && column >= 0 && dim >= 0, "inputs: bad entry");
    shape.input_dims[kind] = dim;
    shape.input_columns[kind] = column;
  }
  require(shape.input_dims[kX] > 0, "inputs: the actions are missing");
  return std::make_shared<const Network>(std::move(shape), precision == "float32" ? Format::kF32 : Format::kBf16,
                                         kernels(isa));
}

// The bytes of the same struct; Python has compared its layout with interface_text.
SteeringParams read_steering(const std::string& bytes) {
  SteeringParams s;
  require(bytes.size() == sizeof s, "steering: expected " + std::to_string(sizeof s) + " bytes");
  std::memcpy(&s, bytes.data(), sizeof s);
  const auto known = [](auto value) { return static_cast<unsigned>(value) < unsigned{kCount<decltype(value)>}; };
  require(known(s.estimate) && known(s.clip) && known(s.aggregation) && known(s.scale) && known(s.q_scale_kind),
          "steering: a value that this backend does not know");
  require(s.num_samples >= 1 && s.glass_steps >= 1, "num_samples and glass_steps must be at least 1");
  return s;
}

std::vector<float> floats(const py::handle& object) {
  const auto array = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(object);
  return std::vector<float>(array.data(), array.data() + array.size());
}

std::shared_ptr<SamplerPlan> make_plan(const py::dict& d) {
  auto plan = std::make_shared<SamplerPlan>();
  const auto network = [&](const char* key) {
    return d[key].is_none() ? nullptr : d[key].cast<std::shared_ptr<Network>>();
  };
  plan->flow = network("flow");
  plan->critic = network("critic");
  plan->posterior = network("posterior");
  plan->steering = read_steering(d["steering"].cast<std::string>());
  for (const auto& [t, dt, weight] : d["schedule"].cast<std::vector<std::array<double, 3>>>()) {
    plan->schedule.push_back({t, static_cast<float>(dt), static_cast<float>(weight)});
  }
  plan->obs_dim = d["obs_dim"].cast<int>();
  plan->action_dim = d["action_dim"].cast<int>();
  for (int n = 0; n < 3; ++n) {
    plan->own_obs[n] = d["own_obs"].cast<std::array<bool, 3>>()[n];
    plan->own_times[n] = d["own_times"].cast<std::array<bool, 3>>()[n];
  }
  plan->action_columns = d["action_columns"].cast<std::vector<int>>();
  require(static_cast<int>(plan->action_columns.size()) <= plan->action_dim, "action_columns: too many");
  for (const int dim : plan->action_columns) require(dim >= 0 && dim < plan->action_dim, "action_columns: bad index");
  require(plan->flow != nullptr && plan->steps() >= 1, "a sampler needs a flow and a step");
  require(plan->flow->shape().members == 1, "the flow must have one member");
  const SteeringParams& s = plan->steering;
  for (const Step& step : plan->schedule) {
    if (!(step.weight > 0.0f)) continue;
    require(plan->critic != nullptr, "a steered step needs a critic");
    require(s.estimate != Estimate::kMfm || plan->posterior != nullptr, "estimate 'mfm' needs a posterior");
  }
  for (int n = 0; n < 3; ++n) {
    const Network* net = plan->network(n);
    if (net == nullptr) continue;
    const int actions =
        n == 1 && !plan->action_columns.empty() ? static_cast<int>(plan->action_columns.size()) : plan->action_dim;
    require(
        (plan->own_obs[n] || net->shape().input_dims[kObs] == plan->obs_dim) && net->shape().input_dims[kX] == actions,
        "obs_dim or action_dim differ between the networks");
    require(net->shape().widths.back() == (n == 1 ? 1 : plan->action_dim), "a network's output width is wrong");
    require(&net->table() == &plan->flow->table() && net->format() == plan->flow->format(),
            "networks of different paths");
  }
  require(plan->posterior == nullptr || plan->posterior->has(kXbar), "the posterior needs an xbar input");
  constexpr float infinity = std::numeric_limits<float>::infinity();
  plan->low = floats(d["action_low"]);
  plan->high = floats(d["action_high"]);
  const std::size_t width = plan->action_dim;
  require(plan->low.size() == width && plan->high.size() == width, "action_low, action_high: wrong size");
  plan->low.resize(padded(plan->action_dim), -infinity);
  plan->high.resize(padded(plan->action_dim), infinity);
  if (!d["steered_dims"].is_none()) {
    plan->mask.assign(plan->action_dim, 0);
    for (int dim : d["steered_dims"].cast<std::vector<int>>()) {
      require(dim >= 0 && dim < plan->action_dim, "steered_dims: index out of range");
      plan->mask[dim] = 1;
    }
  }
  const auto glass = d["glass"].cast<std::vector<std::array<double, 5>>>();
  const std::size_t inner = static_cast<std::size_t>(plan->steps()) * s.glass_steps;
  require(glass.size() == (s.estimate == Estimate::kGlass && plan->critic != nullptr ? inner : 0), "glass: wrong size");
  for (const auto& [p_x, p_xbar, c_x, c_xbar, c_v] : glass) plan->glass.push_back({p_x, p_xbar, c_x, c_xbar, c_v});
  plan->flow_times = floats(d["flow_times"]);
  require(plan->own_times[0] ||
              plan->flow_times.size() == (plan->steps() + plan->glass.size()) * plan->flow->shape().input_dims[kT],
          "flow_times: wrong size");
  if (plan->posterior != nullptr) {
    const char* keys[3] = {"posterior_t", "posterior_s", "posterior_u"};
    for (int i = 0; i < 3; ++i) {
      plan->posterior_times[i] = floats(d[keys[i]]);
      require(plan->own_times[2] || plan->posterior_times[i].size() == static_cast<std::size_t>(plan->steps()) *
                                                                           plan->posterior->shape().input_dims[kT + i],
              "posterior times: wrong size");
    }
  }
  return plan;
}

void check_bound(const SamplerPlan& plan, const BoundSources* const (&bound)[3]) {
  for (int n = 0; n < 3; ++n) {
    require(plan.network(n) == nullptr || bound[n] != nullptr, "parameters of a network are missing");
    require(bound[n] == nullptr || bound[n]->net.get() == plan.network(n), "parameters belong to another network");
  }
}

void sample_binding(const std::shared_ptr<SamplerPlan>& plan, const BoundSources* flow, const BoundSources* critic,
                    const BoundSources* posterior, const PackedWeights* packed, std::uintptr_t obs,
                    std::uintptr_t noise, std::uintptr_t posterior_noise, std::uintptr_t alpha, std::uintptr_t actions,
                    const std::array<std::uintptr_t, 4>& report, const std::vector<py::object>& own,
                    const std::array<std::uintptr_t, 3>& own_obs, int batch, int threads,
                    std::uintptr_t phase_seconds) {
  require(batch >= 1 && threads >= 1, "batch and threads must be at least 1");
  require((obs != 0 || plan->obs_dim == 0) && noise != 0 && actions != 0, "a null pointer was given");
  require(!plan->draws() || posterior_noise != 0, "posterior_noise is missing");
  SampleArgs args;
  set_weights(*plan, flow, critic, posterior, packed, args);
  const OwnLease lease(*plan, own, {own_obs[0], own_obs[1], own_obs[2]}, args);
  args.batch = batch;
  args.threads = threads;
  args.obs = pointer<const float>(obs);
  args.noise = pointer<const float>(noise);
  args.posterior_noise = pointer<const float>(posterior_noise);
  args.actions = pointer<float>(actions);
  args.alpha = pointer<const float>(alpha);
  const auto reported = [](std::uintptr_t p) { return p != 0; };
  require(std::all_of(report.begin(), report.end(), reported) || std::none_of(report.begin(), report.end(), reported),
          "the report needs all of its tensors, or none");
  args.gradient_norms = pointer<float>(report[0]);
  args.nonfinite = pointer<unsigned char>(report[1]);
  args.q_std = pointer<float>(report[2]);
  args.gated = pointer<unsigned char>(report[3]);
  args.phase_seconds = pointer<double>(phase_seconds);
  const py::gil_scoped_release release;
  sample(*plan, args, pool());
}

std::unique_ptr<PackedWeights> pack_binding(const SamplerPlan& plan, const BoundSources* flow,
                                            const BoundSources* critic, const BoundSources* posterior, int threads) {
  const BoundSources* const bound[3] = {flow, critic, posterior};
  check_bound(plan, bound);
  const LayerSource* const sources[3] = {flow->sources.data(), critic == nullptr ? nullptr : critic->sources.data(),
                                         posterior == nullptr ? nullptr : posterior->sources.data()};
  auto packed = std::make_unique<PackedWeights>();
  const py::gil_scoped_release release;
  pack(plan, sources, threads, *packed);
  return packed;
}

void network_binding(const BoundSources& bound, const std::vector<std::uintptr_t>& blocks, std::uintptr_t film,
                     std::uintptr_t cotangent, std::uintptr_t out, int batch, int threads, bool vjp) {
  const Network& net = *bound.net;
  require(blocks.size() == kInputKinds && batch >= 1 && threads >= 1 && out != 0, "bad arguments");
  const float* inputs[kInputKinds];
  int input_dim = 0;
  for (int i = 0; i < kInputKinds; ++i) {
    require(!net.has(static_cast<InputKind>(i)) || blocks[i] != 0, "an input block is missing");
    inputs[i] = pointer<const float>(blocks[i]);
    input_dim += net.shape().input_dims[i];
  }
  require(!vjp || cotangent != 0, "the cotangent is missing");
  require(net.film_dim() == 0 || film != 0, "the film numbers are missing");
  const py::gil_scoped_release release;
  if (vjp) {
    network_vjp(net, bound.sources.data(), *bound.live, inputs, pointer<const float>(film),
                pointer<const float>(cotangent), batch, threads, input_dim, pointer<float>(out), pool());
  } else {
    network_forward(net, bound.sources.data(), *bound.live, inputs, pointer<const float>(film), batch, threads,
                    pointer<float>(out), pool());
  }
}

}  // namespace

void set_weights(const SamplerPlan& plan, const BoundSources* flow, const BoundSources* critic,
                 const BoundSources* posterior, const PackedWeights* packed, SampleArgs& args) {
  args.packed = packed;
  const BoundSources* const bound[3] = {flow, critic, posterior};
  if (packed == nullptr) check_bound(plan, bound);
  for (int n = 0; n < 3; ++n) {
    if (plan.network(n) == nullptr) continue;
    if (packed == nullptr) {
      args.sources[n] = bound[n]->sources.data();
      args.live[n] = bound[n]->live.get();
    } else {
      require(packed->arenas[n].size() >= plan.network(n)->arena_bytes(), "packed weights of another sampler");
    }
  }
}

void bind(py::module_& module) {
  module.def("interface_text",
             [] {  // what Python compares with its own: the lists of types.h, and those of this backend
               return interface_text() + interface_line("DType", {QPILOTS_DTYPES(QPILOTS_NAME)}) +
                      interface_line("InputKind", {QPILOTS_INPUT_KINDS(QPILOTS_NAME)}) +
                      interface_line("PhaseIndex", {QPILOTS_PHASES(QPILOTS_NAME)});
             });
  py::class_<Network, std::shared_ptr<Network>>(module, "CpuNetwork")
      .def_property_readonly("isa", [](const Network& n) { return std::string(n.table().name); })
      .def_property_readonly("arena_bytes", &Network::arena_bytes);
  py::class_<BoundSources>(module, "CpuSources").def_property_readonly("watch_status", [](const BoundSources& bound) {
    const std::unique_lock<std::mutex> lock(bound.live->mutex, std::try_to_lock);
    return lock.owns_lock() ? bound.live->watch.status() : std::string("in use by another thread");
  });
  py::class_<PackedWeights>(module, "CpuPackedWeights");
  py::class_<OwnRows>(module, "CpuOwnRows")
      .def(py::init<OwnRows::Memory, py::object, bool>())
      .def("current", &OwnRows::current)
      .def("refresh", &OwnRows::refresh);
  py::class_<SamplerPlan, std::shared_ptr<SamplerPlan>>(module, "CpuPlan");
  module.def("cpu_network", [](const py::dict& spec, const std::string& precision, const std::string& isa) {
    return std::const_pointer_cast<Network>(make_network(spec, precision, isa));
  });
  module.def("cpu_bind", [](const std::shared_ptr<Network>& net, const Table& table, bool watch) {
    auto bound = std::make_unique<BoundSources>();
    bound->net = net;
    bound->sources = read_table(*net, table);
    if (watch) bound->live->watch = WriteWatch(net->panel_memory(bound->sources.data()));
    return bound;
  });
  module.def("cpu_write_watch_unavailable", &WriteWatch::unavailable_reason);
  module.def("cpu_plan", &make_plan);
  bind_quick_call(module);
  module.def("cpu_pack", &pack_binding);
  module.def("cpu_sample", &sample_binding);
  module.def("cpu_network_apply", &network_binding);
  module.def("cpu_workspace_bytes", &workspace_bytes);
  module.def("cpu_isa_paths", &available_paths);
  module.def("cpu_isa", [](const std::string& name) { return std::string(kernels(name).name); }, py::arg("name") = "");
  bind_limits(module);
}

}  // namespace qpilots::cpu
