// Tile registers: their shapes, and the instructions on them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "path/unroll-inl.h"

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

constexpr int kTile = 16;         // rows of a tile; outputs of one of weights
constexpr int kTileBytes = 64;    // a row of a tile: 32 bfloat16 or 16 float32
constexpr int kTileColumns = 32;  // bfloat16 columns that one product sums
constexpr int kOperandBytes = 2;

// Registers: four of sums, two of the first factor, two of the second.
constexpr int kSums = 4, kFirst = 4, kSecond = 6;

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  // The first half of the sums and of the first factors has first_half rows, the second half second_half; second
  // factors have all their pairs. bytes: of a row of sums and of second factors.
  Configuration(int first_half, int second_half, int bytes) {
    for (int i = 0; i < kSecond + 2; ++i) {
      const bool sum = i < kSums, second = i >= kSecond;
      const int half_rows = (sum ? i < kSums / 2 : i == kFirst) ? first_half : second_half;
      rows[i] = static_cast<std::uint8_t>(second ? kTile : half_rows);
      row_bytes[i] = static_cast<std::uint16_t>(sum || second ? bytes : kTileBytes);
    }
  }
};

// The tiles' shapes while it lives. Registers left in use would be saved at every switch of threads.
class TilesInUse {
 public:
  explicit TilesInUse(const Configuration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }
  ~TilesInUse() { asm volatile("tilerelease"); }
};

template <int T>
QPILOTS_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
QPILOTS_INLINE void load(const void* p, std::ptrdiff_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
QPILOTS_INLINE void store(void* p, std::ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(p), "r"(stride) : "memory");
}
template <int Sum, int First, int Second>
QPILOTS_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(First), "i"(Second));
}

// Not std::min: a copy of that, compiled for these instructions, could be what the linker takes for every path.
constexpr int smaller(int a, int b) { return a < b ? a : b; }

int panel_vectors(const Block& block, int panel) {
  return smaller(block.panel_width, block.out_padded - panel * block.panel_width) / kTile;
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
