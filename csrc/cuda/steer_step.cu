// The row-wise pieces that drop into anyone's loop, for any batch: one warp a row.
//   clean_actions: a = x + (1 - t) v, clipped.
//   steer_step: v' = v + scale(v, g) g over the steered dims, x + dt v'; a row with a non-finite g takes the plain step.
#include "host.h"
#include "phase.h"
#include "steering_rows.h"

namespace qpilots {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) steer_step_kernel(const SteerStepArgs a) {
  const int lane = lane_index();
  for (std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_index(); b < a.rows;
       b += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t first = b * a.action_dim;
    if (a.g == nullptr) {  // the clean-action estimate
      for (int c = lane; c < a.action_dim; c += kWarpSize) {
        const float value = fmadd(a.dt, load_constant(a.v + first + c), load_global(a.x + first + c));
        store_global(a.result + first + c,
                     a.steering.clip == Clip::kNone ? value
                                                    : clamp(value, a.steering.action_low, a.steering.action_high));
      }
      continue;
    }
    const float q_std = a.q_std == nullptr ? 0.0f : load_constant(a.q_std + b);
    const SteerOutcome outcome = steer_row_by_warp(
        a.steering, a.action_dim, a.steered, q_std, a.dt, lane, [&](int c) { return load_global(a.x + first + c); },
        [&](int c) { return load_constant(a.v + first + c); }, [&](int c) { return load_constant(a.g + first + c); },
        [&](int c, float value) { store_global(a.result + first + c, value); });
    if (lane == 0 && a.gradient_norms != nullptr) store_global(a.gradient_norms + b, outcome.g_norm);
    if (lane == 0 && a.nonfinite != nullptr) {
      store_global(a.nonfinite + b, static_cast<unsigned char>(outcome.nonfinite));
    }
  }
}

int launch_steer_step(const SteerStepArgs& args, cudaStream_t stream) {
  const std::int64_t blocks = (args.rows + kWarps - 1) / kWarps;
  const LaunchConfig config{static_cast<unsigned>(blocks < 65535 ? blocks : 65535), kThreads, 0, stream, false};
  QPILOTS_CHECK(QPILOTS_LAUNCH(steer_step_kernel, config, args));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

// g null: result = clip(x + dt v), with dt = 1 - t; else the steered Euler step.
QPILOTS_EXPORT int qpilots_cuda_steer_step(const qpilots::cuda::SteerStepArgs* args, int device, void* stream) {
  using namespace qpilots::cuda;
  return on_device(device, [&](const DeviceScope&) {
    return launch_steer_step(*args, static_cast<cudaStream_t>(stream));
  });
}
