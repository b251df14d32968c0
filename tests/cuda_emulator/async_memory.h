// What blocks exchange without barriers, and shared memory fills without waiting: relaxed words, asynchronous copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <utility>

#include "shadow_memory.h"

namespace cuda_emulator {

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

class AsyncMemory : public ShadowMemory {
 public:
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
      for (const Access& access : cell.reads) {
        if (!ordered(access)) race(access, "read", "writes", memory, i);
      }
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

 protected:
  void begin_async() {
    words_.clear();
    num_stores_ = 0;
  }

 private:
  std::unordered_map<std::uintptr_t, Word> words_;
  std::uint64_t num_stores_ = 0;  // relaxed ones, since the launch

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
};

}  // namespace cuda_emulator
