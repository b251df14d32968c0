// The row-wise pieces that drop into anyone's loop, for any batch: one warp a row.
//   clean_actions: a = x + (1 - t) v.
//   steer_step: v' = v + scale(v, g) g over the steered dims, x + dt v'; a row with a non-finite g takes the plain
//   step.
#include "host.h"
#include "phase.h"
#include "steering_rows.h"

namespace qpilots {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) clean_actions_kernel(const SteerStepArgs a) {
  for (std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_index(); b < a.rows;
       b += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    for (int c = lane_index(); c < a.action_dim; c += kWarpSize) {
      const std::int64_t i = b * a.action_dim + c;
      const float t = load_constant(a.times + b * a.time_row_stride + c * a.time_column_stride);
      store_global(a.result + i, fmadd(1.0f - t, load_constant(a.v + i), load_global(a.x + i)));
    }
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

int launch_rows(void (*kernel)(SteerStepArgs), const SteerStepArgs& args, cudaStream_t stream) {
  const std::int64_t blocks = (args.rows + kWarps - 1) / kWarps;
  const LaunchConfig config{static_cast<unsigned>(blocks < 65535 ? blocks : 65535), kThreads, 0, stream, false};
  QPILOTS_CHECK(QPILOTS_LAUNCH(kernel, config, args));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

// result = x + (1 - t) v.
QPILOTS_EXPORT int qpilots_cuda_clean_actions(const qpilots::cuda::SteerStepArgs* args, int device, void* stream) {
  using namespace qpilots::cuda;
  return on_device(device, [&](const DeviceScope&) {
    return launch_rows(clean_actions_kernel, *args, static_cast<cudaStream_t>(stream));
  });
}

QPILOTS_EXPORT int qpilots_cuda_steer_step(const qpilots::cuda::SteerStepArgs* args, int device, void* stream) {
  using namespace qpilots::cuda;
  return on_device(device, [&](const DeviceScope&) {
    return launch_rows(steer_step_kernel, *args, static_cast<cudaStream_t>(stream));
  });
}
