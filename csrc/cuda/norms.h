// LayerNorm where it is not folded, and at the critic's top: a hidden layer is finished by a phase of its own, once the
// sums of all tiles of a row are there.
#pragma once

#include "layers.h"

namespace qpilots {
namespace cuda {

// The tiles' first COUNT sums of a row in `plane`: a lane has every 32nd tile, its first one at hand.
template <class Weight, int NT, int COUNT>
struct RowSums {
  Block<Weight, NT>& block;
  const Phase& p;
  const std::uint64_t* row_words;
  float first[COUNT] = {};

  __device__ __forceinline__ RowSums(Block<Weight, NT>& block, const Phase& p, std::int64_t plane, int member, int row)
      : block(block), p(p), row_words(block.words + plane + row_index(p, member, row) * p.tiles * kTileSums) {
    if (lane_index() < p.tiles) receive(lane_index(), first);
  }

  __device__ __forceinline__ void receive(int tile, float (&sums)[COUNT]) {
    std::uint64_t words[COUNT];
#pragma unroll
    for (int s = 0; s < COUNT; ++s) words[s] = load_word(row_words + tile * kTileSums + s);
#pragma unroll
    for (int s = 0; s < COUNT; ++s) {
      sums[s] = bits_float(await_word(row_words + tile * kTileSums + s, words[s], block.tag, block.patience));
    }
  }

  // f(neurons of the tile, its sums) for the lane's tiles.
  template <class Function>
  __device__ __forceinline__ void each(Function f) {
    for (int tile = lane_index(); tile < p.tiles; tile += kWarpSize) {
      float sums[COUNT];
      if (tile >= kWarpSize) receive(tile, sums);
#pragma unroll
      for (int s = 0; s < COUNT; ++s) sums[s] = tile < kWarpSize ? first[s] : sums[s];
      const int left = p.out_dim - tile * kTile;
      f(static_cast<float>(left < kTile ? left : kTile), sums);
    }
  }

  // Mean and 1 / std of the row, from the tiles' means and squared deviations.
  __device__ __forceinline__ RowNumbers moments() {
    const float width = static_cast<float>(p.out_dim);
    float sum = 0.0f, squares = 0.0f;
    each([&](float neurons, const float (&sums)[COUNT]) { sum = fmadd(neurons, sums[0], sum); });
    const float mean = warp_sum(sum) / width;
    each([&](float neurons, const float (&sums)[COUNT]) {
      const float shift = sums[0] - mean;
      squares += fmadd(neurons * shift, shift, sums[1]);
    });
    return {mean, reciprocal_std(warp_sum(squares), width, p.layer_norm_eps)};
  }
};

// LayerNorm of the block's neurons; at the critic's top ("pre") also its derivative, as far as it goes.
template <class Weight, int NT>
__device__ __forceinline__ bool finish_norm(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p) {
  constexpr int kRows = 8 * NT;
  const bool pre = static_cast<NormPlacement>(p.norm) == NormPlacement::kPre;
  return each_group<kRows>(a, p, [&](int member, int first_tile, int tiles, int row0, int valid) {
    const int half = block.parity;
    for (int r = warp_index(); r < valid; r += kWarps) {
      const RowNumbers moments = RowSums<Weight, NT, 2>(block, p, p.sums, member, row0 + r).moments();
      if (lane_index() == 0) {
        store_shared(block.numbers_of_row(half, r), moments.first);
        store_shared(block.numbers_of_row(half, r) + 1, moments.second);
        if (p.first_norm_row >= 0) {
          store_shared(norm_row(block, p, p.first_norm_row, member, row0 + r) + 1, moments.second);
        }
      }
    }
    if (!block.barrier()) return false;
    each_pair<kRows, Weight>(
        a, p, member, first_tile, tiles, row0, valid, [&](const Pair& pair, int r, bool row_exists) {
          float value[2] = {0.0f, 0.0f}, terms[3] = {0.0f, 0.0f, 0.0f};
          each_of(pair, value, [&](int v, float) {
            const int n = pair.neuron + v;
            float* kept = a.workspace + p.values + pair.cell + v;
            const float mean = load_shared(block.numbers_of_row(half, r));
            const float xhat = (load_global(kept) - mean) * load_shared(block.numbers_of_row(half, r) + 1);
            const float gamma = parameter_or(pair.member, p.gamma, n, 1.0f);
            float h = layer_norm_affine(xhat, gamma, parameter_or(pair.member, p.beta, n, 0.0f)), slope = 1.0f;
            store_global(kept, xhat);
            if (pre) {
              const ValueSlope<float> activated = activate_any(p.activation, h);
              h = activated.value;
              slope = activated.slope;
              if (p.slopes >= 0) store_global(a.workspace + p.slopes + pair.cell + v, slope);
            }
            if (p.at_top) {
              const float w = output_weight<Weight>(p, pair.member, n), delta = w * slope * gamma;
              store_global(a.workspace + p.deltas + pair.cell + v, delta);
              terms[0] += delta;
              terms[1] = fmadd(delta, xhat, terms[1]);
              terms[2] = fmadd(w, rounded<Weight>(h), terms[2]);
            }
            return h;
          });
          if (p.at_top) {
            send_sums(block.words + p.vjp_sums, pair, row_exists, terms, block.tag);
          } else if (row_exists) {
            send_pair<Weight>(block.words + p.target + pair.operands, pair.index, value, block.tag);
          }
        });
    return true;
  });
}

// The derivative of the norm of the block's neurons, which completes d z; at the critic's top also Q, and of a "post"
// norm there the norm as well, whose sums come with the derivative's.
template <class Weight, int NT>
__device__ __forceinline__ bool finish_norm_vjp(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p) {
  constexpr int kRows = 8 * NT;
  const NormPlacement norm = static_cast<NormPlacement>(p.norm);
  const bool whole = p.at_top && norm == NormPlacement::kPost;
  return each_group<kRows>(a, p, [&](int member, int first_tile, int tiles, int row0, int valid) {
    const int half = block.parity, lane = lane_index();
    const bool sends_q = p.at_top && first_tile == 0;
    if (norm == NormPlacement::kNone && !sends_q) return true;
    for (int r = warp_index(); r < valid; r += kWarps) {
      const int row = row0 + r;
      RowNumbers moments{0.0f, 0.0f};
      float sums[3] = {0.0f, 0.0f, 0.0f};  // of d xhat, of d xhat xhat, and Q without its bias
      if (whole) {
        RowSums<Weight, NT, 5> received(block, p, p.vjp_sums, member, row);
        moments = received.moments();
        received.each([&](float, const float (&tile)[5]) {
          sums[0] += tile[3];
          sums[1] += fmadd(tile[3], tile[0] - moments.first, tile[2]);
          sums[2] += tile[4];
        });
      } else if (p.at_top) {
        RowSums<Weight, NT, 3>(block, p, p.vjp_sums, member, row).each([&](float, const float (&tile)[3]) {
          for (int s = 0; s < 3; ++s) sums[s] += tile[s];
        });
      } else {
        RowSums<Weight, NT, 2>(block, p, p.vjp_sums, member, row).each([&](float, const float (&tile)[2]) {
          for (int s = 0; s < 2; ++s) sums[s] += tile[s];
        });
      }
      if (!whole && norm != NormPlacement::kNone) {
        moments.second = load_shared(norm_row(block, p, p.first_norm_row, member, row) + 1);
      }
#pragma unroll
      for (int s = 0; s < 3; ++s) sums[s] = warp_sum(sums[s]);
      if (whole) {
        sums[1] *= moments.second;
        sums[2] += sums[1];
      }
      const bool complete = __any_sync(kAllLanes, !block.patience.alive) == 0;
      if (lane == 0) {
        const float width = static_cast<float>(p.out_dim);
        float* numbers = block.numbers_of_row(half, r);
        store_shared(numbers, moments.first);
        store_shared(numbers + 1, moments.second);
        store_shared(numbers + 2, sums[0] / width);
        store_shared(numbers + 3, sums[1] / width);
        if (sends_q && complete) {
          const float q = sums[2] + parameter_or(a.weights + member * p.member_bytes, p.top_bias, 0, 0.0f);
          send_number(block.words + a.q_values + row_index(p, member, row), q, block.tag);
        }
      }
    }
    if (!block.barrier()) return false;
    if (norm == NormPlacement::kNone) return true;
    each_pair<kRows, Weight>(
        a, p, member, first_tile, tiles, row0, valid, [&](const Pair& pair, int r, bool row_exists) {
          const float* numbers = block.numbers_of_row(half, r);
          float value[2] = {0.0f, 0.0f};
          each_of(pair, value, [&](int v, float) {
            const int n = pair.neuron + v;
            const float mean = load_shared(numbers), rstd = load_shared(numbers + 1);
            const float kept = load_global(a.workspace + p.values + pair.cell + v);
            const float d_xhat =
                whole ? output_weight<Weight>(p, pair.member, n) * parameter_or(pair.member, p.gamma, n, 1.0f)
                      : load_global(a.workspace + p.deltas + pair.cell + v);
            const float delta = layer_norm_vjp(d_xhat, whole ? (kept - mean) * rstd : kept, rstd,
                                               load_shared(numbers + 2), load_shared(numbers + 3));
            if (norm != NormPlacement::kPost) return delta;
            return delta * load_global(a.workspace + p.slopes + pair.cell + v);
          });
          float fold_sum[2], linear[2];
          load_fold(a, p, pair, fold_sum, linear);
          send_delta<Weight>(p, pair, row_exists, fold_sum, linear, value, block.words, block.tag);
        });
    return true;
  });
}

}  // namespace cuda
}  // namespace qpilots
