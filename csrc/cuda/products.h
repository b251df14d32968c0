// Rows times weights: a warp computes its neurons for all rows of the tile.
#pragma once

#include "warp.h"

namespace qpilots {
namespace cuda {

// acc[i * ROWS + r] = sum_c weight[i][c] staged[r][c]. A lane takes every 32nd 16-byte vector of columns; the order of
// additions depends on the width alone, so a row has the same bits in every batch and on every grid.
template <int NEURONS, int ROWS, class Weight>
__device__ __forceinline__ OwnedSums multiply_rows(const Weight* weight, const Weight* staged, int stride, int lane,
                                                   float (&acc)[NEURONS * ROWS]) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(Weight));
#pragma unroll
  for (int i = 0; i < NEURONS * ROWS; ++i) acc[i] = 0.0f;
#pragma unroll(NEURONS* ROWS <= 16 ? 4 : 1)
  for (int c = lane * kVector; c < stride; c += kWarpSize * kVector) {
    float w[NEURONS][kVector];
#pragma unroll
    for (int i = 0; i < NEURONS; ++i) widen(load16_constant(weight + static_cast<std::int64_t>(i) * stride + c), w[i]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float x[kVector];
      widen(load16_shared(staged + r * stride + c), x);
#pragma unroll
      for (int i = 0; i < NEURONS; ++i) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) acc[i * ROWS + r] = fmadd(w[i][v], x[v], acc[i * ROWS + r]);
      }
    }
  }
  return warp_sums(acc, lane);
}

}  // namespace cuda
}  // namespace qpilots
