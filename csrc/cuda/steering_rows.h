// The per-row maths between the products, one warp a row: the critics' weights, the draws' weights, the update.
// The formulas are those of qpilots/steering.h, whose row functions are serial; here the lanes share a row.
#pragma once

#include "qpilots/steering.h"
#include "warp.h"

namespace qpilots {
namespace cuda {

__device__ __forceinline__ float not_a_number() { return bits_float(0x7fc00000u); }

struct MemberStatistics {
  float value;  // aggregated Q
  float std;    // population std over the members
  float mean;   // relative to the first member
  float first;
  float ties;   // members at the minimum
  bool finite;  // every Q is
};

// Aggregated Q of a row; load(j) is Q_j.
template <class Load>
__device__ __forceinline__ MemberStatistics member_statistics(const SteeringParams& s, int members, int lane,
                                                              Load load) {
  MemberStatistics out{};
  out.first = load(0);
  const float count = static_cast<float>(members);
  float sum = 0.0f, lowest = out.first;
  bool finite = true;
  for (int j = lane; j < members; j += kWarpSize) {
    const float q = load(j);
    sum += q - out.first;
    lowest = minimum(q, lowest);
    finite = finite && is_finite(q);
  }
  out.finite = __any_sync(kAllLanes, !finite) == 0;
  out.mean = warp_sum(sum) / count;
  lowest = warp_minimum(lowest);
  float squares = 0.0f, ties = 0.0f;
  for (int j = lane; j < members; j += kWarpSize) {
    const float q = load(j);
    const float centred = (q - out.first) - out.mean;
    squares = fmadd(centred, centred, squares);
    ties += q == lowest ? 1.0f : 0.0f;
  }
  out.std = square_root(warp_sum(squares) / count);
  out.ties = warp_sum(ties);
  if (s.aggregation == Aggregation::kMin) {
    out.value = lowest;
  } else {
    const float mean = out.first + out.mean;
    out.value = s.aggregation == Aggregation::kMean ? mean : fmadd(-s.rho, out.std, mean);
  }
  return out;
}

// w_j = d Qbar / d Q_j; NaN in a row with a critic that is not finite, whose gradient means nothing.
__device__ __forceinline__ float member_weight(const SteeringParams& s, const MemberStatistics& row, int members,
                                               float q) {
  if (!row.finite) return not_a_number();
  const float inverse = 1.0f / static_cast<float>(members);
  if (s.aggregation == Aggregation::kMean) return inverse;
  if (s.aggregation == Aggregation::kMin) return q == row.value ? 1.0f / row.ties : 0.0f;
  const float slope = row.std == 0.0f ? 0.0f : s.rho * inverse / row.std;
  return fmadd(-slope, (q - row.first) - row.mean, inverse);
}

__device__ __forceinline__ bool is_steered(const unsigned char* steered, int c) {
  return steered == nullptr || load_constant(steered + c) != 0;
}

// ||x|| over the steered dims, scaled by the largest element; not finite where an element is not.
template <class Load>
__device__ __forceinline__ float row_norm(int count, const unsigned char* steered, int lane, Load load) {
  float largest = 0.0f;
  bool finite = true;
  for (int c = lane; c < count; c += kWarpSize) {
    if (!is_steered(steered, c)) continue;
    const float a = absolute(load(c));
    finite = finite && is_finite(a);
    largest = maximum(a, largest);
  }
  if (__any_sync(kAllLanes, !finite)) return not_a_number();
  largest = warp_maximum(largest);
  if (largest == 0.0f) return 0.0f;
  const float peak = maximum(largest, 1e-37f);  // 1 / (a denormal) would overflow
  const float inverse = 1.0f / peak;
  float sum = 0.0f;
  for (int c = lane; c < count; c += kWarpSize) {
    if (!is_steered(steered, c)) continue;
    const float a = load(c) * inverse;
    sum = fmadd(a, a, sum);
  }
  return peak * square_root(warp_sum(sum));
}

// One Euler step of a row, x += dt (v + coefficient g), by one warp: store(c, x + dt v').
template <class LoadX, class LoadV, class LoadG, class Store>
__device__ __forceinline__ SteerOutcome steer_velocity_by_warp(const SteeringParams& s, float strength, int count,
                                                               const unsigned char* steered, float q_std, float dt,
                                                               int lane, LoadX x, LoadV v, LoadG g, Store store) {
  const float g_norm = row_norm(count, steered, lane, g);
  const float v_norm = row_norm(count, steered, lane, v);
  const auto [coefficient, outcome] = decide_steering(s, strength, v_norm, g_norm, q_std);
  const bool steers = !outcome.nonfinite && !outcome.gated;
  for (int c = lane; c < count; c += kWarpSize) {
    float drift = v(c);
    if (steers && is_steered(steered, c)) drift = fmadd(coefficient, g(c), drift);
    store(c, fmadd(dt, drift, x(c)));
  }
  return outcome;
}

}  // namespace cuda
}  // namespace qpilots
