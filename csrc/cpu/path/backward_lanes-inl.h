// dx = dy W of many float32 rows: lanes run over rows, and one weight meets all of them. What a block of backward-inl.h
// adds at its end across lanes is here added lane by lane, without a shuffle: outputs n, n + lanes, n + 2 lanes .. are
// summed by themselves, and those sums along the same tree. The bits are the same.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "path/forward-inl.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

static constexpr int kLaneVectors = kPanelVectors;  // of rows at once
static constexpr int kLaneRows = kLaneVectors * Vec::kLanes;
static constexpr int kLaneColumns = tuning::EveryPath::kLaneBlocks * kBlockRows;  // results that wait to be turned back
static_assert(kLaneColumns % Vec::kLanes == 0);

constexpr int lane_levels() {
  int levels = 0;
  while (1 << levels < Vec::kLanes) ++levels;
  return levels;
}

// The outputs' residues in the order in which the tree (l, l + lanes / 2), (l, l + lanes / 4) .. takes them.
constexpr int lane_of(int i) {
  int lane = 0;
  for (int bit = 0; bit < lane_levels(); ++bit) lane |= (i >> bit & 1) << (lane_levels() - 1 - bit);
  return lane;
}

template <int C>
static inline void lanes_panel(Vec (&acc)[C][kLaneVectors], const float*& d, const char* w, int vectors,
                               std::ptrdiff_t pitch) {
  for (int n = 0; n < vectors; ++n) {
    Vec rows[kLaneVectors];
    unroll<kLaneVectors>([&](auto v) {
      rows[v] = Vec::load(d + v * Vec::kLanes);
      keep_in_register(rows[v].v);
    });
    unroll<C>([&](auto c) {
      const Vec weight(*reinterpret_cast<const float*>(w + c * pitch));
      unroll<kLaneVectors>([&](auto v) { accumulate(acc[c][v], rows[v], weight); });
    });
    d += kLaneRows;
    w += kVectorBytes;
  }
}

// Gradients as lanes_block reads them: [residue, as ordered][step][row], and a vector more a residue, since 16 residues
// a power of two apart would share a set of the first-level cache.
static std::ptrdiff_t residue_floats(const Block& block) {
  return block.out_padded / Vec::kLanes * kLaneRows + Vec::kLanes;
}

// C columns from k on, to out[column][row].
template <int C>
QPILOTS_FLAT void lanes_block(const BackwardArgs& args, const float* d, int k, float* out) {
  constexpr int kLevels = lane_levels();
  constexpr std::ptrdiff_t kPitch = kPanelVectors * kVectorBytes;
  // the same columns serve every residue; meanwhile each asks for its part of those after the next few
  constexpr int kLines = (C * kPanelVectors + Vec::kLanes - 1) / Vec::kLanes;
  const Block& block = *args.block;
  const int full = block.out_padded / block.panel_width;
  Vec waiting[kLevels][C][kLaneVectors];
  for (int i = 0; i < Vec::kLanes; ++i) {
    Vec acc[C][kLaneVectors];
    unroll<C * kLaneVectors>([&](auto j) { acc[j / kLaneVectors][j % kLaneVectors] = Vec(0.0f); });
    const char* w = args.weights + k * kPitch;
    const std::ptrdiff_t lane = lane_of(i) * static_cast<std::ptrdiff_t>(sizeof(float));
    for (int p = 0; p < full; ++p) {
      const char* ahead = w + C * kPitch + i * kLines * kVectorBytes;
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + line * kVectorBytes, 0, 2);
      lanes_panel(acc, d, w + lane, kPanelVectors, kPitch);
      w += block.panel_stride;
    }
    if (full < block.panels) {
      const int vectors = panel_vectors(block, full);
      const std::ptrdiff_t pitch = vectors * kVectorBytes;
      lanes_panel(acc, d, w + k * (pitch - kPitch) + lane, vectors, pitch);
    }
    d += Vec::kLanes;
    int level = 0;
    for (; (i >> level & 1) != 0; ++level) {
      unroll<C * kLaneVectors>([&](auto j) {
        constexpr int c = j.value / kLaneVectors, v = j.value % kLaneVectors;
        acc[c][v] = waiting[level][c][v] + acc[c][v];
      });
    }
    unroll<C * kLaneVectors>([&](auto j) {
      constexpr int c = j.value / kLaneVectors, v = j.value % kLaneVectors;
      if (level < kLevels) {
        waiting[level][c][v] = acc[c][v];
      } else {
        acc[c][v].store(out + j * Vec::kLanes);
      }
    });
  }
}

template <int C>
static void lanes_columns(const BackwardArgs& args, const float* d, int k, int columns, float* out) {
  if constexpr (C > 0) {
    if (columns == C) {
      lanes_block<C>(args, d, k, out);
    } else {
      lanes_columns<C - 1>(args, d, k, columns, out);
    }
  }
}

static bool lanes_serve(const BackwardArgs& args) {
  const std::size_t bytes = sizeof(float) * Vec::kLanes * residue_floats(*args.block);
  return args.rows >= kLaneRows && args.k_end - args.k_begin >= tuning::EveryPath::kLeastLaneColumns &&
         args.scratch_bytes >= bytes;
}

// The first kLaneRows rows.
static void backward_lanes(const BackwardArgs& args) {
  constexpr int kLanes = Vec::kLanes;
  float* const d = reinterpret_cast<float*>(args.scratch);
  const int steps = args.block->out_padded / kLanes;
  const std::ptrdiff_t residue = residue_floats(*args.block);
  const std::ptrdiff_t dy_stride = args.dy_stride / static_cast<std::ptrdiff_t>(sizeof(float));
  Vec turned[kLanes];
  for (int v = 0; v < kLaneVectors; ++v) {
    const float* dy = static_cast<const float*>(args.dy) + v * kLanes * dy_stride;
    for (int step = 0; step < steps; ++step) {
      unroll<kLanes>([&](auto r) { turned[r] = Vec::load(dy + r * dy_stride + step * kLanes); });
      transpose(turned);
      unroll<kLanes>(
          [&](auto i) { turned[lane_of(i.value)].store(d + i * residue + (step * kLaneVectors + v) * kLanes); });
    }
  }
  alignas(64) float out[kLaneColumns][kLaneVectors][kLanes];
  for (int k = args.k_begin; k < args.k_end; k += kLaneColumns) {
    const int columns = args.k_end - k < kLaneColumns ? args.k_end - k : kLaneColumns;
    for_row_blocks<kBlockRows>(columns,
                               [&](int c, int count) { lanes_columns<kBlockRows>(args, d, k + c, count, out[c][0]); });
    for (int v = 0; v < kLaneVectors; ++v) {
      for (int c = 0; c < columns; c += kLanes) {
        unroll<kLanes>([&](auto i) { turned[i] = Vec::load(out[c + i][v]); });
        transpose(turned);
        float* dx = args.dx + v * kLanes * args.dx_stride + k + c;
        unroll<kLanes>([&](auto r) { turned[r].store(dx + r * args.dx_stride); });
      }
    }
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
