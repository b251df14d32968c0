// z = a W^T on register blocks.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "path/caches-inl.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// Weights that are needed next, asked for a few lines at every stop of the row blocks before: spread over arithmetic,
// their latency and their traffic hide behind it. All at once, in one row block, they stall it.
struct Ahead {
  const char* next;
  int lines;  // a stop

  void ask() const {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64, 0, 2);
  }
};
static constexpr int kStopSteps = tuning::EveryPath::kStopSteps;  // of a forward block

struct Steps {  // along k
  int begin, end;
};

template <class F, int R, int NV>
QPILOTS_FLAT void forward_block(const ForwardArgs& args, const char* w, int row, int column, Steps steps, Ahead ahead) {
  Vec acc[R][NV];
  const bool first = steps.begin == 0;
  unroll<R>([&](auto r) {
    const float* init = args.init_shared != nullptr ? args.init_shared : args.init[row + r];
    const float* so_far = first ? init : args.z + (row + r) * args.z_stride;
    unroll<NV>([&](auto n) { acc[r][n] = Vec::load(so_far + column + n * Vec::kLanes); });
  });
  if (first && args.add != nullptr) {
    unroll<NV>([&](auto n) {
      const Vec shared = Vec::load(args.add + column + n * Vec::kLanes);
      unroll<R>([&](auto r) { acc[r][n] = acc[r][n] + shared; });
    });
  }
  const std::ptrdiff_t stride = args.a_stride;
  const char* a = static_cast<const char*>(args.a) + row * stride + steps.begin * F::kStep * F::kABytes;
  w += steps.begin * NV * kVectorBytes;
  const auto step = [&](auto) __attribute__((always_inline)) {
    F::template forward_step<R, NV>(acc, w, a, stride);
    w += NV * kVectorBytes;
    a += F::kStep * F::kABytes;
  };
  int left = steps.end - steps.begin;
  for (; left >= kStopSteps; left -= kStopSteps) {
    ahead.ask();
    ahead.next += ahead.lines * 64;
    unroll<kStopSteps>(step);
  }
  for (; left > 0; --left) step(0);
  unroll<R>([&](auto r) {
    float* z = args.z + (row + r) * args.z_stride + column;
    unroll<NV>([&](auto n) { acc[r][n].store(z + n * Vec::kLanes); });
  });
}

// One row, two full panels at once: 4 accumulators alone would wait for each other.
template <class F>
QPILOTS_FLAT void forward_single(const ForwardArgs& args, const char* w, int column) {
  constexpr int NV = kPanelVectors;
  const char* second = w + args.block->panel_stride;
  const float* init = (args.init_shared != nullptr ? args.init_shared : args.init[0]) + column;
  Vec acc[2][1][NV];
  unroll<2 * NV>([&](auto n) {
    Vec start = Vec::load(init + n * Vec::kLanes);
    if (args.add != nullptr) start = start + Vec::load(args.add + column + n * Vec::kLanes);
    acc[n / NV][0][n % NV] = start;
  });
  const char* a = static_cast<const char*>(args.a);
  const int steps = (args.block->in + F::kStep - 1) / F::kStep;
#pragma GCC unroll 4
  for (int k = 0; k < steps; ++k) {
    F::template forward_step<1, NV>(acc[0], w, a, 0);
    F::template forward_step<1, NV>(acc[1], second, a, 0);
    w += NV * kVectorBytes;
    second += NV * kVectorBytes;
    a += F::kStep * F::kABytes;
  }
  unroll<2 * NV>([&](auto n) { acc[n / NV][0][n % NV].store(args.z + column + n * Vec::kLanes); });
}

template <class F, int NV, int R>
static void forward_rows(const ForwardArgs& args, const char* w, int rows, int row, int column, Steps steps,
                         Ahead ahead) {
  if constexpr (R > 0) {
    if (rows == R) {
      forward_block<F, R, NV>(args, w, row, column, steps, ahead);
    } else {
      forward_rows<F, NV, R - 1>(args, w, rows, row, column, steps, ahead);
    }
  }
}

// Rows in even blocks of at most kMost: 32 rows are 6 6 5 5 5 5, not 6 6 6 6 6 2.
template <int kMost, class Run>
static inline void for_row_blocks(int rows, Run run) {
  const int blocks = (rows + kMost - 1) / kMost;
  for (int b = 0, row = 0; b < blocks; ++b) {
    const int count = rows / blocks + (b < rows % blocks ? 1 : 0);
    run(row, count);
    row += count;
  }
}

// Of a panel, before every row block has taken them. A far last-level cache is waited for less where row blocks find
// the weights in L1 in turns, at the price of sums that come and go. So only for few blocks of rows, and where L2 is
// large, as it is on servers whose last level is far.
template <class F>
static int steps_at_once(int steps, int blocks) {
  using tuning::EveryPath;
  static const bool far_last_level = second_level_bytes() >= EveryPath::kLargeSecondLevel;
  const bool pieces = blocks >= EveryPath::kPieceFewestBlocks && blocks <= EveryPath::kPieceMostBlocks;
  return pieces && far_last_level && F::kFormat == Format::kF32 ? EveryPath::kPieceSteps : steps;
}

template <class F, int NV>
static void forward_panel(const ForwardArgs& args, const char* w, int vectors, int column) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      const int blocks = (args.rows + kBlockRows - 1) / kBlockRows;
      const int steps = (args.block->in + F::kStep - 1) / F::kStep;
      const int at_once = steps_at_once<F>(steps, blocks);
      const int lines = blocks == 1 && !F::kAskInOneBlock ? 0 : (NV * kStopSteps + blocks - 1) / blocks;
      for (int k = 0; k < steps; k += at_once) {
        const Steps part{k, k + at_once < steps ? k + at_once : steps};
        const std::ptrdiff_t end = static_cast<std::ptrdiff_t>(part.end) * NV * kVectorBytes;
        Ahead ahead{w + (part.end < steps ? end : static_cast<std::ptrdiff_t>(args.block->panel_stride)), lines};
        for_row_blocks<kBlockRows>(args.rows, [&](int row, int count) {
          forward_rows<F, NV, kBlockRows>(args, w, count, row, column, part, ahead);
          ahead.next += (part.end - part.begin) / kStopSteps * ahead.lines * 64;
        });
      }
    } else {
      forward_panel<F, NV - 1>(args, w, vectors, column);
    }
  }
}

static inline int panel_vectors(const Block& block, int panel) {
  const int left = block.out_padded - panel * block.panel_width;
  return (left < block.panel_width ? left : block.panel_width) / Vec::kLanes;
}

template <class F>
static void forward(const ForwardArgs& args) {
  const auto weights = [&](int p) { return args.weights + p * args.block->panel_stride; };
  int pairs = 0;  // of full panels
  if (args.rows == 1) {
    while (args.panel_begin + 2 * pairs + 1 < args.panel_end &&
           panel_vectors(*args.block, args.panel_begin + 2 * pairs + 1) == kPanelVectors) {
      ++pairs;
    }
  }
  for (int p = args.panel_begin + 2 * pairs; p < args.panel_end; ++p) {
    forward_panel<F, kPanelVectors>(args, weights(p), panel_vectors(*args.block, p), p * args.block->panel_width);
  }
  // backwards: the backward pass, which begins with the first panel, finds the last layer's still in the cache
  while (pairs-- > 0) {
    const int p = args.panel_begin + 2 * pairs;
    forward_single<F>(args, weights(p), p * args.block->panel_width);
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
