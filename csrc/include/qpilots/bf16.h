// bfloat16 <-> float32 by integer arithmetic: round to nearest, ties to even; NaN stays NaN.
#pragma once

#include <cstdint>

#include "qpilots/number.h"

namespace qpilots {

using bf16_bits = std::uint16_t;

QPILOTS_HD float from_bf16(bf16_bits x) { return bits_float(static_cast<std::uint32_t>(x) << 16); }

QPILOTS_HD bf16_bits to_bf16(float x) {
  const std::uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_bits>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<bf16_bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

QPILOTS_HD float round_to_bf16(float x) { return from_bf16(to_bf16(x)); }

}  // namespace qpilots
