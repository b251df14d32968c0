// dx = dy W on tile registers. tdpbf16ps sums the first elements of its pairs by themselves and the second ones by
// themselves, and adds the sum of both to what was there. Either way below makes that
//   C + (sum over 16 outputs + sum over the next 16),
// for few rows with the weights as they lie, for more rows with their pairs turned round.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "amx/tiles-inl.h"
#include "kernels.h"
#include "path/unroll-inl.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

constexpr int kPanelVectors = tuning::Avx512::kPanelVectors;  // as weights are packed
constexpr int kUnturnedRows = tuning::Amx::kUnturnedRows;
constexpr int kOutputs = 2 * kTile;  // that are summed before C is met

constexpr int output_blocks(int outputs) { return (outputs + kOutputs - 1) / kOutputs; }

// ---- Few rows: the first factor is 16 pairs of columns by 16 outputs, and the second holds every gradient d twice, as
// (d, 0) for the pair's even column and as (0, d) for its odd one. Half of the products are with zero, but no weight is
// moved. The sums over 32 outputs have a tile of their own, and are added to C outside the tiles. One row: 5 us a layer
// from the second-level cache, 18 from a far third; with turned weights 8 and 22.

constexpr int kOutputsAtOnce = tuning::Amx::kOutputsAtOnce;
constexpr int kColumnsAtOnce = tuning::Amx::kColumnsAtOnce, kPairs = kColumnsAtOnce / 2;

template <int kQuarter>  // its 8 words, each four times
constexpr WordIndex kSpread = word_index([](int i) { return kQuarter * 8 + i / 4; });

// 32 outputs of R rows to R vectors. A quarter of a vector has 8 / R outputs, each with all rows side by side: those
// after the outputs of the vector before.
template <int R>
QPILOTS_INLINE void interleave(__m512i* x) {
  if constexpr (R > 1) {
    interleave<R / 2>(x);
    interleave<R / 2>(x + R / 2);
    __m512i y[R];
    unroll<R / 2>([&](auto i) {
      const __m512i first = x[i], second = x[R / 2 + i];
      y[2 * i] = R == 2   ? _mm512_unpacklo_epi16(first, second)
                 : R == 4 ? _mm512_unpacklo_epi32(first, second)
                          : _mm512_unpacklo_epi64(first, second);
      y[2 * i + 1] = R == 2   ? _mm512_unpackhi_epi16(first, second)
                     : R == 4 ? _mm512_unpackhi_epi32(first, second)
                              : _mm512_unpackhi_epi64(first, second);
    });
    unroll<R>([&](auto i) { x[i] = y[i]; });
  }
}

// [rows, 32 outputs] gradients to 32 lines, one an output, of R places of 8 bytes.
template <int R>
QPILOTS_INLINE void spread(const char* dy, std::ptrdiff_t stride, int rows, char* out) {
  constexpr __mmask32 kFirstAndLast = 0x99999999u;  // (d, 0, 0, d)
  __m512i x[R];
  unroll<R>([&](auto r) { x[r] = r < rows ? _mm512_loadu_si512(dy + r * stride) : _mm512_setzero_si512(); });
  interleave<R>(x);
  unroll<R>([&](auto i) {
    unroll<4>([&](auto quarter) {
      const __m512i index = _mm512_load_si512(kSpread<quarter>.word);
      _mm512_store_si512(out + (quarter * R + i) * 64, _mm512_maskz_permutexvar_epi16(kFirstAndLast, index, x[i]));
    });
  });
}

// 8 pairs of columns, each with R rows side by side, to R vectors: one a row.
template <int R>
QPILOTS_INLINE void separate(__m512i* x) {
  if constexpr (R > 1) {
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi64(1));
    __m512i y[R];
    unroll<R / 2>([&](auto i) {
      y[i] = _mm512_permutex2var_epi64(x[2 * i], even, x[2 * i + 1]);
      y[R / 2 + i] = _mm512_permutex2var_epi64(x[2 * i], odd, x[2 * i + 1]);
    });
    separate<R / 2>(y);
    separate<R / 2>(y + R / 2);
    unroll<R>([&](auto r) { x[r] = y[r % 2 * (R / 2) + r / 2]; });
  }
}

template <int R>  // places for rows
class FewRows {
 public:
  explicit FewRows(const BackwardArgs& args) : args_(args) {}  // leaves the buffers as they are

  void run() {
    const TilesInUse tiles(Configuration(kTile, kTile, kLine));
    const Block& block = *args_.block;
    for (int first = args_.k_begin; first < args_.k_end; first += kColumnsAtOnce) {
      const int columns = smaller(kColumnsAtOnce, args_.k_end - first);
      for (int n = 0; n < block.out_padded; n += kOutputsAtOnce) {
        const int end = smaller(block.out_padded, n + kOutputsAtOnce);
        for (int i = n; i < end; i += kOutputs) {
          const char* dy = static_cast<const char*>(args_.dy) + i * kOperandBytes;
          spread<R>(dy, args_.dy_stride, args_.rows, gradients_[(i - n) / kTile]);
        }
        // a last tile may reach past the columns: those sums are not written
        for (int k = 0; k < columns; k += kTileColumns) sum(n, end, first + k, sums_[k / 2]);
      }
      for (int k = 0; k < columns; k += kTile) write(sums_[k / 2], args_.dx + first + k);
    }
  }

 private:
  static constexpr int kLine = 8 * R;  // bytes of an output's gradients, and of a pair's sums
  static constexpr int kBlocks = kOutputsAtOnce / kOutputs;

  // Outputs [begin, end) for the tile of columns from `k`.
  void sum(int begin, int end, int k, char* sums) {
    const Block& block = *args_.block;
    int blocks = 0;
    for (int p = begin / block.panel_width; p * block.panel_width < end; ++p) {
      const int vectors = panel_vectors(block, p);
      const char* w = args_.weights + p * block.panel_stride + k / 2 * (vectors * kTileBytes);
      const auto panel = [&](auto vectors) {
        const std::ptrdiff_t pitch = vectors * kTileBytes;
        for (int n = 0; n < vectors; n += 2, ++blocks, w += 2 * kTileBytes) {
          clear<0>();
          unroll<2>([&](auto second) {
            if (n + second == vectors) return;
            load<kSecond + second>(gradients_[2 * blocks + second], kLine);
            load<kFirst + second>(w + second * kTileBytes, pitch);
            multiply<0, kFirst + second, kSecond + second>();
          });
          store<0>(partial_[blocks], kLine);
        }
      };
      vectors == kPanelVectors ? panel(Index<kPanelVectors>()) : panel(vectors);
    }
    const auto add = [&](auto count) {
      for (int i = 0; i < kTile * kLine; i += 64) {
        Vec sum = begin == 0 ? Vec(0.0f) : Vec::load(reinterpret_cast<const float*>(sums + i));
        for (int b = 0; b < count; ++b) sum = sum + Vec::load(reinterpret_cast<const float*>(partial_[b] + i));
        sum.store(reinterpret_cast<float*>(sums + i));
      }
    };
    blocks == kBlocks ? add(Index<kBlocks>()) : add(blocks);
  }

  // 16 columns of every row.
  void write(const char* sums, float* dx) const {
    __m512i x[R];
    unroll<R>([&](auto i) { x[i] = _mm512_load_si512(sums + i * 64); });
    separate<R>(x);
    unroll<R>([&](auto r) {
      if (r < args_.rows) _mm512_storeu_si512(dx + r * args_.dx_stride, x[r]);
    });
  }

  const BackwardArgs& args_;
  alignas(64) char gradients_[kOutputsAtOnce / kTile][kTile * kLine];
  alignas(64) char partial_[kBlocks][kTile * kLine];
  alignas(64) char sums_[kPairs][kLine];
};

// ---- More rows: the first factor is 16 columns by 32 outputs, n and n + 16 side by side, and the second 16 such pairs
// of gradients by 16 rows. To turn the weights takes two instructions a vector.

constexpr int kTurnedBytes = kTile * kTileBytes;  // of a tile

// One row of pairs of `vectors` outputs to two columns of a tile for every 32 outputs.
QPILOTS_INLINE void turn(const char* w, int vectors, char* tile) {
  constexpr __mmask32 kOddWords = 0xAAAAAAAAu;
  for (int n = 0; n < vectors; n += 2, w += 2 * kTileBytes, tile += kTurnedBytes) {
    const __m512i low = _mm512_loadu_si512(w);
    const __m512i high = n + 1 < vectors ? _mm512_loadu_si512(w + kTileBytes) : _mm512_setzero_si512();
    _mm512_store_si512(tile, _mm512_mask_blend_epi16(kOddWords, low, _mm512_slli_epi32(high, 16)));
    _mm512_store_si512(tile + kTileBytes, _mm512_mask_blend_epi16(kOddWords, _mm512_srli_epi32(low, 16), high));
  }
}

constexpr WordIndex kPairUp = word_index([](int i) { return i % 2 * 16 + i / 2; });  // n, n + 16, n + 1, n + 17 ..

// Gradients of up to 16 rows and 32 outputs, of which 16 may be missing, to a tile of pairs by rows.
QPILOTS_INLINE void pair_up(const char* dy, std::ptrdiff_t stride, int rows, int outputs, char* tile) {
  const __mmask32 present = outputs < kOutputs ? 0xffffu : 0xffffffffu;
  const __m512i index = _mm512_load_si512(kPairUp.word);
  Vec row[kTile];
  unroll<kTile>([&](auto r) {
    const __m512i gradients = _mm512_maskz_loadu_epi16(r < rows ? present : 0, dy + r * stride);
    row[r] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, gradients));
  });
  transpose(row);
  unroll<kTile>([&](auto i) { row[i].store(reinterpret_cast<float*>(tile + i * kTileBytes)); });
}

// The scratch begins with the gradients, [block of 16 rows][block of outputs] tiles: two blocks of rows fit the share
// of any of a team of 8. For more than 32 rows the turned weights of some columns follow, [16 columns][block of
// outputs].
class ManyRows {
 public:
  explicit ManyRows(const BackwardArgs& args)
      : args_(args), row_blocks_((args.rows + kTile - 1) / kTile), blocks_(output_blocks(args.block->out_padded)) {}

  void run() {
    const TilesInUse tiles(Configuration(kTile, kTile, kTileBytes));
    const std::ptrdiff_t room = static_cast<std::ptrdiff_t>(args_.scratch_bytes) - gradients_of(row_blocks_);
    const std::ptrdiff_t tiles_of_columns = room / (kTurnedBytes * blocks_);
    if (row_blocks_ <= 2 || tiles_of_columns < 2) {
      turn_for_two_blocks();
    } else {
      turn_for_all_rows(tiles_of_columns < kTilesAtOnce ? static_cast<int>(tiles_of_columns) : kTilesAtOnce);
    }
    write_pending();
  }

 private:
  static constexpr int kTilesAtOnce = tuning::Amx::kTurnedTiles;  // of columns that are turned before rows meet them

  // Every two blocks of rows meet weights of their own turning, two tiles at a time.
  void turn_for_two_blocks() {
    for (int r = 0; r < row_blocks_; r += 2) {
      const bool two = r + 1 < row_blocks_;
      pair_up_rows(r, two ? 2 : 1);
      for (int k = args_.k_begin; k < args_.k_end; k += kTile) two ? turn_and_meet<2>(r, k) : turn_and_meet<1>(r, k);
    }
  }

  void turn_for_all_rows(int column_tiles) {
    pair_up_rows(0, row_blocks_);
    char* const turned = args_.scratch + gradients_of(row_blocks_);
    for (int first = args_.k_begin; first < args_.k_end; first += column_tiles * kTile) {
      const int end = smaller(args_.k_end, first + column_tiles * kTile);
      turn_columns(first, end, turned);
      for (int r = 0; r < row_blocks_; r += 2) {
        const bool two = r + 1 < row_blocks_;
        for (int k = first; k < end; k += 2 * kTile) {
          const char* w = turned + (k - first) * (kTileBytes * blocks_);
          if (k + kTile < end) {
            two ? meet<2, 2>(r, k, w) : meet<1, 2>(r, k, w);
          } else {
            two ? meet<2, 1>(r, k, w) : meet<1, 1>(r, k, w);
          }
        }
      }
    }
  }

  int rows_of(int row_block) const { return smaller(args_.rows - row_block * kTile, kTile); }
  std::ptrdiff_t gradients_of(int row_blocks) const {
    return static_cast<std::ptrdiff_t>(kTurnedBytes) * row_blocks * blocks_;
  }

  void pair_up_rows(int first, int count) {
    first_row_block_ = first;
    const int outputs = args_.block->out_padded;
    char* tile = args_.scratch;
    for (int r = first; r < first + count; ++r) {
      const char* dy = static_cast<const char*>(args_.dy) + r * kTile * args_.dy_stride;
      for (int n = 0; n < outputs; n += kOutputs, tile += kTurnedBytes) {
        pair_up(dy + n * kOperandBytes, args_.dy_stride, rows_of(r), outputs - n, tile);
      }
    }
  }

  // visit(panel's first block of outputs, its vectors, its pairs of columns from `k` on)
  template <class Visit>
  void for_panels(int k, Visit visit) const {
    const Block& block = *args_.block;
    for (int p = 0; p < block.panels; ++p) {
      const int vectors = panel_vectors(block, p), first = p * block.panel_width / kOutputs;
      const char* w = args_.weights + p * block.panel_stride + k / 2 * (vectors * kTileBytes);
      vectors == kPanelVectors ? visit(first, Index<kPanelVectors>(), w) : visit(first, vectors, w);
    }
  }

  void turn_columns(int first, int end, char* turned) const {
    for_panels(first, [&](int block, auto vectors, const char* w) {
      for (int k = 0; k < end - first; k += 2, w += vectors * kTileBytes) {
        turn(w, vectors, turned + (k / kTile * blocks_ + block) * kTurnedBytes + k % kTile * kTileBytes);
      }
    });
  }

  template <int RB>
  void turn_and_meet(int row_block, int k) {
    alignas(64) char turned[kPanelVectors / 2][kTurnedBytes];
    unroll<RB>([&](auto i) { clear<i>(); });
    for_panels(k, [&](int block, auto vectors, const char* w) {
      for (int i = 0; i < kTile; i += 2, w += vectors * kTileBytes) turn(w, vectors, turned[0] + i * kTileBytes);
      for (int b = 0; 2 * b < vectors; ++b) meet_block<RB, 1>(row_block, block + b, turned[b]);
    });
    finish<RB, 1>(row_block, k);
  }

  template <int RB, int KB>
  void meet(int row_block, int k, const char* turned) {
    unroll<RB * KB>([&](auto i) { clear<i>(); });
    for (int b = 0; b < blocks_; ++b) meet_block<RB, KB>(row_block, b, turned + b * kTurnedBytes);
    finish<RB, KB>(row_block, k);
  }

  // RB blocks of rows and KB tiles of columns, of one block of outputs.
  template <int RB, int KB>
  void meet_block(int row_block, int block, const char* turned) const {
    const char* gradients = args_.scratch + gradients_of(row_block - first_row_block_) + block * kTurnedBytes;
    unroll<RB>([&](auto r) { load<kSecond + r>(gradients + r * blocks_ * kTurnedBytes, kTileBytes); });
    unroll<KB>([&](auto k) {
      load<kFirst + k>(turned + k * blocks_ * kTurnedBytes, kTileBytes);
      unroll<RB>([&](auto r) { multiply<r * KB + k, kFirst + k, kSecond + r>(); });
    });
  }

  // Stores the sums, and writes those of the call before, which have reached memory by now.
  template <int RB, int KB>
  void finish(int row_block, int k) {
    const int half = 1 - pending_.half;
    unroll<RB * KB>([&](auto i) { store<i>(sums_[half][i], kTileBytes); });
    write_pending();
    pending_ = {half, RB * KB, KB, row_block, k};
  }

  void write_pending() const {
    for (int i = 0; i < pending_.tiles; ++i) {
      const int block = pending_.row_block + i / pending_.column_tiles, rows = rows_of(block);
      float* dx = args_.dx + block * kTile * args_.dx_stride + pending_.k + i % pending_.column_tiles * kTile;
      Vec row[kTile];
      unroll<kTile>([&](auto c) { row[c] = Vec::load(sums_[pending_.half][i][c]); });
      transpose(row);
      unroll<kTile>([&](auto r) {
        if (r < rows) row[r].store(dx + r * args_.dx_stride);
      });
    }
  }

  const BackwardArgs& args_;
  const int row_blocks_, blocks_;
  int first_row_block_ = 0;  // of the gradients in the scratch
  struct {
    int half = 0, tiles = 0, column_tiles = 1, row_block = 0, k = 0;
  } pending_;
  alignas(64) float sums_[2][kSums][kTile][kTile];  // column, row
};

void backward(const BackwardArgs& args) {
  if (args.rows == 1) {
    FewRows<1>(args).run();
  } else if (args.rows <= kUnturnedRows / 2) {
    FewRows<kUnturnedRows / 2>(args).run();
  } else if (args.rows <= kUnturnedRows) {
    FewRows<kUnturnedRows>(args).run();
  } else {
    ManyRows(args).run();
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
