// Whether other processes want the processors: then a short call on several threads waits at every barrier for one that
// the scheduler has put aside, and one thread alone is faster.
#pragma once

#include <algorithm>
#include <atomic>

#include "tuning.h"

namespace qpilots::cpu {

// What a call's threads lost: time that passed, less time that they ran.
struct Lost {
  double wall_s, most_s;  // of the call; of the thread that lost most
  bool share(double part, double least_s) const { return most_s > least_s && most_s > part * wall_s; }
};

// One for the process; safe from several threads, whose notes may come in any order.
class Crowd {
 public:
  // How many of the threads wanted a call may use.
  int threads(int wanted) const { return alone_.load(std::memory_order_relaxed) ? 1 : wanted; }

  void note(int used, const Lost& lost) {
    using tuning::Crowded;
    constexpr auto order = std::memory_order_relaxed;
    if (lost.wall_s > Crowded::kLongest) return;
    if (used == 1) {
      if (!alone_.load(order)) return;
      const int calm = lost.share(Crowded::kCalm, Crowded::kCalmSeconds) ? 0 : calm_.load(order) + 1;
      calm_.store(calm, order);
      if (calm < needed_.load(order)) return;
      strikes_.store(0, order);
      together_.store(0, order);
      alone_.store(false, order);
      return;
    }
    if (!lost.share(Crowded::kCrowded, Crowded::kCrowdedSeconds)) {
      strikes_.store(0, order);
      const int together = together_.load(order) + 1;
      together_.store(together, order);
      if (together == Crowded::kForget) needed_.store(Crowded::kFirst, order);
      return;
    }
    const int strikes = strikes_.load(order) + 1;
    strikes_.store(strikes, order);
    if (strikes < Crowded::kStrikes) return;
    // the shorter the return to several threads lasted, the longer the next one waits
    const int needed = needed_.load(order);
    needed_.store(together_.load(order) < Crowded::kForget ? std::min(2 * needed, Crowded::kMost) : needed, order);
    calm_.store(0, order);
    alone_.store(true, order);
  }

 private:
  std::atomic<bool> alone_{false};
  std::atomic<int> strikes_{0};   // crowded calls in a row
  std::atomic<int> together_{0};  // calls on several threads since the last return
  std::atomic<int> calm_{0};      // calm calls in a row, alone
  std::atomic<int> needed_{tuning::Crowded::kFirst};
};

}  // namespace qpilots::cpu
