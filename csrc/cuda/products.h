// Rows times weights. A warp multiplies its slice of the columns for all neurons of a group of tiles and up to 8 kNT
// rows; the block adds up the warps' partial sums. A sum's order depends on the width alone, so a row has the same bits
// in every batch and on every grid.
//
// Lane 4 g + q holds, of row g of 8, the words 4 j + q of each tile of columns: the fragment of mma.m16n8k16's second
// operand, which so goes from the exchange to the tensor cores without a stop.
#pragma once

#include "exchange.h"
#include "stream.h"

namespace qpilots {
namespace cuda {

constexpr int kChunk = 4;       // tiles of columns held at a time
constexpr int kGroupTiles = 3;  // most tiles of neurons a product takes at once

__device__ __forceinline__ int lane_row() { return lane_index() >> 2; }
__device__ __forceinline__ int lane_quarter() { return lane_index() & 3; }

template <class Weight, int NT>
using OperandWords = std::uint32_t[kChunk][NT][kLaneWords<Weight>];

// A shared array of the warps' partial sums: [kWarps][8 NT rows][row_stride neurons].
template <int NT>
struct Partials {
  float* sums;
  int row_stride;

  __device__ __forceinline__ float* at(int warp, int row, int neuron) const {
    return sums + (warp * 8 * NT + row) * row_stride + neuron;
  }
};

// The operand of rows row0 .. row0 + valid - 1 (rows of the plane at `rows`, row_words words each), as far as tiles
// first .. first + count - 1 of it go; zeros beyond.
template <class Weight, int NT>
__device__ __forceinline__ void receive_operand(OperandWords<Weight, NT>& operand, const std::uint64_t* rows,
                                                int row_words, int first, int count, int valid, std::uint32_t tag,
                                                Patience& patience) {
  std::uint64_t words[kChunk][NT][kLaneWords<Weight>];
  const int g = lane_row(), q = lane_quarter();
  const auto address = [&](int t, int n, int j) {
    return rows + static_cast<std::int64_t>(8 * n + g) * row_words + (first + t) * kTileWords<Weight> + 4 * j + q;
  };
#pragma unroll
  for (int t = 0; t < kChunk; ++t) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < kLaneWords<Weight>; ++j) {
        const bool wanted = t < count && 8 * n + g < valid;
        words[t][n][j] = wanted ? load_word(address(t, n, j)) : tagged_word(0u, tag);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kChunk; ++t) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < kLaneWords<Weight>; ++j) {
        operand[t][n][j] = await_word(address(t, n, j), words[t][n][j], tag, patience);
      }
    }
  }
}

// The same of numbers that this block can make itself: value(row, column) for column < in_dim.
template <class Weight, int NT, class Function>
__device__ __forceinline__ void make_operand(OperandWords<Weight, NT>& operand, int in_dim, int first, int count,
                                             int valid, Function value) {
  const int g = lane_row(), q = lane_quarter();
#pragma unroll 1
  for (int t = 0; t < kChunk; ++t) {
    std::uint32_t made[NT][kLaneWords<Weight>];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int j = 0; j < kLaneWords<Weight>; ++j) {
        const int row = 8 * n + g, column = (first + t) * kTile + word_column<Weight>(j, q);
        const bool wanted = t < count && row < valid;
        const float x = wanted && column < in_dim ? value(row, column) : 0.0f;
        const float y = sizeof(Weight) == 2 && wanted && column + 1 < in_dim ? value(row, column + 1) : 0.0f;
        made[n][j] = operand_bits(Weight{}, x, y);
      }
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i != t) continue;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int j = 0; j < kLaneWords<Weight>; ++j) operand[i][n][j] = made[n][j];
      }
    }
  }
}

// Adds this warp's part of the products of `tiles` tiles of neurons to the partial sums, or writes it there at the
// first chunk of columns. weights: the group's first row, at the first column of the chunk.
template <int NT>
__device__ __forceinline__ void multiply_group(const Bf16* weights, int stride, const OperandWords<Bf16, NT>& operand,
                                               int count, int tiles, const Partials<NT>& partials, bool first_chunk) {
  const int lane = lane_index(), g = lane_row(), q = lane_quarter();
  float acc[kGroupTiles][NT][4];
  const auto cell = [&](int m, int n, int i) {
    return partials.at(warp_index(), 8 * n + 2 * q + (i & 1), m * kTile + g + (i >> 1) * 8);
  };
#pragma unroll
  for (int m = 0; m < kGroupTiles; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = first_chunk || m >= tiles ? 0.0f : load_shared(cell(m, n, i));
    }
  }
#pragma unroll
  for (int t = 0; t < kChunk; ++t) {
    if (t >= count) break;
#pragma unroll
    for (int m = 0; m < kGroupTiles; ++m) {
      if (m >= tiles) break;
      std::uint32_t a[4];
      ldmatrix_x4(a, weights + (m * kTile + (lane & 15)) * stride + t * kTile + (lane >> 4) * 8);
#pragma unroll
      for (int n = 0; n < NT; ++n) mma_m16n8k16(acc[m][n], a, operand[t][n]);
    }
  }
#pragma unroll
  for (int m = 0; m < kGroupTiles; ++m) {
    if (m >= tiles) break;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_shared(cell(m, n, i), acc[m][n][i]);
    }
  }
}

template <int NT>
__device__ __forceinline__ void multiply_group(const float* weights, int stride, const OperandWords<float, NT>& operand,
                                               int count, int tiles, const Partials<NT>& partials, bool first_chunk) {
  const int g = lane_row(), q = lane_quarter();
  const int first = (q & 2) * 4 + (q & 1) * 4;  // of the four neurons of a tile whose sums this lane ends with
#pragma unroll 1
  for (int m = 0; m < tiles; ++m) {
    float acc[NT][kTile];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) acc[n][i] = 0.0f;
    }
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      if (t >= count) break;
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        float w[4];
        widen(load16_shared(weights + (m * kTile + i) * stride + t * kTile + 4 * q), w);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[n][i] = fmadd(w[j], bits_float(operand[t][n][j]), acc[n][i]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float keep = (q & 2) != 0 ? acc[n][i + 8] : acc[n][i], give = (q & 2) != 0 ? acc[n][i] : acc[n][i + 8];
        acc[n][i] = keep + __shfl_xor_sync(kAllLanes, give, 2);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float keep = (q & 1) != 0 ? acc[n][i + 4] : acc[n][i], give = (q & 1) != 0 ? acc[n][i] : acc[n][i + 4];
        float* cell = partials.at(warp_index(), 8 * n + g, m * kTile + first + i);
        const float sum = keep + __shfl_xor_sync(kAllLanes, give, 1);
        store_shared(cell, first_chunk ? sum : load_shared(cell) + sum);
      }
    }
  }
}

}  // namespace cuda
}  // namespace qpilots
