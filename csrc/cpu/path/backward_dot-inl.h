// dx = dy W with vdpbf16ps, whose pairs run along the outputs here, while the packed ones run along k: loads and
// shuffles turn 8 columns by 16 outputs into 4 vectors of 8 columns by 4 outputs ("quads"). Each meets 4 gradients of a
// row, broadcast as 64 bits: Zen 5 broadcasts those in its load ports, but 128 bits in a port of the products (75 % of
// peak). An accumulator holds two partial sums of 8 columns ("unit").
#pragma once

#include <cstddef>

#include "kernels.h"
#include "path/backward-inl.h"
#include "path/forward-inl.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

#if defined(__AVX512BF16__)
static constexpr int kUnitColumns = 8, kUnitVectors = kUnitColumns / 2;
static constexpr int kQuadBytes = 4 * Bf16Dot::kABytes, kVectorQuads = Vec::kLanes / 4;

using Dot = tuning::Avx512Bf16;
// rows of a register block of two units and of one of four
static constexpr int kTwoUnitRows = Dot::kTwoUnitRows, kFourUnitRows = Dot::kFourUnitRows;

// Zen 5 takes 6 cycles for vdpbf16ps, two a cycle: 12 accumulators keep it busy, 18 and more also where shuffles get in
// the way.
struct OnZen5 {
  static constexpr Shuffle kShuffle = Shuffle::kTwoSources;  // they take a port of the products: as few as possible
  static constexpr int kQuadsAtOnce = Dot::kQuadsOnZen5;

  // Rows are shared evenly among blocks, of kTwoUnitRowsWanted or more where possible. Where the blocks would be
  // smaller, kFourUnitRows go into one of their own.
  static int rows_apart(int rows) {
    const int blocks = (rows + kTwoUnitRows - 1) / kTwoUnitRows, rest = rows - kFourUnitRows;
    return blocks > 1 && rows < Dot::kTwoUnitRowsWanted * blocks && rest <= kTwoUnitRows * (blocks - 1) ? kFourUnitRows
                                                                                                        : 0;
  }
};

// Zen 4 reads a third source register at the expense of a product: a shuffle with two sources and a register of
// indices costs one, a shuffle of either kind with fewer nothing, if it stands among the products.
struct OnZen4 {
  static constexpr Shuffle kShuffle = Shuffle::kOneSource;
  static constexpr int kQuadsAtOnce = Dot::kQuadsOnZen4;
  static int rows_apart(int) { return 0; }
};

// 8 columns by the outputs 4 q .. 4 q + 3 of 16
template <int q, bool kOnce, Shuffle kShuffle>
QPILOTS_INLINE Pairs quad(const char* w, std::ptrdiff_t pitch) {
  const char* third = w + 2 * pitch;
  if constexpr (q < 2) {
    return quad_of<q % 2, kShuffle>(lower_halves<kOnce>(w, w + pitch), lower_halves<kOnce>(third, third + pitch));
  } else {
    return quad_of<q % 2, kShuffle>(upper_halves<kOnce>(w, w + pitch), upper_halves<kOnce>(third, third + pitch));
  }
}

// acc[r][u] += 16 outputs of U units; gradient(r, q): 4 of row r's, broadcast.
template <int R, int U, class Cpu, class Gradient>
QPILOTS_INLINE void dot_vector(Vec (&acc)[R][U], const char* w, std::ptrdiff_t pitch, const Gradient& gradient) {
  constexpr int kQuads = Cpu::kQuadsAtOnce / U;
  unroll<4 / kQuads>([&](auto part) {
    Pairs quads[U][kQuads];
    unroll<U * kQuads>([&](auto i) {
      const char* unit = w + i / kQuads * kUnitVectors * pitch;
      quads[i / kQuads][i % kQuads] = quad<part * kQuads + i % kQuads, R == 1, Cpu::kShuffle>(unit, pitch);
    });
    unroll<kQuads>([&](auto q) {
      unroll<R>([&](auto r) {
        const Pairs d = gradient(r, Index<part * kQuads + q>());
        unroll<U>([&](auto u) { acc[r][u] = dot_pairs(acc[r][u], quads[u][q], d); });
      });
    });
  });
}

template <int R, int U>
QPILOTS_INLINE void store_units(const Vec (&acc)[R][U], float* dx, std::ptrdiff_t stride) {
  unroll<R>([&](auto r) {
    unroll<U / 2>([&](auto i) {
      add_neighbours(acc[r][2 * i], acc[r][2 * i + 1]).store(dx + r * stride + i * 2 * kUnitColumns);
    });
  });
}

// With kAsk the block asks for its part of the next panel, into the first-level cache, and where it has two units for
// the next block's, into the second: 16 rows of a layer in the last-level cache take 17.5 us instead of 19.5, from
// memory 18.4 instead of 29. 4 rows by 4 units: 5.8 instead of 7.0 and 14.7 instead of 19; there the second only
// competes.
template <int R, int U, bool kAsk, class Cpu>
QPILOTS_FLAT void dot_block(const BackwardArgs& args, int row, int k) {
  constexpr std::ptrdiff_t kPitch = kPanelVectors * kVectorBytes;
  constexpr int kLines = U * kUnitVectors;  // a vector
  Vec acc[R][U];
  unroll<R * U>([&](auto i) { acc[i / U][i % U] = Vec(0.0f); });
  const Block& block = *args.block;
  const std::ptrdiff_t panel_stride = static_cast<std::ptrdiff_t>(block.panel_stride);
  const char* dy = static_cast<const char*>(args.dy) + row * args.dy_stride;
  const auto gradient = [&](auto r, auto q) __attribute__((always_inline)) {
    return broadcast_quad(dy + r * args.dy_stride + q * kQuadBytes);
  };
  const int full = block.out_padded / block.panel_width;
  const char* w = args.weights + k / 2 * kPitch;
  for (int p = 0; p < full; ++p) {
    const std::ptrdiff_t ahead = p + 1 < full ? panel_stride : kLines * kPitch - p * panel_stride;
    for (int n = 0; n < kPanelVectors; ++n) {
      const char* vector = w + n * kVectorBytes;
      if constexpr (kAsk) {
        unroll<kLines>([&](auto i) { __builtin_prefetch(vector + ahead + i * kPitch, 0, 3); });
        if (U == 2) unroll<kLines>([&](auto i) { __builtin_prefetch(vector + (kLines + i) * kPitch, 0, 2); });
      }
      dot_vector<R, U, Cpu>(acc, vector, kPitch, gradient);
      dy += kVectorQuads * kQuadBytes;
    }
    w += panel_stride;
  }
  if (full < block.panels) {
    const int vectors = panel_vectors(block, full);
    const std::ptrdiff_t pitch = vectors * kVectorBytes;
    w = args.weights + full * panel_stride + k / 2 * pitch;
    for (int n = 0; n < vectors; ++n) {
      dot_vector<R, U, Cpu>(acc, w + n * kVectorBytes, pitch, gradient);
      dy += kVectorQuads * kQuadBytes;
    }
  }
  store_units(acc, args.dx + row * args.dx_stride + k, args.dx_stride);
}

template <int R, int U, bool kAsk, class Cpu>
static void dot_rows(const BackwardArgs& args, int rows, int row, int k) {
  if constexpr (R > 0) {
    if (rows == R) {
      dot_block<R, U, kAsk, Cpu>(args, row, k);
    } else {
      dot_rows<R - 1, U, kAsk, Cpu>(args, rows, row, k);
    }
  }
}

// One row: bound by the weights' way from cache or memory, which is fastest in the order of their addresses. The
// accumulators of many columns wait in the first-level cache meanwhile; each sums in the same order as in a block.
// Lines are loaded in one piece: a layer from memory takes 13.5 us, with merging loads, which straddle lines, 24.
template <int NV>
QPILOTS_INLINE void dot_stream_panel(const char* w, const char* dy, int units, Vec (*sums)[1][2]) {
  Pairs d[NV][kVectorQuads];
  unroll<NV * kVectorQuads>(
      [&](auto i) { d[i / kVectorQuads][i % kVectorQuads] = broadcast_quad(dy + i * kQuadBytes); });
  for (; units > 0; units -= 2, ++sums) {
    Vec acc[1][2] = {{(*sums)[0][0], (*sums)[0][1]}};
    unroll<NV>([&](auto n) {
      dot_vector<1, 2, OnZen5>(acc, w + n * kVectorBytes, NV * kVectorBytes, [&](auto, auto q) { return d[n][q]; });
    });
    unroll<2>([&](auto u) { (*sums)[0][u] = acc[0][u]; });
    w += 2 * kUnitVectors * NV * kVectorBytes;
  }
}

template <int NV>
QPILOTS_INLINE void dot_stream_narrow(const char* w, int vectors, const char* dy, int units, Vec (*sums)[1][2]) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      dot_stream_panel<NV>(w, dy, units, sums);
    } else {
      dot_stream_narrow<NV - 1>(w, vectors, dy, units, sums);
    }
  }
}

QPILOTS_FLAT void dot_stream(const BackwardArgs& args) {
  constexpr int kStreamColumns = Dot::kStreamColumnsOf1;
  const Block& block = *args.block;
  Vec sums[kStreamColumns / kUnitColumns / 2][1][2];
  for (int k = args.k_begin; k < args.k_end; k += kStreamColumns) {
    const int units = (args.k_end - k < kStreamColumns ? args.k_end - k : kStreamColumns) / kUnitColumns;
    for (int i = 0; i < units; ++i) sums[i / 2][0][i % 2] = Vec(0.0f);
    for (int p = 0; p < block.panels; ++p) {
      const int vectors = panel_vectors(block, p);
      const char* dy = static_cast<const char*>(args.dy) + p * kPanelVectors * kVectorQuads * kQuadBytes;
      dot_stream_narrow<kPanelVectors>(args.weights + p * block.panel_stride + k / 2 * vectors * kVectorBytes, vectors,
                                       dy, units, sums);
    }
    for (int i = 0; i < units / 2; ++i) store_units(sums[i], args.dx + k + i * 2 * kUnitColumns, 0);
  }
}

// Up to kFourUnitRows rows wait for the weights' way more than for a port, whatever the processor.
template <class Cpu>
static void backward_dot(const BackwardArgs& args) {
  if (args.rows == 1) {
    dot_stream(args);
    return;
  }
  constexpr int kTwo = 2 * kUnitColumns, kFour = 4 * kUnitColumns;
  const int apart = Cpu::rows_apart(args.rows), even = args.rows - apart;
  for (int k = args.k_begin; k < args.k_end; k += kFour) {
    const bool four = k + kFour <= args.k_end;
    if (args.rows <= kFourUnitRows && four) {
      dot_rows<kFourUnitRows, 4, true, OnZen5>(args, args.rows, 0, k);
      continue;
    }
    for (int i = k; i < (four ? k + kFour : args.k_end); i += kTwo) {
      for_row_blocks<kTwoUnitRows>(even, [&](int row, int count) {
        if (row == 0) {
          dot_rows<kTwoUnitRows, 2, true, Cpu>(args, count, row, i);
        } else {
          dot_rows<kTwoUnitRows, 2, false, Cpu>(args, count, row, i);
        }
      });
      if (apart > 0 && !four) dot_rows<kFourUnitRows, 2, false, OnZen5>(args, apart, even, i);
    }
    if (apart > 0 && four) dot_rows<kFourUnitRows, 4, false, OnZen5>(args, apart, even, k);
  }
}

template <>
void backward<Bf16Dot>(const BackwardArgs& args) {
  backward_dot<OnZen5>(args);
}
#endif

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
