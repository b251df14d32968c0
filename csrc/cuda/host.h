// What the host functions share: error messages, the device they run on, the C ABI.
// The ABI is plain C over raw pointers, loaded with ctypes: no libtorch, no pybind11.
#pragma once

#include <string>

#include "platform.h"

#define QPILOTS_EXPORT extern "C" __attribute__((visibility("default")))

namespace qpilots {
namespace cuda {

constexpr int kSuccess = 0;
constexpr int kRefused = 1;    // the request cannot be served here; the message says why
constexpr int kCudaError = 2;  // the CUDA runtime reported an error

// Of this thread; read by qpilots_cuda_last_error.
std::string& last_error();

inline int fail(int code, const std::string& message) {
  last_error() = message;
  return code;
}

inline int cuda_failure(cudaError_t code, const char* call) {
  return fail(kCudaError, std::string(call) + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code));
}

#define QPILOTS_CHECK(call)                                                                     \
  do {                                                                                          \
    const cudaError_t qpilots_code = (call);                                                    \
    if (qpilots_code != cudaSuccess) return ::qpilots::cuda::cuda_failure(qpilots_code, #call); \
  } while (0)

struct DeviceScope {
  int index;
};

// Makes `device` current for f, then restores the caller's.
template <class Function>
int on_device(int device, Function f) {
  int before = 0;
  QPILOTS_CHECK(cudaGetDevice(&before));
  if (before != device) QPILOTS_CHECK(cudaSetDevice(device));
  const int code = f(DeviceScope{device});
  if (before != device) QPILOTS_CHECK(cudaSetDevice(before));
  return code;
}

}  // namespace cuda
}  // namespace qpilots
