// Rows that a network's own module computed, kept while the memory that they follow holds what it held.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "call/sampler.h"
#include "live/write_watch.h"
#include "python/python_types.h"

namespace qpilots::cpu {

namespace py = pybind11;

// Under the GIL but for reading what `lend` gave.
class OwnRows {
 public:
  struct Values {
    std::vector<float> times, scale, shift, film;
  };
  using Memory = std::vector<std::pair<std::uintptr_t, std::size_t>>;  // (address, bytes)

  // owners: keep the memory alive. No memory: the rows stay as they are first made. watch: whether the kernel may be
  // asked for writes.
  OwnRows(Memory memory, py::object owners, bool watch) : memory_(std::move(memory)), owners_(std::move(owners)) {
    std::vector<Interval> intervals;
    for (const auto& [address, size] : memory_) intervals.push_back({address, address + size});
    if (watch) watch_ = WriteWatch(std::move(intervals));
  }

  bool current() {
    if (values_ == nullptr || memory_.empty()) return values_ != nullptr;
    if (watch_.unchanged()) return true;
    const bool same = as_seen();
    watch_.was_read(!same);
    return same;
  }

  // compute() -> (times, scale, shift, film), float32 arrays. Memory that is written meanwhile is found changed later.
  void refresh(const py::function& compute) {
    std::vector<char> before = read();
    const auto [times, scale, shift, film] = compute().cast<std::tuple<Array, Array, Array, Array>>();
    values_ = std::make_shared<const Values>(Values{vector(times), vector(scale), vector(shift), vector(film)});
    seen_ = std::move(before);
  }

  std::shared_ptr<const Values> lend() const { return values_; }

 private:
  using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

  static std::vector<float> vector(const Array& values) { return {values.data(), values.data() + values.size()}; }

  bool as_seen() const {
    const char* seen = seen_.data();
    for (const auto& [address, size] : memory_) {
      if (std::memcmp(pointer<const char>(address), seen, size) != 0) return false;
      seen += size;
    }
    return true;
  }

  std::vector<char> read() const {
    std::vector<char> bytes;
    for (const auto& [address, size] : memory_) {
      const char* begin = pointer<const char>(address);
      bytes.insert(bytes.end(), begin, begin + size);
    }
    return bytes;
  }

  Memory memory_;
  py::object owners_;
  WriteWatch watch_;
  std::vector<char> seen_;
  std::shared_ptr<const Values> values_;
};

// What the networks of a call read of their own, alive while this is.
class OwnLease {
 public:
  // rows: an OwnRows or None of each network; obs: their own observations, or 0. Throws where the plan needs more.
  OwnLease(const SamplerPlan& plan, const std::vector<py::object>& rows, const std::uintptr_t (&obs)[3],
           SampleArgs& args) {
    for (int n = 0; n < 3; ++n) {
      const Network* net = plan.network(n);
      if (net == nullptr) continue;
      args.own[n].obs = pointer<const float>(obs[n]);
      require(!plan.own_obs[n] || obs[n] != 0 || !net->has(kObs), "a network's own observations are missing");
      if (static_cast<int>(rows.size()) > n && !rows[n].is_none()) values_[n] = rows[n].cast<OwnRows*>()->lend();
      const OwnRows::Values none, &own = values_[n] == nullptr ? none : *values_[n];
      const std::size_t times = plan.steps() + (n == 0 ? plan.glass.size() : 0);
      require(!plan.own_times[n] || own.times.size() == times * net->shape().input_dims[kT],
              "a network's own times: wrong size");
      const std::size_t columns = n == 1 ? plan.action_columns.size() : 0;
      require(own.scale.size() == columns && own.shift.size() == columns, "scale or shift: wrong size");
      require(own.film.size() == times * net->film_dim(), "a network's film numbers: wrong size");
      args.own[n].times = own.times.data();
      args.own[n].film = own.film.data();
      args.own[n].scale = own.scale.data();
      args.own[n].shift = own.shift.data();
    }
  }

 private:
  std::shared_ptr<const OwnRows::Values> values_[3];
};

}  // namespace qpilots::cpu
