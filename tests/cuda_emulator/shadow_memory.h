// Global and shared memory with a shadow: who wrote and read each cell, and whether that was ordered before the access.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace cuda_emulator {

constexpr std::size_t kCopyBytes = 16;  // of an asynchronous copy

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

class ShadowMemory : public Scheduler {
 public:
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

  // ---- ordinary accesses
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

 protected:
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

  template <class Visit>
  void each_cell(Allocation* memory, const void* pointer, std::size_t bytes, Visit visit) {
    if (memory->read_only) return;
    const std::size_t first = (reinterpret_cast<std::uintptr_t>(pointer) - memory->begin) / memory->cell_bytes;
    const std::size_t last = first + (bytes + memory->cell_bytes - 1) / memory->cell_bytes;
    for (std::size_t i = first; i < last; ++i) visit(memory->cells[i], i);
  }

  void begin_memory(std::size_t shared_bytes) {
    for (auto& allocation : global_) allocation->forget_accesses();
    for (Block& block : blocks_) {
      if (shared_bytes == 0) continue;
      block.dynamic_storage.assign(shared_bytes + 256, 0xff);
      const auto base = (reinterpret_cast<std::uintptr_t>(block.dynamic_storage.data()) + 127) & ~std::uintptr_t(127);
      block.dynamic_pointer = reinterpret_cast<void*>(base);
      shared_.push_back(
          std::make_unique<Allocation>(block.dynamic_pointer, shared_bytes, "dynamic shared memory", false, false));
      block.dynamic_shared = shared_.back().get();
      shared_.back()->shared = true;
    }
  }
  void end_memory() {
    for (auto& storage : blocks_) {
      for (auto& entry : storage.static_shared) std::free(entry.second);
    }
    shared_.clear();
    last_hit_ = nullptr;
  }

  std::string describe(const char* what, const Allocation* memory, std::size_t cell) const {
    return name(current->id) + " " + what + ": byte " + std::to_string(cell * memory->cell_bytes) + " of " +
           memory->name;
  }
  [[noreturn]] void race(const Access& other, const char* did, const char* does, const Allocation* memory,
                         std::size_t cell) {
    fail("race: " + describe(does, memory, cell) + ", which " + name(other.thread) + " " + did +
         " with no barrier between");
  }

 private:
  std::vector<std::unique_ptr<Allocation>> global_, shared_;
  Allocation* last_hit_ = nullptr;

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
};

}  // namespace cuda_emulator
