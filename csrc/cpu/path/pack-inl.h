// Live parameters of any float type and strides into packed panels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "path/forward-inl.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"
#include "qpilots/bf16.h"
#include "qpilots/number.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

static inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));  // 2^-24
}

static inline float read_element(const Source& source, std::int64_t i) {
  switch (source.dtype) {
    case DType::kFloat64:
      return static_cast<float>(static_cast<const double*>(source.data)[i]);
    case DType::kBFloat16:
      return from_bf16(static_cast<const std::uint16_t*>(source.data)[i]);
    case DType::kFloat16:
      return half_to_float(static_cast<const std::uint16_t*>(source.data)[i]);
    default:
      return static_cast<const float*>(source.data)[i];
  }
}

// Non-temporal: the source is read once a call, and must not push packed weights out of the last-level cache.
static inline void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

// rows[o] = the weights of output (first + o) for the inputs [k, k + lanes), zero outside the matrix.
static inline void read_rows(const Block& block, const Source& source, int first, int k, Vec (&rows)[Vec::kLanes]) {
  constexpr int kLanes = Vec::kLanes;
  const bool whole = source.dtype == DType::kFloat32 && k + kLanes <= block.in && first + kLanes <= block.out;
  const std::int64_t base = first * source.row_stride + (block.column + k) * source.col_stride;
  if (whole && source.col_stride == 1) {
    const float* p = static_cast<const float*>(source.data) + base;
    // as many streams as lanes are more than the hardware follows: ask ahead, at a row's end for the next rows
    constexpr int kAhead = tuning::EveryPath::kPackAheadElements;
    const float* ahead = k + kAhead < block.in ? p + kAhead : p + kAhead - block.in + kLanes * source.row_stride;
    unroll<kLanes>([&](auto o) {
      prefetch_once(ahead + o * source.row_stride);
      rows[o] = Vec::load(p + o * source.row_stride);
    });
    return;
  }
  float values[kLanes][kLanes];
  for (int o = 0; o < kLanes; ++o) {
    for (int i = 0; i < kLanes; ++i) {
      const bool inside = first + o < block.out && k + i < block.in;
      values[o][i] = inside ? read_element(source, base + o * source.row_stride + i * source.col_stride) : 0.0f;
    }
  }
  for (int o = 0; o < kLanes; ++o) rows[o] = Vec::load(values[o]);
}

template <class F>
static void pack_panel(const Block& block, const Source& source, int panel, char* arena) {
  constexpr int kLanes = Vec::kLanes;
  const int vectors = panel_vectors(block, panel);
  const std::ptrdiff_t pitch = vectors * kVectorBytes;
  char* out = arena + block.offset + panel * block.panel_stride;
  const bool transposed = source.row_stride == 1 && source.dtype == DType::kFloat32;  // outputs already contiguous
  for (int n = 0; n < vectors; ++n) {
    const int first = panel * block.panel_width + n * kLanes;
    for (int k = 0; k < block.in_padded; k += kLanes) {
      Vec column[kLanes];  // column[i]: the vector of outputs for input k + i
      if (transposed && first + kLanes <= block.out && k + kLanes <= block.in) {
        const float* p = static_cast<const float*>(source.data) + first + (block.column + k) * source.col_stride;
        for (int i = 0; i < kLanes; ++i) column[i] = Vec::load(p + i * source.col_stride);
      } else {
        read_rows(block, source, first, k, column);
        transpose(column);
      }
      char* dst = out + k / F::kStep * pitch + n * kVectorBytes;
      unroll<kLanes / F::kStep>([&](auto i) {
        if constexpr (F::kStep == 1) {
          column[i].store(reinterpret_cast<float*>(dst + i * pitch));
        } else {
          store_pairs(column[2 * i], column[2 * i + 1], dst + i * pitch);
        }
      });
    }
  }
}

static void pack_vector(const Source& source, int width, float fill, bool round, float* dst) {
  const bool plain = source.data != nullptr && source.dtype == DType::kFloat32 && source.row_stride == 1 && !round;
  if (plain) std::memcpy(dst, source.data, sizeof(float) * width);
  for (int i = 0; !plain && i < width; ++i) {
    const float x = source.data == nullptr ? fill : read_element(source, i * source.row_stride);
    dst[i] = round ? qpilots::round_to_bf16(x) : x;
  }
  for (int i = width; i < padded(width); ++i) dst[i] = 0.0f;
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
