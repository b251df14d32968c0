// The whole call in one launch: every block runs the same program of phases, a grid barrier ends each phase.
//
// A phase is one product for every member. The neurons of all members are split evenly over the blocks, then over the
// warps of a block; each block first stages the rows it needs in shared memory (staging.h). x and the few numbers of a
// row (weights of critics and draws) are computed by every block for itself, which saves barriers.
#include "host.h"
#include "phase.h"
#include "products.h"
#include "staging.h"
#include "steering_rows.h"

namespace qpilots {
namespace cuda {
namespace {

QPILOTS_HD std::int64_t align16(std::int64_t bytes) { return (bytes + 15) & ~std::int64_t(15); }

// Byte offsets into dynamic shared memory.
struct SharedLayout {
  std::int64_t program, staged, values, deltas, parts, sums, x, g, member_weights, q_bar, q_std, draw_weights, scalars;
  std::int64_t total;
};

QPILOTS_HD SharedLayout shared_layout(const SampleArgs& a, int rows, int weight_bytes) {
  const std::int64_t tile = static_cast<std::int64_t>(rows) * a.stage_stride;
  const std::int64_t estimates = static_cast<std::int64_t>(a.batch) * a.steering.num_samples;
  const std::int64_t state = static_cast<std::int64_t>(a.batch) * a.action_dim;
  SharedLayout s{};
  s.program = 0;
  s.values = align16((a.num_once + a.num_step_phases) * static_cast<std::int64_t>(sizeof(Phase)));
  s.deltas = align16(s.values + tile * 4);
  s.staged = weight_bytes == 4 ? s.deltas : align16(s.deltas + tile * 4);
  s.parts = align16((weight_bytes == 4 ? s.deltas + tile * 4 : s.staged + tile * weight_bytes));
  s.sums = s.parts + kWarps * 2 * rows * 4;
  s.x = s.sums + 4 * rows * 4;
  s.g = s.x + state * 4;
  s.member_weights = s.g + state * 4;
  s.q_bar = s.member_weights + estimates * a.num_members * 4;
  s.q_std = s.q_bar + estimates * 4;
  s.draw_weights = s.q_std + estimates * 4;
  s.scalars = s.draw_weights + estimates * 4;
  s.total = align16(s.scalars + 16);
  return s;
}

// Pointers into shared memory, typed.
template <class Weight>
struct SharedMemory {
  Phase* program;
  StagingBuffers<Weight> buffers;
  float* x;               // [B][A]
  float* g;               // [B][A]
  float* member_weights;  // [R][E]
  float* q_bar;           // [R]
  float* q_std;           // [R]
  float* draw_weights;    // [R]
  float* q_scale;         // [1]
  std::uint32_t* barrier_flag;
};

template <class Weight>
__device__ __forceinline__ SharedMemory<Weight> shared_memory(const SampleArgs& a, int rows) {
  unsigned char* base = dynamic_shared();
  const SharedLayout s = shared_layout(a, rows, sizeof(Weight));
  const auto floats = [base](std::int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  SharedMemory<Weight> m;
  m.program = reinterpret_cast<Phase*>(base + s.program);
  m.buffers = {reinterpret_cast<Weight*>(base + s.staged),
               floats(s.values),
               floats(s.deltas),
               floats(s.parts),
               floats(s.sums),
               floats(s.sums) + rows,
               floats(s.sums) + 2 * rows};
  m.x = floats(s.x);
  m.g = floats(s.g);
  m.member_weights = floats(s.member_weights);
  m.q_bar = floats(s.q_bar);
  m.q_std = floats(s.q_std);
  m.draw_weights = floats(s.draw_weights);
  m.q_scale = floats(s.scalars);
  m.barrier_flag = reinterpret_cast<std::uint32_t*>(base + s.scalars + 4);
  return m;
}

// eps of draw `row` (b N + n) at step k.
__device__ __forceinline__ float posterior_noise(const SampleArgs& a, int k, int row, int c) {
  const std::int64_t draws = static_cast<std::int64_t>(a.batch) * a.steering.num_samples;
  return load_constant(a.posterior_noise + (k * draws + row) * a.action_dim + c);
}

// The clean-action estimate of a row before the clip.
template <class Weight>
__device__ __forceinline__ float estimate(const SampleArgs& a, const SharedMemory<Weight>& shared, int k, int row,
                                          int c) {
  const std::int64_t cell = static_cast<std::int64_t>(row) * a.action_dim + c;
  switch (a.steering.estimate) {
    case Estimate::kNoisy:
      return load_shared(shared.x + cell);
    case Estimate::kTweedie:
      return fmadd(load_constant(a.schedule + 3 * k), load_global(a.workspace + a.velocity + cell),
                   load_shared(shared.x + cell));
    default:
      return posterior_noise(a, k, row, c) + load_global(a.workspace + a.posterior_output + cell);
  }
}

__device__ __forceinline__ float action_low(const SampleArgs& a, int c) { return load_constant(a.bounds + c); }
__device__ __forceinline__ float action_high(const SampleArgs& a, int c) {
  return load_constant(a.bounds + a.action_dim + c);
}

// sum_j w_j dQ_j / da at the estimate, through the clip.
template <class Weight>
__device__ __forceinline__ float critic_gradient(const SampleArgs& a, const SharedMemory<Weight>& shared, int k,
                                                 int row, int c) {
  const std::int64_t rows = static_cast<std::int64_t>(a.batch) * a.steering.num_samples;
  const float* vjp = a.workspace + a.critic_vjp + static_cast<std::int64_t>(row) * a.action_dim + c;
  const float* weights = shared.member_weights + static_cast<std::int64_t>(row) * a.num_members;
  float sum = 0.0f;
#pragma unroll 4
  for (int j = 0; j < a.num_members; ++j) {
    sum = fmadd(load_shared(weights + j), load_global(vjp + j * rows * a.action_dim), sum);
  }
  if (a.steering.clip == Clip::kMasked && a.steering.full_jacobian) {
    const float at = estimate(a, shared, k, row, c);
    if (!(at >= action_low(a, c) && at <= action_high(a, c))) sum = 0.0f;
  }
  return sum;
}

// Weights of the critics, of the draws, and the scale of Q, from the Q values of all rows.
template <class Weight>
__device__ __forceinline__ void weigh_critics(const SampleArgs& a, const SharedMemory<Weight>& shared) {
  const SteeringParams& s = a.steering;
  const int rows = a.batch * s.num_samples, lane = lane_index();
  for (int row = warp_index(); row < rows; row += kWarps) {
    const float* q_values = a.workspace + a.q_values + row;
    const auto load = [&](int j) { return load_global(q_values + static_cast<std::int64_t>(j) * rows); };
    const MemberStatistics statistics = member_statistics(s, a.num_members, lane, load);
    for (int j = lane; j < a.num_members; j += kWarpSize) {
      store_shared(shared.member_weights + static_cast<std::int64_t>(row) * a.num_members + j,
                   member_weight(s, statistics, a.num_members, load(j)));
    }
    if (lane == 0) {
      store_shared(shared.q_bar + row, statistics.finite ? statistics.value : not_a_number());
      store_shared(shared.q_std + row, statistics.finite ? statistics.std : not_a_number());
    }
  }
  __syncthreads();
  if (warp_index() == 0) {
    float scale = s.q_scale_kind == QScale::kNumber ? s.q_scale : 1.0f;
    if (s.q_scale_kind == QScale::kBatchStd) {  // rows without a value must not reach the others through the std
      float sum = 0.0f, count = 0.0f, squares = 0.0f;
      for (int row = lane; row < rows; row += kWarpSize) {
        const float q = load_shared(shared.q_bar + row);
        sum += is_finite(q) ? q : 0.0f;
        count += is_finite(q) ? 1.0f : 0.0f;
      }
      count = warp_sum(count);
      const float mean = warp_sum(sum) / maximum(count, 1.0f);
      for (int row = lane; row < rows; row += kWarpSize) {
        const float q = load_shared(shared.q_bar + row);
        squares = is_finite(q) ? fmadd(q - mean, q - mean, squares) : squares;
      }
      const float std = square_root(warp_sum(squares) / maximum(count, 1.0f));
      scale = count > 0.0f ? std + 1e-6f : 1.0f;
    }
    if (lane == 0) store_shared(shared.q_scale, scale);
  }
  __syncthreads();
  if (s.num_samples > 1) {
    const float scale = s.tau / load_shared(shared.q_scale);
    for (int b = warp_index(); b < a.batch; b += kWarps) {  // softmax over the draws
      const int first = b * s.num_samples;
      float highest = -3.4e38f, sum = 0.0f;
      for (int n = lane; n < s.num_samples; n += kWarpSize) {
        highest = maximum(scale * load_shared(shared.q_bar + first + n), highest);
      }
      highest = warp_maximum(highest);
      for (int n = lane; n < s.num_samples; n += kWarpSize) {
        const float e = exp_clamped(fmadd(scale, load_shared(shared.q_bar + first + n), -highest));
        store_shared(shared.draw_weights + first + n, e);
        sum += e;
      }
      sum = warp_sum(sum);
      for (int n = lane; n < s.num_samples; n += kWarpSize) {
        store_shared(shared.draw_weights + first + n, load_shared(shared.draw_weights + first + n) / sum);
      }
    }
  } else {
    for (int b = threadIdx.x; b < a.batch; b += kThreads) store_shared(shared.draw_weights + b, 1.0f);
  }
  __syncthreads();
}

// g of one action dim, before the norm match.
template <class Weight>
__device__ __forceinline__ float steering_gradient(const SampleArgs& a, const SharedMemory<Weight>& shared, int k,
                                                   int b, int c) {
  const SteeringParams& s = a.steering;
  const float scale = s.tau / load_shared(shared.q_scale);
  const float* pulled_back = a.workspace + a.estimate_vjp + c;
  if (s.estimate == Estimate::kMfm) {
    float sum = 0.0f;
    for (int n = 0; n < s.num_samples; ++n) {
      const std::int64_t row = static_cast<std::int64_t>(b) * s.num_samples + n;
      sum = fmadd(load_shared(shared.draw_weights + row), load_global(pulled_back + row * a.action_dim), sum);
    }
    return scale * sum;
  }
  float sum = critic_gradient(a, shared, k, b, c);
  if (s.estimate == Estimate::kTweedie && s.full_jacobian) {
    sum = fmadd(load_constant(a.schedule + 3 * k),
                load_global(pulled_back + static_cast<std::int64_t>(b) * a.action_dim), sum);
  }
  return scale * sum;
}

// x <- x + dt v' in every block's own copy.
template <class Weight>
__device__ __forceinline__ void update(const SampleArgs& a, const SharedMemory<Weight>& shared, int k, float weight) {
  const SteeringParams& s = a.steering;
  const int lane = lane_index();
  const float dt = load_constant(a.schedule + 3 * k + 1);
  for (int b = warp_index(); b < a.batch; b += kWarps) {
    float* x = shared.x + static_cast<std::int64_t>(b) * a.action_dim;
    float* g = shared.g + static_cast<std::int64_t>(b) * a.action_dim;
    const float* v = a.workspace + a.velocity + static_cast<std::int64_t>(b) * a.action_dim;
    SteerOutcome outcome{0.0f, false, false};
    float q_std = 0.0f;
    if (weight > 0.0f) {
      for (int c = lane; c < a.action_dim; c += kWarpSize) {
        store_shared(g + c, is_steered(a.steered, c) ? steering_gradient(a, shared, k, b, c) : 0.0f);
      }
      for (int n = 0; n < s.num_samples; ++n) {
        const int row = b * s.num_samples + n;
        q_std = fmadd(load_shared(shared.draw_weights + row), load_shared(shared.q_std + row), q_std);
      }
      outcome = steer_velocity_by_warp(
          s, weight * (a.alpha == nullptr ? s.alpha : load_constant(a.alpha + b)), a.action_dim, a.steered, q_std, dt,
          lane, [&](int c) { return load_shared(x + c); }, [&](int c) { return load_global(v + c); },
          [&](int c) { return load_shared(g + c); }, [&](int c, float value) { store_shared(x + c, value); });
    } else {
      for (int c = lane; c < a.action_dim; c += kWarpSize) {
        store_shared(x + c, fmadd(dt, load_global(v + c), load_shared(x + c)));
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

template <int ROWS, class Weight>
__device__ __forceinline__ void stage(const SampleArgs& a, const SharedMemory<Weight>& shared, const Phase& p, int k,
                                      const Tile& tile, bool yields_q) {
  const unsigned char* member = a.weights + tile.member * p.member_bytes;
  Weight* staged = shared.buffers.staged;
  switch (static_cast<Stage>(p.stage)) {
    case Stage::kRows: {
      const float* rows = (p.input < 0 ? a.workspace : a.inputs[p.input]) + p.source +
                          tile.member * p.source_member_stride + static_cast<std::int64_t>(tile.row0) * p.in_dim;
      stage_each<ROWS>(p, tile, staged, [&](int r, int c) { return load_global(rows + r * p.in_dim + c); });
      break;
    }
    case Stage::kState:
      stage_each<ROWS>(p, tile, staged,
                       [&](int r, int c) { return load_shared(shared.x + (tile.row0 + r) * a.action_dim + c); });
      break;
    case Stage::kEstimate:
      stage_each<ROWS>(p, tile, staged, [&](int r, int c) {
        const float value = estimate(a, shared, k, tile.row0 + r, c);
        return a.steering.clip == Clip::kNone ? value : clamp(value, action_low(a, c), action_high(a, c));
      });
      break;
    case Stage::kPosteriorInput:
      stage_each<ROWS>(p, tile, staged, [&](int r, int c) {
        const int row = tile.row0 + r;
        if (c < a.action_dim) return posterior_noise(a, k, row, c);
        return load_shared(shared.x + row / a.steering.num_samples * a.action_dim + c - a.action_dim);
      });
      break;
    case Stage::kCotangent:
      stage_each<ROWS>(p, tile, staged, [&](int r, int c) { return critic_gradient(a, shared, k, tile.row0 + r, c); });
      break;
    case Stage::kHidden:
      stage_hidden<ROWS>(p, tile, a.workspace, member, shared.buffers);
      break;
    default: {  // kCriticTop, kDelta
      const bool stores_q = yields_q && static_cast<Stage>(p.stage) == Stage::kCriticTop;
      float* q_values = a.workspace + a.q_values + static_cast<std::int64_t>(tile.member) * p.rows + tile.row0;
      stage_delta<ROWS>(p, tile, a.workspace, member, shared.buffers, stores_q ? q_values : nullptr);
    }
  }
}

// NEURONS neurons of the tile by one warp; lanes share the sums between them for what follows the product.
template <int NEURONS, int ROWS, class Weight>
__device__ __forceinline__ void compute_neurons(const SampleArgs& a, const SharedMemory<Weight>& shared, const Phase& p,
                                                int k, const Tile& tile, int neuron0) {
  const unsigned char* member = a.weights + tile.member * p.member_bytes;
  const Weight* weight =
      reinterpret_cast<const Weight*>(member + p.weight) + static_cast<std::int64_t>(neuron0) * p.in_stride;
  float acc[NEURONS * ROWS];
  const OwnedSums owned = multiply_rows<NEURONS, ROWS>(weight, shared.buffers.staged, p.in_stride, lane_index(), acc);
  constexpr int kPerLane = NEURONS * ROWS > kWarpSize ? NEURONS * ROWS / kWarpSize : 1;
  if (!owned.owner) return;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int r = (owned.first + i) % ROWS, n = neuron0 + (owned.first + i) / ROWS;
    if (r >= tile.valid) continue;
    const std::int64_t row = tile.row0 + r;
    float value = acc[i] + affine_or(member, p.bias, n, 0.0f);
    if (p.row_addend >= 0) {
      const std::int64_t addend_rows = p.rows / p.rows_per_addend;
      value += load_global(a.workspace + p.row_addend +
                           (tile.member * addend_rows + row / p.rows_per_addend) * p.out_dim + n);
    }
    if (p.step_addend >= 0) {
      value += load_global(a.workspace + p.step_addend + static_cast<std::int64_t>(k) * p.out_dim + n);
    }
    const std::int64_t cell = (static_cast<std::int64_t>(tile.member) * p.rows + row) * p.out_dim + n;
    if (p.activates) {
      const ValueSlope<float> activated = activate_any(p.activation, value);
      if (p.target_slope >= 0) store_global(a.workspace + p.target_slope + cell, activated.slope);
      value = activated.value;
    }
    store_global(a.workspace + p.target + cell, value);
  }
}

template <int ROWS, class Weight>
__device__ __forceinline__ void run_phase(const SampleArgs& a, const SharedMemory<Weight>& shared, const Phase& p,
                                          int k) {
  const std::int64_t total = static_cast<std::int64_t>(p.members) * p.out_dim;
  std::int64_t unit = total * blockIdx.x / gridDim.x;
  const std::int64_t last = total * (blockIdx.x + 1) / gridDim.x;
  while (unit < last) {  // one member at a time
    Tile tile{static_cast<int>(unit / p.out_dim), 0, 0};
    const int begin = static_cast<int>(unit % p.out_dim);
    const int count = static_cast<int>(last - unit < p.out_dim - begin ? last - unit : p.out_dim - begin);
    const int neuron_begin = begin + count * warp_index() / kWarps;
    const int neuron_end = begin + count * (warp_index() + 1) / kWarps;
    for (tile.row0 = 0; tile.row0 < p.rows; tile.row0 += ROWS) {
      tile.valid = p.rows - tile.row0 < ROWS ? p.rows - tile.row0 : ROWS;
      stage<ROWS>(a, shared, p, k, tile, begin == 0);
      __syncthreads();
      int n = neuron_begin;
      for (; neuron_end - n >= 4; n += 4) compute_neurons<4, ROWS>(a, shared, p, k, tile, n);
      for (; n < neuron_end; ++n) compute_neurons<1, ROWS>(a, shared, p, k, tile, n);
      __syncthreads();
    }
    unit += count;
  }
}

template <class Weight, int ROWS>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const SampleArgs a) {
  const SharedMemory<Weight> shared = shared_memory<Weight>(a, ROWS);
  std::uint32_t arrivals = 0;

  const int num_phases = a.num_once + a.num_step_phases;
  const auto* program_words = reinterpret_cast<const std::uint32_t*>(a.program);
  auto* shared_words = reinterpret_cast<std::uint32_t*>(shared.program);
  for (int i = threadIdx.x; i < num_phases * static_cast<int>(sizeof(Phase) / 4); i += kThreads) {
    store_shared(shared_words + i, load_constant(program_words + i));
  }
  if (a.num_steps > 0) {
    for (int i = threadIdx.x; i < a.batch * a.action_dim; i += kThreads) {
      store_shared(shared.x + i, load_constant(a.noise + i));
    }
  }
  __syncthreads();

  bool alive = true;
  for (int k = -1; k < a.num_steps && alive; ++k) {  // -1: the phases before the first step
    const float weight = k < 0 ? 0.0f : load_constant(a.schedule + 3 * k + 2);
    const int first = k < 0 ? 0 : a.num_once;
    const int last = k < 0 ? a.num_once : a.num_once + (weight > 0.0f ? a.num_step_phases : a.num_flow_phases);
    for (int i = first; i < last && alive; ++i) {
      const Phase& p = shared.program[i];
      run_phase<ROWS>(a, shared, p, k < 0 ? 0 : k);
      if (p.ends_with_barrier) alive = grid_barrier(a.sync, arrivals, a.spin_limit, shared.barrier_flag);
      if (p.completes_critics && alive) weigh_critics(a, shared);
    }
    if (k >= 0 && alive) update(a, shared, k, weight);
  }
  if (blockIdx.x != 0) return;
  if (!alive && a.host_failure != nullptr && threadIdx.x == 0) store_relaxed(a.host_failure, 1u);
  if (a.actions == nullptr) return;
  for (int i = threadIdx.x; i < a.batch * a.action_dim; i += kThreads) {
    const float x = alive ? load_shared(shared.x + i) : not_a_number();
    const int c = i % a.action_dim;
    store_global(a.actions + i, clamp(x, action_low(a, c), action_high(a, c)));
  }
}

struct SampleVariant {
  void (*kernel)(SampleArgs);
  int rows;
};

template <class Weight>
const SampleVariant* sample_variants() {
  static const SampleVariant variants[] = {
      {sample_kernel<Weight, 16>, 16}, {sample_kernel<Weight, 4>, 4}, {sample_kernel<Weight, 1>, 1}};
  return variants;
}

}  // namespace

// The largest tile of rows that is useful and fits; then as many blocks as can be resident, at most one an SM.
int launch_sample(const SampleArgs& args, int weight_bytes, int max_rows, const DeviceScope& device, int max_blocks,
                  cudaStream_t stream) {
  const SampleVariant* variants = weight_bytes == 2 ? sample_variants<Bf16>() : sample_variants<float>();
  int cooperative = 0, shared_limit = 0, num_sms = 0;
  QPILOTS_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device.index));
  QPILOTS_CHECK(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  QPILOTS_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device.index));
  if (!cooperative) return fail(kRefused, "this GPU has no cooperative launch, which the persistent kernel needs");
  int pick = max_rows > 4 ? 0 : (max_rows > 1 ? 1 : 2);
  while (pick < 2 && shared_layout(args, variants[pick].rows, weight_bytes).total > shared_limit) ++pick;
  const std::int64_t shared_bytes = shared_layout(args, variants[pick].rows, weight_bytes).total;
  if (shared_bytes > shared_limit) {
    return fail(kRefused, "one row of the widest layer and the state need " + std::to_string(shared_bytes) +
                              " bytes of shared memory; this GPU gives a block " + std::to_string(shared_limit));
  }
  const auto kernel = variants[pick].kernel;
  // what this call needs would be too little for a launch of another thread between its own call and its launch
  QPILOTS_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit));
  int blocks_per_sm = 0;
  QPILOTS_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kThreads, shared_bytes));
  if (blocks_per_sm < 1) return fail(kRefused, "no block of the persistent kernel fits on an SM of this GPU");
  int grid = num_sms;
  if (max_blocks > 0 && max_blocks < grid) grid = max_blocks;
  QPILOTS_CHECK(cudaMemsetAsync(args.sync, 0, sizeof(GridSync), stream));
  const LaunchConfig config{static_cast<unsigned>(grid), kThreads, static_cast<std::size_t>(shared_bytes), stream,
                            true};
  QPILOTS_CHECK(QPILOTS_LAUNCH(kernel, config, args));
  return kSuccess;
}

}  // namespace cuda
}  // namespace qpilots

// Queues one call. weight_bytes: 4 (float32) or 2 (bf16); max_rows: the most rows of any phase; max_blocks: 0 for all
// SMs.
QPILOTS_EXPORT int qpilots_cuda_sample(const qpilots::cuda::SampleArgs* args, int weight_bytes, int max_rows,
                                       int device, int max_blocks, void* stream) {
  return qpilots::cuda::on_device(device, [&](const qpilots::cuda::DeviceScope& scope) {
    return qpilots::cuda::launch_sample(*args, weight_bytes, max_rows, scope, max_blocks,
                                        static_cast<cudaStream_t>(stream));
  });
}
