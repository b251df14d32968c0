// Small kernels, one of them right and each of the others wrong in one way that the emulator must catch.
#include "grid_barrier.h"
#include "host.h"
#include "warp.h"

namespace qpilots {
namespace cuda {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

namespace {

enum class Fault : int {
  kNone,
  kMissingBlockBarrier,
  kWriteAfterRead,
  kOutOfBounds,
  kMisaligned,
  kUninitialised,
  kWritesConstant,
  kSkippedBlockBarrier,
  kOtherBlockBarrier,
  kSkippedShuffle,
  kMissingWarpBarrier,
  kMissingGridBarrier,
  kUnorderedGridBarrier,
  kBoundedSpin,
  kMissingRelease,
  kMissingAcquire,
  kWrittenConstant,
};

struct FaultArgs {
  Fault fault;
  const float* input;  // [kThreads]
  float* result;       // [blocks][kThreads]
  GridSync* sync;
};

__global__ void faulty_kernel(const FaultArgs a) {
  QPILOTS_SHARED(float, row, kThreads);
  QPILOTS_SHARED(std::uint32_t, flag, 1);
  const Fault fault = a.fault;
  const int i = threadIdx.x;
  store_shared(row + i, load_constant(a.input + i));
  if (fault == Fault::kSkippedBlockBarrier) {
    if (i == 7) return;
    __syncthreads();
  } else if (fault == Fault::kOtherBlockBarrier) {
    if (i < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != Fault::kMissingBlockBarrier) {
    __syncthreads();
  }
  const float neighbour = load_shared(row + (i + 33) % kThreads);
  if (fault == Fault::kWriteAfterRead) store_shared(row + i, neighbour);
  if (fault == Fault::kOutOfBounds) load_constant(a.input + kThreads + i / 255);
  if (fault == Fault::kMisaligned) load16_constant(a.input + 1);
  if (fault == Fault::kUninitialised) load_global(a.result + blockIdx.x * kThreads + i);
  if (fault == Fault::kWritesConstant) store_global(const_cast<float*>(a.input) + i, neighbour);
  float sum = neighbour;
  if (fault != Fault::kSkippedShuffle || i != 40) sum = warp_sum(sum);
  __syncthreads();
  store_shared(row + i, sum);
  if (fault != Fault::kMissingWarpBarrier) __syncwarp();
  sum = load_shared(row + (i ^ 1));
  store_global(a.result + blockIdx.x * kThreads + i, sum);

  std::uint32_t passed = 0;
  if (fault == Fault::kUnorderedGridBarrier) {  // arrives before the other threads of the block have written
    if (i == 0) {
      add_release(&a.sync->arrivals, 1u);
      while (load_acquire(&a.sync->arrivals) < gridDim.x) {
      }
    }
    __syncthreads();
  } else if (fault == Fault::kMissingRelease || fault == Fault::kMissingAcquire) {
    __syncthreads();
    if (i == 0) {
      const bool released = fault != Fault::kMissingRelease, acquired = fault != Fault::kMissingAcquire;
      cuda_emulator::machine.add(&a.sync->arrivals, 1u, released);
      while ((acquired ? load_acquire(&a.sync->arrivals) : load_relaxed(&a.sync->arrivals)) < gridDim.x) {
      }
    }
    __syncthreads();
  } else if (fault != Fault::kMissingGridBarrier) {
    if (fault == Fault::kBoundedSpin && blockIdx.x == 0) return;
    const bool alive = grid_barrier(a.sync, passed, fault == Fault::kBoundedSpin ? 100u : 1u << 20, flag);
    if (!alive) return;
  }
  const float* neighbours = a.result + (blockIdx.x + 1) % gridDim.x * kThreads;
  if (fault == Fault::kWrittenConstant) load_constant(neighbours + i);
  const float other = load_global(neighbours + i);
  const bool alive = grid_barrier(a.sync, passed, 1u << 20, flag);
  if (alive) store_global(a.result + blockIdx.x * kThreads + i, other);
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

QPILOTS_EXPORT int qpilots_faulty_launch(int fault, int grid, const float* input, float* result, void* sync) {
  using namespace qpilots::cuda;
  const FaultArgs args{static_cast<Fault>(fault), input, result, static_cast<GridSync*>(sync)};
  const LaunchConfig config{static_cast<unsigned>(grid), kThreads, 0, nullptr, true};
  QPILOTS_CHECK(QPILOTS_LAUNCH(faulty_kernel, config, args));
  return kSuccess;
}
