// What a network and a sampling call are, as plain data: the only description that kernels read.
//
// Each list below makes an enum, or a struct, and its description (interface.h), which Python compares with its own
// (qpilots_fast/backends/params.py) when a compiled library is loaded.
#pragma once

#include <cstdint>

namespace qpilots {

// X(enumerator, the name in Python)
#define QPILOTS_ACTIVATIONS(X) \
  X(kGeluTanh, "gelu_tanh")    \
  X(kGelu, "gelu")             \
  X(kRelu, "relu")             \
  X(kSilu, "silu")             \
  X(kMish, "mish")             \
  X(kTanh, "tanh")             \
  X(kElu, "elu")               \
  X(kSelu, "selu")             \
  X(kSoftplus, "softplus")     \
  X(kSigmoid, "sigmoid")       \
  X(kSymexp, "symexp")
#define QPILOTS_NORM_PLACEMENTS(X)  \
  X(kNone, "none")                  \
  X(kPre, "pre")   /* act(LN(z)) */ \
  X(kPost, "post") /* LN(act(z)) */
// what may stand in a chain between two Linears; qpilots_fast/row_ops.py says what each does
#define QPILOTS_ROW_OPS(X)     \
  X(kActivation, "activation") \
  X(kLeakyRelu, "leaky_relu")  \
  X(kClamp, "clamp")           \
  X(kLayerNorm, "layer_norm")  \
  X(kRmsNorm, "rms_norm")      \
  X(kSoftmax, "softmax")       \
  X(kLowest, "lowest")         \
  X(kKeep, "keep")             \
  X(kAdd, "add")               \
  X(kFilm, "film")
#define QPILOTS_AGGREGATIONS(X)  \
  X(kPessimistic, "pessimistic") \
  X(kMean, "mean")               \
  X(kMin, "min")
#define QPILOTS_SCALES(X)     \
  X(kNormMatch, "norm_match") \
  X(kAbsolute, "absolute")    \
  X(kGaf, "gaf")
#define QPILOTS_CLIPS(X)                  \
  X(kStraightThrough, "straight_through") \
  X(kMasked, "masked")                    \
  X(kNone, "none")
#define QPILOTS_ESTIMATES(X) \
  X(kNoisy, "noisy")         \
  X(kTweedie, "tweedie")     \
  X(kMfm, "mfm")             \
  X(kGlass, "glass")
#define QPILOTS_Q_SCALES(X) \
  X(kNone, "none")          \
  X(kNumber, "number")      \
  X(kBatchStd, "batch_std")

// X(enum, its list)
#define QPILOTS_ENUMS(X)                    \
  X(Activation, QPILOTS_ACTIVATIONS)        \
  X(NormPlacement, QPILOTS_NORM_PLACEMENTS) \
  X(RowOpKind, QPILOTS_ROW_OPS)             \
  X(Aggregation, QPILOTS_AGGREGATIONS)      \
  X(Scale, QPILOTS_SCALES)                  \
  X(Clip, QPILOTS_CLIPS)                    \
  X(Estimate, QPILOTS_ESTIMATES)            \
  X(QScale, QPILOTS_Q_SCALES)

template <class Enum>
inline constexpr int kCount = 0;  // of enumerators

#define QPILOTS_ENUMERATOR(enumerator, name) enumerator,
#define QPILOTS_ONE_MORE(enumerator, name) +1
#define QPILOTS_DEFINE_ENUM(Enum, LIST)                        \
  enum class Enum : std::int32_t { LIST(QPILOTS_ENUMERATOR) }; \
  template <>                                                  \
  inline constexpr int kCount<Enum> = 0 LIST(QPILOTS_ONE_MORE);
QPILOTS_ENUMS(QPILOTS_DEFINE_ENUM)

// How a step steers: X(type, field) for the fields of qpilots_fast.Steering.
#define QPILOTS_STEERING_FIELDS(X)                                                      \
  X(Estimate, estimate)                                                                 \
  X(Clip, clip)                                                                         \
  X(Aggregation, aggregation)                                                           \
  X(Scale, scale)                                                                       \
  X(QScale, q_scale_kind)                                                               \
  X(std::int32_t, full_jacobian) /* 0: the gradient at the estimate is used as it is */ \
  X(std::int32_t, num_samples)   /* N posterior draws; 1 for noisy and tweedie */       \
  X(std::int32_t, glass_steps)   /* m inner Euler steps */                              \
  X(float, alpha)                                                                       \
  X(float, rho)                                                                         \
  X(float, tau)                                                                         \
  X(float, q_scale)                                                                     \
  X(float, eps) /* of the norm match */                                                 \
  X(float, max_grad_norm)                                                               \
  X(float, gaf_beta)                                                                    \
  X(float, gaf_decay)                                                                   \
  X(float, gaf_min)                                                                     \
  X(float, max_disagreement) /* infinite: no gate */

#define QPILOTS_FIELD(type, field) type field;
struct SteeringParams {
  QPILOTS_STEERING_FIELDS(QPILOTS_FIELD)
};

}  // namespace qpilots
