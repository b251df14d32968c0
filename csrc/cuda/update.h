// What every block computes for itself: the estimate, the weights of critics and draws, the critics' gradient, the new
// x. All come from the same numbers in the same order, so that all blocks have the same bits.
#pragma once

#include "block.h"
#include "steering_rows.h"

namespace qpilots {
namespace cuda {

// eps of draw `row` (b N + n) at step k.
__device__ __forceinline__ float posterior_noise(const SampleArgs& a, int k, int row, int c) {
  const std::int64_t draws = static_cast<std::int64_t>(a.batch) * a.steering.num_samples;
  return load_constant(a.posterior_noise + (k * draws + row) * a.action_dim + c);
}

// The clean-action estimate of a row before the clip.
template <class Weight, int NT>
__device__ __forceinline__ float estimate(const SampleArgs& a, const Block<Weight, NT>& block, int row, int c) {
  const std::int64_t cell = static_cast<std::int64_t>(row) * a.action_dim + c;
  switch (a.steering.estimate) {
    case Estimate::kNoisy:
      return load_shared(block.x + cell);
    case Estimate::kTweedie:
      return fmadd(load_constant(a.schedule + 3 * block.step), load_shared(block.velocity + cell),
                   load_shared(block.x + cell));
    default:
      return posterior_noise(a, block.step, row, c) + load_shared(block.posterior_output + cell);
  }
}

__device__ __forceinline__ float action_low(const SampleArgs& a, int c) { return load_constant(a.bounds + c); }
__device__ __forceinline__ float action_high(const SampleArgs& a, int c) {
  return load_constant(a.bounds + a.action_dim + c);
}

// A kCollect phase: numbers [rows][out_dim] into the block's own copy.
template <class Weight, int NT>
__device__ __forceinline__ bool collect(Block<Weight, NT>& block, const Phase& p) {
  float* copy = block.collected(p.input);
  for (int i = threadIdx.x; i < p.rows * p.out_dim; i += kThreads) {
    store_shared(copy + i, receive_number(block.words + p.source + i, block.tag, block.patience));
  }
  return block.barrier();
}

// sum_j w_j dQ_j / da at the estimate of each row, through the clip.
template <class Weight, int NT>
__device__ __forceinline__ void collect_gradients(const SampleArgs& a, Block<Weight, NT>& block) {
  const int rows = a.batch * a.steering.num_samples;
  constexpr int kAtOnce = 5;
  for (int i = threadIdx.x; i < rows * a.action_dim; i += kThreads) {
    const int row = i / a.action_dim, c = i % a.action_dim;
    const std::uint64_t* vjp = block.words + a.critic_vjp + i;
    const std::int64_t stride = static_cast<std::int64_t>(rows) * a.action_dim;
    const float* weights = block.member_weights + static_cast<std::int64_t>(row) * a.num_members;
    float sum = 0.0f;
    for (int j0 = 0; j0 < a.num_members; j0 += kAtOnce) {
      std::uint64_t words[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (j0 + j < a.num_members) words[j] = load_word(vjp + (j0 + j) * stride);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (j0 + j >= a.num_members) continue;
        const std::uint32_t bits = await_word(vjp + (j0 + j) * stride, words[j], block.tag, block.patience);
        sum = fmadd(load_shared(weights + j0 + j), bits_float(bits), sum);
      }
    }
    if (a.steering.clip == Clip::kMasked && a.steering.full_jacobian) {
      const float at = estimate(a, block, row, c);
      if (!(at >= action_low(a, c) && at <= action_high(a, c))) sum = 0.0f;
    }
    store_shared(block.gradients + i, sum);
  }
}

// A kWeigh phase: weights of the critics, of the draws, the scale of Q, and the critics' gradient.
// The gradient is for the blocks with a share: the draws' serves the map's backward pass alone, any other the update.
template <class Weight, int NT>
__device__ __forceinline__ bool weigh(const SampleArgs& a, Block<Weight, NT>& block, const Phase& p) {
  const SteeringParams& s = a.steering;
  const int rows = a.batch * s.num_samples, lane = lane_index();
  for (int i = threadIdx.x; i < rows * a.num_members; i += kThreads) {
    const int j = i / rows, row = i % rows;
    store_shared(block.q_values + row * a.num_members + j,
                 receive_number(block.words + a.q_values + i, block.tag, block.patience));
  }
  if (!block.barrier()) return false;
  for (int row = warp_index(); row < rows; row += kWarps) {
    const auto load = [&](int j) { return load_shared(block.q_values + row * a.num_members + j); };
    const MemberStatistics statistics = member_statistics(s, a.num_members, lane, load);
    for (int j = lane; j < a.num_members; j += kWarpSize) {
      store_shared(block.member_weights + static_cast<std::int64_t>(row) * a.num_members + j,
                   member_weight(s, statistics, a.num_members, load(j)));
    }
    if (lane == 0) {
      store_shared(block.q_bar + row, statistics.finite ? statistics.value : not_a_number());
      store_shared(block.q_std + row, statistics.finite ? statistics.std : not_a_number());
    }
  }
  __syncthreads();
  if (warp_index() == 0) {
    float scale = s.q_scale_kind == QScale::kNumber ? s.q_scale : 1.0f;
    if (s.q_scale_kind == QScale::kBatchStd) {  // rows without a value must not reach the others through the std
      float sum = 0.0f, count = 0.0f, squares = 0.0f;
      for (int row = lane; row < rows; row += kWarpSize) {
        const float q = load_shared(block.q_bar + row);
        sum += is_finite(q) ? q : 0.0f;
        count += is_finite(q) ? 1.0f : 0.0f;
      }
      count = warp_sum(count);
      const float mean = warp_sum(sum) / maximum(count, 1.0f);
      for (int row = lane; row < rows; row += kWarpSize) {
        const float q = load_shared(block.q_bar + row);
        squares = is_finite(q) ? fmadd(q - mean, q - mean, squares) : squares;
      }
      const float std = square_root(warp_sum(squares) / maximum(count, 1.0f));
      scale = count > 0.0f ? std + 1e-6f : 1.0f;
    }
    if (lane == 0) store_shared(block.q_scale, scale);
  }
  if (p.tile_begin < p.tile_end) collect_gradients(a, block);
  if (!block.barrier()) return false;
  if (s.num_samples > 1) {
    const float scale = s.tau / load_shared(block.q_scale);
    for (int b = warp_index(); b < a.batch; b += kWarps) {  // softmax over the draws
      const int first = b * s.num_samples;
      float highest = -3.4e38f, sum = 0.0f;
      for (int n = lane; n < s.num_samples; n += kWarpSize) {
        highest = maximum(scale * load_shared(block.q_bar + first + n), highest);
      }
      highest = warp_maximum(highest);
      for (int n = lane; n < s.num_samples; n += kWarpSize) {
        const float e = exp_clamped(fmadd(scale, load_shared(block.q_bar + first + n), -highest));
        store_shared(block.draw_weights + first + n, e);
        sum += e;
      }
      sum = warp_sum(sum);
      for (int n = lane; n < s.num_samples; n += kWarpSize) {
        store_shared(block.draw_weights + first + n, load_shared(block.draw_weights + first + n) / sum);
      }
    }
  } else {
    for (int b = threadIdx.x; b < a.batch; b += kThreads) store_shared(block.draw_weights + b, 1.0f);
  }
  return true;  // the update's barrier comes before the draws' weights are read
}

// g of one action dim, before the norm match.
template <class Weight, int NT>
__device__ __forceinline__ float steering_gradient(const SampleArgs& a, const Block<Weight, NT>& block, int b, int c) {
  const SteeringParams& s = a.steering;
  const float scale = s.tau / load_shared(block.q_scale);
  if (s.estimate == Estimate::kMfm) {
    float sum = 0.0f;
    for (int n = 0; n < s.num_samples; ++n) {
      const std::int64_t row = static_cast<std::int64_t>(b) * s.num_samples + n;
      sum = fmadd(load_shared(block.draw_weights + row), load_shared(block.estimate_vjp + row * a.action_dim + c), sum);
    }
    return scale * sum;
  }
  const std::int64_t cell = static_cast<std::int64_t>(b) * a.action_dim + c;
  float sum = load_shared(block.gradients + cell);
  if (s.estimate == Estimate::kTweedie && s.full_jacobian) {
    sum = fmadd(load_constant(a.schedule + 3 * block.step), load_shared(block.estimate_vjp + cell), sum);
  }
  return scale * sum;
}

// x <- x + dt v' in every block's own copy. weight: of the step's steering.
template <class Weight, int NT>
__device__ __forceinline__ void update(const SampleArgs& a, const Block<Weight, NT>& block, float weight) {
  const SteeringParams& s = a.steering;
  const int lane = lane_index(), k = block.step;
  const float dt = load_constant(a.schedule + 3 * k + 1);
  __syncthreads();
  for (int b = warp_index(); b < a.batch; b += kWarps) {
    float* x = block.x + static_cast<std::int64_t>(b) * a.action_dim;
    float* g = block.g + static_cast<std::int64_t>(b) * a.action_dim;
    const float* v = block.velocity + static_cast<std::int64_t>(b) * a.action_dim;
    SteerOutcome outcome{0.0f, false, false};
    float q_std = 0.0f;
    if (weight > 0.0f) {
      for (int c = lane; c < a.action_dim; c += kWarpSize) {
        store_shared(g + c, is_steered(a.steered, c) ? steering_gradient(a, block, b, c) : 0.0f);
      }
      for (int n = 0; n < s.num_samples; ++n) {
        const int row = b * s.num_samples + n;
        q_std = fmadd(load_shared(block.draw_weights + row), load_shared(block.q_std + row), q_std);
      }
      outcome = steer_velocity_by_warp(
          s, weight * (a.alpha == nullptr ? s.alpha : load_constant(a.alpha + b)), a.action_dim, a.steered, q_std, dt,
          lane, [&](int c) { return load_shared(x + c); }, [&](int c) { return load_shared(v + c); },
          [&](int c) { return load_shared(g + c); }, [&](int c, float value) { store_shared(x + c, value); });
    } else {
      for (int c = lane; c < a.action_dim; c += kWarpSize) {
        store_shared(x + c, fmadd(dt, load_shared(v + c), load_shared(x + c)));
      }
    }
    if (blockIdx.x == 0 && lane == 0 && a.gradient_norms != nullptr) {
      const std::int64_t at = static_cast<std::int64_t>(k) * a.batch + b;
      store_global(a.gradient_norms + at, outcome.g_norm);
      store_global(a.nonfinite + at, static_cast<unsigned char>(outcome.nonfinite));
      store_global(a.q_std + at, outcome.nonfinite ? 0.0f : q_std);
      store_global(a.gated + at, static_cast<unsigned char>(outcome.gated));
    }
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace qpilots
