// The machine's own limits, by the same instructions: an FMA loop without memory, and a read of a buffer.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

template <class F>
static double fma_loop(long iterations) {
  constexpr int kChains = Vec::kLanes == 16 ? 24 : 12;
  Vec acc[kChains];
  unroll<kChains>([&](auto i) { acc[i] = Vec(static_cast<float>(i)); });
  float one = 1e-3f;
  asm volatile("" : "+m"(one));
  const Vec x(one), y(1.0f - one);
  for (long i = 0; i < iterations; ++i) {
    unroll<kChains>([&](auto c) {
#if defined(__AVX512BF16__)
      if constexpr (F::kFormat == Format::kBf16) {
        acc[c] = dot_pairs(acc[c], _mm512_castps_si512(x.v), _mm512_castps_si512(y.v));
        return;
      }
#endif
      acc[c] = fmadd(x, y, acc[c]);
    });
  }
  Vec total(0.0f);
  unroll<kChains>([&](auto c) { total = total + acc[c]; });
  float result = sum(total);
  asm volatile("" : "+m"(result));
  return 2.0 * kChains * Vec::kLanes * static_cast<double>(iterations) * (F::kABytes == 2 ? 2 : 1);
}

static double peak_flops(Format format, long iterations) {
  return format == Format::kF32 ? fma_loop<F32>(iterations) : fma_loop<Bf16>(iterations);
}

static float read_bytes(const char* data, std::size_t bytes) {
  constexpr std::size_t kStride = 8 * kVectorBytes;
  Vec s[8];
  unroll<8>([&](auto i) { s[i] = Vec(0.0f); });
  for (std::size_t at_byte = 0; at_byte + kStride <= bytes; at_byte += kStride) {
    const float* p = reinterpret_cast<const float*>(data + at_byte);
    unroll<8>([&](auto i) { s[i] = s[i] + Vec::load(p + i * Vec::kLanes); });
  }
  return sum(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
