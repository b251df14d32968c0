// dx = dy W on register blocks whose lanes run over outputs (for vdpbf16ps: backward_dot-inl.h).
#pragma once

#include <cstddef>

#include "kernels.h"
#include "path/backward_lanes-inl.h"
#include "path/forward-inl.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// Of a register block of so many rows.
constexpr int backward_columns(int rows) {
  return rows == 1 ? Tuning::kColumnsOf1 : rows <= 3 ? Tuning::kColumnsOf2Or3 : Tuning::kColumnsOfMore;
}

template <class F, int R, int NV, int N>
static inline void backward_panel(Vec (&acc)[R][N], const char* w, const char* dy, std::ptrdiff_t stride,
                                  const char* ahead, int lines) {
  constexpr std::ptrdiff_t kPitch = NV * kVectorBytes;
  for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
  for (int n = 0; n < NV; ++n) {
    Vec d[R];
    unroll<R>([&](auto r) { d[r] = Vec::load(reinterpret_cast<const float*>(dy + r * stride)); });
    unroll<N / F::kUnit>([&](auto u) {
      const typename F::Weights weights = F::load_weights(w + u * kPitch);
      unroll<R>([&](auto r) { F::update(&acc[r][u * F::kUnit], weights, d[r]); });
    });
    w += kVectorBytes;
    dy += Vec::kLanes * F::kABytes;
  }
}

template <class F, int R, int NV, int N>
static inline void backward_narrow_panel(Vec (&acc)[R][N], const char* w, int vectors, const char* dy,
                                         std::ptrdiff_t stride) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      backward_panel<F, R, NV, N>(acc, w, dy, stride, w, 0);
    } else {
      backward_narrow_panel<F, R, NV - 1, N>(acc, w, vectors, dy, stride);
    }
  }
}

// The row blocks ask for the columns ahead in turns; `turn` of `turns`.
template <class F, int R>
QPILOTS_FLAT void backward_block(const BackwardArgs& args, int row, int k, int turn, int turns) {
  constexpr int N = backward_columns(R);
  Vec acc[R][N];
  unroll<R>([&](auto r) { unroll<N>([&](auto c) { acc[r][c] = Vec(0.0f); }); });
  const Block& block = *args.block;
  const std::ptrdiff_t panel_stride = static_cast<std::ptrdiff_t>(block.panel_stride);
  const char* dy = static_cast<const char*>(args.dy) + row * args.dy_stride;
  const char* w = args.weights;
  const int full = block.out_padded / block.panel_width;
  const std::ptrdiff_t first = k / F::kStep * kPanelVectors * kVectorBytes;
  constexpr int kLines = N / F::kUnit * kPanelVectors;  // of a panel in this block
  const int lines = (kLines + turns - 1) / turns;
  const std::ptrdiff_t distance = tuning::EveryPath::kAheadColumns / F::kStep * kPanelVectors * kVectorBytes;
  const std::ptrdiff_t ahead = first + distance + turn * lines * 64;
  for (int p = 0; p < full; ++p) {
    backward_panel<F, R, kPanelVectors, N>(acc, w + first, dy, args.dy_stride, w + ahead, lines);
    w += panel_stride;
    dy += kPanelVectors * Vec::kLanes * F::kABytes;
  }
  if (full < block.panels) {
    const int vectors = panel_vectors(block, full);
    backward_narrow_panel<F, R, kPanelVectors - 1, N>(acc, w + k / F::kStep * vectors * kVectorBytes, vectors, dy,
                                                      args.dy_stride);
  }
  store_sums(acc, args.dx + row * args.dx_stride + k, args.dx_stride);
}

template <class F, int R>
static void backward_rows(const BackwardArgs& args, int rows, int row, int begin, int end, int turn, int turns) {
  if constexpr (R > 1) {
    if (rows == R) {
      for (int k = begin; k < end; k += backward_columns(R)) backward_block<F, R>(args, row, k, turn, turns);
    } else {
      backward_rows<F, R - 1>(args, rows, row, begin, end, turn, turns);
    }
  }
}

// Few rows: bound by the weights' way from cache or memory, which is fastest in the order of their addresses. The
// accumulators of many columns wait in the first-level cache meanwhile; each sums in the same order as in a register
// block. sums: [stores][R][N]
template <class F, int R, int N, int NV, int kPanels>
static inline void backward_stream_panels(const char* w, std::ptrdiff_t panel_stride, const char* dy,
                                          std::ptrdiff_t dy_stride, int stores, Vec* sums) {
  Vec d[R][NV * kPanels];
  unroll<R>([&](auto r) {
    const float* row = reinterpret_cast<const float*>(dy + r * dy_stride);
    unroll<NV * kPanels>([&](auto n) { d[r][n] = Vec::load(row + n * Vec::kLanes); });
  });
  for (; stores > 0; --stores, sums += R * N) {
#pragma GCC unroll 4
    for (int c = 0; c < N; c += F::kUnit) {
      Vec acc[R][F::kUnit];
      unroll<R>([&](auto r) { unroll<F::kUnit>([&](auto i) { acc[r][i] = sums[r * N + c + i]; }); });
      unroll<NV * kPanels>([&](auto n) {
        const auto weights = F::load_weights(w + n / NV * panel_stride + n % NV * kVectorBytes);
        unroll<R>([&](auto r) { F::update(acc[r], weights, d[r][n]); });
      });
      unroll<R>([&](auto r) { unroll<F::kUnit>([&](auto i) { sums[r * N + c + i] = acc[r][i]; }); });
      w += NV * kVectorBytes;
    }
  }
}

template <class F, int R, int N, int NV>
static inline void backward_stream_narrow(const char* w, int vectors, const char* dy, std::ptrdiff_t dy_stride,
                                          int stores, Vec* sums) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      backward_stream_panels<F, R, N, NV, 1>(w, 0, dy, dy_stride, stores, sums);
    } else {
      backward_stream_narrow<F, R, N, NV - 1>(w, vectors, dy, dy_stride, stores, sums);
    }
  }
}

template <class F, int R>
QPILOTS_FLAT void backward_stream(const BackwardArgs& args) {
  constexpr int N = backward_columns(R);  // of one store
  constexpr int kStreamColumns = Tuning::kStreamColumns[R - 1], kPanels = Tuning::kStreamPanels[R - 1];
  const Block& block = *args.block;
  Vec sums[kStreamColumns / N][R][N];
  for (int k = args.k_begin; k < args.k_end; k += kStreamColumns) {
    const int stores = (args.k_end - k < kStreamColumns ? args.k_end - k : kStreamColumns) / N;
    Vec* all = &sums[0][0][0];
    for (int i = 0; i < stores * R * N; ++i) all[i] = Vec(0.0f);
    const auto weights = [&](int p, int vectors) {
      return args.weights + p * block.panel_stride + k / F::kStep * vectors * kVectorBytes;
    };
    const auto gradients = [&](int p) {
      return static_cast<const char*>(args.dy) + p * kPanelVectors * Vec::kLanes * F::kABytes;
    };
    const int full = block.out_padded / block.panel_width;
    int p = 0;
    for (; p + kPanels <= full; p += kPanels) {
      backward_stream_panels<F, R, N, kPanelVectors, kPanels>(weights(p, kPanelVectors), block.panel_stride,
                                                              gradients(p), args.dy_stride, stores, all);
    }
    for (; p < block.panels; ++p) {
      const int vectors = panel_vectors(block, p);
      backward_stream_narrow<F, R, N, kPanelVectors>(weights(p, vectors), vectors, gradients(p), args.dy_stride, stores,
                                                     all);
    }
    for (int i = 0; i < stores; ++i) store_sums(sums[i], args.dx + k + i * N, args.dx_stride);
  }
}

template <class F, int R>
static void backward_few_rows(const BackwardArgs& args) {
  if constexpr (R > 0) {
    if (args.rows == R) {
      backward_stream<F, R>(args);
    } else {
      backward_few_rows<F, R - 1>(args);
    }
  }
}

// Every block of rows visits the widest register block's columns before the next are taken: their weights (all outputs)
// stay in the first-level cache.
template <class F>
static void backward_blocks(const BackwardArgs& args) {
  if (args.rows <= F::kStreams) {
    backward_few_rows<F, F::kStreams>(args);
    return;
  }
  const int turns = (args.rows + kBlockRows - 1) / kBlockRows;
  const int columns = backward_columns(args.rows / turns);
  for (int k = args.k_begin; k < args.k_end; k += columns) {
    int turn = 0;
    for_row_blocks<kBlockRows>(args.rows, [&](int row, int count) {
      backward_rows<F, kBlockRows>(args, count, row, k, k + columns, turn++, turns);
    });
  }
}

template <class F>
static void backward(const BackwardArgs& args) {
  BackwardArgs rest = args;
  if (F::kFormat == Format::kF32 && lanes_serve(args)) {
    for (; rest.rows >= kLaneRows; rest.rows -= kLaneRows) {
      backward_lanes(rest);
      rest.dy = static_cast<const char*>(rest.dy) + kLaneRows * rest.dy_stride;
      rest.dx += kLaneRows * rest.dx_stride;
    }
  }
  if (rest.rows > 0) backward_blocks<F>(rest);
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
