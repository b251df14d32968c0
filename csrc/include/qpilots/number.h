// The operations that the shared maths is written in, for T = float (host, device or emulated device).
// A SIMD vector supplies the same names in its own namespace; templates find them by argument-dependent lookup.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QPILOTS_HD __host__ __device__ __forceinline__
#else
// static: a file compiled for AVX-512 must not lend its copy of a function to the portable path at link time
#define QPILOTS_HD static inline
#endif

namespace qpilots {

// One rounding: a * b + c. Always explicit, because -ffp-contract=off keeps every path's roundings the same.
QPILOTS_HD float fmadd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// NaN in b comes out (x86 semantics), NaN in a does not.
QPILOTS_HD float minimum(float a, float b) { return a < b ? a : b; }
QPILOTS_HD float maximum(float a, float b) { return a > b ? a : b; }
QPILOTS_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }

QPILOTS_HD std::uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

QPILOTS_HD float bits_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

QPILOTS_HD float absolute(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }

// The sign of `sign` on the magnitude of x.
QPILOTS_HD float copy_sign(float x, float sign) {
  return bits_float((float_bits(x) & 0x7fffffffu) | (float_bits(sign) & 0x80000000u));
}

// Nearest integer, ties to even, for |x| < 2^22.
QPILOTS_HD float round_even(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23
  return (x + shift) - shift;
}

// 2^n for an integral n in [-126, 127].
QPILOTS_HD float power_of_two(float n) {
  return bits_float(static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23);
}

// x 2^n for an integral n in [-126, 127].
QPILOTS_HD float scale_by_power_of_two(float x, float n) { return x * power_of_two(n); }

QPILOTS_HD float reciprocal(float x) { return 1.0f / x; }
QPILOTS_HD float rough_reciprocal(float x) { return 1.0f / x; }  // to 2^-11

QPILOTS_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

// Finite: neither infinite nor NaN.
QPILOTS_HD bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

template <class T>
QPILOTS_HD T clamp(T x, T low, T high) {  // NaN stays NaN
  return minimum(high, maximum(low, x));
}

}  // namespace qpilots
