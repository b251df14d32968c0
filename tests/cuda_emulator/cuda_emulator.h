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

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "async_memory.h"
#include "fragments.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace cuda_emulator {

constexpr int kDefaultShared = 48 * 1024;  // dynamic shared memory of a kernel that was allowed no more

class Machine : public AsyncMemory {
 public:
  std::mutex launch_mutex;
  std::map<const void*, int> allowed_shared;  // kernel -> its attribute cudaFuncAttributeMaxDynamicSharedMemorySize

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
    published_.clear();
    prepare(grid, block);
    begin_memory(shared_bytes);
    begin_async();
    run();
    end_memory();
    current = nullptr;
    return error.empty();
  }

 private:
  std::map<const std::uint32_t*, std::vector<std::uint32_t>> published_;
};

inline Machine machine;

inline void Scheduler::fiber_main() {
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
#define __syncthreads() cuda_emulator::machine.block_barrier("__syncthreads", __LINE__)
#define __syncthreads_count(vote) cuda_emulator::machine.block_barrier("__syncthreads_count", __LINE__, (vote) != 0)
#define __syncthreads_or(vote) (__syncthreads_count(vote) != 0)
#define __syncthreads_and(vote) (__syncthreads_count(vote) == static_cast<int>(blockDim.x))
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
