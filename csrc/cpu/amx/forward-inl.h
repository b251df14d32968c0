// z = a W^T on tile registers: two blocks of 16 rows meet two vectors of 16 outputs.
#pragma once

#include <cstddef>
#include <cstring>

#include "amx/tiles-inl.h"
#include "kernels.h"
#include "path/unroll-inl.h"

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// RB blocks of rows, the last of last_rows, the others of 16; `groups` times, one after the other from `row`.
template <int RB>
struct ForwardRows {
  static constexpr int kVectors = kSums / RB;  // of outputs at once
  const ForwardArgs& args;
  int row, groups, last_rows;

  int rows(int block) const { return block + 1 < RB ? kTile : last_rows; }

  // The sums of one group and NB vectors of outputs, whose weights start at `w`.
  template <int NB>
  void run(int first, const char* w, std::ptrdiff_t pitch, int column) const {
    const std::ptrdiff_t z_bytes = args.z_stride * static_cast<std::ptrdiff_t>(sizeof(float));
    const auto z = [&](int r, int n) { return args.z + (first + r * kTile) * args.z_stride + column + n * kTile; };
    const char* a[RB];
    unroll<RB>([&](auto r) { a[r] = static_cast<const char*>(args.a) + (first + r * kTile) * args.a_stride; });
    if (args.init_shared != nullptr && args.add == nullptr) {
      unroll<RB * NB>([&](auto i) { load<sum(i / NB, i % NB)>(args.init_shared + column + i % NB * kTile, 0); });
    } else {
      start(first, column, NB * kTile);
      unroll<RB * NB>([&](auto i) { load<sum(i / NB, i % NB)>(z(i / NB, i % NB), z_bytes); });
    }
    for (int k = kTileColumns; k <= args.block->in_padded; k += kTileColumns) {
      unroll<RB>([&](auto r) {
        load<kFirst + r>(a[r], args.a_stride);
        a[r] += kTileBytes;
      });
      unroll<NB>([&](auto n) {
        load<kSecond + n % 2>(w + n * kTileBytes, pitch);
        unroll<RB>([&](auto r) { multiply<sum(r, n), kFirst + r, kSecond + n % 2>(); });
      });
      w += kTile * pitch;
    }
    if (args.block->in_padded % kTileColumns != 0) last_columns<NB>(a, w, pitch);
    unroll<RB * NB>([&](auto i) { store<sum(i / NB, i % NB)>(z(i / NB, i % NB), z_bytes); });
  }

  // The registers of a block are all in one half.
  static constexpr int sum(int block, int vector) { return block * kVectors + vector; }

  // Writes what the sums start from to where they will be.
  void start(int first, int column, int columns) const {
    for (int r = first; r < first + (RB - 1) * kTile + last_rows; ++r) {
      const float* init = (args.init_shared != nullptr ? args.init_shared : args.init[r]) + column;
      float* z = args.z + r * args.z_stride + column;
      for (int c = 0; c < columns; ++c) z[c] = args.add == nullptr ? init[c] : init[c] + args.add[column + c];
    }
  }

  // Half a tile of columns: copies filled up with zeros.
  template <int NB>
  void last_columns(const char* const (&a)[RB], const char* w, std::ptrdiff_t pitch) const {
    alignas(64) char copy[kTile * kTileBytes] = {};
    unroll<RB>([&](auto r) {
      for (int i = 0; i < rows(r); ++i) std::memcpy(copy + i * kTileBytes, a[r] + i * args.a_stride, kTileBytes / 2);
      load<kFirst + r>(copy, kTileBytes);
    });
    std::memset(copy, 0, sizeof copy);
    unroll<NB>([&](auto n) {
      for (int i = 0; i < kTile / 2; ++i) {
        std::memcpy(copy + i * kTileBytes, w + i * pitch + n * kTileBytes, kTileBytes);
      }
      load<kSecond>(copy, kTileBytes);
      unroll<RB>([&](auto r) { multiply<sum(r, n), kFirst + r, kSecond>(); });
    });
  }

  template <int NB>
  void run_vectors(int vectors, const char* w, std::ptrdiff_t pitch, int column) const {
    if constexpr (NB > 0) {
      if (vectors < NB) {
        run_vectors<NB - 1>(vectors, w, pitch, column);
        return;
      }
      for (int g = 0; g < groups; ++g) run<NB>(row + g * RB * kTile, w, pitch, column);
    }
  }

  void run_panels() const {
    const TilesInUse tiles(Configuration(rows(0), last_rows, kTileBytes));
    for (int p = args.panel_begin; p < args.panel_end; ++p) {
      const int vectors = panel_vectors(*args.block, p), column = p * args.block->panel_width;
      const char* w = args.weights + p * args.block->panel_stride;
      for (int n = 0; n < vectors; n += kVectors) {
        run_vectors<kVectors>(smaller(kVectors, vectors - n), w + n * kTileBytes, vectors * kTileBytes,
                              column + n * kTile);
      }
    }
  }
};

void forward(const ForwardArgs& args) {
  const int pairs = args.rows / (2 * kTile), rest = args.rows % (2 * kTile), row = args.rows - rest;
  if (pairs > 0) ForwardRows<2>{args, 0, pairs, kTile}.run_panels();
  if (rest > kTile) {
    ForwardRows<2>{args, row, 1, rest - kTile}.run_panels();
  } else if (rest > 0) {
    ForwardRows<1>{args, row, 1, rest}.run_panels();
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
