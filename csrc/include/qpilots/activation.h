// Activations and their derivatives from plain arithmetic (no libm), one formula for scalar, SIMD and device code.
// Accurate to a few ulp of max(|value|, ulp-scale of the input); finite input never gives NaN, NaN input gives NaN.
#pragma once

#include "qpilots/number.h"
#include "qpilots/types.h"

namespace qpilots {

// e^r - 1 for |r| <= ln2 / 2: minimax polynomial, error 3e-9 + rounding.
template <class T>
QPILOTS_HD T exp_minus_one_reduced(T r) {
  T p = fmadd(T(0.001381446674f), r, T(0.008368780429f));
  p = fmadd(p, r, T(0.04166839422f));
  p = fmadd(p, r, T(0.1666652011f));
  p = fmadd(p, r, T(0.4999999341f));
  return fmadd(p, r * r, r);
}

// e^x for x in [-87.3, 88]: callers clamp. x = n ln2 + r, |r| <= ln2 / 2.
template <class T>
QPILOTS_HD T exp_bounded(T x) {
  const T n = round_even(x * T(1.44269504089f));
  T r = fmadd(n, T(-0.693359375f), x);
  r = fmadd(n, T(2.12194440e-4f), r);
  return scale_by_power_of_two(exp_minus_one_reduced(r) + T(1.0f), n);
}

// What a value is used for: kBf16 is rounded to bfloat16, or meets numbers that are, and may be off by 2^-13 of itself.
enum class Accuracy { kFloat32, kBf16 };

// 2^x for x in [-126, 126.9], where the caller's own rounding of x already costs more than the polynomial's 9e-8; for
// kBf16 7.5e-5.
template <Accuracy kAccuracy, class T>
QPILOTS_HD T exp2_bounded(T x) {
  const T n = round_even(x);
  const T f = x - n;
  if constexpr (kAccuracy == Accuracy::kBf16) {
    T p = fmadd(T(0.05517166983f), f, T(0.2426111419f));
    p = fmadd(p, f, T(0.6932609877f));
    return scale_by_power_of_two(fmadd(p, f, T(0.9999280733f)), n);
  }
  T p = fmadd(T(0.001326459053f), f, T(0.009671619019f));
  p = fmadd(p, f, T(0.05550735032f));
  p = fmadd(p, f, T(0.2402224046f));
  p = fmadd(p, f, T(0.6931469764f));
  return scale_by_power_of_two(fmadd(p, f, T(1.0f)), n);
}

// e^x for any x: 0 below -87, 1.6e38 above 88; NaN stays NaN.
template <class T>
QPILOTS_HD T exp_clamped(T x) {
  const T e = exp_bounded(clamp(x, T(-87.0f), T(88.0f)));
  return select(x < T(-87.0f), T(0.0f), e);
}

template <class T>
struct ValueSlope {
  T value;
  T slope;
};

// x s and its derivative, where s = 1 / (1 + 2^-u) is a logistic function and du its argument's derivative, times ln 2.
// 1 - s is taken as 2^-u s, which keeps its relative accuracy. x and u are clamped so that nothing overflows.
// For kBf16 plainly as 1 - s, which x times it follows to 2^-20.
template <Accuracy kAccuracy, class T>
QPILOTS_HD ValueSlope<T> logistic_gate(T x, T minus_u, T x_clamped, T du) {
  const T e = exp2_bounded<kAccuracy>(minus_u);
  if constexpr (kAccuracy == Accuracy::kBf16) {
    const T s = rough_reciprocal(T(1.0f) + e);
    const T value = x * s;
    return {value, fmadd(value * (T(1.0f) - s), du, s)};
  }
  const T s = reciprocal(T(1.0f) + e);
  return {x * s, fmadd(x_clamped * s, (e * s) * du, s)};
}

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
template <Accuracy kAccuracy, class T>
QPILOTS_HD ValueSlope<T> gelu_tanh(T x) {
  const T low = maximum(T(-10.0f), x);  // the value at -10 is -1e-37
  const T c = minimum(T(10.0f), low);
  const T c2 = c * c;
  const T minus_u = c * fmadd(c2, T(-0.1029432396f), T(-2.302208198f));
  return logistic_gate<kAccuracy>(low, minus_u, c, fmadd(c2, T(0.2140644488f), T(1.595769122f)));
}

template <Accuracy kAccuracy, class T>
QPILOTS_HD ValueSlope<T> silu(T x) {
  const T low = maximum(T(-87.0f), x);
  const T c = minimum(T(87.0f), low);
  return logistic_gate<kAccuracy>(low, c * T(-1.442695041f), c, T(1.0f));
}

// x Phi(x). Upper tail Q(|x|) = exp(-x^2/2) t P(t), t = 1 / (1 + 0.3 |x|): relative error 4e-9 + rounding on [0, 14].
template <class T>
QPILOTS_HD ValueSlope<T> gelu_erf(T x) {
  const T low = maximum(T(-13.0f), x);  // x Phi(x) at -13 is -8e-38
  const T c = minimum(T(13.0f), low);
  const T t = reciprocal(fmadd(absolute(c), T(0.3f), T(1.0f)));
  T p = fmadd(T(-0.02061283531f), t, T(0.1123758095f));
  p = fmadd(p, t, T(-0.2280675841f));
  p = fmadd(p, t, T(0.1915817842f));
  p = fmadd(p, t, T(-0.07924741065f));
  p = fmadd(p, t, T(0.0960578654f));
  p = fmadd(p, t, T(0.0784255679f));
  p = fmadd(p, t, T(0.1102273263f));
  p = fmadd(p, t, T(0.1195728409f));
  p = fmadd(p, t, T(0.1196866341f));
  const T gauss = exp_bounded(c * c * T(-0.5f));
  const T tail = gauss * (t * p);
  const T cdf = select(c < T(0.0f), tail, T(1.0f) - tail);
  return {low * cdf, fmadd(c * T(0.398942280f), gauss, cdf)};
}

// x tanh(log(1 + e^x)) = x n / (n + 2), n = e^x (e^x + 2); derivative n/(n+2) + 4 x e^x (e^x + 1) / (n + 2)^2
template <class T>
QPILOTS_HD ValueSlope<T> mish(T x) {
  const T low = maximum(T(-87.0f), x);
  const T c = minimum(T(20.0f), low);  // tanh(softplus(20)) = 1 in float32
  const T w = exp_bounded(c);
  const T n = w * (w + T(2.0f));
  const T inverse = reciprocal(n + T(2.0f));
  const T gate = n * inverse;
  return {low * gate, fmadd(T(4.0f) * c * w * inverse, (w + T(1.0f)) * inverse, gate)};
}

// |x| < 0.625: odd polynomial; else 1 - 2 e / (1 + e), e = exp(-2|x|)
template <class T>
QPILOTS_HD ValueSlope<T> hyperbolic_tangent(T x) {
  const T magnitude = absolute(x);
  const T c = minimum(T(43.5f), magnitude);  // the slope there is 7e-38: one of 1e-17 is a push where weights are 1e4
  const T e = exp_bounded(T(-2.0f) * c);
  const T ratio = e * reciprocal(T(1.0f) + e);
  const T big = copy_sign(fmadd(T(-2.0f), ratio, T(1.0f)), x);
  const T x2 = c * c;
  T p = fmadd(T(-0.00571704451f), x2, T(0.02065058678f));
  p = fmadd(p, x2, T(-0.05374349792f));
  p = fmadd(p, x2, T(0.1333149128f));
  p = fmadd(p, x2, T(-0.3333328393f));
  const T small = fmadd(p * x2, x, x);
  const T value = select(magnitude < T(0.625f), small, big);
  const T sech2 = T(4.0f) * ratio * (T(1.0f) - ratio);  // 1 - tanh^2 = 4 e / (1 + e)^2
  return {select(x == x, value, x), select(x == x, sech2, x)};
}

template <class T>
QPILOTS_HD ValueSlope<T> relu(T x) {  // derivative 0 at 0, as PyTorch; NaN stays NaN
  const T zero(0.0f), one(1.0f);
  return {select(x <= zero, zero, x), select(x <= zero, zero, select(x == x, one, x))};
}

template <class T>
QPILOTS_HD ValueSlope<T> elu(T x) {  // e^x - 1 below 0, its relative accuracy kept near 0
  const T c = minimum(T(0.0f), maximum(T(-87.0f), x));
  const T e = exp_bounded(c);
  const T negative = select(c < T(-0.34f), e - T(1.0f), exp_minus_one_reduced(c));
  return {select(T(0.0f) < x, x, negative), e};
}

template <class T>
QPILOTS_HD ValueSlope<T> selu(T x) {
  constexpr float kScale = 1.05070098736f, kScaledAlpha = 1.75809934085f;
  const ValueSlope<T> y = elu(x);
  const T positive = T(kScale) * x;
  return {select(T(0.0f) < x, positive, T(kScaledAlpha) * y.value),
          select(T(0.0f) < x, T(kScale), T(kScaledAlpha) * y.slope)};
}

// 1 / (1 + e^-x) by e^-|x|, which is at most 1.
template <class T>
QPILOTS_HD ValueSlope<T> sigmoid(T x) {
  const T e = exp_clamped(T(0.0f) - absolute(x));
  const T inverse = reciprocal(T(1.0f) + e);
  return {select(x < T(0.0f), e * inverse, select(x == x, inverse, x)), e * inverse * inverse};
}

// max(x, 0) + log(1 + w), w = e^-|x|; log(1 + w) = 2 atanh(s), s = w / (2 + w) <= 1/3, its series to 1e-9 of itself
template <class T>
QPILOTS_HD ValueSlope<T> softplus(T x) {
  const T w = exp_clamped(T(0.0f) - absolute(x));
  const T s = w * reciprocal(T(2.0f) + w);
  const T s2 = s * s;
  T p = fmadd(T(0.06666666667f), s2, T(0.07692307692f));
  p = fmadd(p, s2, T(0.09090909091f));
  p = fmadd(p, s2, T(0.1111111111f));
  p = fmadd(p, s2, T(0.1428571429f));
  p = fmadd(p, s2, T(0.2f));
  p = fmadd(p, s2, T(0.3333333333f));
  const T log1p = T(2.0f) * fmadd(p * s2, s, s);
  const T above = select(T(0.0f) < x, x, T(0.0f));
  return {select(x == x, above + log1p, x), sigmoid(x).value};
}

// sign(x) (e^|x| - 1), its relative accuracy kept near 0; e^|x| ends at e^88
template <class T>
QPILOTS_HD ValueSlope<T> symexp(T x) {
  const T magnitude = minimum(T(88.0f), absolute(x));
  const T e = exp_bounded(magnitude);
  const T grown = select(magnitude < T(0.34f), exp_minus_one_reduced(magnitude), e - T(1.0f));
  return {select(x == x, copy_sign(grown, x), x), select(x == x, e, x)};
}

// The activation known at compile time: value and derivative, of which an unused one is dropped by the compiler.
template <Activation kActivation, Accuracy kAccuracy = Accuracy::kFloat32, class T>
QPILOTS_HD ValueSlope<T> activate(T x) {
  if constexpr (kActivation == Activation::kGeluTanh)
    return gelu_tanh<kAccuracy>(x);
  else if constexpr (kActivation == Activation::kGelu)
    return gelu_erf(x);
  else if constexpr (kActivation == Activation::kRelu)
    return relu(x);
  else if constexpr (kActivation == Activation::kSilu)
    return silu<kAccuracy>(x);
  else if constexpr (kActivation == Activation::kMish)
    return mish(x);
  else if constexpr (kActivation == Activation::kTanh)
    return hyperbolic_tangent(x);
  else if constexpr (kActivation == Activation::kElu)
    return elu(x);
  else if constexpr (kActivation == Activation::kSelu)
    return selu(x);
  else if constexpr (kActivation == Activation::kSoftplus)
    return softplus(x);
  else if constexpr (kActivation == Activation::kSigmoid)
    return sigmoid(x);
  else if constexpr (kActivation == Activation::kSymexp)
    return symexp(x);
  else
    static_assert(sizeof(T) == 0, "an activation without a formula");
}

}  // namespace qpilots
