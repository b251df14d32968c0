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
// Relaxed accesses go past L1, whole, and order nothing else: what they carry must be in the word itself.
__device__ __forceinline__ std::uint32_t load_relaxed(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed(std::uint32_t* word, std::uint32_t value) {  // also to the host's memory
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ std::uint64_t load_word(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void store_word(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
// 16 bytes, both ends aligned to 16, that arrive by copy_async_wait. Each thread waits for its own copies only, and
// __syncthreads must follow where others read them.
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS_LEFT>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}
// Matrices of 8 x 8 bf16 into fragments of the whole warp, one a register: the rows of matrix j are the 16 bytes, in
// shared memory and aligned to 16, at `row` of lanes 8 j .. 8 j + 7. `trans` gives the fragments of the transposes.
#define QPILOTS_LDMATRIX_X4(name, form)                                                     \
  __device__ __forceinline__ void name(std::uint32_t (&out)[4], const void* row) {          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" form ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])                   \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }
#define QPILOTS_LDMATRIX_X2(name, form)                                             \
  __device__ __forceinline__ void name(std::uint32_t (&out)[2], const void* row) {  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" form ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(out[0]), "=r"(out[1])                                       \
                 : "r"(shared_address(row))                                         \
                 : "memory");                                                       \
  }
QPILOTS_LDMATRIX_X4(ldmatrix_x4, "")
QPILOTS_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
QPILOTS_LDMATRIX_X2(ldmatrix_x2, "")
QPILOTS_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")
// Two floats as the bf16 elements of one register, the first in the lower half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// c [16, 8] += a [16, 16] b [16, 8], as fragments of the whole warp: bf16 products, float32 sums.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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
template <class T>
inline T observed_constant(const T* p) {
  return *static_cast<const T*>(cuda_emulator::machine.read_constant(p, sizeof(T)));
}
inline float load_global(const float* p) { return observed(p); }
template <class T>
inline void store_global(T* p, T value) {
  observed_store(p, value);
}
template <class T>
inline T load_constant(const T* p) {
  return observed_constant(p);
}
inline Vector16 load16_constant(const void* p) { return observed_constant(static_cast<const Vector16*>(p)); }
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
  cuda_emulator::machine.add(counter, value, true);
}
inline std::uint32_t load_acquire(const std::uint32_t* counter) { return cuda_emulator::machine.load_acquire(counter); }
inline std::uint32_t load_relaxed(const std::uint32_t* word) { return cuda_emulator::machine.load_word(word); }
inline void store_relaxed(std::uint32_t* word, std::uint32_t value) { cuda_emulator::machine.store_word(word, value); }
inline std::uint64_t load_word(const std::uint64_t* word) { return cuda_emulator::machine.load_word(word); }
inline void store_word(std::uint64_t* word, std::uint64_t value) { cuda_emulator::machine.store_word(word, value); }
inline void copy_async16(void* shared, const void* global) { cuda_emulator::machine.copy_async(shared, global); }
inline void copy_async_commit() { cuda_emulator::machine.commit_copies(); }
template <int GROUPS_LEFT>
inline void copy_async_wait() {
  cuda_emulator::machine.wait_copies(GROUPS_LEFT);
}
inline std::uint32_t pack_bf16(float low, float high) {
  return static_cast<std::uint32_t>(to_bf16(low)) | static_cast<std::uint32_t>(to_bf16(high)) << 16;
}
// Warp operations take the line of their call: lanes that meet in different ones diverge.
inline void ldmatrix_x4(std::uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  cuda_emulator::machine.load_matrices(out, row, false, "ldmatrix_x4", line);
}
inline void ldmatrix_x4_trans(std::uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  cuda_emulator::machine.load_matrices(out, row, true, "ldmatrix_x4_trans", line);
}
inline void ldmatrix_x2(std::uint32_t (&out)[2], const void* row, int line = __builtin_LINE()) {
  cuda_emulator::machine.load_matrices(out, row, false, "ldmatrix_x2", line);
}
inline void ldmatrix_x2_trans(std::uint32_t (&out)[2], const void* row, int line = __builtin_LINE()) {
  cuda_emulator::machine.load_matrices(out, row, true, "ldmatrix_x2_trans", line);
}
inline void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                         int line = __builtin_LINE()) {
  cuda_emulator::machine.multiply_matrices(c, a, b, line);
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

// A tagged word: 32 bits that are valid where the tag is the one awaited.
__device__ __forceinline__ std::uint64_t tagged_word(std::uint32_t bits, std::uint32_t tag) {
  return static_cast<std::uint64_t>(tag) << 32 | bits;
}
__device__ __forceinline__ std::uint32_t word_bits(std::uint64_t word) { return static_cast<std::uint32_t>(word); }
__device__ __forceinline__ std::uint32_t word_tag(std::uint64_t word) { return static_cast<std::uint32_t>(word >> 32); }

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
