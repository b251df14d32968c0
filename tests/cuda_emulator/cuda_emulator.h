// Runs CUDA C++ kernels on the CPU, to test them: the threads of a grid are fibers, and every observed
// access is checked. It is no simulator of speed.
//
// A kernel includes its platform header, which includes this file where nvcc is not the compiler, and
// reaches memory through load/store functions that end here. Caught, with the coordinates of the threads:
//   - a read or write of a cell that another thread wrote (or read) without a barrier that orders the two:
//     __syncthreads within a block, __syncwarp within a warp, release/acquire chains across blocks;
//   - an access outside every registered allocation, misaligned, or a write to a read-only one;
//   - a read of a cell that nothing has written, or as a constant of one that this launch wrote;
//   - an access to what an asynchronous copy still reads or writes;
//   - a word that is written in parts, or by relaxed and by ordinary accesses;
//   - __syncthreads or a warp operation reached at different places, or not by all (deadlock).
// The order in which threads run is random, by seed, and so is the time at which a relaxed store reaches a block.
// Ordinary stores need no such delay: who could tell it reads without an order, which is a race and ends the launch.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>
#if defined(__x86_64__) && !defined(CUDA_EMULATOR_UCONTEXT)
#define CUDA_EMULATOR_OWN_SWITCH
#else
#include <ucontext.h>
#endif

#include "fragments.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};

namespace cuda_emulator {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::uint32_t kNoThread = 0xffffffffu;
constexpr std::size_t kDepositBytes = 32;  // what a lane gives to a warp operation, at most
constexpr std::size_t kCopyBytes = 16;     // of an asynchronous copy
constexpr int kDefaultShared = 48 * 1024;  // dynamic shared memory of a kernel that was allowed no more

// ---------------------------------------------------------------- memory

struct Access {
  std::uint32_t thread = kNoThread;
  std::uint32_t block_epoch = 0;
  std::uint32_t warp_epoch = 0;
};

struct Cell {
  Access write;
  Access reads[2];  // the last one, and the last one of another block or thread
  bool written = false;
  bool copy_target = false;        // an asynchronous copy, issued by write.thread, has not been waited for
  bool word = false;               // exchanged by relaxed accesses in this launch
  std::uint16_t copy_sources = 0;  // asynchronous copies that read it
};

struct Allocation {
  std::uintptr_t begin = 0, end = 0;
  std::string name;
  bool read_only = false;
  bool shared = false;
  std::size_t cell_bytes;   // 1 in small allocations, 2 in large ones, where no kernel stores bytes
  std::vector<Cell> cells;  // empty where read-only

  Allocation(const void* pointer, std::size_t bytes, std::string label, bool constant, bool initialised)
      : begin(reinterpret_cast<std::uintptr_t>(pointer)),
        end(begin + bytes),
        name(std::move(label)),
        read_only(constant),
        cell_bytes(bytes <= 4096 ? 1 : 2) {
    if (!read_only) cells.resize((bytes + cell_bytes - 1) / cell_bytes);
    if (initialised) {
      for (Cell& cell : cells) cell.written = true;
    }
  }
  void forget_accesses() {
    for (Cell& cell : cells) {
      const bool written = cell.written;
      cell = Cell();
      cell.written = written;
    }
  }
};

// Memory that threads exchange by relaxed accesses of one size: which of the stored values a block sees is a matter of
// time, but it sees them in the order in which they were stored.
struct Word {
  struct Store {
    std::uint64_t value;
    Access access;
    std::uint64_t serial, time;
  };
  std::size_t bytes;
  std::deque<Store> stores;  // the first one is seen by all
};

struct AsyncCopy {
  unsigned char* target;
  const unsigned char* source;
};

// ---------------------------------------------------------------- fibers

#if defined(CUDA_EMULATOR_OWN_SWITCH)
using Context = void*;
__attribute__((naked, noinline, noipa)) inline void switch_context(Context* /*save*/, Context* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void make_context(Context* context, void* stack, std::size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t(15);
  auto* slots = reinterpret_cast<void**>(top) - 2;  // the return address sits so that rsp = 8 (mod 16) at entry
  slots[0] = reinterpret_cast<void*>(entry);
  slots[1] = nullptr;
  for (int i = 1; i <= 6; ++i) slots[-i] = nullptr;
  *context = slots - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* save, Context* load) { swapcontext(save, load); }
inline void make_context(Context* context, void* stack, std::size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

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

class Machine {
 public:
  Settings settings;
  std::string error;  // of the last launch
  Fiber* current = nullptr;
  uint3 block_dim{}, grid_dim{};
  std::mutex launch_mutex;
  std::map<const void*, int> allowed_shared;  // kernel -> its attribute cudaFuncAttributeMaxDynamicSharedMemorySize

  // ---- allocations
  void register_memory(const void* pointer, std::size_t bytes, const char* name, bool read_only, bool initialised) {
    if (bytes == 0) return;
    auto allocation = std::make_unique<Allocation>(pointer, bytes, name, read_only, initialised);
    auto position =
        std::upper_bound(global_.begin(), global_.end(), allocation->begin,
                         [](std::uintptr_t a, const std::unique_ptr<Allocation>& b) { return a < b->begin; });
    global_.insert(position, std::move(allocation));
    last_hit_ = nullptr;
  }
  void forget_memory() {
    global_.clear();
    last_hit_ = nullptr;
  }

  // ---- what kernels call
  const void* read(const void* pointer, std::size_t bytes) {
    maybe_preempt();
    Allocation* memory = find(pointer, bytes, "read");
    each_cell(memory, pointer, bytes, [&](Cell& cell, std::size_t i) {
      if (!cell.written) fail(describe("reads uninitialised memory", memory, i));
      if (cell.copy_target) copied(cell.write.thread, "reads", "writes", memory, i);
      if (cell.word) fail(describe("reads a word of relaxed accesses as ordinary memory", memory, i));
      if (!ordered(cell.write)) race(cell.write, "wrote", "reads", memory, i);
      if (cell.reads[0].thread != current->id) {
        const bool other_block = cell.reads[0].thread / block_dim.x != current->block;
        if (cell.reads[0].thread != kNoThread && (other_block || !ordered(cell.reads[0])))
          cell.reads[1] = cell.reads[0];
      }
      cell.reads[0] = now();
    });
    return pointer;
  }
  // Through the cache that no store of this launch updates.
  const void* read_constant(const void* pointer, std::size_t bytes) {
    Allocation* memory = find(pointer, bytes, "read");
    each_cell(memory, pointer, bytes, [&](Cell& cell, std::size_t i) {
      if (cell.write.thread == kNoThread && !cell.word) return;
      fail(describe("reads as a constant", memory, i) + ", which " + name(cell.write.thread) + " wrote in this launch");
    });
    return read(pointer, bytes);
  }
  void write(const void* pointer, std::size_t bytes) {
    maybe_preempt();
    Allocation* memory = find(pointer, bytes, "write");
    if (memory->read_only) fail(describe("writes to read-only memory", memory, 0));
    each_cell(memory, pointer, bytes, [&](Cell& cell, std::size_t i) {
      if (cell.copy_target) copied(cell.write.thread, "writes", "writes", memory, i);
      if (cell.copy_sources > 0) copied(copier_from(pointer, bytes), "writes", "reads", memory, i);
      if (cell.word) fail(describe("writes a word of relaxed accesses as ordinary memory", memory, i));
      if (!ordered(cell.write)) race(cell.write, "wrote", "writes", memory, i);
      for (const Access& access : cell.reads) {
        if (!ordered(access)) race(access, "read", "writes", memory, i);
      }
      cell.write = now();
      cell.reads[0] = cell.reads[1] = Access();
      cell.written = true;
    });
  }

  // ---- words: relaxed accesses of 4 or 8 bytes, outside the race rule
  template <class T>
  T load_word(const T* pointer) {
    yield();
    Allocation* memory = find(pointer, sizeof(T), "relaxed load");
    each_cell(memory, pointer, sizeof(T), [&](Cell& cell, std::size_t i) {
      if (!cell.written) fail(describe("reads uninitialised memory", memory, i));
      if (!ordered(cell.write)) race(cell.write, "wrote", "reads", memory, i);
    });
    const Word* word = find_word(pointer, sizeof(T), memory);
    return word == nullptr ? *pointer : static_cast<T>(word->stores[seen(*word)].value);
  }
  template <class T>
  void store_word(T* pointer, T value) {
    yield();
    Allocation* memory = find(pointer, sizeof(T), "relaxed store");
    if (memory->read_only) fail(describe("writes to read-only memory", memory, 0));
    Word* word = find_word(pointer, sizeof(T), memory);
    if (word == nullptr) {
      word = &words_[reinterpret_cast<std::uintptr_t>(pointer)];
      word->bytes = sizeof(T);
      word->stores.push_back({*pointer, Access(), 0, 0});
    }
    each_cell(memory, pointer, sizeof(T), [&](Cell& cell, std::size_t i) {
      if (!ordered(cell.write)) race(cell.write, "wrote", "writes", memory, i);
      cell.written = cell.word = true;
    });
    word->stores.push_back({value, now(), ++num_stores_, clock_});
    while (word->stores.size() > 1 && word->stores[1].time + longest_delay() <= clock_) word->stores.pop_front();
    *pointer = value;  // what the next launch finds
  }

  // ---- asynchronous copies of 16 bytes from global to shared memory. The bytes arrive at the wait: who looked or
  // wrote before, at either end, could tell when they did, and fails.
  void copy_async(void* target, const void* source) {
    read(source, kCopyBytes);
    write(target, kCopyBytes);
    Allocation *from = find(source, kCopyBytes, "read"), *to = find(target, kCopyBytes, "write");
    if (from->shared || !to->shared)
      fail(name(current->id) + ": an asynchronous copy runs from global to shared memory");
    each_cell(from, source, kCopyBytes, [](Cell& cell, std::size_t) { ++cell.copy_sources; });
    each_cell(to, target, kCopyBytes, [](Cell& cell, std::size_t) { cell.copy_target = true; });
    std::memset(target, 0xff, kCopyBytes);
    current->uncommitted.push_back({static_cast<unsigned char*>(target), static_cast<const unsigned char*>(source)});
  }
  void commit_copies() {
    current->copy_groups.push_back(std::move(current->uncommitted));
    current->uncommitted.clear();
  }
  void wait_copies(std::size_t groups_left) {
    maybe_preempt();
    for (; current->copy_groups.size() > groups_left; current->copy_groups.pop_front()) {
      for (const AsyncCopy& copy : current->copy_groups.front()) {
        each_cell(find(copy.source, kCopyBytes, "read"), copy.source, kCopyBytes,
                  [](Cell& cell, std::size_t) { --cell.copy_sources; });
        each_cell(find(copy.target, kCopyBytes, "write"), copy.target, kCopyBytes, [&](Cell& cell, std::size_t) {
          cell.copy_target = false;
          cell.write = now();
        });
        std::memcpy(copy.target, copy.source, kCopyBytes);
      }
    }
  }

  void block_barrier(int line) {
    Block& block = blocks_[current->block];
    if (block.arrived > 0 && block.line != line) {
      fail("divergent __syncthreads: " + name(current->id) + " at line " + std::to_string(line) +
           ", other threads of its block at line " + std::to_string(block.line));
    }
    block.line = line;
    if (++block.arrived < static_cast<int>(block_dim.x)) return wait(Status::at_block_barrier, "__syncthreads", line);
    block.arrived = 0;
    ++block.epoch;
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
  }

  // All lanes exchange 32-bit values; returns what lane `source` gave.
  std::uint32_t warp_exchange(std::uint32_t value, int source, const char* what, int line) {
    const std::uint32_t slot = warp_arrive(value, what, line);
    return deposited<std::uint32_t>(slot, source & (kWarpSize - 1));
  }
  std::uint32_t warp_ballot(bool predicate, const char* what, int line) {
    const std::uint32_t slot = warp_arrive(predicate ? 1u : 0u, what, line);
    std::uint32_t bits = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) bits |= deposited<std::uint32_t>(slot, lane) << lane;
    return bits;
  }
  void warp_barrier(int line) { warp_arrive(0u, kSyncWarp, line); }

  // ldmatrix: the 16 bytes at `row` of lanes 8 j .. 8 j + 7 are the rows of matrix j, of which each lane gets two
  // elements in out[j]. The addresses of lanes from 8 COUNT on do not count.
  template <int COUNT>
  void load_matrices(std::uint32_t (&out)[COUNT], const void* row, bool transposed, const char* what, int line) {
    MatrixRow mine{};
    const int lane = static_cast<int>(current->id % kWarpSize);
    if (lane < 8 * COUNT) {
      std::memcpy(&mine, read(row, sizeof(mine)), sizeof(mine));
      if (!find(row, sizeof(mine), "read")->shared) fail(name(current->id) + ": " + what + " reads shared memory only");
    }
    const std::uint32_t slot = warp_arrive(mine, what, line);
    for (int j = 0; j < COUNT; ++j) {
      out[j] = 0;
      for (int half = 0; half < 2; ++half) {
        const Position at = fragments::matrix(lane, half, transposed);
        const std::uint32_t bits = deposited<MatrixRow>(slot, 8 * j + at.row).elements[at.column];
        out[j] |= bits << (16 * half);
      }
    }
  }
  // mma.m16n8k16 on bf16: c += a b. The 16 products are summed in float64 and rounded once; the order and the rounding
  // of the hardware are its own, so results agree to a few units in the last place, and exactly for small integers.
  void multiply_matrices(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], int line) {
    MatrixOperands mine;
    std::copy(a, a + 4, mine.a);
    std::copy(b, b + 2, mine.b);
    const std::uint32_t slot = warp_arrive(mine, "mma", line);
    const int lane = static_cast<int>(current->id % kWarpSize);
    for (int i = 0; i < 4; ++i) {
      const Position at = fragments::accumulator(lane, i);
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const Source left = fragments::source_a({at.row, k}), right = fragments::source_b({k, at.column});
        sum += static_cast<double>(bf16_value(deposited<MatrixOperands>(slot, left.lane).a, left.element)) *
               bf16_value(deposited<MatrixOperands>(slot, right.lane).b, right.element);
      }
      c[i] = static_cast<float>(sum);
    }
  }

  std::uint32_t add(std::uint32_t* counter, std::uint32_t value, bool release) {
    yield();
    find(counter, sizeof(*counter), "atomic");
    if (release) {
      std::vector<std::uint32_t>& published = published_[counter];
      published.resize(grid_dim.x, 0);
      for (unsigned b = 0; b < grid_dim.x; ++b) published[b] = std::max(published[b], current->view[b]);
      published[current->block] = std::max(published[current->block], blocks_[current->block].epoch);
    }
    const std::uint32_t before = *counter;
    *counter += value;
    return before;
  }
  std::uint32_t load_acquire(const std::uint32_t* counter) {
    yield();
    find(counter, sizeof(*counter), "atomic");
    auto found = published_.find(counter);
    if (found != published_.end()) {
      for (unsigned b = 0; b < grid_dim.x; ++b) {
        if (b != current->block && current->view[b] < found->second[b]) {
          current->view[b] = found->second[b];
          blocks_[current->block].views_differ = true;
        }
      }
    }
    return *counter;
  }
  void* dynamic_shared() { return blocks_[current->block].dynamic_pointer; }
  void* static_shared(const void* tag, std::size_t bytes, const char* label) {
    void*& storage = blocks_[current->block].static_shared[tag];
    if (storage == nullptr) {
      storage = std::aligned_alloc(16, (bytes + 31) / 16 * 16);
      shared_.push_back(std::make_unique<Allocation>(storage, bytes, label, false, false));
      shared_.back()->shared = true;
    }
    return storage;
  }

  [[noreturn]] void fail(const std::string& message) {
    if (error.empty()) error = message;
    aborted_ = true;
    switch_context(&current->context, &scheduler_);
    std::abort();
  }

  // ---- launch: returns false, with `error` set, where a check failed
  bool launch(const void* kernel, unsigned grid, unsigned block, std::size_t shared_bytes, std::function<void()> body) {
    std::lock_guard<std::mutex> lock(launch_mutex);
    error.clear();
    if (grid == 0 || block == 0 || block > 1024 || block % kWarpSize != 0) {
      error = "invalid launch: grid " + std::to_string(grid) + ", block " + std::to_string(block);
      return false;
    }
    const auto allowed = allowed_shared.find(kernel);
    if (shared_bytes > static_cast<std::size_t>(allowed == allowed_shared.end() ? kDefaultShared : allowed->second)) {
      error = "invalid launch: more shared memory than the kernel was allowed";
      return false;
    }
    grid_dim = {grid, 1, 1};
    block_dim = {block, 1, 1};
    body_ = std::move(body);
    aborted_ = false;
    state_ = settings.seed * 0x9e3779b97f4a7c15ull + 0x1234567ull;
    published_.clear();
    words_.clear();
    clock_ = num_stores_ = 0;
    for (auto& allocation : global_) allocation->forget_accesses();
    prepare(grid, block, shared_bytes);
    run();
    for (auto& storage : blocks_) {
      for (auto& entry : storage.static_shared) std::free(entry.second);
    }
    shared_.clear();
    last_hit_ = nullptr;
    current = nullptr;
    return error.empty();
  }

  std::string name(std::uint32_t thread) const {
    return "thread (block " + std::to_string(thread / block_dim.x) + ", thread " +
           std::to_string(thread % block_dim.x) + ")";
  }

 private:
  static constexpr const char* kSyncWarp = "__syncwarp";

  std::vector<std::unique_ptr<Allocation>> global_, shared_;
  Allocation* last_hit_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<std::uint32_t> ready_warps_;
  std::vector<char> warp_listed_;
  std::map<const std::uint32_t*, std::vector<std::uint32_t>> published_;
  std::unordered_map<std::uintptr_t, Word> words_;
  std::uint64_t clock_ = 0, num_stores_ = 0;  // turns of a warp; relaxed stores
  std::function<void()> body_;
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
  Access now() const { return {current->id, blocks_[current->block].epoch, warps_[current->id / kWarpSize].epoch}; }
  bool ordered(const Access& access) const {
    if (access.thread == kNoThread || access.thread == current->id) return true;
    const std::uint32_t block = access.thread / block_dim.x;
    if (block != current->block) return current->view[block] > access.block_epoch;
    if (access.block_epoch < blocks_[block].epoch) return true;
    return access.thread / kWarpSize == current->id / kWarpSize &&
           access.warp_epoch < warps_[current->id / kWarpSize].epoch;
  }
  std::string describe(const char* what, const Allocation* memory, std::size_t cell) const {
    return name(current->id) + " " + what + ": byte " + std::to_string(cell * memory->cell_bytes) + " of " +
           memory->name;
  }
  [[noreturn]] void copied(std::uint32_t copier, const char* does, const char* copy_does, const Allocation* memory,
                           std::size_t cell) {
    fail(describe(does, memory, cell) + ", which an asynchronous copy of " + name(copier) + " still " + copy_does);
  }
  std::uint32_t copier_from(const void* pointer, std::size_t bytes) const {
    const auto* begin = static_cast<const unsigned char*>(pointer);
    const auto overlaps = [&](const AsyncCopy& c) { return c.source < begin + bytes && begin < c.source + kCopyBytes; };
    for (const Fiber& fiber : fibers_) {
      if (std::any_of(fiber.uncommitted.begin(), fiber.uncommitted.end(), overlaps)) return fiber.id;
      for (const auto& group : fiber.copy_groups) {
        if (std::any_of(group.begin(), group.end(), overlaps)) return fiber.id;
      }
    }
    return current->id;
  }
  template <class Visit>
  void each_cell(Allocation* memory, const void* pointer, std::size_t bytes, Visit visit) {
    if (memory->read_only) return;
    const std::size_t first = (reinterpret_cast<std::uintptr_t>(pointer) - memory->begin) / memory->cell_bytes;
    const std::size_t last = first + (bytes + memory->cell_bytes - 1) / memory->cell_bytes;
    for (std::size_t i = first; i < last; ++i) visit(memory->cells[i], i);
  }

  // The word at this address, null where nobody stored it yet. A word is always accessed whole.
  Word* find_word(const void* pointer, std::size_t bytes, const Allocation* memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    const auto at = words_.find(address);
    const auto other = words_.find(bytes == 8 ? address + 4 : address - 4);
    const bool overlapped = other != words_.end() && (bytes == 8 || other->second.bytes == 8);
    if (overlapped || (at != words_.end() && at->second.bytes != bytes)) {
      const Word& word = overlapped ? other->second : at->second;
      fail("torn word: " + describe("accesses", memory, (address - memory->begin) / memory->cell_bytes) + " as " +
           std::to_string(bytes) + " bytes, which " + name(word.stores.back().access.thread) + " stored as " +
           std::to_string(word.bytes));
    }
    return at == words_.end() ? nullptr : &at->second;
  }
  std::uint64_t longest_delay() const { return static_cast<std::uint64_t>(settings.max_delay) * warps_.size(); }
  std::uint64_t delay(std::uint64_t serial) const {  // of a store, until the current block sees it: mostly short
    if (settings.max_delay == 0) return 0;
    std::uint64_t hash = (settings.seed + 1) * 0x9e3779b97f4a7c15ull ^ (serial * grid_dim.x + current->block);
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9ull;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebull;
    hash ^= hash >> 31;
    return (hash >> 8) % longest_delay() >> (hash & 7);
  }
  // The newest store that the current thread sees: all stores before it have arrived, or it is ordered before the load.
  std::size_t seen(const Word& word) const {
    std::size_t index = 0;
    const auto arrived = [&](const Word::Store& store) { return store.time + delay(store.serial) <= clock_; };
    while (index + 1 < word.stores.size() && arrived(word.stores[index + 1])) ++index;
    for (std::size_t i = word.stores.size() - 1; i > index; --i) {
      if (ordered(word.stores[i].access)) return i;
    }
    return index;
  }
  [[noreturn]] void race(const Access& other, const char* did, const char* does, const Allocation* memory,
                         std::size_t cell) {
    fail("race: " + describe(does, memory, cell) + ", which " + name(other.thread) + " " + did +
         " with no barrier between");
  }
  Allocation* find(const void* pointer, std::size_t bytes, const char* what) {
    const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
    const std::size_t alignment = std::min<std::size_t>(bytes, 16);
    if (begin % alignment != 0) {
      fail(name(current->id) + ": misaligned " + what + " of " + std::to_string(bytes) + " bytes");
    }
    const auto holds = [&](const Allocation* a) {
      return a != nullptr && begin >= a->begin && begin + bytes <= a->end;
    };
    Allocation* dynamic = blocks_[current->block].dynamic_shared;
    if (holds(dynamic)) return dynamic;
    if (holds(last_hit_)) return last_hit_;
    auto after = std::upper_bound(global_.begin(), global_.end(), begin,
                                  [](std::uintptr_t a, const std::unique_ptr<Allocation>& b) { return a < b->begin; });
    if (after != global_.begin() && holds(std::prev(after)->get())) return last_hit_ = std::prev(after)->get();
    for (auto& allocation : global_) {  // registered ranges may overlap: views of one storage
      if (holds(allocation.get())) return last_hit_ = allocation.get();
    }
    for (auto& allocation : shared_) {
      if (holds(allocation.get())) {
        if (!owned_by_current_block(allocation.get())) {
          fail(name(current->id) + ": " + what + " in the shared memory of another block");
        }
        return allocation.get();
      }
    }
    std::string near;
    if (after != global_.begin()) {
      const Allocation* before = std::prev(after)->get();
      near = "; " + std::to_string(begin - before->begin) + " bytes after the start of " + before->name +
             ", which has " + std::to_string(before->end - before->begin);
    }
    fail("out of bounds: " + name(current->id) + ": " + what + " of " + std::to_string(bytes) +
         " bytes outside every allocation" + near);
  }
  bool owned_by_current_block(const Allocation* allocation) const {
    for (const auto& entry : blocks_[current->block].static_shared) {
      if (reinterpret_cast<std::uintptr_t>(entry.second) == allocation->begin) return true;
    }
    return false;
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

  static void fiber_main();

  void prepare(unsigned grid, unsigned block, std::size_t shared_bytes) {
    const std::size_t total = std::size_t(grid) * block;
    if (num_stacks_ < total) {
      if (stacks_ != nullptr) munmap(stacks_, num_stacks_ * kStackBytes);
      void* mapped = mmap(nullptr, total * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) std::abort();
      stacks_ = static_cast<unsigned char*>(mapped);
      num_stacks_ = total;
    }
    fibers_.assign(total, Fiber());
    warps_.assign(total / kWarpSize, Warp());
    warp_listed_.assign(warps_.size(), 0);
    ready_warps_.clear();
    blocks_.assign(grid, Block());
    for (unsigned b = 0; b < grid; ++b) {
      if (shared_bytes == 0) continue;
      blocks_[b].dynamic_storage.assign(shared_bytes + 256, 0xff);
      const auto base =
          (reinterpret_cast<std::uintptr_t>(blocks_[b].dynamic_storage.data()) + 127) & ~std::uintptr_t(127);
      blocks_[b].dynamic_pointer = reinterpret_cast<void*>(base);
      shared_.push_back(std::make_unique<Allocation>(blocks_[b].dynamic_pointer, shared_bytes, "dynamic shared memory",
                                                     false, false));
      blocks_[b].dynamic_shared = shared_.back().get();
      shared_.back()->shared = true;
    }
    for (std::size_t i = 0; i < total; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.id = static_cast<std::uint32_t>(i);
      fiber.block = static_cast<std::uint32_t>(i / block);
      fiber.thread_idx = {static_cast<unsigned>(i % block), 0, 0};
      fiber.block_idx = {fiber.block, 0, 0};
      fiber.view.assign(grid, 0);
      make_context(&fiber.context, stacks_ + i * kStackBytes, kStackBytes, &Machine::fiber_main);
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
};

inline Machine machine;

inline void Machine::fiber_main() {
  machine.body_();
  machine.current->status = Status::done;
  switch_context(&machine.current->context, &machine.scheduler_);
  std::abort();
}

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "32-bit values only");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

template <class T>
inline T shuffle(T value, int source, const char* what, int line) {
  return bits_as<T>(machine.warp_exchange(bits_as<std::uint32_t>(value), source, what, line));
}

inline int lane_id() { return static_cast<int>(machine.current->id % kWarpSize); }

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::machine.current->thread_idx)
#define blockIdx (cuda_emulator::machine.current->block_idx)
#define blockDim (cuda_emulator::machine.block_dim)
#define gridDim (cuda_emulator::machine.grid_dim)
#define __syncthreads() cuda_emulator::machine.block_barrier(__LINE__)
#define __syncwarp() cuda_emulator::machine.warp_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, offset) \
  cuda_emulator::shuffle(value, cuda_emulator::lane_id() ^ (offset), "__shfl_xor_sync", __LINE__)
#define __shfl_sync(mask, value, source) cuda_emulator::shuffle(value, source, "__shfl_sync", __LINE__)
#define __ballot_sync(mask, predicate) cuda_emulator::machine.warp_ballot((predicate) != 0, "__ballot_sync", __LINE__)
#define __any_sync(mask, predicate) (cuda_emulator::machine.warp_ballot((predicate) != 0, "__any_sync", __LINE__) != 0u)

// ---------------------------------------------------------------- the part of the runtime API that the hosts call

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaErrorNoDevice) return "no CUDA-capable device is detected";
  if (code == cudaErrorLaunchFailure) return cuda_emulator::machine.error.c_str();
  return code == cudaSuccess ? "no error" : "invalid argument";
}
inline const char* cudaGetErrorName(cudaError_t code) {
  if (code == cudaErrorNoDevice) return "cudaErrorNoDevice";
  if (code == cudaErrorLaunchFailure) return "cudaErrorLaunchFailure";
  return code == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuda_emulator::machine.settings.has_device ? 1 : 0;
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_emulator::Settings& settings = cuda_emulator::machine.settings;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = settings.num_sms;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = settings.max_shared_bytes;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
  }
  return cudaSuccess;
}
template <class Function>
inline cudaError_t cudaFuncSetAttribute(Function function, cudaFuncAttribute, int bytes) {
  cuda_emulator::Machine& machine = cuda_emulator::machine;
  if (bytes > machine.settings.max_shared_bytes) return cudaErrorInvalidValue;
  std::lock_guard<std::mutex> lock(machine.launch_mutex);
  machine.allowed_shared[reinterpret_cast<const void*>(function)] = bytes;
  return cudaSuccess;
}
template <class Function>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function, int, std::size_t) {
  *blocks = cuda_emulator::machine.settings.cooperative_blocks_per_sm;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

// ---------------------------------------------------------------- control, for the tests (ctypes)

extern "C" {
inline __attribute__((used, visibility("default"))) void cuda_emulator_configure(std::uint64_t seed, int num_sms,
                                                                                 int max_shared_bytes,
                                                                                 int preempt_every, int blocks_per_sm,
                                                                                 int has_device, int max_delay) {
  cuda_emulator::machine.settings = {seed,          num_sms,         max_shared_bytes, preempt_every,
                                     blocks_per_sm, has_device != 0, max_delay};
  cuda_emulator::machine.allowed_shared.clear();
}
// The least dynamic shared memory that any kernel whose attribute was set may have now; 0: none was set.
inline __attribute__((used, visibility("default"))) int cuda_emulator_allowed_shared_bytes() {
  int least = 0;
  for (const auto& entry : cuda_emulator::machine.allowed_shared) {
    least = least == 0 || entry.second < least ? entry.second : least;
  }
  return least;
}
inline __attribute__((used, visibility("default"))) void cuda_emulator_register(const void* pointer,
                                                                                std::uint64_t bytes, const char* name,
                                                                                int read_only, int initialised) {
  cuda_emulator::machine.register_memory(pointer, bytes, name, read_only != 0, initialised != 0);
}
inline __attribute__((used, visibility("default"))) void cuda_emulator_forget_memory() {
  cuda_emulator::machine.forget_memory();
}
inline __attribute__((used, visibility("default"))) const char* cuda_emulator_error() {
  return cuda_emulator::machine.error.c_str();
}
// Where element `element` of lane `lane` lies: row * 256 + column. map: 0 ldmatrix, 1 its transpose, 2 a, 3 b, 4 c.
inline __attribute__((used, visibility("default"))) int cuda_emulator_fragment(int map, int lane, int element) {
  namespace fragments = cuda_emulator::fragments;
  const cuda_emulator::Position at = map < 2    ? fragments::matrix(lane, element, map == 1)
                                     : map == 2 ? fragments::a(lane, element)
                                     : map == 3 ? fragments::b(lane, element)
                                                : fragments::accumulator(lane, element);
  return at.row * 256 + at.column;
}
}
