// The parallel region of a call, and how items are dealt to its threads.
#pragma once

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "call/parallel.h"
#include "call/sampler.h"
#include "tuning.h"

namespace qpilots::cpu {

template <class Body>
void parallel_region([[maybe_unused]] int threads, Body body) {
#if defined(__SANITIZE_THREAD__)
  // GCC's OpenMP is not instrumented: ThreadSanitizer would take its fork and join for races.
  if (usable_threads(threads) > 1) {
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) {
      others.emplace_back([&body, thread, threads] {
        const FlushDenormals flush;
        body(thread, threads);
      });
    }
    {
      const FlushDenormals flush;
      body(0, threads);
    }
    for (std::thread& other : others) other.join();
    return;
  }
#elif defined(_OPENMP)
  if (usable_threads(threads) > 1) {
#pragma omp parallel num_threads(threads)
    {
      const FlushDenormals flush;
      body(omp_get_thread_num(), omp_get_num_threads());
    }
    return;
  }
#endif
  const FlushDenormals flush;
  body(0, 1);
}

// Ranges of at most `most` rows such that members x ranges deals evenly to the threads where rows allow it.
inline int range_count(int rows, int most, int members, int threads) {
  const int least = std::max(1, (rows + most - 1) / most);
  for (int ranges = least; ranges < least + threads && rows / ranges >= tuning::Call::kLeastRows; ++ranges) {
    if (members * ranges % threads == 0) return ranges;
  }
  return least;
}

struct RowRange {  // rows [begin, end) that go through a network together
  int begin, end;
  int count() const { return end - begin; }
};

// Range i of `ranges` even ones.
inline RowRange row_range(int rows, int ranges, int i) {
  const long all = rows;
  return {static_cast<int>(all * i / ranges), static_cast<int>(all * (i + 1) / ranges)};
}

// Items dealt in a fixed way: item i always to the same thread, or with fewer items than threads to the same team.
// visit(item, team, leader): leader names the scratch that the team shares.
template <class Visit>
void for_fixed_items(int items, int thread, int threads, Barrier* barriers, Visit visit) {
  if (items >= threads) {
    for (int i = thread; i < items; i += threads) visit(i, Team{0, 1, nullptr}, thread);
    return;
  }
  constexpr int kMostTeam = tuning::Call::kMostTeam;
  const int item = static_cast<int>(static_cast<long>(thread) * items / threads);
  const int leader = static_cast<int>((static_cast<long>(item) * threads + items - 1) / items);
  const int next = static_cast<int>((static_cast<long>(item + 1) * threads + items - 1) / items);
  const int size = std::min(next - leader, kMostTeam);
  if (thread - leader < size) visit(item, Team{thread - leader, size, &barriers[leader]}, leader);
}

// Items taken from a queue where there are enough for every thread, else dealt to teams as above.
template <class Visit>
void for_queued_items(int items, int thread, int threads, std::atomic<int>& queue, Barrier* barriers, Visit visit) {
  if (items < threads) {
    for_fixed_items(items, thread, threads, barriers, visit);
    return;
  }
  for (int i; (i = queue.fetch_add(1, std::memory_order_relaxed)) < items;) visit(i, Team{0, 1, nullptr}, thread);
}

}  // namespace qpilots::cpu
