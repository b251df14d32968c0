// Products with a packed matrix and with its transpose, on register tiles. One accumulator an output, summed in one
// order whatever the tile, so that a row's result is bitwise the same at any batch size.
#pragma once

#if defined(QPILOTS_GENERIC_SUMS)
template <int R, int K>
static inline void store_sums(const Vec (&acc)[R][K], float* dx, std::ptrdiff_t stride) {
  unroll<R>([&](auto r) { unroll<K>([&](auto k) { dx[r * stride + k] = sum(acc[r][k]); }); });
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
    unroll<NV>([&](auto n) { weights[n] = Vec::load(reinterpret_cast<const float*>(w + n * kVectorBytes)); });
    unroll<R>([&](auto r) {
      const Vec x(*reinterpret_cast<const float*>(a + r * stride));
      unroll<NV>([&](auto n) { acc[r][n] = fmadd(x, weights[n], acc[r][n]); });
    });
  }

  // Backward: one weight vector (a "unit") updates kUnit accumulators, which hold kColumns columns.
  static constexpr int kUnit = 1, kColumns = 1, kBackwardRows = kTileRows;
  static constexpr bool kAskInSteps = false, kAskInOneBlock = true;
  static constexpr int kStreams = kStreamRows;  // up to so many rows, the backward pass streams
  using Weights = Vec;
  using Gradient = Vec;
  static inline Weights load_weights(const char* w) { return Vec::load(reinterpret_cast<const float*>(w)); }
  static inline Gradient load_gradient(const char* dy) { return Vec::load(reinterpret_cast<const float*>(dy)); }
  static inline void update(Vec* acc, Weights w, Gradient d) { acc[0] = fmadd(d, w, acc[0]); }
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
    unroll<NV>([&](auto n) {
      const Pairs pairs = load_pairs(w + n * kVectorBytes);
      const Vec even = even_of(pairs), odd = odd_of(pairs);
      unroll<R>([&](auto r) {
        const float* x = reinterpret_cast<const float*>(a + r * stride);
        acc[r][n] = fmadd(Vec(x[1]), odd, fmadd(Vec(x[0]), even, acc[r][n]));
      });
    });
  }

  static constexpr int kUnit = 2, kColumns = 2, kBackwardRows = kTileRows;
  static constexpr bool kAskInSteps = false, kAskInOneBlock = true;
  static constexpr int kStreams = 1;
  struct Weights {
    Vec even, odd;
  };
  using Gradient = Vec;
  static inline Weights load_weights(const char* w) {
    const Pairs pairs = load_pairs(w);
    return {even_of(pairs), odd_of(pairs)};
  }
  static inline Gradient load_gradient(const char* dy) { return Vec::load(reinterpret_cast<const float*>(dy)); }
  static inline void update(Vec* acc, Weights w, Gradient d) {
    acc[0] = fmadd(d, w.even, acc[0]);
    acc[1] = fmadd(d, w.odd, acc[1]);
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
    unroll<NV>([&](auto n) { weights[n] = load_pairs(w + n * kVectorBytes); });
    unroll<R>([&](auto r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * stride, sizeof pair);
      const Pairs x = _mm512_set1_epi32(pair);
      unroll<NV>([&](auto n) { acc[r][n] = dot_pairs(acc[r][n], weights[n], x); });
    });
  }

  // The shuffle takes slots of the products on Zen 5. 8 rows by 2 pairs reach 87 % of peak at 16 rows (6 by 4: 79 %);
  // 12 by 2 fall to 71 %, since their gradients no longer fit the first-level cache.
  static constexpr int kUnit = 1, kColumns = 2, kBackwardRows = 8;
  // lines asked for between the steps and by the first two row blocks: 17.6 us a layer of 16 rows; in one loop before
  // them, 19.1
  static constexpr bool kAskInSteps = true;
  // up to 6 rows are bound by the way from the last-level cache: asking only competes (4 rows forward: 5.0 us,
  // else 6.6)
  static constexpr bool kAskInOneBlock = false;
  static constexpr int kStreams = 1;  // streamed, 4 rows take 6.4 us a layer from the last-level cache, in tiles 5.6
  using Weights = Pairs;
  using Gradient = Pairs;
  static inline Weights load_weights(const char* w) {
    // per 128 bits: (o0: e o)(o1: e o)(o2: e o)(o3: e o) -> (o0 o1)e (o2 o3)e (o0 o1)o (o2 o3)o
    const __m512i by_output =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    return _mm512_shuffle_epi8(load_pairs(w), by_output);
  }
  static inline Gradient load_gradient(const char* dy) { return load_pairs(dy); }
  static inline void update(Vec* acc, Weights w, Gradient d) { acc[0] = dot_pairs(acc[0], w, d); }
  template <int R, int P>
  static inline void store(const Vec (&acc)[R][P], float* dx, std::ptrdiff_t stride) {
    store_pair_sums(acc, dx, stride);
  }

  static inline void store_operand(Vec x, char* p) { store_bf16(x, reinterpret_cast<std::uint16_t*>(p)); }
  static inline void store_d_operand(Vec x, char* p) {
    const __m256i halves = to_bf16_lanes(x);
    const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(halves)));
  }
  static inline Vec load_operand(const char* p) { return load_bf16(reinterpret_cast<const std::uint16_t*>(p)); }
};
using Bf16 = Bf16Dot;
#else
using Bf16 = Bf16Expanded;
#endif

// Weights that are needed next, asked for a few lines at every stop of the row blocks before: spread over arithmetic,
// their latency and their traffic hide behind it. All at once, in one row block, they stall it (16 rows in float32,
// weights in memory: 53 us a layer unasked, 65 at once, 36 spread).
struct Ahead {
  const char* next;
  int lines;  // a stop

  void ask() const {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64, 0, 2);
  }
};

// Accumulators a row of a backward tile. All divide kPad columns.
template <class F>
constexpr int tile_accumulators(int rows) {
  return F::kUnit != F::kColumns ? (rows <= 3 ? 8 : rows <= 6 ? 4 : 2) : backward_columns(rows);
}

// ---------------------------------------------------------------- z = a W^T

static constexpr int kStopSteps = 4;  // of a forward tile

template <class F, int R, int NV>
static void forward_tile(const ForwardArgs& args, const char* w, int row, int column, Ahead ahead) {
  Vec acc[R][NV];
  unroll<R>([&](auto r) {
    const float* init = (args.init_shared != nullptr ? args.init_shared : args.init[row + r]) + column;
    unroll<NV>([&](auto n) { acc[r][n] = Vec::load(init + n * Vec::kLanes); });
  });
  if (args.add != nullptr) {
    unroll<NV>([&](auto n) {
      const Vec shared = Vec::load(args.add + column + n * Vec::kLanes);
      unroll<R>([&](auto r) { acc[r][n] = acc[r][n] + shared; });
    });
  }
  const std::ptrdiff_t stride = args.a_stride;
  const char* a = static_cast<const char*>(args.a) + row * stride;
  const auto step = [&](auto) __attribute__((always_inline)) {
    F::template forward_step<R, NV>(acc, w, a, stride);
    w += NV * kVectorBytes;
    a += F::kStep * F::kABytes;
  };
  int left = (args.block->in + F::kStep - 1) / F::kStep;
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
static void forward_single(const ForwardArgs& args, const char* w, int column) {
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
static void forward_rows(const ForwardArgs& args, const char* w, int rows, int row, int column, Ahead ahead) {
  if constexpr (R > 0) {
    if (rows == R) {
      forward_tile<F, R, NV>(args, w, row, column, ahead);
    } else {
      forward_rows<F, NV, R - 1>(args, w, rows, row, column, ahead);
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

template <class F, int NV>
static void forward_panel(const ForwardArgs& args, const char* w, int vectors, int column) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      const int blocks = (args.rows + kTileRows - 1) / kTileRows;
      const int stops = args.block->in / (F::kStep * kStopSteps);
      const int lines = blocks == 1 && !F::kAskInOneBlock ? 0 : (NV * kStopSteps + blocks - 1) / blocks;
      Ahead next_panel{w + args.block->panel_stride, lines};
      for_row_blocks<kTileRows>(args.rows, [&](int row, int count) {
        forward_rows<F, NV, kTileRows>(args, w, count, row, column, next_panel);
        next_panel.next += stops * next_panel.lines * 64;
      });
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

// ---------------------------------------------------------------- dx = dy W

static constexpr int kChunk = 64;  // columns

template <class F, int R, int NV, int N, bool kAsk>
static inline void backward_panel(Vec (&acc)[R][N], const char* w, const char* dy, std::ptrdiff_t stride,
                                  const char* ahead, int lines) {
  constexpr int kUnits = N / F::kUnit;
  constexpr std::ptrdiff_t kPitch = NV * kVectorBytes;
  if constexpr (kAsk && !F::kAskInSteps) {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
  }
  for (int n = 0; n < NV; ++n) {
    if constexpr (kAsk && F::kAskInSteps) {
      unroll<(kUnits + 1) / 2>([&](auto i) { __builtin_prefetch(ahead + (n + i * NV) * 64, 0, 2); });
    }
    typename F::Gradient d[R];
    unroll<R>([&](auto r) { d[r] = F::load_gradient(dy + r * stride); });
    unroll<kUnits>([&](auto u) {
      const typename F::Weights weights = F::load_weights(w + u * kPitch);
      unroll<R>([&](auto r) { F::update(&acc[r][u * F::kUnit], weights, d[r]); });
    });
    w += kVectorBytes;
    dy += Vec::kLanes * F::kDBytes;
  }
}

template <class F, int R, int NV, int N>
static inline void backward_narrow_panel(Vec (&acc)[R][N], const char* w, int vectors, const char* dy,
                                         std::ptrdiff_t stride) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      backward_panel<F, R, NV, N, false>(acc, w, dy, stride, w, 0);
    } else {
      backward_narrow_panel<F, R, NV - 1, N>(acc, w, vectors, dy, stride);
    }
  }
}

// The row blocks ask for the next chunk in turns; `turn` of `turns`.
template <class F, int R>
static void backward_tile(const BackwardArgs& args, int row, int k, int turn, int turns) {
  constexpr int N = tile_accumulators<F>(R);
  Vec acc[R][N];
  unroll<R>([&](auto r) { unroll<N>([&](auto c) { acc[r][c] = Vec(0.0f); }); });
  const Block& block = *args.block;
  const std::ptrdiff_t panel_stride = static_cast<std::ptrdiff_t>(block.panel_stride);
  const char* dy = static_cast<const char*>(args.dy) + row * args.dy_stride;
  const char* w = args.weights;
  const int full = block.out_padded / block.panel_width;
  const std::ptrdiff_t first = k / F::kStep * kPanelVectors * kVectorBytes;
  constexpr int kLines = N / F::kUnit * kPanelVectors;  // of a panel in this tile
  const int lines = F::kAskInSteps ? (kLines + 1) / 2 : (kLines + turns - 1) / turns;
  const std::ptrdiff_t chunk = kChunk / F::kStep * kPanelVectors * kVectorBytes;
  const std::ptrdiff_t ahead = F::kAskInSteps && turn > 1 ? first : first + chunk + turn * lines * 64;
  const auto panels = [&](auto ask) __attribute__((always_inline)) {
    for (int p = 0; p < full; ++p) {
      backward_panel<F, R, kPanelVectors, N, ask.value>(acc, w + first, dy, args.dy_stride, w + ahead, lines);
      w += panel_stride;
      dy += kPanelVectors * Vec::kLanes * F::kDBytes;
    }
  };
  if (turns == 1 && !F::kAskInOneBlock) {
    panels(std::false_type());
  } else {
    panels(std::true_type());
  }
  if (full < block.panels) {
    const int vectors = panel_vectors(block, full);
    backward_narrow_panel<F, R, kPanelVectors - 1, N>(acc, w + k / F::kStep * vectors * kVectorBytes, vectors, dy,
                                                      args.dy_stride);
  }
  F::store(acc, args.dx + row * args.dx_stride + k, args.dx_stride);
}

template <class F, int R>
static void backward_rows(const BackwardArgs& args, int rows, int row, int begin, int end, int turn, int turns) {
  if constexpr (R > 1) {
    if (rows == R) {
      constexpr int kColumns = tile_accumulators<F>(R) / F::kUnit * F::kColumns;
      for (int k = begin; k < end; k += kColumns) backward_tile<F, R>(args, row, k, turn, turns);
    } else {
      backward_rows<F, R - 1>(args, rows, row, begin, end, turn, turns);
    }
  }
}

// Few rows: bound by the weights' way from cache or memory, which is fastest in the order of their addresses. The
// accumulators of many columns wait in the first-level cache meanwhile; each sums in the same order as in a tile.
// 2 to 4 rows in float32, a layer from the last-level cache: in tiles 14.1, 16.0, 16.0 us; streamed 10.6, 10.9, 12.5.
// sums: [stores][R][N]
template <class F, int R, int N, int NV, int kPanels>
static inline void backward_stream_panels(const char* w, std::ptrdiff_t panel_stride, const char* dy,
                                          std::ptrdiff_t dy_stride, int stores, Vec* sums) {
  typename F::Gradient d[R][NV * kPanels];
  unroll<R>([&](auto r) {
    unroll<NV * kPanels>(
        [&](auto n) { d[r][n] = F::load_gradient(dy + r * dy_stride + n * Vec::kLanes * F::kDBytes); });
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
static void backward_stream(const BackwardArgs& args) {
  constexpr int N = tile_accumulators<F>(R), kColumns = N / F::kUnit * F::kColumns;  // of one store
  constexpr int kSpan = R == 1 ? 256 : R == 2 ? 128 : 64;                            // columns: 16 kB of sums
  constexpr int kPanels = R <= 2 ? 2 : 1;                                            // at once: 16 gradients at most
  const Block& block = *args.block;
  Vec sums[kSpan / kColumns][R][N];
  for (int k = args.k_begin; k < args.k_end; k += kSpan) {
    const int stores = (args.k_end - k < kSpan ? args.k_end - k : kSpan) / kColumns;
    Vec* all = &sums[0][0][0];
    for (int i = 0; i < stores * R * N; ++i) all[i] = Vec(0.0f);
    const auto weights = [&](int p, int vectors) {
      return args.weights + p * block.panel_stride + k / F::kStep * vectors * kVectorBytes;
    };
    const auto gradients = [&](int p) {
      return static_cast<const char*>(args.dy) + p * kPanelVectors * Vec::kLanes * F::kDBytes;
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
    for (int i = 0; i < stores; ++i) F::store(sums[i], args.dx + k + i * kColumns, args.dx_stride);
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

// Columns in chunks whose weights (all outputs) stay in the second-level cache while every row block visits them.
template <class F>
static void backward(const BackwardArgs& args) {
  if (args.rows <= F::kStreams) {
    backward_few_rows<F, F::kStreams>(args);
    return;
  }
  const int turns = (args.rows + F::kBackwardRows - 1) / F::kBackwardRows;
  for (int k = args.k_begin; k < args.k_end; k += kChunk) {
    const int end = k + kChunk < args.k_end ? k + kChunk : args.k_end;
    int turn = 0;
    for_row_blocks<F::kBackwardRows>(args.rows, [&](int row, int count) {
      backward_rows<F, F::kBackwardRows>(args, count, row, k, end, turn++, turns);
    });
  }
}
