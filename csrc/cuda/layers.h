// What follows the sums of a product, on the neurons that a block owns: biases, activation, LayerNorm, their
// derivatives. A hidden layer's rows leave as operands of the next product; what its derivative needs stays with the
// block, in the workspace.
//
// A norm needs sums over all neurons of a row. Each tile sends its own, and a later phase finishes the layer.
// Eight lanes hold the 16 neurons of a tile, two each, so a tile's sum is three shuffles.
#pragma once

#include "fold.h"
#include "qpilots/activation.h"

namespace qpilots {
namespace cuda {

__device__ __forceinline__ ValueSlope<float> activate_any(std::int32_t activation, float z) {
  switch (static_cast<Activation>(activation)) {
#define QPILOTS_CASE(known, name) \
  case Activation::known:         \
    return activate<Activation::known>(z);
    QPILOTS_ACTIVATIONS(QPILOTS_CASE)
#undef QPILOTS_CASE
  }
  trap();
  return {};
}

__device__ __forceinline__ float parameter_or(const unsigned char* member, std::int64_t offset, int i,
                                              float otherwise) {
  return offset < 0 ? otherwise : load_constant(reinterpret_cast<const float*>(member + offset) + i);
}
template <class Weight>
__device__ __forceinline__ float output_weight(const Phase& p, const unsigned char* member, int n) {
  return to_float(load_constant(reinterpret_cast<const Weight*>(member + p.top_weight) + n));
}

// Two neurons of one row: what a thread works on after a product.
struct Pair {
  int row, tile, index;   // index: of 8 in the tile
  int neuron;             // the first
  int count;              // of the two that exist, 0 also where the row does not
  std::int64_t cell;      // of the first, in a plane [members][rows][out_dim]
  std::int64_t operands;  // of the tile's first word, in operand planes
  std::int64_t sums;      // of the tile's first sum
  const unsigned char* member;
};

// value[v] = f(v, value[v]) for those of the pair that exist; one after the other, so that f is there once.
template <class Function>
__device__ __forceinline__ void each_of(const Pair& pair, float (&value)[2], Function f) {
#pragma unroll 1
  for (int v = 0; v < pair.count; ++v) {
    const float made = f(v, v == 0 ? value[0] : value[1]);
    value[0] = v == 0 ? made : value[0];
    value[1] = v == 0 ? value[1] : made;
  }
}

// The i-th pair of a group.
template <int ROWS, class Weight>
__device__ __forceinline__ Pair pair_of(const SampleArgs& a, const Phase& p, int member, int first_tile, int row0,
                                        int valid, int i) {
  Pair pair;
  const int r = i / 8 % ROWS;
  pair.index = i % 8;
  pair.row = row0 + r;
  pair.tile = first_tile + i / (8 * ROWS);
  pair.neuron = pair.tile * kTile + 2 * pair.index;
  const int left = p.out_dim - pair.neuron;
  pair.count = r < valid ? (left > 2 ? 2 : (left > 0 ? left : 0)) : 0;
  const std::int64_t row = row_index(p, member, pair.row);
  pair.cell = row * p.out_dim + pair.neuron;
  pair.operands = (row * p.tiles + pair.tile) * kTileWords<Weight>;
  pair.sums = (row * p.tiles + pair.tile) * kTileSums;
  pair.member = a.weights + member * p.member_bytes;
  return pair;
}

// f(pair) for all pairs of a group, also those that do not exist, so that whole warps meet in the tile sums.
template <int ROWS, class Weight, class Function>
__device__ __forceinline__ void each_pair(const SampleArgs& a, const Phase& p, int member, int first_tile, int tiles,
                                          int row0, int valid, Function f) {
#pragma unroll 1
  for (int i = threadIdx.x; i < tiles * 8 * ROWS; i += kThreads) {
    const Pair pair = pair_of<ROWS, Weight>(a, p, member, first_tile, row0, valid, i);
    const int r = pair.row - row0;
    f(pair, r, r < valid);
  }
}

// What a pair needs from memory after its product, so that it can be on its way while the block waits for the operand.
struct Needs {
  float bias[2], addend[2], fold_sum[2], slope[2], kept[2], linear[2];
};
template <class Weight, int NT>
__device__ __forceinline__ Needs load_needs(const SampleArgs& a, const Block<Weight, NT>& block, const Phase& p,
                                            const Pair& pair, int member) {
  Needs needs{};
  const bool delta = static_cast<Result>(p.result) == Result::kDelta;
  const float* step_addend = a.workspace + p.step_addend + (block.step < 0 ? 0 : block.step) * p.out_dim;
  const std::int64_t addend_row =
      static_cast<std::int64_t>(member) * (p.rows / p.rows_per_addend) + pair.row / p.rows_per_addend;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (v >= pair.count) continue;
    const int n = pair.neuron + v;
    needs.bias[v] = parameter_or(pair.member, p.bias, n, 0.0f);
    needs.fold_sum[v] = parameter_or(pair.member, p.fold_sums, n, 0.0f);
    if (p.row_addend >= 0) needs.addend[v] = load_global(a.workspace + p.row_addend + addend_row * p.out_dim + n);
    if (p.step_addend >= 0) needs.addend[v] += load_global(step_addend + n);
    if (!delta) continue;
    needs.slope[v] = load_global(a.workspace + p.slopes + pair.cell + v);
    if (p.values >= 0) needs.kept[v] = load_global(a.workspace + p.values + pair.cell + v);
    if (p.delta_sums >= 0) needs.linear[v] = load_global(a.workspace + p.linear + pair.cell + v);
  }
  return needs;
}
// In float32 the registers are taken, and the products take longer than the loads.
template <class Weight>
inline constexpr bool kLoadsEarly = sizeof(Weight) == 2;

__device__ __forceinline__ float pick(const float (&pair)[2], int v) { return v == 0 ? pair[0] : pair[1]; }

// Sums over the tile of each of the terms.
template <int COUNT>
__device__ __forceinline__ void send_sums(std::uint64_t* sums, const Pair& pair, bool row_exists,
                                          const float (&terms)[COUNT], std::uint32_t tag) {
#pragma unroll
  for (int s = 0; s < COUNT; ++s) {
    const float sum = tile_sum(terms[s]);
    if (row_exists && pair.index == 0) send_number(sums + pair.sums + s, sum, tag);
  }
}

// A part of the pair's mean of its tile, and the deviations from it.
struct Moments {
  float mean_part;  // the tile's mean is the sum over its lanes
  float deviation[2];
};
__device__ __forceinline__ Moments tile_moments(const Pair& pair, int width, const float (&value)[2]) {
  const int left = width - pair.tile * kTile;
  const float part = (value[0] + value[1]) / static_cast<float>(left < kTile ? left : kTile);
  const float mean = tile_sum(part);
  return {part, {pair.count > 0 ? value[0] - mean : 0.0f, pair.count > 1 ? value[1] - mean : 0.0f}};
}

template <class Weight, int NT>
__device__ __forceinline__ float* norm_row(const Block<Weight, NT>& block, const Phase& p, int first, int member,
                                           int row) {
  return block.norm_rows + 2 * (first + member / p.teams * p.rows + row);
}

// What send_delta needs of memory.
__device__ __forceinline__ void load_fold(const SampleArgs& a, const Phase& p, const Pair& pair, float (&fold_sum)[2],
                                          float (&linear)[2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const bool wanted = p.delta_sums >= 0 && v < pair.count;
    fold_sum[v] = wanted ? parameter_or(pair.member, p.fold_sums, pair.neuron + v, 0.0f) : 0.0f;
    linear[v] = wanted ? load_global(a.workspace + p.linear + pair.cell + v) : 0.0f;
  }
}

// Sends d z of a pair, complete, and its tile's sums for the norm below where that is folded.
template <class Weight>
__device__ __forceinline__ void send_delta(const Phase& p, const Pair& pair, bool row_exists,
                                           const float (&fold_sum)[2], const float (&linear)[2], float (&value)[2],
                                           std::uint64_t* words, std::uint32_t tag) {
  if (row_exists) send_pair<Weight>(words + p.target + pair.operands, pair.index, value, tag);
  if (p.delta_sums < 0) return;
  float terms[2] = {0.0f, 0.0f};
  each_of(pair, value, [&](int v, float delta) {
    delta = rounded<Weight>(delta);
    terms[0] = fmadd(delta, pick(fold_sum, v), terms[0]);
    terms[1] = fmadd(delta, pick(linear, v), terms[1]);
    return delta;
  });
  send_sums(words + p.delta_sums, pair, row_exists, terms, tag);
}

// A hidden layer from its sums z, as far as it goes without its norm.
template <class Weight>
__device__ __forceinline__ void begin_hidden(const SampleArgs& a, const Phase& p, const Pair& pair, bool row_exists,
                                             float (&value)[2], std::uint64_t* words, std::uint32_t tag) {
  const NormPlacement norm = static_cast<NormPlacement>(p.norm);
  const bool top = static_cast<Result>(p.result) == Result::kCriticTop;
  float q = 0.0f;
  each_of(pair, value, [&](int v, float z) {
    if (norm != NormPlacement::kPre) {
      const ValueSlope<float> activated = activate_any(p.activation, z);
      z = activated.value;
      if (norm == NormPlacement::kNone && top) {
        const float w = output_weight<Weight>(p, pair.member, pair.neuron + v);
        q = fmadd(w, rounded<Weight>(activated.value), q);
        z = w * activated.slope;
      } else if (p.slopes >= 0) {
        store_global(a.workspace + p.slopes + pair.cell + v, activated.slope);
      }
    }
    if (p.folded) z = rounded<Weight>(z);
    if (p.values >= 0) store_global(a.workspace + p.values + pair.cell + v, z);
    return z;
  });
  if (norm != NormPlacement::kNone && !p.folded) {
    const Moments m = tile_moments(pair, p.out_dim, value);
    const float squares = fmadd(m.deviation[0], m.deviation[0], m.deviation[1] * m.deviation[1]);
    if (top && norm == NormPlacement::kPost) {
      float terms[5] = {m.mean_part, squares, 0.0f, 0.0f, 0.0f};
      float deviation[2] = {m.deviation[0], m.deviation[1]};
      each_of(pair, deviation, [&](int v, float x) {
        const int n = pair.neuron + v;
        const float w = output_weight<Weight>(p, pair.member, n);
        const float delta = w * parameter_or(pair.member, p.gamma, n, 1.0f);
        terms[2] = fmadd(delta, x, terms[2]);
        terms[3] += delta;
        terms[4] = fmadd(w, parameter_or(pair.member, p.beta, n, 0.0f), terms[4]);
        return x;
      });
      send_sums(words + p.vjp_sums, pair, row_exists, terms, tag);
    } else {
      send_sums(words + p.sums, pair, row_exists, {m.mean_part, squares}, tag);
    }
  } else if (!top) {
    if (row_exists) send_pair<Weight>(words + p.target + pair.operands, pair.index, value, tag);
  } else {
    float fold_sum[2], linear[2];
    load_fold(a, p, pair, fold_sum, linear);
    send_delta<Weight>(p, pair, row_exists, fold_sum, linear, value, words, tag);
    send_sums(words + p.vjp_sums, pair, row_exists, {0.0f, 0.0f, q}, tag);
  }
}

// d z of a hidden layer from d h, as far as it goes without its norm. sums, moments: of a folded norm (fold.h).
template <class Weight>
__device__ __forceinline__ void begin_delta(const SampleArgs& a, const Phase& p, const Pair& pair, bool row_exists,
                                            const Needs& needs, const RowNumbers& sums, const RowNumbers& moments,
                                            float (&value)[2], std::uint64_t* words, std::uint32_t tag) {
  const NormPlacement norm = static_cast<NormPlacement>(p.norm);
  float terms[2] = {0.0f, 0.0f};
  each_of(pair, value, [&](int v, float delta) {
    const float slope = pick(needs.slope, v);
    if (p.folded) {
      const float xhat = (pick(needs.kept, v) - moments.first) * moments.second;
      const float width = static_cast<float>(p.out_dim);
      return slope * layer_norm_vjp(delta, xhat, moments.second, sums.first / width, sums.second / width);
    }
    if (norm != NormPlacement::kPost) delta *= slope;
    if (norm == NormPlacement::kNone) return delta;
    delta *= parameter_or(pair.member, p.gamma, pair.neuron + v, 1.0f);
    store_global(a.workspace + p.deltas + pair.cell + v, delta);
    terms[0] += delta;
    terms[1] = fmadd(delta, pick(needs.kept, v), terms[1]);
    return delta;
  });
  if (norm != NormPlacement::kNone && !p.folded) {
    send_sums(words + p.vjp_sums, pair, row_exists, terms, tag);
  } else {
    send_delta<Weight>(p, pair, row_exists, needs.fold_sum, needs.linear, value, words, tag);
  }
}

// early: the needs of the thread's first pair, where they are loaded early.
template <class Weight, int NT>
__device__ __forceinline__ void finish_product(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p,
                                               const Needs& early, int member, int first_tile, int tiles, int row0,
                                               int valid) {
  Needs needs = early;
  bool have_needs = kLoadsEarly<Weight>;
  const int half = block.parity ^ 1;
  const Partials<NT> partials = block.partials(a, half);
  const Result result = static_cast<Result>(p.result);
  const RowWork work = row_work(p);
  each_pair<8 * NT, Weight>(
      a, p, member, first_tile, tiles, row0, valid, [&](const Pair& pair, int r, bool row_exists) {
        if (!have_needs) needs = load_needs(a, block, p, pair, member);
        have_needs = false;
        const int place = (pair.tile - first_tile) * kTile + 2 * pair.index;
        RowNumbers numbers{0.0f, 0.0f}, moments{0.0f, 1.0f};
        const float* part = block.parts_of_row(half, pair.index, r);  // of the warp that the lane stands for
        if (work == RowWork::kMoments) {
          moments = merge_moments(p, pair.index, load_shared(part), load_shared(part + 1));
          if (row_exists && p.source_norm_row >= 0 && pair.index == 0 && pair.tile == p.tile_begin) {
            float* kept = norm_row(block, p, p.source_norm_row, member, pair.row);
            store_shared(kept, moments.first);
            store_shared(kept + 1, moments.second);
          }
        } else if (work == RowWork::kSums) {
          numbers = {tile_sum(load_shared(part)), tile_sum(load_shared(part + 1))};
          if (row_exists) {
            const float* kept = norm_row(block, p, p.first_norm_row, member, pair.row);
            moments = {load_shared(kept), load_shared(kept + 1)};
          }
        }
        float value[2] = {0.0f, 0.0f};
        each_of(pair, value, [&](int v, float sum) {
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += load_shared(partials.at(w, r, place + v));
          if (work == RowWork::kMoments) {
            sum = moments.second * fmadd(-moments.first, pick(needs.fold_sum, v), sum);
            if (p.linear >= 0) store_global(a.workspace + p.linear + pair.cell + v, sum);
          }
          return sum + pick(needs.bias, v) + pick(needs.addend, v);
        });
        if (result == Result::kHidden || result == Result::kCriticTop) {
          begin_hidden<Weight>(a, p, pair, row_exists, value, block.words, block.tag);
        } else if (result == Result::kDelta) {
          begin_delta<Weight>(a, p, pair, row_exists, needs, numbers, moments, value, block.words, block.tag);
        } else {
          each_of(pair, value, [&](int v, float number) {
            if (result == Result::kNumbers) {
              send_number(block.words + p.target + pair.cell + v, number, block.tag);
            } else if (result == Result::kOwn) {
              store_shared(block.collected(p.input) + pair.cell + v, number);
            } else {
              store_global(a.workspace + p.target + pair.cell + v, number);
            }
            return number;
          });
        }
      });
}

}  // namespace cuda
}  // namespace qpilots
