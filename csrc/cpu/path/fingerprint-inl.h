// A 64-bit fingerprint of live weights, so that a call repacks only what changed since the last one. Reading is all
// that an unchanged weight costs: 34 MB at memory speed, half of a repack.
// Each 64-bit word enters one lane by a bijection, lane = rotl((lane ^ word) * odd, 29): a single changed word always
// changes the result, and any other change goes unnoticed with probability 2^-64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "path/unroll-inl.h"
#include "tuning.h"

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

typedef std::uint64_t Words __attribute__((vector_size(64)));

static inline std::uint64_t mix(std::uint64_t lane, std::uint64_t word) {
  const std::uint64_t x = (lane ^ word) * 0x9E3779B185EBCA87u;
  return (x << 29) | (x >> 35);
}

static inline __attribute__((always_inline)) void mix_words(Words& lanes, const Words& words) {
  const Words x = (lanes ^ words) * 0x9E3779B185EBCA87u;
  lanes = (x << 29) | (x >> 35);
}

// Rows of `bytes` bytes, `stride` bytes apart.
static std::uint64_t fingerprint(const void* data, std::ptrdiff_t stride, int rows, std::ptrdiff_t bytes) {
  constexpr int kChains = tuning::EveryPath::kFingerprintChains;
  constexpr std::ptrdiff_t kBlock = kChains * static_cast<std::ptrdiff_t>(sizeof(Words));
  constexpr std::ptrdiff_t kAhead = tuning::EveryPath::kFingerprintAheadBytes;
  if (stride == bytes) {
    bytes *= rows;
    rows = 1;
  }
  Words lanes[kChains];
  unroll<kChains>([&](auto c) { lanes[c] = Words{1, 2, 3, 4, 5, 6, 7, 8} * (2u * c + 0xC2B2AE3D27D4EB4Fu); });
  for (int r = 0; r < rows; ++r) {
    const char* p = static_cast<const char*>(data) + r * stride;
    std::ptrdiff_t i = 0;
    for (; i + kBlock <= bytes; i += kBlock) {
      unroll<kChains>([&](auto c) {
        // non-temporal: the source is read once a call, and must not push packed weights out of the last-level cache
        __builtin_prefetch(p + i + kAhead + c * 64, 0, 0);
        Words words;
        std::memcpy(&words, p + i + c * 64, sizeof words);
        mix_words(lanes[c], words);
      });
    }
    for (; i < bytes; i += 64) {
      Words words = {};
      std::memcpy(&words, p + i, static_cast<std::size_t>(bytes - i < 64 ? bytes - i : 64));
      mix_words(lanes[0], words);
    }
  }
  std::uint64_t result = static_cast<std::uint64_t>(bytes) * 0x165667B19E3779F9u + static_cast<std::uint64_t>(rows);
  for (int c = 0; c < kChains; ++c) {
    for (int l = 0; l < 8; ++l) result = mix(result, lanes[c][l]);
  }
  result = mix(result ^ (result >> 32), 0);
  return result == 0 ? 1 : result;  // 0 means: never packed
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
