// The threads of a grid as fibers, run in an order that a seed gives; the barriers and warp operations that they meet
// in; and what each of them may take as ordered before it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fiber_context.h"

struct uint3 {
  unsigned x, y, z;
};

namespace cuda_emulator {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::uint32_t kNoThread = 0xffffffffu;
constexpr std::size_t kDepositBytes = 32;  // what a lane gives to a warp operation, at most

struct Access {
  std::uint32_t thread = kNoThread;
  std::uint32_t block_epoch = 0;
  std::uint32_t warp_epoch = 0;
};

struct AsyncCopy {
  unsigned char* target;
  const unsigned char* source;
};

struct Allocation;

enum class Status { ready, at_block_barrier, at_warp_operation, done };

struct Fiber {
  Context context{};
  Status status = Status::ready;
  const char* where = "";  // the operation it waits in
  int line = 0;
  std::uint32_t id = 0;  // block * threads a block + thread
  std::uint32_t block = 0;
  uint3 thread_idx{};
  uint3 block_idx{};
  std::vector<std::uint32_t> view;  // [blocks] accesses of block b before its epoch view[b] are visible here
  std::vector<AsyncCopy> uncommitted;
  std::deque<std::vector<AsyncCopy>> copy_groups;  // committed, not waited for
};

struct Warp {
  int arrived = 0;
  std::uint32_t generation = 0;
  std::uint32_t epoch = 0;
  int line = 0;
  const char* what = "";
  std::uint64_t asleep_until = 0;
  alignas(16) unsigned char exchange[2][kWarpSize][kDepositBytes] = {};
};

struct Block {
  int arrived = 0;
  int line = 0;
  std::uint32_t epoch = 0;
  bool views_differ = false;
  int votes[2] = {0, 0};  // of this barrier and the last one, by the parity of the epoch
  std::vector<unsigned char> dynamic_storage;
  Allocation* dynamic_shared = nullptr;
  void* dynamic_pointer = nullptr;
  std::map<const void*, void*> static_shared;  // tag -> storage
};

struct Settings {
  std::uint64_t seed = 0;
  int num_sms = 4;
  int max_shared_bytes = 232448;
  int preempt_every = 256;  // on average, a thread yields once in this many accesses; 0: never
  int cooperative_blocks_per_sm = 1;
  bool has_device = true;
  // A relaxed store reaches every block before each warp had this many turns, and a warp now and then sleeps while the
  // others have four times as many; 0: stores arrive at once and no warp sleeps.
  int max_delay = 4;
};

class Scheduler {
 public:
  Settings settings;
  std::string error;  // of the last launch
  Fiber* current = nullptr;
  uint3 block_dim{}, grid_dim{};

  // Returns how many threads of the block voted for.
  int block_barrier(const char* what, int line, bool vote = false) {
    Block& block = blocks_[current->block];
    if (block.arrived > 0 && block.line != line) {
      fail(std::string("divergent ") + what + ": " + name(current->id) + " at line " + std::to_string(line) +
           ", other threads of its block at line " + std::to_string(block.line));
    }
    block.line = line;
    int& votes = block.votes[block.epoch % 2];
    votes += vote ? 1 : 0;
    if (++block.arrived < static_cast<int>(block_dim.x)) {
      wait(Status::at_block_barrier, what, line);
      return votes;
    }
    block.arrived = 0;
    block.votes[++block.epoch % 2] = 0;
    const std::uint32_t first = current->block * block_dim.x;
    if (block.views_differ) {
      std::vector<std::uint32_t> joined(grid_dim.x, 0);
      for (std::uint32_t i = first; i < first + block_dim.x; ++i) {
        for (unsigned b = 0; b < grid_dim.x; ++b) joined[b] = std::max(joined[b], fibers_[i].view[b]);
      }
      for (std::uint32_t i = first; i < first + block_dim.x; ++i) fibers_[i].view = joined;
      block.views_differ = false;
    }
    for (std::uint32_t i = first; i < first + block_dim.x; ++i) wake(i);
    return votes;
  }

  [[noreturn]] void fail(const std::string& message) {
    if (error.empty()) error = message;
    aborted_ = true;
    switch_context(&current->context, &scheduler_);
    std::abort();
  }

  std::string name(std::uint32_t thread) const {
    return "thread (block " + std::to_string(thread / block_dim.x) + ", thread " +
           std::to_string(thread % block_dim.x) + ")";
  }

 protected:
  static constexpr const char* kSyncWarp = "__syncwarp";

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::function<void()> body_;
  std::uint64_t clock_ = 0;  // turns of a warp since the launch

  Access now() const { return {current->id, blocks_[current->block].epoch, warps_[current->id / kWarpSize].epoch}; }
  bool ordered(const Access& access) const {
    if (access.thread == kNoThread || access.thread == current->id) return true;
    const std::uint32_t block = access.thread / block_dim.x;
    if (block != current->block) return current->view[block] > access.block_epoch;
    if (access.block_epoch < blocks_[block].epoch) return true;
    return access.thread / kWarpSize == current->id / kWarpSize &&
           access.warp_epoch < warps_[current->id / kWarpSize].epoch;
  }
  template <class T>
  std::uint32_t warp_arrive(const T& deposit, const char* what, int line) {
    static_assert(sizeof(T) <= kDepositBytes, "more than a lane can give");
    Warp& warp = warps_[current->id / kWarpSize];
    if (warp.arrived > 0 && (warp.line != line || std::strcmp(warp.what, what) != 0)) {
      fail("divergent warp operation: " + name(current->id) + " in " + what + " at line " + std::to_string(line) +
           ", other lanes in " + warp.what + " at line " + std::to_string(warp.line));
    }
    warp.line = line;
    warp.what = what;
    const std::uint32_t slot = warp.generation & 1u;
    std::memcpy(warp.exchange[slot][current->id % kWarpSize], &deposit, sizeof(T));
    if (++warp.arrived < kWarpSize) {
      wait(Status::at_warp_operation, what, line);
    } else {
      warp.arrived = 0;
      ++warp.generation;
      if (std::strcmp(what, kSyncWarp) == 0) ++warp.epoch;
      const std::uint32_t first = current->id / kWarpSize * kWarpSize;
      for (std::uint32_t i = first; i < first + kWarpSize; ++i) wake(i);
    }
    return slot;
  }
  template <class T>
  T deposited(std::uint32_t slot, int lane) const {
    T value;
    std::memcpy(&value, warps_[current->id / kWarpSize].exchange[slot][lane], sizeof(T));
    return value;
  }

  void wait(Status status, const char* where, int line) {
    current->status = status;
    current->where = where;
    current->line = line;
    switch_context(&current->context, &scheduler_);
  }
  void yield() { switch_context(&current->context, &scheduler_); }
  void maybe_preempt() {
    if (settings.preempt_every > 0 && random() % static_cast<std::uint32_t>(settings.preempt_every) == 0) yield();
  }
  void wake(std::uint32_t id) {
    if (fibers_[id].status == Status::done) return;
    fibers_[id].status = Status::ready;
    list(id / kWarpSize);
  }
  void list(std::uint32_t warp) {
    if (warp_listed_[warp]) return;
    warp_listed_[warp] = 1;
    ready_warps_.push_back(warp);
  }

  std::uint64_t longest_delay() const { return static_cast<std::uint64_t>(settings.max_delay) * warps_.size(); }

  static void fiber_main();

  void prepare(unsigned grid, unsigned block) {
    const std::size_t total = std::size_t(grid) * block;
    if (num_stacks_ < total) {
      if (stacks_ != nullptr) munmap(stacks_, num_stacks_ * kStackBytes);
      void* mapped = mmap(nullptr, total * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) std::abort();
      stacks_ = static_cast<unsigned char*>(mapped);
      num_stacks_ = total;
    }
    aborted_ = false;
    clock_ = 0;
    state_ = settings.seed * 0x9e3779b97f4a7c15ull + 0x1234567ull;
    fibers_.assign(total, Fiber());
    warps_.assign(total / kWarpSize, Warp());
    warp_listed_.assign(warps_.size(), 0);
    ready_warps_.clear();
    blocks_.assign(grid, Block());
    for (std::size_t i = 0; i < total; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.id = static_cast<std::uint32_t>(i);
      fiber.block = static_cast<std::uint32_t>(i / block);
      fiber.thread_idx = {static_cast<unsigned>(i % block), 0, 0};
      fiber.block_idx = {fiber.block, 0, 0};
      fiber.view.assign(grid, 0);
      make_context(&fiber.context, stacks_ + i * kStackBytes, kStackBytes, &Scheduler::fiber_main);
      list(static_cast<std::uint32_t>(i / kWarpSize));
    }
  }

  void run() {
    std::size_t remaining = fibers_.size();
    while (remaining > 0) {
      if (ready_warps_.empty()) return report_deadlock();
      const std::uint32_t warp = next_warp();
      const std::uint32_t start = random();
      bool still_ready = false;
      for (std::uint32_t i = 0; i < kWarpSize; ++i) {
        Fiber& fiber = fibers_[warp * kWarpSize + (start + i) % kWarpSize];
        if (fiber.status != Status::ready) continue;
        current = &fiber;
        switch_context(&scheduler_, &fiber.context);
        if (aborted_) return;
        if (fiber.status == Status::done) --remaining;
        still_ready = still_ready || fiber.status == Status::ready;
      }
      if (still_ready) list(warp);
    }
  }

  // A ready warp, drawn by chance; one that sleeps only where several draws found no other.
  std::uint32_t next_warp() {
    ++clock_;
    std::size_t pick = 0;
    for (int draw = 0; draw < 8; ++draw) {
      pick = random() % ready_warps_.size();
      if (warps_[ready_warps_[pick]].asleep_until <= clock_) break;
    }
    const std::uint32_t warp = ready_warps_[pick];
    ready_warps_[pick] = ready_warps_.back();
    ready_warps_.pop_back();
    warp_listed_[warp] = 0;
    const auto rounds8 = static_cast<std::uint32_t>(8 * warps_.size());
    if (settings.max_delay > 0 && random() % rounds8 == 0) {
      warps_[warp].asleep_until = clock_ + random() % (4 * longest_delay());
    }
    return warp;
  }

  void report_deadlock() {
    std::map<std::string, std::pair<int, std::uint32_t>> groups;
    for (const Fiber& fiber : fibers_) {
      std::string key = fiber.status == Status::done
                            ? "exited"
                            : std::string("wait at ") + fiber.where + " line " + std::to_string(fiber.line);
      auto& group = groups[key];
      if (group.first++ == 0) group.second = fiber.id;
    }
    error = "deadlock:";
    for (const auto& group : groups) {
      error += " " + std::to_string(group.second.first) + " threads " + group.first +
               " (first: " + name(group.second.second) + ");";
    }
  }

 private:
  std::vector<std::uint32_t> ready_warps_;
  std::vector<char> warp_listed_;
  Context scheduler_{};
  bool aborted_ = false;
  std::uint64_t state_ = 1;
  unsigned char* stacks_ = nullptr;
  std::size_t num_stacks_ = 0;

  std::uint32_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<std::uint32_t>(state_ >> 32);
  }
};

}  // namespace cuda_emulator
