// Products with a packed matrix and with its transpose, on register tiles. One accumulator an output, summed in one
// order whatever the tile, so that a row's result is bitwise the same at any batch size.
#pragma once

#if defined(QPILOTS_GENERIC_SUMS)
template <int R, int K>
static inline void store_sums(const Vec (&acc)[R][K], float* dx, std::ptrdiff_t stride) {
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < K; ++k) dx[r * stride + k] = sum(acc[r][k]);
  }
}
#endif

static constexpr int kVectorBytes = 4 * Vec::kLanes;

// ---------------------------------------------------------------- operand formats

struct F32 {
  static constexpr Format kFormat = Format::kF32;
  static constexpr int kStep = 1;  // weights per packed element along k
  static constexpr int kABytes = 4, kDBytes = 4;

  template <int R, int NV>
  static inline void forward_step(Vec (&acc)[R][NV], const char* w, const char* a, std::ptrdiff_t stride) {
    Vec weights[NV];
    for (int n = 0; n < NV; ++n) weights[n] = Vec::load(reinterpret_cast<const float*>(w + n * kVectorBytes));
    for (int r = 0; r < R; ++r) {
      const Vec x(*reinterpret_cast<const float*>(a + r * stride));
      for (int n = 0; n < NV; ++n) acc[r][n] = fmadd(x, weights[n], acc[r][n]);
    }
  }

  // acc[r][c]: column c. `w` is the vector of the first column; the next is `pitch` bytes on.
  static constexpr int accumulators(int columns) { return columns; }
  template <int R, int K>
  static inline void backward_step(Vec (&acc)[R][K], const char* w, std::ptrdiff_t pitch, const char* dy,
                                   std::ptrdiff_t stride) {
    Vec d[R];
    for (int r = 0; r < R; ++r) d[r] = Vec::load(reinterpret_cast<const float*>(dy + r * stride));
    for (int k = 0; k < K; ++k) {
      const Vec weights = Vec::load(reinterpret_cast<const float*>(w + k * pitch));
      for (int r = 0; r < R; ++r) acc[r][k] = fmadd(d[r], weights, acc[r][k]);
    }
  }
  template <int R, int K>
  static inline void store(const Vec (&acc)[R][K], float* dx, std::ptrdiff_t stride) {
    store_sums(acc, dx, stride);
  }

  static inline void store_operand(Vec x, char* p) { x.store(reinterpret_cast<float*>(p)); }
  static inline void store_d_operand(Vec x, char* p) { x.store(reinterpret_cast<float*>(p)); }
  static inline Vec load_operand(const char* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};

// bfloat16 weights expanded to float32, operands rounded to bfloat16 but kept in float32.
struct Bf16Expanded {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kStep = 2;
  static constexpr int kABytes = 4, kDBytes = 4;

  template <int R, int NV>
  static inline void forward_step(Vec (&acc)[R][NV], const char* w, const char* a, std::ptrdiff_t stride) {
    for (int n = 0; n < NV; ++n) {
      const Pairs pairs = load_pairs(w + n * kVectorBytes);
      const Vec even = even_of(pairs), odd = odd_of(pairs);
      for (int r = 0; r < R; ++r) {
        const float* x = reinterpret_cast<const float*>(a + r * stride);
        acc[r][n] = fmadd(Vec(x[1]), odd, fmadd(Vec(x[0]), even, acc[r][n]));
      }
    }
  }

  static constexpr int accumulators(int columns) { return columns; }
  template <int R, int K>
  static inline void backward_step(Vec (&acc)[R][K], const char* w, std::ptrdiff_t pitch, const char* dy,
                                   std::ptrdiff_t stride) {
    for (int k = 0; k < K; k += 2) {
      const Pairs pairs = load_pairs(w + k / 2 * pitch);
      const Vec even = even_of(pairs), odd = odd_of(pairs);
      for (int r = 0; r < R; ++r) {
        const Vec d = Vec::load(reinterpret_cast<const float*>(dy + r * stride));
        acc[r][k] = fmadd(d, even, acc[r][k]);
        acc[r][k + 1] = fmadd(d, odd, acc[r][k + 1]);
      }
    }
  }
  template <int R, int K>
  static inline void store(const Vec (&acc)[R][K], float* dx, std::ptrdiff_t stride) {
    store_sums(acc, dx, stride);
  }

  static inline void store_operand(Vec x, char* p) { round_to_bf16(x).store(reinterpret_cast<float*>(p)); }
  static inline void store_d_operand(Vec x, char* p) { round_to_bf16(x).store(reinterpret_cast<float*>(p)); }
  static inline Vec load_operand(const char* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps on pairs. Forward: pairs along k, as packed. Backward: one byte shuffle a weight vector turns the pairs
// along k into pairs along the outputs, which meet output gradients stored with every 4 of them twice.
struct Bf16Dot {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kStep = 2;
  static constexpr int kABytes = 2, kDBytes = 4;

  template <int R, int NV>
  static inline void forward_step(Vec (&acc)[R][NV], const char* w, const char* a, std::ptrdiff_t stride) {
    Pairs weights[NV];
    for (int n = 0; n < NV; ++n) weights[n] = load_pairs(w + n * kVectorBytes);
    for (int r = 0; r < R; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * stride, sizeof pair);
      const Pairs x = _mm512_set1_epi32(pair);
      for (int n = 0; n < NV; ++n) acc[r][n] = dot_pairs(acc[r][n], weights[n], x);
    }
  }

  static constexpr int accumulators(int columns) { return columns / 2; }  // one holds both columns of a pair
  template <int R, int P>
  static inline void backward_step(Vec (&acc)[R][P], const char* w, std::ptrdiff_t pitch, const char* dy,
                                   std::ptrdiff_t stride) {
    // per 128 bits: (o0: e o)(o1: e o)(o2: e o)(o3: e o) -> (o0 o1)e (o2 o3)e (o0 o1)o (o2 o3)o
    const __m512i by_output = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    Pairs d[R];
    for (int r = 0; r < R; ++r) d[r] = load_pairs(dy + r * stride);
    for (int p = 0; p < P; ++p) {
      const Pairs weights = _mm512_shuffle_epi8(load_pairs(w + p * pitch), by_output);
      for (int r = 0; r < R; ++r) acc[r][p] = dot_pairs(acc[r][p], weights, d[r]);
    }
  }
  template <int R, int P>
  static inline void store(const Vec (&acc)[R][P], float* dx, std::ptrdiff_t stride) {
    store_pair_sums(acc, dx, stride);
  }

  static inline void store_operand(Vec x, char* p) { store_bf16(x, reinterpret_cast<std::uint16_t*>(p)); }
  static inline void store_d_operand(Vec x, char* p) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits_of(x), 16));
    const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(halves)));
  }
  static inline Vec load_operand(const char* p) { return load_bf16(reinterpret_cast<const std::uint16_t*>(p)); }
};
using Bf16 = Bf16Dot;
#else
using Bf16 = Bf16Expanded;
#endif

// Columns of a backward tile: a bfloat16 pair accumulator holds two.
template <class F>
constexpr int tile_columns(int rows) {
  return F::accumulators(2) == 1 ? (rows <= 3 ? 16 : 8) : backward_columns(rows);
}

// ---------------------------------------------------------------- z = a W^T

template <class F, int R, int NV>
static void forward_tile(const ForwardArgs& args, const char* w, const char* a, int row, int column) {
  Vec acc[R][NV];
  for (int r = 0; r < R; ++r) {
    const float* init = (args.init_shared != nullptr ? args.init_shared : args.init[row + r]) + column;
    for (int n = 0; n < NV; ++n) acc[r][n] = Vec::load(init + n * Vec::kLanes);
  }
  if (args.add != nullptr) {
    for (int n = 0; n < NV; ++n) {
      const Vec shared = Vec::load(args.add + column + n * Vec::kLanes);
      for (int r = 0; r < R; ++r) acc[r][n] = acc[r][n] + shared;
    }
  }
  const std::ptrdiff_t stride = args.a_stride;
  const int steps = (args.block->in + F::kStep - 1) / F::kStep;
#pragma GCC unroll 4
  for (int k = 0; k < steps; ++k) {
    F::template forward_step<R, NV>(acc, w, a, stride);
    w += NV * kVectorBytes;
    a += F::kStep * F::kABytes;
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < NV; ++n) acc[r][n].store(args.z + (row + r) * args.z_stride + column + n * Vec::kLanes);
  }
}

template <class F, int NV, int R>
static void forward_rows(const ForwardArgs& args, const char* w, int rows, int row, int column) {
  if constexpr (R > 0) {
    if (rows == R) {
      forward_tile<F, R, NV>(args, w, static_cast<const char*>(args.a) + row * args.a_stride, row, column);
    } else {
      forward_rows<F, NV, R - 1>(args, w, rows, row, column);
    }
  }
}

// Rows in even blocks of at most kTileRows: 32 rows are 6 6 5 5 5 5, not 6 6 6 6 6 2.
template <class Run>
static inline void for_row_blocks(int rows, Run run) {
  const int blocks = (rows + kTileRows - 1) / kTileRows;
  for (int b = 0, row = 0; b < blocks; ++b) {
    const int count = rows / blocks + (b < rows % blocks ? 1 : 0);
    run(row, count);
    row += count;
  }
}

template <class F, int NV>
static void forward_panel(const ForwardArgs& args, const char* w, int vectors, int column) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      for_row_blocks(args.rows, [&](int row, int count) { forward_rows<F, NV, kTileRows>(args, w, count, row, column); });
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
  for (int p = args.panel_begin; p < args.panel_end; ++p) {
    forward_panel<F, kPanelVectors>(args, args.weights + p * args.block->panel_stride, panel_vectors(*args.block, p),
                                    p * args.block->panel_width);
  }
}

// ---------------------------------------------------------------- dx = dy W

template <class F, int R>
static void backward_tile(const BackwardArgs& args, int row, int k) {
  constexpr int kColumns = tile_columns<F>(R);
  constexpr int kAccumulators = F::accumulators(kColumns);
  Vec acc[R][kAccumulators];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kAccumulators; ++c) acc[r][c] = Vec(0.0f);
  }
  const Block& block = *args.block;
  const char* dy = static_cast<const char*>(args.dy) + row * args.dy_stride;
  for (int p = 0; p < block.panels; ++p) {
    const int vectors = panel_vectors(block, p);
    const std::ptrdiff_t pitch = vectors * kVectorBytes;
    const char* w = args.weights + p * block.panel_stride + k / F::kStep * pitch;
    if (vectors == kPanelVectors) {
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVectors; ++n) {
        F::template backward_step<R, kAccumulators>(acc, w + n * kVectorBytes, kPanelVectors * kVectorBytes, dy,
                                                    args.dy_stride);
        dy += Vec::kLanes * F::kDBytes;
      }
    } else {
      for (int n = 0; n < vectors; ++n) {
        F::template backward_step<R, kAccumulators>(acc, w + n * kVectorBytes, pitch, dy, args.dy_stride);
        dy += Vec::kLanes * F::kDBytes;
      }
    }
  }
  F::store(acc, args.dx + row * args.dx_stride + k, args.dx_stride);
}

template <class F, int R>
static void backward_rows(const BackwardArgs& args, int rows, int row, int begin, int end) {
  if constexpr (R > 0) {
    if (rows == R) {
      for (int k = begin; k < end; k += tile_columns<F>(R)) backward_tile<F, R>(args, row, k);
    } else {
      backward_rows<F, R - 1>(args, rows, row, begin, end);
    }
  }
}

// Columns in chunks whose weights (all outputs) stay in the second-level cache while every row block visits them.
template <class F>
static void backward(const BackwardArgs& args) {
  constexpr int kChunk = 64;
  for (int k = args.k_begin; k < args.k_end; k += kChunk) {
    const int end = k + kChunk < args.k_end ? k + kChunk : args.k_end;
    for_row_blocks(args.rows, [&](int row, int count) { backward_rows<F, kTileRows>(args, count, row, k, end); });
  }
}
