// How the operands of the two products (forward-inl.h, backward-inl.h, backward_dot-inl.h) meet in registers. The
// products of an output are summed in one order whatever the block, so that a row's result is bitwise the same at any
// batch size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "path/unroll-inl.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

#if defined(QPILOTS_GENERIC_SUMS)
template <int R, int K>
static inline void store_sums(const Vec (&acc)[R][K], float* dx, std::ptrdiff_t stride) {
  unroll<R>([&](auto r) { unroll<K>([&](auto k) { dx[r * stride + k] = sum(acc[r][k]); }); });
}
#endif

static constexpr int kVectorBytes = 4 * Vec::kLanes;
static constexpr int kPanelVectors = Tuning::kPanelVectors, kBlockRows = Tuning::kBlockRows;

// GCC loads a weight anew for each of 3 rows otherwise: 70 and 78 % of peak in float32 and bfloat16, instead of 98.
template <class Register>
QPILOTS_INLINE void keep_in_register(Register& weights) {
#if defined(__x86_64__)
  asm("" : "+v"(weights));
#else
  (void)weights;
#endif
}

// acc += a b, always into acc's own register: at a weight's last use GCC else multiplies into the weight's and moves
// registers about (a float32 backward block at 79 % of peak instead of 82).
QPILOTS_INLINE void accumulate(Vec& acc, Vec a, Vec b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
#else
  acc = fmadd(a, b, acc);
#endif
}

struct F32 {
  static constexpr Format kFormat = Format::kF32;
  static constexpr int kStep = 1;    // weights per packed element along k
  static constexpr int kABytes = 4;  // an element of an operand, of a forward product or a backward one

  template <int R, int NV>
  static inline void forward_step(Vec (&acc)[R][NV], const char* w, const char* a, std::ptrdiff_t stride) {
    Vec weights[NV];
    unroll<NV>([&](auto n) {
      weights[n] = Vec::load(reinterpret_cast<const float*>(w + n * kVectorBytes));
      keep_in_register(weights[n].v);
    });
    unroll<R>([&](auto r) {
      const Vec x(*reinterpret_cast<const float*>(a + r * stride));
      unroll<NV>([&](auto n) { accumulate(acc[r][n], x, weights[n]); });
    });
  }

  static constexpr bool kAskInOneBlock = tuning::EveryPath::kAskInOneBlock;
  static constexpr int kUnit = 1;  // backward, columns that a weight vector holds: an accumulator each
  static constexpr int kStreams = Tuning::kStreamRows;  // up to so many rows, the backward pass streams
  using Weights = Vec;
  static inline Weights load_weights(const char* w) { return Vec::load(reinterpret_cast<const float*>(w)); }
  static inline void update(Vec* acc, Weights w, Vec d) { accumulate(acc[0], d, w); }

  static inline void store_operand(Vec x, char* p) { x.store(reinterpret_cast<float*>(p)); }
  static inline void store_operand_pair(Vec x, Vec next, char* p) {
    store_operand(x, p);
    store_operand(next, p + kVectorBytes);
  }
  static inline Vec load_operand(const char* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};

// bfloat16 weights expanded to float32, operands rounded to bfloat16 but kept in float32.
struct Bf16Expanded {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kStep = 2;
  static constexpr int kABytes = 4;

  template <int R, int NV>
  static inline void forward_step(Vec (&acc)[R][NV], const char* w, const char* a, std::ptrdiff_t stride) {
    unroll<2>([&](auto odd) {  // half of the weights at once: with both, registers run out and operands are loaded anew
      Vec weights[NV];
      unroll<NV>([&](auto n) {
        const Pairs pairs = load_pairs(w + n * kVectorBytes);
        weights[n] = odd == 0 ? even_of(pairs) : odd_of(pairs);
        keep_in_register(weights[n].v);
      });
      unroll<R>([&](auto r) {
        const Vec x(reinterpret_cast<const float*>(a + r * stride)[odd]);
        unroll<NV>([&](auto n) { accumulate(acc[r][n], x, weights[n]); });
      });
    });
  }

  static constexpr bool kAskInOneBlock = tuning::EveryPath::kAskInOneBlock;
  static constexpr int kUnit = 2;
  static constexpr int kStreams = 1;
  struct Weights {
    Vec even, odd;
  };
  static inline Weights load_weights(const char* w) {
    const Pairs pairs = load_pairs(w);
    return {even_of(pairs), odd_of(pairs)};
  }
  static inline void update(Vec* acc, Weights w, Vec d) {
    acc[0] = fmadd(d, w.even, acc[0]);
    acc[1] = fmadd(d, w.odd, acc[1]);
  }

  static inline void store_operand(Vec x, char* p) { round_to_bf16(x).store(reinterpret_cast<float*>(p)); }
  static inline void store_operand_pair(Vec x, Vec next, char* p) {
    store_operand(x, p);
    store_operand(next, p + kVectorBytes);
  }
  static inline Vec load_operand(const char* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps on pairs along k, as packed; backward: backward_dot-inl.h.
struct Bf16Dot {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kStep = 2;
  static constexpr int kABytes = 2;

  template <int R, int NV>
  static inline void forward_step(Vec (&acc)[R][NV], const char* w, const char* a, std::ptrdiff_t stride) {
    Pairs weights[NV];
    unroll<NV>([&](auto n) {
      weights[n] = load_pairs(w + n * kVectorBytes);
      keep_in_register(weights[n]);
    });
    unroll<R>([&](auto r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * stride, sizeof pair);
      const Pairs x = _mm512_set1_epi32(pair);
      unroll<NV>([&](auto n) { acc[r][n] = dot_pairs(acc[r][n], weights[n], x); });
    });
  }

  static constexpr bool kAskInOneBlock = tuning::Avx512Bf16::kAskInOneBlock;

  static inline void store_operand(Vec x, char* p) { store_bf16(x, reinterpret_cast<std::uint16_t*>(p)); }
  static inline void store_operand_pair(Vec x, Vec next, char* p) { store_bf16_pair(x, next, p); }
  static inline Vec load_operand(const char* p) { return load_bf16(reinterpret_cast<const std::uint16_t*>(p)); }
};
using Bf16 = Bf16Dot;
#else
using Bf16 = Bf16Expanded;
#endif

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
