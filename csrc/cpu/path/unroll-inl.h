// Loops that are unrolled by the front end, and what is always inlined.
#pragma once

#define QPILOTS_INLINE static inline __attribute__((always_inline))
// For whatever keeps accumulators: where GCC's budget for a file is used up, it leaves a lambda as a call and its
// accumulators in memory (30 % of peak).
#define QPILOTS_FLAT static __attribute__((flatten))

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// Loops over accumulators are unrolled by the front end: with plain loops GCC keeps the array in memory (12 % of peak).
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class Body>
static inline __attribute__((always_inline)) void unroll(const Body& body) {
  if constexpr (I < N) {
    body(Index<I>());
    unroll<N, I + 1>(body);
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
