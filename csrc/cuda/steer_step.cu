// The row-wise pieces that drop into anyone's loop, for any batch: one warp a row.
//   clean_actions: a = x + (1 - t) v, clipped.
//   steer_step: v' = v + scale(v, g) g over the steered dims, x + dt v'; a row with a non-finite g takes the plain
//   step.
#include "host.h"
#include "phase.h"
#include "steering_rows.h"

namespace qpilots {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) clean_actions_kernel(const SteerStepArgs a) {
  const std::int64_t count = a.rows * a.action_dim;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const float value = fmadd(a.dt, load_constant(a.v + i), load_global(a.x + i));
    const bool clips = a.steering.clip != Clip::kNone;
    store_global(a.result + i, clips ? clamp(value, a.steering.action_low, a.steering.action_high) : value);
  }
}

__global__ void __launch_bounds__(kThreads) steer_step_kernel(const SteerStepArgs a) {
  const int lane = lane_index();
  for (std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_index(); b < a.rows;
       b += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t first = b * a.action_dim;
    const float q_std = a.q_std == nullptr ? 0.0f : load_constant(a.q_std + b);
    const SteerOutcome outcome = steer_velocity_by_warp(
        a.steering, a.steering.alpha, a.action_dim, a.steered, q_std, a.dt, lane,
        [&](int c) { return load_global(a.x + first + c); }, [&](int c) { return load_constant(a.v + first + c); },
        [&](int c) { return load_constant(a.g + first + c); },
        [&](int c, float value) { store_global(a.result + first + c, value); });
    if (lane == 0 && a.gradient_norms != nullptr) store_global(a.gradient_norms + b, outcome.g_norm);
    if (lane == 0 && a.nonfinite != nullptr) {
      store_global(a.nonfinite + b, static_cast<unsigned char>(outcome.nonfinite));
    }
  }
}

unsigned blocks_for(std::int64_t items, int per_block) {
  const std::int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
}

int launch_clean_actions(const SteerStepArgs& args, cudaStream_t stream) {
  const LaunchConfig config{blocks_for(args.rows * args.action_dim, kThreads), kThreads, 0, stream, false};
  QPILOTS_CHECK(QPILOTS_LAUNCH(clean_actions_kernel, config, args));
  return kSuccess;
}

int launch_steer_step(const SteerStepArgs& args, cudaStream_t stream) {
  const LaunchConfig config{blocks_for(args.rows, kWarps), kThreads, 0, stream, false};
  QPILOTS_CHECK(QPILOTS_LAUNCH(steer_step_kernel, config, args));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

// result = x + (1 - t) v, clipped unless the clip is none; dt is 1 - t.
QPILOTS_EXPORT int qpilots_cuda_clean_actions(const qpilots::cuda::SteerStepArgs* args, int device, void* stream) {
  using namespace qpilots::cuda;
  return on_device(device,
                   [&](const DeviceScope&) { return launch_clean_actions(*args, static_cast<cudaStream_t>(stream)); });
}

QPILOTS_EXPORT int qpilots_cuda_steer_step(const qpilots::cuda::SteerStepArgs* args, int device, void* stream) {
  using namespace qpilots::cuda;
  return on_device(device,
                   [&](const DeviceScope&) { return launch_steer_step(*args, static_cast<cudaStream_t>(stream)); });
}
