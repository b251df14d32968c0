// The bfloat16 products on the tile registers of Intel's AMX. A product sums 32 columns of 16 rows into 16 outputs:
// pairs along the columns, as the weights are packed, are what tdpbf16ps wants of its second factor. Backward the sum
// runs along the outputs, across those pairs: there the weights are the first factor, 16 pairs of columns by 16
// outputs, and the second holds each gradient d twice, as (d, 0) for the pair's even column and as (0, d) for its odd
// one. Half of those products are with zero, but no weight is moved: turning the pairs round would take four times as
// long as the products of 16 rows, and a second copy of the weights doubles what a call of few rows waits for.
//
// One row or many, the sums are the same: a row's result is bitwise that of any batch.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace qpilots::cpu {
namespace {

#include "unroll.h"

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

// ---------------------------------------------------------------- forward

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

// ---------------------------------------------------------------- backward

constexpr int kGradientRows = 8;                // of a tile of gradients: 16 columns of sums
constexpr int kSpan = 512, kPairs = kSpan / 2;  // columns that are summed before any is written
// Spread gradients at a time, of one block of rows and of two: with two, what stays in the first-level cache beside the
// weights that pass through it (128 rows: 79 us a layer; with as much as for one 88, with all 96).
constexpr int kSpreadBytes[] = {32 << 10, 16 << 10};

struct SpreadIndex {
  alignas(64) short word[4][32];
};
constexpr SpreadIndex kSpreadIndex = [] {  // of every quarter's 8 words, each four times
  SpreadIndex index{};
  for (int i = 0; i < 4 * 32; ++i) index.word[i / 32][i % 32] = static_cast<short>(i / 32 * 8 + i % 32 / 4);
  return index;
}();

// A quarter's 8 gradients d, each as (d, 0, 0, d): what the even and the odd column of a pair are multiplied with.
template <int kQuarter>
QPILOTS_INLINE __m512i spread_quarter(__m512i gradients) {
  constexpr __mmask32 kFirstAndLast = 0x99999999u;
  return _mm512_maskz_permutexvar_epi16(kFirstAndLast, _mm512_load_si512(kSpreadIndex.word[kQuarter]), gradients);
}

// [8 rows, 32 outputs] gradients to 32 lines, one an output, of 8 bytes a row. Missing rows are zero.
QPILOTS_INLINE void spread(const char* dy, std::ptrdiff_t stride, int rows, char* out) {
  const auto gradients = [&](int r) { return r < rows ? _mm512_loadu_si512(dy + r * stride) : _mm512_setzero_si512(); };
  __m512i low[4], high[4];
  unroll<4>([&](auto i) {
    const __m512i even = gradients(2 * i), odd = gradients(2 * i + 1);
    low[i] = _mm512_unpacklo_epi16(even, odd);
    high[i] = _mm512_unpackhi_epi16(even, odd);
  });
  // of outputs 8 quarter + j, all rows
  const auto write = [&](__m512i gradients_of_rows, int j) {
    unroll<4>([&](auto quarter) {
      _mm512_store_si512(out + (8 * quarter + j) * kTileBytes, spread_quarter<quarter>(gradients_of_rows));
    });
  };
  unroll<2>([&](auto half) {
    const __m512i(&x)[4] = half == 0 ? low : high;
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    write(_mm512_unpacklo_epi64(a, b), 4 * half);
    write(_mm512_unpackhi_epi64(a, b), 4 * half + 1);
    write(_mm512_unpacklo_epi64(c, d), 4 * half + 2);
    write(_mm512_unpackhi_epi64(c, d), 4 * half + 3);
  });
}

// Of one row, without places for others.
QPILOTS_INLINE void spread_one(const char* dy, char* out) {
  const __m512i gradients = _mm512_loadu_si512(dy);
  unroll<4>([&](auto quarter) { _mm512_store_si512(out + quarter * 64, spread_quarter<quarter>(gradients)); });
}

// Sums of 8 pairs of columns, lines of 8 rows each, to 16 columns of every row.
QPILOTS_INLINE void gather(const char* sums, int rows, float* dx, std::ptrdiff_t stride) {
  __m512i x[8], y[8];
  unroll<4>([&](auto i) {
    const __m512i even = _mm512_load_si512(sums + 2 * i * kTileBytes);
    const __m512i odd = _mm512_load_si512(sums + (2 * i + 1) * kTileBytes);
    x[i] = _mm512_unpacklo_epi64(even, odd);  // pairs 2 i, 2 i + 1 of rows 0 2 4 6
    x[4 + i] = _mm512_unpackhi_epi64(even, odd);
  });
  unroll<2>([&](auto odd) {
    const __m512i* pairs = x + 4 * odd;
    const __m512i low = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0x44);
    const __m512i high = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0xEE);
    const __m512i low2 = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0x44);
    const __m512i high2 = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0xEE);
    y[odd] = _mm512_shuffle_i64x2(low, low2, 0x88);
    y[2 + odd] = _mm512_shuffle_i64x2(low, low2, 0xDD);
    y[4 + odd] = _mm512_shuffle_i64x2(high, high2, 0x88);
    y[6 + odd] = _mm512_shuffle_i64x2(high, high2, 0xDD);
  });
  unroll<8>([&](auto r) {
    if (r < rows) _mm512_storeu_si512(dx + r * stride, y[r]);
  });
}

// RB blocks of up to 8 rows from `row`; one row alone has lines of its own width, kLine bytes.
template <int RB, int kLine>
class BackwardRows {
 public:
  BackwardRows(const BackwardArgs& args, int row) : args_(args), row_(row) {}  // leaves the buffers as they are

  void run() {
    constexpr int KB = kSums / RB;
    const Block& block = *args_.block;
    const int panels = kTilesAtOnce * kTile / block.panel_width;  // at once
    for (int first = args_.k_begin; first < args_.k_end; first += kSpan) {
      const int columns = smaller(kSpan, args_.k_end - first);
      for (int p = 0; p < block.panels; p += panels) {
        const int end = smaller(block.panels, p + panels);
        spread_panels(p, end);
        int k = 0;  // a last tile may reach past the columns: those sums are not written
        for (; k + KB * kTileColumns <= columns; k += KB * kTileColumns) sum_panels<KB>(p, end, first + k, k / 2);
        for (; k < columns; k += kTileColumns) sum_panels<1>(p, end, first + k, k / 2);
      }
      write(first, columns);
    }
  }

 private:
  int rows_of(int block) const { return smaller(args_.rows - row_ - block * kGradientRows, kGradientRows); }

  void spread_panels(int begin, int end) {
    const Block& block = *args_.block;
    const int first = begin * block.panel_width, last = smaller(end * block.panel_width, block.out_padded);
    for (int r = 0; r < RB; ++r) {
      const char* dy = static_cast<const char*>(args_.dy) + (row_ + r * kGradientRows) * args_.dy_stride;
      for (int n = first; n < last; n += 2 * kTile) {
        char* out = gradients_[r][(n - first) / kTile][0];
        if constexpr (kLine == kTileBytes) {
          spread(dy + n * kOperandBytes, args_.dy_stride, rows_of(r), out);
        } else {
          spread_one(dy + n * kOperandBytes, out);
        }
      }
    }
  }

  // The panels' outputs for KB tiles of weights, from column `k`, whose sums are at `pair`.
  template <int KB>
  void sum_panels(int begin, int end, int k, int pair) {
    static_assert(RB * KB <= kSums);
    const auto sum = [&](int i) { return sums_[i % RB][pair + i / RB * kTile]; };
    unroll<RB * KB>([&](auto i) {
      if (begin == 0) {
        clear<i>();
      } else {
        load<i>(sum(i), kLine);
      }
    });
    const Block& block = *args_.block;
    int tile = 0;
    for (int p = begin; p < end; ++p) {
      const int vectors = panel_vectors(block, p);
      const std::ptrdiff_t pitch = vectors * kTileBytes;
      const char* w = args_.weights + p * block.panel_stride + k / 2 * pitch;
      for (int n = 0; n < vectors; ++n, ++tile, w += kTileBytes) {
        unroll<RB>([&](auto r) { load<kSecond + r>(gradients_[r][tile], kLine); });
        unroll<KB>([&](auto b) {
          load<kFirst + b % 2>(w + b * kTile * pitch, pitch);
          unroll<RB>([&](auto r) { multiply<b * RB + r, kFirst + b % 2, kSecond + r>(); });
        });
      }
    }
    unroll<RB * KB>([&](auto i) { store<i>(sum(i), kLine); });
  }

  void write(int first, int columns) {
    float* dx = args_.dx + row_ * args_.dx_stride + first;
    if constexpr (kLine < kTileBytes) {
      std::memcpy(dx, sums_, columns * sizeof(float));
    } else {
      for (int r = 0; r < RB; ++r, dx += kGradientRows * args_.dx_stride) {
        for (int k = 0; k < columns; k += kTile) gather(sums_[r][k / 2], rows_of(r), dx + k, args_.dx_stride);
      }
    }
  }

  static constexpr int kTilesAtOnce = kSpreadBytes[RB - 1] / (RB * kTile * kLine);

  const BackwardArgs& args_;
  const int row_;
  alignas(64) char gradients_[RB][kTilesAtOnce][kTile][kLine];
  alignas(64) char sums_[RB][kPairs][kLine];
};

template <int RB, int kLine>
void backward_rows(const BackwardArgs& args, int row) {
  BackwardRows<RB, kLine>(args, row).run();
}

void backward(const BackwardArgs& args) {
  constexpr int kOneRowBytes = kTileBytes / kGradientRows;
  if (args.rows == 1) {
    const TilesInUse tiles(Configuration(kTile, kTile, kOneRowBytes));
    backward_rows<1, kOneRowBytes>(args, 0);
    return;
  }
  const TilesInUse tiles(Configuration(kTile, kTile, kTileBytes));
  int row = 0;
  for (; args.rows - row > kGradientRows; row += 2 * kGradientRows) backward_rows<2, kTileBytes>(args, row);
  if (row < args.rows) backward_rows<1, kTileBytes>(args, row);
}

// ---------------------------------------------------------------- the machine's limit

double peak(Format format, long iterations) {
  if (format != Format::kBf16) return table_avx512_bf16()->peak(format, iterations);
  const TilesInUse tiles(Configuration(kTile, kTile, kTileBytes));
  unroll<kSecond + 2>([&](auto i) { clear<i>(); });
  for (long i = 0; i < iterations; ++i) {  // a product of tiles takes about as long as 16 of vectors
    unroll<kSums>([&](auto s) { multiply<s, kFirst + s / 2, kSecond + s % 2>(); });
  }
  return 2.0 * kSums * kTile * kTile * kTileColumns * static_cast<double>(iterations);
}

}  // namespace

const KernelTable* table_avx512_amx() {
  static const KernelTable table = [] {
    KernelTable t = *table_avx512_bf16();
    t.name = "avx512_amx";
    t.peak = peak;
    FormatKernels& bf16 = t.formats[static_cast<int>(Format::kBf16)];
    bf16.tile_rows = 128;  // U at B=256: 74 ms; with 32 rows 86, with 64 79, with 256 76
    bf16.forward = forward;
    bf16.backward = backward;
    return t;
  }();
  return &table;
}

}  // namespace qpilots::cpu
