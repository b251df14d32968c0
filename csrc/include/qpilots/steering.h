// The steering maths of one row: ensemble aggregation, posterior weights, stable norms, the velocity update.
// Vectors are read with a stride so that any layout serves; all are short (E, N or A elements).
#pragma once

#include "qpilots/activation.h"
#include "qpilots/number.h"
#include "qpilots/types.h"

namespace qpilots {

struct EnsembleValue {
  float value;  // aggregated Q
  float std;    // population std over the members
};

// Mean and population std over the members. Deviations are taken from q[0], so that equal members give exactly 0.
QPILOTS_HD EnsembleValue mean_and_std(const float* q, int stride, int count) {
  const float first = q[0];
  float sum = 0.0f;
  for (int j = 1; j < count; ++j) sum += q[j * stride] - first;
  const float mean = sum / static_cast<float>(count);
  float squares = 0.0f;
  for (int j = 0; j < count; ++j) {
    const float d = (q[j * stride] - first) - mean;
    squares = fmadd(d, d, squares);
  }
  return {first + mean, square_root(squares / static_cast<float>(count))};
}

// Aggregated Q over E members and its derivatives w_j = dQ / dQ_j  (weights may be null).
//   pessimistic  mean - rho std,  w_j = 1/E - rho (Q_j - mean) / (E std);  std == 0: 1/E
//   mean         w_j = 1/E        min   w_j = 1 / (number of tied minima) on the minima, else 0
// A NaN member makes the value NaN, and the weights too unless they are the constant 1/E of the mean.
QPILOTS_HD EnsembleValue aggregate(const float* q, int stride, int count, Aggregation aggregation, float rho,
                                   float* weights, int weight_stride) {
  EnsembleValue result = mean_and_std(q, stride, count);
  const float inverse = 1.0f / static_cast<float>(count);
  if (aggregation == Aggregation::kMin) {
    float lowest = q[0];
    for (int j = 1; j < count; ++j) {
      const float qj = q[j * stride];
      lowest = (qj < lowest || !(qj == qj)) ? qj : lowest;
    }
    int ties = 0;
    for (int j = 0; j < count; ++j) ties += q[j * stride] == lowest;
    result.value = lowest;
    if (weights != nullptr) {
      for (int j = 0; j < count; ++j) {
        const float tied = 1.0f / static_cast<float>(ties > 0 ? ties : 1);
        weights[j * weight_stride] = lowest == lowest ? (q[j * stride] == lowest ? tied : 0.0f) : lowest;
      }
    }
    return result;
  }
  if (aggregation == Aggregation::kPessimistic) {
    const float slope = result.std == 0.0f ? 0.0f : rho * inverse / result.std;
    if (weights != nullptr) {
      const float shift = result.value - q[0];
      for (int j = 0; j < count; ++j) {
        weights[j * weight_stride] = fmadd(-slope, (q[j * stride] - q[0]) - shift, inverse);
      }
    }
    result.value = fmadd(-rho, result.std, result.value);
    return result;
  }
  if (weights != nullptr) {
    for (int j = 0; j < count; ++j) weights[j * weight_stride] = inverse;
  }
  return result;
}

// p_n = softmax_n(scale * q_n). NaN in any q makes every p NaN. In place is allowed.
QPILOTS_HD void posterior_softmax(const float* q, int stride, int count, float scale, float* p, int p_stride) {
  float highest = scale * q[0];
  for (int n = 1; n < count; ++n) highest = maximum(highest, scale * q[n * stride]);
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) {
    p[n * p_stride] = exp_clamped(fmadd(scale, q[n * stride], -highest));
    sum += p[n * p_stride];
  }
  const float inverse = 1.0f / sum;
  for (int n = 0; n < count; ++n) p[n * p_stride] *= inverse;
}

// ||x|| over the steered dims (mask may be null: all), scaled by the largest element so that no square overflows or
// underflows. Not finite where any element is not.
QPILOTS_HD float stable_norm(const float* x, int count, const unsigned char* mask) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (mask != nullptr && !mask[i]) continue;
    const float a = absolute(x[i]);
    if (!is_finite(a)) return a;
    largest = maximum(largest, a);
  }
  if (largest == 0.0f) return 0.0f;
  const float inverse = 1.0f / maximum(largest, 1e-37f);  // 1 / (a denormal) would overflow
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (mask != nullptr && !mask[i]) continue;
    const float a = x[i] * inverse;
    sum = fmadd(a, a, sum);
  }
  return maximum(largest, 1e-37f) * square_root(sum);
}

// c of v' = v + c g.  norm match: strength ||v|| / (||g|| + eps); absolute: strength;
// GAF: strength m min(1, max_grad_norm / ||g||) / beta with m = max(gaf_min, exp(-gaf_decay std_Q)).
QPILOTS_HD float steering_coefficient(const SteeringParams& s, float strength, float v_norm, float g_norm,
                                      float q_std) {
  if (s.scale == Scale::kNormMatch) return strength * v_norm / (g_norm + s.eps);
  if (s.scale == Scale::kAbsolute) return strength;
  const float m = maximum(s.gaf_min, exp_clamped(-s.gaf_decay * q_std));
  const float clip = g_norm > s.max_grad_norm ? s.max_grad_norm / g_norm : 1.0f;
  return strength * m * clip / s.gaf_beta;
}

struct SteerOutcome {
  float g_norm;    // 0 where nonfinite
  bool nonfinite;  // no usable gradient: the row follows the unsteered velocity
  bool gated;      // the critics disagree too much: likewise
};

// The coefficient of g and the outcome of a row whose norms are known.
struct SteerDecision {
  float coefficient;  // 0 where the row is not steered
  SteerOutcome outcome;
};

QPILOTS_HD SteerDecision decide_steering(const SteeringParams& s, float strength, float v_norm, float g_norm,
                                         float q_std) {
  const float c = is_finite(g_norm) ? steering_coefficient(s, strength, v_norm, g_norm, q_std) : 0.0f;
  const bool bad = !is_finite(g_norm) || !is_finite(c);
  const bool gated = !bad && q_std > s.max_disagreement;
  return {bad || gated ? 0.0f : c, {bad ? 0.0f : g_norm, bad, gated}};
}

// x += dt (v + c g), c of this strength, over one row of `count` dims; g counts only on the steered dims (mask, null:
// all). A row with any non-finite g, norm or coefficient, or behind the gate, takes the plain Euler step.
QPILOTS_HD SteerOutcome steer_velocity_row(const SteeringParams& s, float strength, float* x, const float* v,
                                           const float* g, int count, const unsigned char* mask, float q_std,
                                           float dt) {
  const float g_norm = stable_norm(g, count, mask);
  const float v_norm = is_finite(g_norm) ? stable_norm(v, count, mask) : 0.0f;
  const auto [c, outcome] = decide_steering(s, strength, v_norm, g_norm, q_std);
  const bool steers = !outcome.nonfinite && !outcome.gated;
  for (int i = 0; i < count; ++i) {
    float drift = v[i];
    if (steers && (mask == nullptr || mask[i])) drift = fmadd(c, g[i], drift);
    x[i] = fmadd(dt, drift, x[i]);
  }
  return outcome;
}

}  // namespace qpilots
