#include "live/buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "tuning.h"

namespace qpilots::cpu {
namespace {

using tuning::Live;

// Fresh pages, so that the kernel can make them huge ones: an allocator's may have been in use before, as small ones.
char* map_pages(std::size_t size, std::size_t alignment) {
  void* mapped = mmap(nullptr, size + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(mapped);
  const std::size_t before = (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + size, alignment - before);
  return begin + before;
}

}  // namespace

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, size_);
}

char* Buffer::reserve(std::size_t bytes) {
  if (bytes <= size_) return data_;
  const std::size_t alignment =
      bytes >= Live::kHugePage ? Live::kHugePage : static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
  char* fresh = map_pages(size, alignment);
#if defined(MADV_HUGEPAGE)
  if (alignment == Live::kHugePage) madvise(fresh, size, MADV_HUGEPAGE);
#endif
  std::memset(fresh, 0, size);  // touches them
  if (data_ != nullptr) munmap(data_, size_);
  data_ = fresh;
  size_ = size;
  return data_;
}

}  // namespace qpilots::cpu
