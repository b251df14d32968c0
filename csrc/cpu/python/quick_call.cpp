// The plainest call of a sampler without the interpreter: everything that the general path checks and prepares, or the
// answer None, upon which the caller takes that path. At batch 1 the interpreter took 0.11 to 0.16 ms of a 1.9 ms call,
// and half of the 0.2 to 0.36 ms of two hidden layers of 256 (Zen 4, 2 cores, d5f39dd).
#include <algorithm>
#include <cstring>
#include <limits>

#include "python/own_rows.h"
#include "python/parameter_watch.h"
#include "python/python_types.h"

namespace py = pybind11;

namespace qpilots::cpu {
namespace {

bool all_finite(const float* values, std::size_t count) {
  constexpr std::uint32_t kExponent = 0x7F800000u;
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & kExponent) == kExponent;
  }
  return bad == 0;
}

class QuickCall {
 public:
  // slots: as of ParameterWatch; networks: views of what is read, which keep that memory while another thread gives a
  // parameter a new one; own: an OwnRows or None of each network; own_obs: None, or a function of obs [B, S] that makes
  // the network's own [B, dim]; torch: the names used below.
  QuickCall(py::list slots, py::object networks, std::shared_ptr<SamplerPlan> plan, py::object flow, py::object critic,
            py::object posterior, py::object packed, std::vector<py::object> own, std::vector<py::object> own_obs,
            const py::dict& torch)
      : watch_(std::move(slots), torch["Tensor"]),
        networks_(std::move(networks)),
        plan_(std::move(plan)),
        owners_{std::move(flow), std::move(critic), std::move(posterior), std::move(packed)},
        own_(std::move(own)),
        own_obs_(std::move(own_obs)),
        tensor_type_(torch["Tensor"]),
        float32_(torch["float32"]),
        randn_(torch["randn"]),
        empty_like_(torch["empty_like"]),
        num_threads_(torch["get_num_threads"]),
        is_cpu_(interned("is_cpu")),
        dtype_(interned("dtype")),
        shape_(interned("shape")),
        is_contiguous_(interned("is_contiguous")) {
    const auto sources = [&](int i) { return owners_[i].is_none() ? nullptr : owners_[i].cast<const BoundSources*>(); };
    set_weights(*plan_, sources(0), sources(1), sources(2),
                owners_[3].is_none() ? nullptr : owners_[3].cast<const PackedWeights*>(), weights_);
  }

  py::object call(const py::handle& obs, const py::handle& noise, const py::handle& posterior_noise,
                  const py::handle& alpha) const {
    py::object actions = attempt(obs, noise, posterior_noise, alpha);
    PyErr_Clear();  // of an attribute that is not there: the general path says what is wrong
    return actions;
  }

 private:
  py::object attempt(const py::handle& obs, const py::handle& noise, const py::handle& posterior_noise,
                     const py::handle& alpha) const {
    if (!watch_.stayed()) return py::none();
    SampleArgs args = weights_;
    Py_ssize_t rows = -1, steps = plan_->steps();
    args.obs = read(obs, {&rows, plan_->obs_dim});
    if (args.obs == nullptr || rows < 1 || rows > std::numeric_limits<int>::max() / 64) return py::none();
    const Py_ssize_t action_dim = plan_->action_dim, draws = plan_->steering.num_samples;
    const bool takes_draws = plan_->draws();
    // what was given first: nothing is drawn for a call that the general path, which draws too, must make
    if (!noise.is_none() && (args.noise = read(noise, {&rows, action_dim})) == nullptr) return py::none();
    if (takes_draws && !posterior_noise.is_none()) {
      args.posterior_noise = read(posterior_noise, {&steps, rows, draws, action_dim});
      if (args.posterior_noise == nullptr) return py::none();
    }
    if (!alpha.is_none()) {
      if (plan_->critic == nullptr || (args.alpha = read(alpha, {&rows})) == nullptr) return py::none();
      if (std::any_of(args.alpha, args.alpha + rows, [](float strength) { return strength < 0.0f; })) return py::none();
    }
    py::object start = py::reinterpret_borrow<py::object>(noise), eps;
    if (args.noise == nullptr) args.noise = read(start = randn_(rows, action_dim), {&rows, action_dim});
    if (takes_draws && args.posterior_noise == nullptr) {
      eps = randn_(steps, rows, draws, action_dim);
      args.posterior_noise = read(eps, {&steps, rows, draws, action_dim});
    }
    const py::object actions = empty_like_(start);
    args.actions = const_cast<float*>(read(actions, {&rows, action_dim}, false));
    if (args.noise == nullptr || (takes_draws && args.posterior_noise == nullptr) || args.actions == nullptr) {
      return py::none();
    }
    args.batch = static_cast<int>(rows);
    args.threads = num_threads_().cast<int>();
    std::uintptr_t own_obs[3] = {};
    py::object made[3];
    for (std::size_t n = 0; n < own_.size(); ++n) {
      if (!own_[n].is_none() && !own_[n].cast<OwnRows*>()->current()) return py::none();
      if (own_obs_[n].is_none()) continue;
      made[n] = own_obs_[n](obs);
      own_obs[n] = reinterpret_cast<std::uintptr_t>(
          read(made[n], {&rows, plan_->network(static_cast<int>(n))->shape().input_dims[kObs]}));
      if (own_obs[n] == 0) return py::none();
    }
    const OwnLease lease(*plan_, own_, own_obs, args);
    bool finite;
    {
      const py::gil_scoped_release release;
      sample(*plan_, args, pool());
      finite = all_finite(args.actions, static_cast<std::size_t>(rows * action_dim));
    }
    return finite ? actions : py::none();
  }

  // A shape: its first size goes to, or where that is not -1 must equal, *first.
  struct Shape {
    Py_ssize_t* first;
    Py_ssize_t rest[3] = {};
    int count = 0;
    template <class... Sizes>
    Shape(Py_ssize_t* first_size, Sizes... sizes)
        : first(first_size), rest{static_cast<Py_ssize_t>(sizes)...}, count(sizeof...(sizes)) {}
  };

  // The values of a plain contiguous finite float32 CPU tensor of this shape, or null.
  const float* read(const py::handle& tensor, const Shape& shape, bool finite = true) const {
    PyObject* object = tensor.ptr();
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != tensor_type_.ptr()) return nullptr;
    if (attribute(object, dtype_).ptr() != float32_.ptr() || attribute(object, is_cpu_).ptr() != Py_True)
      return nullptr;
    const py::object sizes = attribute(object, shape_);
    if (!sizes || !PyTuple_Check(sizes.ptr()) || PyTuple_GET_SIZE(sizes.ptr()) != shape.count + 1) return nullptr;
    std::size_t count = 1;
    for (int i = 0; i <= shape.count; ++i) {
      const Py_ssize_t size = PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes.ptr(), i));
      if (i > 0 ? size != shape.rest[i - 1] : *shape.first != -1 && size != *shape.first) return nullptr;
      if (i == 0) *shape.first = size;
      count *= static_cast<std::size_t>(size);
    }
    if (call_method(object, is_contiguous_).ptr() != Py_True) return nullptr;
    const float* values = pointer<const float>(watch_.address(object));
    return values != nullptr && (!finite || all_finite(values, count)) ? values : nullptr;
  }

  ParameterWatch watch_;
  py::object networks_;  // goes after the sources, which watch its memory
  std::shared_ptr<SamplerPlan> plan_;
  py::object owners_[4];
  std::vector<py::object> own_, own_obs_;
  py::object tensor_type_, float32_, randn_, empty_like_, num_threads_;
  py::str is_cpu_, dtype_, shape_, is_contiguous_;
  SampleArgs weights_;
};

}  // namespace

void bind_quick_call(py::module_& module) {
  py::class_<QuickCall>(module, "CpuQuickCall")
      .def(py::init<py::list, py::object, std::shared_ptr<SamplerPlan>, py::object, py::object, py::object, py::object,
                    std::vector<py::object>, std::vector<py::object>, const py::dict&>())
      .def("__call__", &QuickCall::call);
  py::class_<ParameterWatch>(module, "ParameterWatch")
      .def(py::init<py::list, const py::object&>())
      .def("stayed", [](const ParameterWatch& watch) {
        const bool stayed = watch.stayed();
        PyErr_Clear();
        return stayed;
      });
}

}  // namespace qpilots::cpu
