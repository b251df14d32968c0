// 16 floats in a zmm register, with the names of qpilots/number.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "path/unroll-inl.h"
#include "tuning.h"

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

struct Mask {
  __mmask16 m;
};

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 value) : v(value) {}
  Vec(float value) : v(_mm512_set1_ps(value)) {}
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};

static inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
static inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
static inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
static inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
static inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask operator<=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
static inline Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
static inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
static inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
static inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
static inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m.m, no.v, yes.v); }
static inline Vec absolute(Vec x) { return _mm512_abs_ps(x.v); }
static inline Vec copy_sign(Vec x, Vec sign) {  // (x & ~s) | (sign & s)
  const __m512i s = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(s, _mm512_castps_si512(sign.v), _mm512_castps_si512(x.v), 0xCA));
}
static inline Vec round_even(Vec x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec scale_by_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x.v, n.v); }
static inline Vec rough_reciprocal(Vec x) { return _mm512_rcp14_ps(x.v); }
static inline Vec reciprocal(Vec x) {  // one Newton step: half the time of the division
  const __m512 r = _mm512_rcp14_ps(x.v);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(1.0f)), r);
}

// Lane sums always as the tree (l, l + 8), (l, l + 4), (l, l + 2), (l, l + 1): the same value wherever it is taken.
QPILOTS_INLINE __m512 fold_quarters(__m512 a, __m512 b, __m512 c, __m512 d) {  // quarter i: 4 partial sums of input i
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}

// Lane 4 i + j of the result: the sum of acc[4 j + i].
QPILOTS_INLINE __m512 sum_16(const Vec* acc) {
  const __m512 t0 = fold_quarters(acc[0].v, acc[1].v, acc[2].v, acc[3].v);
  const __m512 t1 = fold_quarters(acc[4].v, acc[5].v, acc[6].v, acc[7].v);
  const __m512 t2 = fold_quarters(acc[8].v, acc[9].v, acc[10].v, acc[11].v);
  const __m512 t3 = fold_quarters(acc[12].v, acc[13].v, acc[14].v, acc[15].v);
  const __m512 u01 = _mm512_add_ps(_mm512_shuffle_ps(t0, t1, 0x44), _mm512_shuffle_ps(t0, t1, 0xEE));
  const __m512 u23 = _mm512_add_ps(_mm512_shuffle_ps(t2, t3, 0x44), _mm512_shuffle_ps(t2, t3, 0xEE));
  return _mm512_add_ps(_mm512_shuffle_ps(u01, u23, 0x88), _mm512_shuffle_ps(u01, u23, 0xDD));
}

// Lane 2 i + j of the lower half: the sum of acc[4 j + i]; the same tree.
QPILOTS_INLINE __m256 sum_8(const Vec* acc) {
  const __m512 t0 = fold_quarters(acc[0].v, acc[1].v, acc[2].v, acc[3].v);
  const __m512 t1 = fold_quarters(acc[4].v, acc[5].v, acc[6].v, acc[7].v);
  const __m512 u = _mm512_add_ps(_mm512_shuffle_ps(t0, t1, 0x44), _mm512_shuffle_ps(t0, t1, 0xEE));
  const __m512 s = _mm512_add_ps(u, _mm512_shuffle_ps(u, u, 0xB1));  // per quarter: i, i, i + 4, i + 4
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(even, s));
}

static inline float sum(Vec x) {
  const __m512 q = fold_quarters(x.v, x.v, x.v, x.v);
  const __m512 u = _mm512_add_ps(q, _mm512_shuffle_ps(q, q, 0x4E));
  return _mm512_cvtss_f32(_mm512_add_ps(u, _mm512_shuffle_ps(u, u, 0xB1)));
}

using Pairs = __m512i;  // 16 pairs of bfloat16
static inline Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
static inline Vec even_of(Pairs p) { return _mm512_castsi512_ps(_mm512_slli_epi32(p, 16)); }
static inline Vec odd_of(Pairs p) {
  return _mm512_castsi512_ps(_mm512_and_si512(p, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Nearest even, NaN kept quiet; the bits stay in the upper half of each lane.
static inline __m512i bf16_bits_of(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
static inline Vec round_to_bf16(Vec x) {
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits_of(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
#if defined(__AVX512BF16__)
static inline __m256i to_bf16_lanes(Vec x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)); }
#else
static inline __m256i to_bf16_lanes(Vec x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits_of(x), 16)); }
#endif
static inline void store_bf16(Vec x, std::uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_lanes(x));
}
#if defined(__AVX512BF16__)
static inline void store_bf16_pair(Vec x, Vec next, void* p) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(next.v, x.v)));
}
#endif
static inline Vec load_bf16(const std::uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
static inline void store_pairs(Vec even, Vec odd, void* p) {  // pairs (even, odd) as bfloat16
#if defined(__AVX512BF16__)
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));  // even below, odd above
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
#else
  const __m512i high = _mm512_and_si512(bf16_bits_of(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(bf16_bits_of(even), 16), high));
#endif
}

// rows[i] lane j -> rows[j] lane i
static inline void transpose(Vec (&rows)[16]) {
  __m512 t[16], u[16];
  unroll<8>([&](auto i) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  });
  unroll<8>([&](auto h) {
    constexpr int i = h.value / 2 * 4, j = h.value % 2;
    u[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
    u[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
  });
  unroll<4>([&](auto j) {  // u[4 b + j]: column 4 q + j of rows 4 b .. 4 b + 3 in quarter q
    const __m512 low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88),
                 low2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xDD),
                 high2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xDD);
    rows[j].v = _mm512_shuffle_f32x4(low, low2, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(low, low2, 0xDD);
    rows[4 + j].v = _mm512_shuffle_f32x4(high, high2, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(high, high2, 0xDD);
  });
}

#if defined(__AVX512BF16__)
using Tuning = tuning::Avx512Bf16;
#else
using Tuning = tuning::Avx512;
#endif

// dx[r][k] = lane sum of acc[r][k]
template <int R, int K>
static inline void store_sums(const Vec (&acc)[R][K], float* dx, std::ptrdiff_t stride) {
  if constexpr (K == 16) {
    Vec order[16];
    unroll<16>([&](auto l) { order[4 * (l % 4) + l / 4] = acc[0][l]; });
    _mm512_storeu_ps(dx, sum_16(order));
  } else if constexpr (K == 8) {
    unroll<(R + 1) / 2>([&](auto half) {
      constexpr int r = 2 * half.value, other = r + 1 < R ? r + 1 : r;
      Vec order[16];
      unroll<16>([&](auto l) { order[4 * (l % 4) + l / 4] = acc[l < 8 ? r : other][l % 8]; });
      const __m512 s = sum_16(order);
      _mm256_storeu_ps(dx + r * stride, _mm512_castps512_ps256(s));
      if (r + 1 < R) _mm256_storeu_ps(dx + (r + 1) * stride, _mm512_extractf32x8_ps(s, 1));
    });
  } else {
    static_assert(K == 4);
    unroll<(R + 3) / 4>([&](auto quarter) {
      constexpr int r = 4 * quarter.value;
      if constexpr (R - r <= 2) {
        Vec order[8];
        unroll<8>([&](auto l) { order[4 * (l % 2) + l / 2] = acc[r + l / 4 < R ? r + l / 4 : r][l % 4]; });
        const __m256 s = sum_8(order);
        _mm_storeu_ps(dx + r * stride, _mm256_castps256_ps128(s));
        if (r + 1 < R) _mm_storeu_ps(dx + (r + 1) * stride, _mm256_extractf128_ps(s, 1));
        return;
      }
      Vec order[16];
      unroll<16>([&](auto l) { order[4 * (l % 4) + l / 4] = acc[r + l / 4 < R ? r + l / 4 : R - 1][l % 4]; });
      const __m512 s = sum_16(order);
      _mm_storeu_ps(dx + r * stride, _mm512_castps512_ps128(s));
      if (r + 1 < R) _mm_storeu_ps(dx + (r + 1) * stride, _mm512_extractf32x4_ps(s, 1));
      if (r + 2 < R) _mm_storeu_ps(dx + (r + 2) * stride, _mm512_extractf32x4_ps(s, 2));
      if (r + 3 < R) _mm_storeu_ps(dx + (r + 3) * stride, _mm512_extractf32x4_ps(s, 3));
    });
  }
}

struct WordIndex {
  alignas(64) short word[32];
};
template <class Source>
constexpr WordIndex word_index(Source source) {
  WordIndex index{};
  for (int i = 0; i < 32; ++i) index.word[i] = static_cast<short>(source(i));
  return index;
}

#if defined(__AVX512BF16__)
static inline Vec dot_pairs(Vec acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Packed weights: 16 outputs of two columns a vector, in pairs along the columns. The lower (upper) 8 outputs of two
// vectors, merged by loads, since shuffles compete with the products for a port on Zen 5 and merging loads do not; or
// (kOnce) with every line loaded in one piece, where the lines come from far.
template <bool kOnce>
static inline Pairs lower_halves(const char* first, const char* second) {
  if (kOnce) return _mm512_shuffle_i64x2(load_pairs(first), load_pairs(second), 0x44);
  return _mm512_mask_loadu_epi64(load_pairs(first), 0xF0, second - 32);
}
template <bool kOnce>
static inline Pairs upper_halves(const char* first, const char* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + 32));
  const __m512i wide = _mm512_castsi256_si512(low);
  return kOnce ? _mm512_mask_blend_epi64(0xF0, wide, load_pairs(second)) : _mm512_mask_loadu_epi64(wide, 0xF0, second);
}

// The word of a column (of 8) and an output (of 4): among 8 outputs from kFrom on, or among these 4 alone.
template <int kFrom>
static constexpr WordIndex kQuadOfEight =
    word_index([](int i) { return i / 8 * 16 + (kFrom + i % 4) * 2 + i / 4 % 2; });
static constexpr WordIndex kQuadOfFour = word_index([](int i) { return i / 8 * 8 + i % 4 * 2 + i / 4 % 2; });

enum class Shuffle { kTwoSources, kOneSource };

// Of two such halves, together 8 columns by 8 outputs: the first or the second 4 outputs, 64 bits a column.
template <int kSecond, Shuffle kShuffle>
static inline Pairs quad_of(Pairs first, Pairs second) {
  if constexpr (kShuffle == Shuffle::kTwoSources) {
    return _mm512_permutex2var_epi16(first, _mm512_load_si512(kQuadOfEight<4 * kSecond>.word), second);
  } else {
    const Pairs outputs = _mm512_shuffle_i32x4(first, second, kSecond == 0 ? 0x88 : 0xDD);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kQuadOfFour.word), outputs);
  }
}
static inline Pairs broadcast_quad(const char* p) {  // 4 bfloat16
  std::int64_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi64(quad);
}
static inline Vec add_neighbours(Vec first, Vec second) {  // lanes 2 i + lanes 2 i + 1 of both
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return _mm512_add_ps(_mm512_permutex2var_ps(first.v, even, second.v), _mm512_permutex2var_ps(first.v, odd, second.v));
}
#endif

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
