// The per-row maths of a step, over ranges of rows.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "qpilots/number.h"
#include "qpilots/steering.h"
#include "qpilots/types.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// g = sum_j w_j dQ_j (in the order of j), with Qbar and std. A row where some critic has no finite value gets NaN: its
// gradient means nothing, and the update then follows the plain velocity.
static void combine_rows(const CombineArgs& args) {
  const SteeringParams& s = *args.steering;
  const bool masked = s.clip == Clip::kMasked && s.full_jacobian;
  for (int i = args.begin; i < args.end; ++i) {
    const EnsembleValue row =
        aggregate(args.q + i, static_cast<int>(args.q_stride), args.members, s.aggregation, s.rho, args.weights, 1);
    bool finite = true;
    for (int j = 0; j < args.members; ++j) finite = finite && is_finite(args.q[j * args.q_stride + i]);
    args.value[i] = row.value;
    args.std[i] = row.std;
    float* g = args.g + static_cast<std::ptrdiff_t>(i) * args.padded_width;
    const Vec unusable(finite ? 0.0f : bits_float(0x7fc00000u));
    for (int c = 0; c < args.padded_width; c += Vec::kLanes) {
      Vec total = unusable;
      for (int j = 0; j < args.members; ++j) {
        const float* dq = args.dq + (j * args.q_stride + i) * args.padded_width;
        total = fmadd(Vec(args.weights[j]), Vec::load(dq + c), total);
      }
      if (masked) {
        const Vec a = Vec::load(args.a + static_cast<std::ptrdiff_t>(i) * args.padded_width + c);
        const Vec low = Vec::load(args.low + c), high = Vec::load(args.high + c);
        total = select(a < low, Vec(0.0f), select(high < a, Vec(0.0f), total));
      }
      total.store(g + c);
    }
  }
}

static void softmax_row(const float* q, int count, float scale, float* p) {
  posterior_softmax(q, 1, count, scale, p, 1);
}

static void steer_velocity_rows(const SteerArgs& args) {
  for (int i = args.begin; i < args.end; ++i) {
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(i) * args.padded_width;
    const float strength = args.weight * (args.alpha == nullptr ? args.steering->alpha : args.alpha[i]);
    const float q_std = args.std[i * args.std_stride];
    const SteerOutcome outcome = steer_velocity_row(*args.steering, strength, args.x + row, args.v + row, args.g + row,
                                                    args.width, args.mask, q_std, args.dt);
    if (args.norms == nullptr) continue;
    args.norms[i] = outcome.g_norm;
    args.nonfinite[i] = outcome.nonfinite;
    args.q_std[i] = outcome.nonfinite ? 0.0f : q_std;
    args.gated[i] = outcome.gated;
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
