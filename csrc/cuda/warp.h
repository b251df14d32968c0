// Sums and extremes over a warp, in an order that depends neither on the batch nor on the grid.
#pragma once

#include "platform.h"

namespace qpilots {
namespace cuda {

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ float warp_maximum(float x) {  // NaN is the caller's concern
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x = maximum(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

__device__ __forceinline__ float warp_minimum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x = minimum(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

}  // namespace cuda
}  // namespace qpilots
