// The machine's own limits, by the same instructions: an FMA loop without memory, and a read of a buffer.
#pragma once

template <class F>
static double fma_loop(long iterations) {
  constexpr int kChains = Vec::kLanes == 16 ? 24 : 12;
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec(static_cast<float>(i));
  float one = 1e-3f;
  asm volatile("" : "+m"(one));
  const Vec x(one), y(1.0f - one);
  for (long i = 0; i < iterations; ++i) {
    for (int c = 0; c < kChains; ++c) {
#if defined(__AVX512BF16__)
      if constexpr (F::kFormat == Format::kBf16) {
        acc[c] = dot_pairs(acc[c], _mm512_castps_si512(x.v), _mm512_castps_si512(y.v));
        continue;
      }
#endif
      acc[c] = fmadd(acc[c], y, x);
    }
  }
  Vec total(0.0f);
  for (int c = 0; c < kChains; ++c) total = total + acc[c];
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
  for (int i = 0; i < 8; ++i) s[i] = Vec(0.0f);
  for (std::size_t at_byte = 0; at_byte + kStride <= bytes; at_byte += kStride) {
    for (int i = 0; i < 8; ++i) s[i] = s[i] + Vec::load(reinterpret_cast<const float*>(data + at_byte + i * kVectorBytes));
  }
  return sum(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
}
