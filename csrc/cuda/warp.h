// Sums over a warp and over a block, in an order that depends neither on the batch nor on the grid.
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

// Which of COUNT sums a lane holds after warp_sums: those at first .. first + max(1, COUNT / 32) - 1.
struct OwnedSums {
  int first;
  bool owner;  // one lane for each sum
};

// COUNT sums over the lanes (COUNT a power of two), about COUNT shuffles rather than 5 COUNT: at each level a lane
// keeps one half of its sums and hands the other over. The order of additions is that of the plain butterfly, so
// a sum has the same bits whatever COUNT. The lane's sums end in values[0 ..].
template <int COUNT>
__device__ __forceinline__ OwnedSums warp_sums(float (&values)[COUNT], int lane) {
  OwnedSums owned{0, COUNT >= kWarpSize || lane % (kWarpSize / (COUNT < kWarpSize ? COUNT : kWarpSize)) == 0};
  int count = COUNT;
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    if (count > 1) {
      count /= 2;
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int i = 0; i < COUNT / 2; ++i) {
        if (i < count) {
          const float keep = upper ? values[i + count] : values[i];
          const float give = upper ? values[i] : values[i + count];
          values[i] = keep + __shfl_xor_sync(kAllLanes, give, offset);
        }
      }
      owned.first += upper ? count : 0;
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
    }
  }
  return owned;
}

// COUNT sums over the block; every thread may read finish(sum) of each in `sums` on return.
// parts: shared, [kWarps * COUNT]; sums: shared, [COUNT], not read since the last __syncthreads.
template <int COUNT, class Finish>
__device__ __forceinline__ void block_sums(float (&values)[COUNT], float* parts, float* sums, Finish finish) {
  const int lane = lane_index();
  const OwnedSums owned = warp_sums(values, lane);
  constexpr int kPerLane = COUNT > kWarpSize ? COUNT / kWarpSize : 1;
  if (owned.owner) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) store_shared(parts + warp_index() * COUNT + owned.first + i, values[i]);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < COUNT) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += load_shared(parts + w * COUNT + threadIdx.x);
    store_shared(sums + threadIdx.x, finish(sum));
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace qpilots
