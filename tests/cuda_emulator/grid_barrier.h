// A barrier over the whole grid of a cooperative launch.
#pragma once

#include "platform.h"

namespace qpilots {
namespace cuda {

// Global words, zero at launch.
struct GridSync {
  std::uint32_t arrivals;  // only grows: barrier number n is passed when it reaches n * blocks
  std::uint32_t failed;    // a block gave up waiting
};

// Returns false, in every block, once some block has waited longer than spin_limit polls: the caller then ends.
// passed: how many arrivals complete this barrier, kept by the caller across calls; flag: a shared word.
__device__ __forceinline__ bool grid_barrier(GridSync* sync, std::uint32_t& passed, std::uint32_t spin_limit,
                                             std::uint32_t* flag) {
  passed += gridDim.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(&sync->arrivals, 1u);
    std::uint32_t failed = 0;
    for (std::uint32_t spins = 0; static_cast<std::int32_t>(load_acquire(&sync->arrivals) - passed) < 0; ++spins) {
      if (spins >= spin_limit || ((spins & 63u) == 63u && load_relaxed(&sync->failed) != 0u)) {
        store_relaxed(&sync->failed, 1u);
        failed = 1;
        break;
      }
    }
    store_shared(flag, failed);
  }
  __syncthreads();
  return load_shared(flag) == 0u;
}

}  // namespace cuda
}  // namespace qpilots
