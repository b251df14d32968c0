// 4 floats as a GNU vector: SSE2 on any x86-64, NEON on aarch64, with the names of qpilots/number.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "tuning.h"

#define QPILOTS_GENERIC_SUMS

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef std::int32_t Int4 __attribute__((vector_size(16)));
typedef std::uint32_t Uint4 __attribute__((vector_size(16)));

struct Mask {
  Int4 m;
};

struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;
  Vec() = default;
  Vec(Float4 value) : v(value) {}
  Vec(float value) : v{value, value, value, value} {}
  static Vec load(const float* p) {
    Float4 x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof v); }
};

static inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
static inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
static inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
static inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
static inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
static inline Mask operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
static inline Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
static inline Vec fmadd(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
  Float4 r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#else
  return a.v * b.v + c.v;  // two roundings: without the instruction a true fma is a library call
#endif
}
static inline Vec select(Mask m, Vec yes, Vec no) {
  return reinterpret_cast<Float4>((m.m & reinterpret_cast<Int4>(yes.v)) | (~m.m & reinterpret_cast<Int4>(no.v)));
}
static inline Vec minimum(Vec a, Vec b) { return select(a < b, a, b); }
static inline Vec maximum(Vec a, Vec b) { return select(b < a, a, b); }
static inline Vec absolute(Vec x) { return reinterpret_cast<Float4>(reinterpret_cast<Int4>(x.v) & 0x7fffffff); }
static inline Vec copy_sign(Vec x, Vec sign) {
  const Uint4 s = {0x80000000u, 0x80000000u, 0x80000000u, 0x80000000u};
  return reinterpret_cast<Float4>((reinterpret_cast<Uint4>(x.v) & ~s) | (reinterpret_cast<Uint4>(sign.v) & s));
}
static inline Vec round_even(Vec x) {
  const Vec shift(12582912.0f);  // 1.5 * 2^23
  return (x + shift) - shift;
}
static inline Vec power_of_two(Vec n) {
  const Vec shifted = n + Vec(12582912.0f + 127.0f);  // the integer sits in the low bits
  return reinterpret_cast<Float4>(reinterpret_cast<Int4>(shifted.v) << 23);
}
static inline Vec scale_by_power_of_two(Vec x, Vec n) { return x * power_of_two(n); }
static inline Vec reciprocal(Vec x) { return Vec(1.0f) / x; }
static inline Vec rough_reciprocal(Vec x) { return reciprocal(x); }
static inline float sum(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }

using Pairs = Uint4;
static inline Pairs load_pairs(const void* p) {
  Uint4 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline Vec even_of(Pairs p) { return reinterpret_cast<Float4>(p << 16); }
static inline Vec odd_of(Pairs p) { return reinterpret_cast<Float4>(p & 0xffff0000u); }
static inline Uint4 bf16_bits_of(Vec x) {  // in the upper half of each lane; nearest even, NaN kept quiet
  const Uint4 bits = reinterpret_cast<Uint4>(x.v);
  const Uint4 rounded = bits + (((bits >> 16) & 1u) + 0x7fffu);
  const Uint4 number = reinterpret_cast<Uint4>(x.v == x.v);
  return (rounded & number) | ((bits | 0x400000u) & ~number);
}
static inline Vec round_to_bf16(Vec x) { return reinterpret_cast<Float4>(bf16_bits_of(x) & 0xffff0000u); }
static inline void store_pairs(Vec even, Vec odd, void* p) {
  const Uint4 pairs = (bf16_bits_of(even) >> 16) | (bf16_bits_of(odd) & 0xffff0000u);
  std::memcpy(p, &pairs, sizeof pairs);
}
static inline void transpose(Vec (&rows)[4]) {
  Vec t[4] = {rows[0], rows[1], rows[2], rows[3]};
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) t[i].v[j] = rows[j].v[i];
  }
  for (int i = 0; i < 4; ++i) rows[i] = t[i];
}

using Tuning = tuning::Portable;

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
