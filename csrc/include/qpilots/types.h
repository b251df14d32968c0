// What a network and a sampling call are, as plain data: the only description that kernels read.
#pragma once

#include <cstdint>

namespace qpilots {

enum class Activation : std::int32_t { kGeluTanh, kGelu, kRelu, kSilu, kMish, kTanh };
enum class NormPlacement : std::int32_t { kNone, kPre, kPost };  // pre: act(LN(z)); post: LN(act(z))
enum class Aggregation : std::int32_t { kPessimistic, kMean, kMin };
enum class Scale : std::int32_t { kNormMatch, kAbsolute, kGaf };
enum class Clip : std::int32_t { kStraightThrough, kMasked, kNone };
enum class Estimate : std::int32_t { kNoisy, kTweedie, kMfm, kGlass };
enum class QScale : std::int32_t { kNone, kNumber, kBatchStd };

// How a step steers; the fields of qpilots_fast.Steering.
struct SteeringParams {
  Estimate estimate;
  Clip clip;
  Aggregation aggregation;
  Scale scale;
  QScale q_scale_kind;
  std::int32_t full_jacobian;  // 0: the gradient at the estimate is used as it is
  std::int32_t steer_first_step;
  std::int32_t num_samples;  // N posterior draws; 1 for noisy and tweedie
  std::int32_t glass_steps;  // m inner Euler steps
  float alpha;
  float rho;
  float tau;
  float q_scale;
  float eps;
  float max_grad_norm;
  float gaf_beta;
  float gaf_decay;
  float gaf_min;
  float action_low;
  float action_high;
};

}  // namespace qpilots
