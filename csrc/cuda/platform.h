// The few words that the kernels are written in, for nvcc and for the test emulator (tests/cuda_emulator).
// Every access to memory goes through the load and store functions below, so that the emulator sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

#include "qpilots/bf16.h"
#include "qpilots/number.h"

namespace qpilots {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;

// A bf16 value in memory; arithmetic is float32.
struct Bf16 {
  bf16_bits bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return from_bf16(x.bits); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  return Bf16{to_bf16(x)};
}

struct alignas(16) Vector16 {
  std::uint32_t words[4];
};

#if defined(__CUDACC__)

__device__ __forceinline__ void trap() { __trap(); }  // ends the launch with an error
// Written by other blocks during this launch: bypasses L1.
__device__ __forceinline__ float load_global(const float* p) { return __ldcg(p); }
template <class T>
__device__ __forceinline__ void store_global(T* p, T value) {
  *p = value;
}
// Constant during this launch.
template <class T>
__device__ __forceinline__ T load_constant(const T* p) {
  return __ldg(p);
}
__device__ __forceinline__ Bf16 load_constant(const Bf16* p) { return Bf16{__ldg(&p->bits)}; }
__device__ __forceinline__ Vector16 load16_constant(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
__device__ __forceinline__ T load_shared(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_shared(T* p, T value) {
  *p = value;
}
__device__ __forceinline__ Vector16 load16_shared(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char qpilots_dynamic_shared[];
  return qpilots_dynamic_shared;
}
__device__ __forceinline__ void add_release(std::uint32_t* counter, std::uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* counter) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* word) {
  return *reinterpret_cast<const volatile std::uint32_t*>(word);
}
__device__ __forceinline__ void store_relaxed(std::uint32_t* word, std::uint32_t value) {
  *reinterpret_cast<volatile std::uint32_t*>(word) = value;
}

#else  // the emulator

inline void trap() { std::abort(); }
template <class T>
inline T observed(const T* p) {
  return *static_cast<const T*>(cuda_emulator::machine.read(p, sizeof(T)));
}
template <class T>
inline void observed_store(T* p, T value) {
  cuda_emulator::machine.write(p, sizeof(T));
  *p = value;
}
inline float load_global(const float* p) { return observed(p); }
template <class T>
inline void store_global(T* p, T value) {
  observed_store(p, value);
}
template <class T>
inline T load_constant(const T* p) {
  return observed(p);
}
inline Vector16 load16_constant(const void* p) { return observed(static_cast<const Vector16*>(p)); }
template <class T>
inline T load_shared(const T* p) {
  return observed(p);
}
template <class T>
inline void store_shared(T* p, T value) {
  observed_store(p, value);
}
inline Vector16 load16_shared(const void* p) { return observed(static_cast<const Vector16*>(p)); }
inline unsigned char* dynamic_shared() { return static_cast<unsigned char*>(cuda_emulator::machine.dynamic_shared()); }
inline void add_release(std::uint32_t* counter, std::uint32_t value) {
  cuda_emulator::machine.add_release(counter, value);
}
inline std::uint32_t load_acquire(const std::uint32_t* counter) { return cuda_emulator::machine.load_acquire(counter); }
inline std::uint32_t load_relaxed(const std::uint32_t* word) { return cuda_emulator::machine.load_relaxed(word); }
inline void store_relaxed(std::uint32_t* word, std::uint32_t value) {
  cuda_emulator::machine.store_relaxed(word, value);
}

#endif

// A static array in shared memory.
#if defined(__CUDACC__)
#define QPILOTS_SHARED(type, name, count) __shared__ type name[count]
#else
#define QPILOTS_SHARED(type, name, count) \
  static const char name##_tag = 0;       \
  type* const name =                      \
      static_cast<type*>(cuda_emulator::machine.static_shared(&name##_tag, sizeof(type) * (count), #name))
#endif

// 16 bytes as 4 floats, or as 8 bf16 values widened.
__device__ __forceinline__ void widen(const Vector16& v, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_float(v.words[i]);
}
__device__ __forceinline__ void widen(const Vector16& v, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_float(v.words[i] << 16);
    out[2 * i + 1] = bits_float(v.words[i] & 0xffff0000u);
  }
}

struct LaunchConfig {
  unsigned grid;
  unsigned block;
  std::size_t shared_bytes;
  cudaStream_t stream;
  bool cooperative;
};

template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), const LaunchConfig& config, Args args) {
#if defined(__CUDACC__)
  void* parameters[] = {&args};
  const void* function = reinterpret_cast<const void*>(kernel);
  const dim3 grid(config.grid), block(config.block);
  return config.cooperative
             ? cudaLaunchCooperativeKernel(function, grid, block, parameters, config.shared_bytes, config.stream)
             : cudaLaunchKernel(function, grid, block, parameters, config.shared_bytes, config.stream);
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  const bool passed = cuda_emulator::machine.launch(function, config.grid, config.block, config.shared_bytes,
                                                    [kernel, args] { kernel(args); });
  return passed ? cudaSuccess : cudaErrorLaunchFailure;
#endif
}

}  // namespace cuda
}  // namespace qpilots

// One launch for both worlds: kernel, LaunchConfig, the kernel's one argument (a plain struct).
#define QPILOTS_LAUNCH(kernel, config, args) ::qpilots::cuda::launch_kernel(kernel, config, args)
