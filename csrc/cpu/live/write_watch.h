// Asks the kernel whether memory was written, so that a call need not read 34 MB of live weights to find them as they
// were. Linux 6.7 can write-protect pages of private memory such that the first write to each lifts its protection
// without a handler (userfaultfd, asynchronous mode) and list the pages where that happened (PAGEMAP_SCAN): 8 us for
// 36 MB, where reading takes 0.7 ms. Every write goes through the page tables, so none by this process or by the
// kernel on its behalf is missed. Where this cannot be had, the caller reads the memory at every call.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tuning.h"

namespace qpilots::cpu {

struct Interval {
  std::uintptr_t begin, end;
};

// Watches some memory for one reader, which calls, in turn, `unchanged` and, where that was false, reads all of the
// memory and calls `was_read`. One thread at a time.
class WriteWatch {
 public:
  WriteWatch() = default;  // watches nothing: never unchanged
  explicit WriteWatch(std::vector<Interval> memory);

  // True only if the memory holds what it held at the last `was_read`.
  bool unchanged();
  // changed: whether the reader found anything new.
  void was_read(bool changed);
  // "watching", "reading" or why the memory cannot be watched.
  std::string status() const;

  // Why no memory can be watched in this process; empty if it can.
  static std::string unavailable_reason();

 private:
  enum State { kReading, kArming, kArmed };
  struct Watched {  // whole pages
    std::vector<Interval> pages;
    std::atomic<int> state{kReading};
    std::atomic<long> generation{0};  // of the kernel's object that protects them
  };
  struct Kernel;

  bool edges_unchanged() const;
  void copy_edges();

  std::shared_ptr<Watched> watched_;
  std::vector<Interval> edges_;  // outside whole pages: compared with a copy
  std::vector<char> edge_copy_;
  std::string refusal_;
  // Memory is protected once it was found as before `patience_` times running.
  int patience_ = tuning::Live::kFirstPatience, quiet_ = 0, saved_ = 0;
};

}  // namespace qpilots::cpu
