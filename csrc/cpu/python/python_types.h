// What Python holds of the CPU backend, and what its entry points share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "call/network.h"
#include "call/sampler.h"
#include "live/arena.h"
#include "live/workspace.h"

namespace qpilots::cpu {

// A network with the addresses of its live parameters.
struct BoundSources {
  std::shared_ptr<const Network> net;
  std::vector<LayerSource> sources;
  std::unique_ptr<LiveArena> live = std::make_unique<LiveArena>();
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline WorkspacePool& pool() {
  static WorkspacePool* shared = new WorkspacePool();  // never destroyed: threads may outlive static destructors
  return *shared;
}

// The weights of a call: live ones of the networks that the plan uses, or packed ones. Throws where one is missing.
void set_weights(const SamplerPlan& plan, const BoundSources* flow, const BoundSources* critic,
                 const BoundSources* posterior, const PackedWeights* packed, SampleArgs& args);

void bind_quick_call(pybind11::module_& module);
void bind_limits(pybind11::module_& module);

}  // namespace qpilots::cpu
