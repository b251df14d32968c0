// Memory of a call: taken from a pool, so that calls in a row allocate nothing and concurrent calls never share.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "live/arena.h"
#include "live/buffer.h"

namespace qpilots::cpu {

struct Workspace {
  Buffer scratch;
  LiveArena arenas[3];  // for calls that find a network's own live arena in use
};

class WorkspacePool {
 public:
  std::unique_ptr<Workspace> acquire();
  void release(std::unique_ptr<Workspace> workspace);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

// Hands out aligned pieces of a buffer; with a null base it only counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  static std::size_t rounded(std::size_t bytes) { return (bytes + 127) / 128 * 128; }
  template <class T>
  T* take(std::size_t count) {
    T* piece = reinterpret_cast<T*>(base_ == nullptr ? nullptr : base_ + used_);
    used_ += rounded(count * sizeof(T));
    return piece;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace qpilots::cpu
