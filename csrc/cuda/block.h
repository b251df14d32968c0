// What a block of the persistent kernel has in shared memory and in hand.
#pragma once

#include "products.h"

namespace qpilots {
namespace cuda {

QPILOTS_HD std::int64_t align16(std::int64_t bytes) { return (bytes + 15) & ~std::int64_t(15); }

constexpr int kRowParts = 2;    // numbers of a row that a folded norm needs (fold.h)
constexpr int kRowNumbers = 4;  // that finishing a norm needs

// Byte offsets into dynamic shared memory; as many bytes as shared_bytes in backends/cuda/plan.py counts.
struct SharedLayout {
  std::int64_t program, weights, partials, row_parts, row_numbers, norm_rows, flags;
  std::int64_t x, velocity, g, posterior_output, estimate_vjp, gradients, q_values, member_weights, q_bar, q_std,
      draw_weights, q_scale;
  std::int64_t total;
};

template <class Weight>
QPILOTS_HD std::int64_t weight_buffer_bytes(const SampleArgs& a) {
  return align16(static_cast<std::int64_t>(a.group_tiles) * kTile * (a.stride * sizeof(Weight) + 16));
}
QPILOTS_HD int partials_stride(const SampleArgs& a) { return a.group_tiles * kTile + 4; }

template <class Weight>
QPILOTS_HD SharedLayout shared_layout(const SampleArgs& a, int nt) {
  const std::int64_t state = static_cast<std::int64_t>(a.batch) * a.action_dim;
  const std::int64_t estimates = a.num_members > 0 ? static_cast<std::int64_t>(a.batch) * a.steering.num_samples : 0;
  const std::int64_t rows = 8 * nt;
  SharedLayout s{};
  s.weights = align16((a.num_once + a.num_step_phases) * static_cast<std::int64_t>(sizeof(Phase)));
  s.partials = s.weights + a.buffers * weight_buffer_bytes<Weight>(a);
  s.row_parts = s.partials + 2 * kWarps * rows * partials_stride(a) * 4;
  s.row_numbers = s.row_parts + 2 * kWarps * rows * kRowParts * 4;
  s.norm_rows = s.row_numbers + 2 * rows * kRowNumbers * 4;
  s.flags = s.norm_rows + a.num_norm_rows * 2 * 4;
  s.x = s.flags + 2 * kWarps * 4;
  s.velocity = s.x + state * 4;
  s.g = s.velocity + state * 4;
  s.posterior_output = s.g + state * 4;
  s.estimate_vjp = s.posterior_output + estimates * a.action_dim * 4;
  s.gradients = s.estimate_vjp + estimates * a.action_dim * 4;
  s.q_values = s.gradients + estimates * a.action_dim * 4;
  s.member_weights = s.q_values + estimates * a.num_members * 4;
  s.q_bar = s.member_weights + estimates * a.num_members * 4;
  s.q_std = s.q_bar + estimates * 4;
  s.draw_weights = s.q_std + estimates * 4;
  s.q_scale = s.draw_weights + estimates * 4;
  s.total = align16(s.q_scale + 4);
  return s;
}

template <class Weight, int NT>
struct Block {
  static constexpr int kRows = 8 * NT;  // of a product at once

  Phase* program;
  WeightStream<Weight> stream;
  float* partial_sums;      // [2][kWarps][kRows][partials_stride]
  float* row_parts;         // [2][kWarps][kRows][kRowParts] of a product's operand, by the warps' columns
  float* row_numbers;       // [2][kRows][kRowNumbers]
  float* norm_rows;         // [num_norm_rows][2] mean and 1 / std of the rows of each hidden layer
  std::uint32_t* flags;     // [2][kWarps]
  float* x;                 // [B][A]
  float* velocity;          // [B][A]
  float* g;                 // [B][A]
  float* posterior_output;  // [R][A] the map's output
  float* estimate_vjp;      // [R][A] the gradient pulled back to x
  float* gradients;         // [R][A] the critics' weighted gradient at the estimate
  float* q_values;          // [R][E]
  float* member_weights;    // [R][E]
  float* q_bar;             // [R]
  float* q_std;             // [R]
  float* draw_weights;      // [R]
  float* q_scale;           // [1]

  int step;
  std::uint32_t tag;     // of the step
  std::uint64_t* words;  // the step's slot of the exchange
  Patience patience;
  int parity;  // of the barriers so far: which half of the arrays above that have two

  __device__ __forceinline__ Block(const SampleArgs& a) {
    unsigned char* base = dynamic_shared();
    const SharedLayout s = shared_layout<Weight>(a, NT);
    const auto floats = [base](std::int64_t offset) { return reinterpret_cast<float*>(base + offset); };
    program = reinterpret_cast<Phase*>(base);
    stream = {base + s.weights, weight_buffer_bytes<Weight>(a), Position{-1, 0, 0, 0, 0}, true, 0, 0};
    partial_sums = floats(s.partials);
    row_parts = floats(s.row_parts);
    row_numbers = floats(s.row_numbers);
    norm_rows = floats(s.norm_rows);
    flags = reinterpret_cast<std::uint32_t*>(base + s.flags);
    x = floats(s.x);
    velocity = floats(s.velocity);
    g = floats(s.g);
    posterior_output = floats(s.posterior_output);
    estimate_vjp = floats(s.estimate_vjp);
    gradients = floats(s.gradients);
    q_values = floats(s.q_values);
    member_weights = floats(s.member_weights);
    q_bar = floats(s.q_bar);
    q_std = floats(s.q_std);
    draw_weights = floats(s.draw_weights);
    q_scale = floats(s.q_scale);
    step = -1;
    parity = 0;
    const auto used = static_cast<std::uint32_t>(load_word(a.tags + 1 + blockIdx.x));
    patience = {a.tags, used + 1u, a.spin_limit, true};
    tag = used;
    words = a.exchange;
  }

  __device__ __forceinline__ float* collected(std::int32_t which) const {
    switch (static_cast<Collected>(which)) {
      case Collected::kVelocity:
        return velocity;
      case Collected::kPosteriorOutput:
        return posterior_output;
      default:
        return estimate_vjp;
    }
  }

  __device__ __forceinline__ void begin_step(const SampleArgs& a, int k) {
    step = k;
    tag = patience.first_tag + static_cast<std::uint32_t>(k);
    words = slot(a, k);
  }
  __device__ __forceinline__ std::uint64_t* slot(const SampleArgs& a, int k) const {
    return a.exchange + (k & 1) * a.slot_words;
  }

  // A barrier of the block; false, in every thread, once one of them gave up.
  __device__ __forceinline__ bool barrier() {
    std::uint32_t* votes = flags + parity * kWarps;
    const bool gave_up = __any_sync(kAllLanes, !patience.alive);
    if (lane_index() == 0) store_shared(votes + warp_index(), gave_up ? 1u : 0u);
    __syncthreads();
    std::uint32_t lost = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) lost |= load_shared(votes + w);
    parity ^= 1;
    patience.alive = lost == 0u;
    return patience.alive;
  }

  // Those written before the latest barrier.
  __device__ __forceinline__ Partials<NT> partials(const SampleArgs& a, int half) const {
    const int stride = partials_stride(a);
    return {partial_sums + half * kWarps * kRows * stride, stride};
  }
  __device__ __forceinline__ float* parts_of_row(int half, int warp, int row) const {
    return row_parts + ((half * kWarps + warp) * kRows + row) * kRowParts;
  }
  __device__ __forceinline__ float* numbers_of_row(int half, int row) const {
    return row_numbers + (half * kRows + row) * kRowNumbers;
  }
};

// f(member, first_tile, tiles, row0, valid) for each group of tiles and rows of this block's share.
template <int ROWS, class Function>
__device__ __forceinline__ bool each_group(const SampleArgs& a, const Phase& p, Function f) {
  for (int member = p.first_member; member < p.members && p.tile_begin < p.tile_end; member += p.teams) {
    for (int first = p.tile_begin; first < p.tile_end; first += a.group_tiles) {
      const int tiles = p.tile_end - first < a.group_tiles ? p.tile_end - first : a.group_tiles;
      for (int row0 = 0; row0 < p.rows; row0 += ROWS) {
        const int valid = p.rows - row0 < ROWS ? p.rows - row0 : ROWS;
        if (!f(member, first, tiles, row0, valid)) return false;
      }
    }
  }
  return true;
}

}  // namespace cuda
}  // namespace qpilots
