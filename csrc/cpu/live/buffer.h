// Memory that the kernel may back with huge pages.
#pragma once

#include <cstddef>

namespace qpilots::cpu {

// Page-aligned memory that only grows.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* reserve(std::size_t bytes);
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace qpilots::cpu
