// LayerNorm folded into the product above it (the identities: qpilots_fast/backends/fold.py). What the product needs of
// a row are two numbers: mean and 1 / std of its operand; or, of an operand d z, the two sums for the norm's
// derivative. Each warp takes them from its own columns while it has them, and the block merges them with the partial
// sums. So a norm costs no exchange. Tiles could have sent the moments along, but the operand is there, and words cost
// more.
#pragma once

#include "block.h"
#include "qpilots/layer_norm.h"

namespace qpilots {
namespace cuda {

// What a product does with the rows of its operand.
enum class RowWork { kNone, kMoments, kSums };
__device__ __forceinline__ RowWork row_work(const Phase& p) {
  if (p.source_sums >= 0) return RowWork::kSums;
  const Result result = static_cast<Result>(p.result);
  const bool forward = result == Result::kHidden || result == Result::kCriticTop;
  return forward && p.fold_sums >= 0 ? RowWork::kMoments : RowWork::kNone;
}

struct RowNumbers {
  float first;
  float second;
};

// Sum over the four lanes of a row of the operand, and over the eight lanes of a tile of neurons.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 2);
  return x + __shfl_xor_sync(kAllLanes, x, 1);
}
__device__ __forceinline__ float tile_sum(float x) {
#pragma unroll
  for (int offset = 4; offset > 0; offset >>= 1) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Columns that exist of the tiles [begin, end).
__device__ __forceinline__ int existing_columns(const Phase& p, int begin, int end) {
  const int last = end * kTile < p.in_dim ? end * kTile : p.in_dim;
  return last > begin * kTile ? last - begin * kTile : 0;
}

// f(column of the tiles, value) of the lane's part of row 8 n + g.
template <class Weight, int NT, class Function>
__device__ __forceinline__ void each_value(const OperandWords<Weight, NT>& operand, int n, Function f) {
#pragma unroll
  for (int t = 0; t < kChunk; ++t) {
#pragma unroll
    for (int j = 0; j < kLaneWords<Weight>; ++j) {
      const std::uint32_t word = operand[t][n][j];
      const int column = t * kTile + word_column<Weight>(j, lane_quarter());
      f(column, bits_float(sizeof(Weight) == 2 ? word << 16 : word));
      if (sizeof(Weight) == 2) f(column + 1, bits_float(word & 0xffff0000u));
    }
  }
}

// A warp's part of the two numbers of each row, over its chunks of columns.
template <class Weight, int NT>
struct RowParts {
  float first[NT] = {}, second[NT] = {};  // moments: mean and squared deviations
  int columns = 0;

  // The moments of tiles [begin, end), merged with those so far.
  __device__ __forceinline__ void add_moments(const Phase& p, const OperandWords<Weight, NT>& operand, int begin,
                                              int end) {
    const int added = existing_columns(p, begin, end);
    const float count = static_cast<float>(added);
    const float share = added > 0 ? count / static_cast<float>(columns + added) : 0.0f;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float sum = 0.0f, squares = 0.0f;
      each_value<Weight, NT>(operand, n, [&](int, float x) { sum += x; });  // what does not exist is zero
      const float mean = quad_sum(sum) / (added > 0 ? count : 1.0f);
      each_value<Weight, NT>(operand, n,
                             [&](int column, float x) { squares += column < added ? (x - mean) * (x - mean) : 0.0f; });
      const float shift = mean - first[n];
      second[n] += quad_sum(squares) + shift * shift * static_cast<float>(columns) * share;
      first[n] = fmadd(shift, share, first[n]);
    }
    columns += added;
  }

  // The sums that come with tiles [begin, begin + count) of d z: asked for before the operand, added after it.
  std::uint64_t sum_words[NT][2];

  __device__ __forceinline__ const std::uint64_t* sums_at(const Block<Weight, NT>& block, const Phase& p, int member,
                                                          int row, int begin) const {
    return block.words + p.source_sums +
           (row_index(p, member, row) * (p.in_stride / kTile) + begin + lane_quarter()) * kTileSums;
  }
  __device__ __forceinline__ void load_sums(const Block<Weight, NT>& block, const Phase& p, int member, int row0,
                                            int valid, int begin, int count) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int r = 8 * n + lane_row();
      const std::uint64_t* at = sums_at(block, p, member, row0 + r, begin);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        sum_words[n][s] = lane_quarter() < count && r < valid ? load_word(at + s) : tagged_word(0u, block.tag);
      }
    }
  }
  __device__ __forceinline__ void add_sums(Block<Weight, NT>& block, const Phase& p, int member, int row0, int begin) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const std::uint64_t* at = sums_at(block, p, member, row0 + 8 * n + lane_row(), begin);
      first[n] += quad_sum(bits_float(await_word(at, sum_words[n][0], block.tag, block.patience)));
      second[n] += quad_sum(bits_float(await_word(at + 1, sum_words[n][1], block.tag, block.patience)));
    }
  }

  __device__ __forceinline__ void store(const Block<Weight, NT>& block) const {
    if (lane_quarter() != 0) return;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float* parts = block.parts_of_row(block.parity, warp_index(), 8 * n + lane_row());
      store_shared(parts, first[n]);
      store_shared(parts + 1, second[n]);
    }
  }
};

// Mean and 1 / std of a row from the warps' parts, one of the eight lanes of a tile each.
__device__ __forceinline__ RowNumbers merge_moments(const Phase& p, int warp, float part_mean, float part_squares) {
  const int tiles = p.in_stride / kTile;
  const float columns = static_cast<float>(existing_columns(p, tiles * warp / kWarps, tiles * (warp + 1) / kWarps));
  const float width = static_cast<float>(p.in_dim);
  const float mean = tile_sum(columns * part_mean) / width;
  const float shift = part_mean - mean;
  return {mean, reciprocal_std(tile_sum(fmadd(columns * shift, shift, part_squares)), width, p.layer_norm_eps)};
}

}  // namespace cuda
}  // namespace qpilots
