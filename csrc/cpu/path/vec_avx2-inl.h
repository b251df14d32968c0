// 8 floats in a ymm register (AVX2 + FMA), with the names of qpilots/number.h.
#pragma once

#include <immintrin.h>

#include "tuning.h"

#define QPILOTS_GENERIC_SUMS

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

struct Mask {
  __m256 m;
};

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 value) : v(value) {}
  Vec(float value) : v(_mm256_set1_ps(value)) {}
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};

static inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
static inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
static inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
static inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
static inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
static inline Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
static inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
static inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
static inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
static inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m.m); }
static inline Vec absolute(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v); }
static inline Vec copy_sign(Vec x, Vec sign) {
  const __m256 s = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(s, x.v), _mm256_and_ps(s, sign.v));
}
static inline Vec round_even(Vec x) { return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23));
}

static inline Vec scale_by_power_of_two(Vec x, Vec n) { return x * power_of_two(n); }
static inline Vec reciprocal(Vec x) { return Vec(1.0f) / x; }
static inline Vec rough_reciprocal(Vec x) { return reciprocal(x); }
static inline float sum(Vec x) {  // (l, l + 4), (l, l + 2), (l, l + 1)
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

using Pairs = __m256i;
static inline Pairs load_pairs(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline Vec even_of(Pairs p) { return _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)); }
static inline Vec odd_of(Pairs p) {
  return _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
static inline __m256i bf16_bits_of(Vec x) {  // in the upper half of each lane; nearest even, NaN kept quiet
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
}
static inline Vec round_to_bf16(Vec x) {
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits_of(x), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
static inline void store_pairs(Vec even, Vec odd, void* p) {
  const __m256i high = _mm256_and_si256(bf16_bits_of(odd), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_or_si256(_mm256_srli_epi32(bf16_bits_of(even), 16), high));
}

static inline void transpose(Vec (&rows)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
  }
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    rows[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

using Tuning = tuning::Avx2;

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
