#include "workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace qpilots::cpu {

Buffer::~Buffer() { std::free(data_); }

char* Buffer::reserve(std::size_t bytes) {
  if (bytes <= size_) return data_;
  constexpr std::size_t kHugePage = std::size_t{1} << 21;
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
  void* fresh = std::aligned_alloc(alignment, size);
  if (fresh == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (size >= kHugePage) madvise(fresh, size, MADV_HUGEPAGE);  // 34 MB of weights are 8,700 small pages
#endif
  std::memset(fresh, 0, size);
  std::free(data_);
  data_ = static_cast<char*>(fresh);
  size_ = size;
  return data_;
}

std::unique_ptr<Workspace> WorkspacePool::acquire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) return std::make_unique<Workspace>();
  std::unique_ptr<Workspace> workspace = std::move(free_.back());
  free_.pop_back();
  return workspace;
}

void WorkspacePool::release(std::unique_ptr<Workspace> workspace) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(workspace));
}

}  // namespace qpilots::cpu
