// Threads of one call: a barrier that spins briefly and then yields, teams, work queues, denormals.
#pragma once

#include <sched.h>

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tuning.h"

namespace qpilots::cpu {

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Reusable by any fixed number of threads.
class alignas(64) Barrier {
 public:
  void wait(int size) {
    if (size == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < tuning::Call::kSpins) {
        pause_cpu();
      } else {
        sched_yield();  // more threads than processors: let the late one run
      }
    }
  }

 private:
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// Threads that work on one item together; a team of one never waits.
struct Team {
  int rank, size;
  Barrier* barrier;

  void wait() const {
    if (size > 1) barrier->wait(size);
  }
  // This member's part of [0, count).
  int begin(int count) const { return static_cast<int>(static_cast<long>(count) * rank / size); }
  int end(int count) const { return static_cast<int>(static_cast<long>(count) * (rank + 1) / size); }
};

// Flushes denormals to zero while it lives: saturated activations give denormal gradients, and one such operand costs
// some processors over a hundred cycles. Restores the caller's mode.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace qpilots::cpu
