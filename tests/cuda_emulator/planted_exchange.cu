// As planted_faults.cu, for what a kernel without barriers is made of: tagged words, asynchronous copies and products
// of matrix fragments. Each kernel is right where its fault is kNone.
#include "host.h"
#include "warp.h"

namespace qpilots {
namespace cuda {
namespace {

// ---------------------------------------------------------------- tagged words

enum class WordFault : int { kNone, kTornStore, kOneSlot, kTagNotRaised, kNotPolled, kOrdinaryLoad, kOrdinaryPayload };

constexpr int kWordsPerBlock = 32;
constexpr std::uint32_t kSpinLimit = 1u << 12;

struct WordArgs {
  WordFault fault;
  int phases;
  std::uint32_t first_tag;
  std::uint64_t* slots;   // [2][blocks * kWordsPerBlock]
  float* payload;         // [blocks * kWordsPerBlock]
  std::uint32_t* result;  // [blocks]: the last sum
  std::uint32_t* failed;
};

// Phase by phase, every block sums the words of all blocks, and sends words that depend on the sum.
__global__ void exchange_kernel(const WordArgs a) {
  QPILOTS_SHARED(std::uint32_t, parts, kWarps);
  const WordFault fault = a.fault;
  const int i = threadIdx.x, words = static_cast<int>(gridDim.x) * kWordsPerBlock;
  const int own = static_cast<int>(blockIdx.x) * kWordsPerBlock + i;
  std::uint32_t sum = 0;
  for (int phase = 0; phase < a.phases; ++phase) {
    const std::uint32_t tag = fault == WordFault::kTagNotRaised ? a.first_tag : a.first_tag + phase;
    std::uint64_t* slot = a.slots + (fault == WordFault::kOneSlot ? 0 : phase % 2) * words;
    if (i < kWordsPerBlock) {
      const std::uint32_t value = sum * 3u + static_cast<std::uint32_t>(own);
      if (fault == WordFault::kTornStore) {
        auto* halves = reinterpret_cast<std::uint32_t*>(slot + own);
        store_relaxed(halves, value);
        store_relaxed(halves + 1, tag);
      } else {
        if (fault == WordFault::kOrdinaryPayload) store_global(a.payload + own, bits_float(value));
        store_word(slot + own, tagged_word(value, tag));
      }
    }
    std::uint32_t mine = 0;
    bool alive = true;
    for (int w = i; w < words; w += kThreads) {
      std::uint64_t word = fault == WordFault::kOrdinaryLoad ? load_constant(slot + w) : load_word(slot + w);
      for (std::uint32_t spins = 0; word_tag(word) != tag && fault != WordFault::kNotPolled; ++spins) {
        if (spins >= kSpinLimit) {
          alive = false;
          break;
        }
        word = load_word(slot + w);
      }
      mine += fault == WordFault::kOrdinaryPayload ? float_bits(load_global(a.payload + w)) : word_bits(word);
    }
    for (int offset = 16; offset > 0; offset >>= 1) mine += __shfl_xor_sync(kAllLanes, mine, offset);
    if (!__syncthreads_and(alive)) {  // the last phase's sums have been read, too
      if (i == 0) store_relaxed(a.failed, 1u);
      return;
    }
    if (lane_index() == 0) store_shared(parts + warp_index(), mine);
    __syncthreads();
    sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += load_shared(parts + w);
  }
  if (i == 0) store_global(a.result + blockIdx.x, sum);
}

// ---------------------------------------------------------------- asynchronous copies

enum class CopyFault : int {
  kNone,
  kNoWait,
  kOneGroupTooMany,
  kNotCommitted,
  kNoBlockBarrier,
  kTargetStillRead,
  kTargetOverwritten,
  kSourceOverwritten,
};

constexpr int kSlice = kThreads * 4;  // floats

struct CopyArgs {
  CopyFault fault;
  int slices;
  float* source;  // [slices][kSlice]
  float* result;  // [blocks][kThreads]: sums over the slices of a neighbour's vector
};

// Two buffers in turn: the next slice arrives while this one is summed.
__global__ void copy_kernel(const CopyArgs a) {
  QPILOTS_SHARED(float, buffers, 2 * kSlice);
  const CopyFault fault = a.fault;
  const int i = threadIdx.x;
  const auto fetch = [&](int s) {
    if (s < a.slices) copy_async16(buffers + s % 2 * kSlice + 4 * i, a.source + s * kSlice + 4 * i);
    if (fault != CopyFault::kNotCommitted) copy_async_commit();
  };
  fetch(0);
  float sum = 0.0f;
  for (int s = 0; s < a.slices; ++s) {
    float* slice = buffers + s % 2 * kSlice;
    fetch(s + 1);
    if (fault == CopyFault::kTargetOverwritten) store_shared(slice + 4 * i, 0.0f);
    if (fault == CopyFault::kSourceOverwritten && blockIdx.x == 0) store_global(a.source + s * kSlice + 4 * i, 0.0f);
    if (fault == CopyFault::kOneGroupTooMany) {
      copy_async_wait<2>();
    } else if (fault != CopyFault::kNoWait) {
      copy_async_wait<1>();
    }
    if (fault != CopyFault::kNoBlockBarrier) __syncthreads();
    const Vector16 v = load16_shared(slice + 4 * ((i + 33) % kThreads));
    for (int j = 0; j < 4; ++j) sum += bits_float(v.words[j]);
    if (fault != CopyFault::kTargetStillRead) __syncthreads();
  }
  copy_async_wait<0>();
  store_global(a.result + blockIdx.x * kThreads + i, sum);
}

// ---------------------------------------------------------------- products of fragments

enum class MatrixFault : int {
  kNone,
  kTransposed,  // right for operands that lie the other way round
  kTransposedByMistake,
  kWrongRow,
  kMissingLane,
  kOtherOperation,
  kMissingLoadLane,
  kSwappedFragments,
  kGlobalRow,
  kNoWait,
};

struct MatrixArgs {
  MatrixFault fault;
  const std::uint16_t* a;  // [16 (m)][16 (k)], or [k][m] for kTransposed
  const std::uint16_t* b;  // [8 (n)][16 (k)], or [k][n]
  float* c;                // [16 (m)][8 (n)]
};

// c = a b by one warp.
__global__ void matrix_kernel(const MatrixArgs args) {
  QPILOTS_SHARED(std::uint16_t, a, 16 * 16);
  QPILOTS_SHARED(std::uint16_t, b, 16 * 8);
  const MatrixFault fault = args.fault;
  const int lane = threadIdx.x;
  copy_async16(a + 8 * lane, args.a + 8 * lane);
  if (lane < 16) copy_async16(b + 8 * lane, args.b + 8 * lane);
  copy_async_commit();
  if (fault != MatrixFault::kNoWait) copy_async_wait<0>();
  __syncthreads();
  std::uint32_t left[4], right[2];
  if (fault == MatrixFault::kTransposed) {
    ldmatrix_x4_trans(left, a + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
    ldmatrix_x2_trans(right, b + lane % 16 * 8);
  } else {
    const int row = fault == MatrixFault::kWrongRow ? lane % 8 : lane % 16;
    const std::uint16_t* from = a + row * 16 + lane / 16 * 8;
    if (fault == MatrixFault::kTransposedByMistake) {
      ldmatrix_x4_trans(left, from);
    } else {
      if (fault == MatrixFault::kGlobalRow) from = args.a + row * 16 + lane / 16 * 8;
      if (fault != MatrixFault::kMissingLoadLane || lane != 9) ldmatrix_x4(left, from);
    }
    ldmatrix_x2(right, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  if (fault == MatrixFault::kSwappedFragments) {
    const std::uint32_t second = left[1];
    left[1] = left[2];
    left[2] = second;
  }
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (fault == MatrixFault::kMissingLane && lane == 5) return;
  if (fault == MatrixFault::kOtherOperation && lane == 5) __syncwarp();
  mma_m16n8k16(c, left, right);
  for (int i = 0; i < 4; ++i) store_global(args.c + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, c[i]);
}

template <class Args>
int launch(void (*kernel)(Args), int grid, int threads, const Args& args) {
  const LaunchConfig config{static_cast<unsigned>(grid), static_cast<unsigned>(threads), 0, nullptr, true};
  QPILOTS_CHECK(QPILOTS_LAUNCH(kernel, config, args));
  return kSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace qpilots

QPILOTS_EXPORT int qpilots_exchange_launch(int fault, int grid, int phases, unsigned first_tag, void* slots,
                                           void* payload, void* result, void* failed) {
  using namespace qpilots::cuda;
  const WordArgs args{static_cast<WordFault>(fault),
                      phases,
                      first_tag,
                      static_cast<std::uint64_t*>(slots),
                      static_cast<float*>(payload),
                      static_cast<std::uint32_t*>(result),
                      static_cast<std::uint32_t*>(failed)};
  return launch(exchange_kernel, grid, kThreads, args);
}

QPILOTS_EXPORT int qpilots_copy_launch(int fault, int grid, int slices, float* source, float* result) {
  using namespace qpilots::cuda;
  return launch(copy_kernel, grid, kThreads, CopyArgs{static_cast<CopyFault>(fault), slices, source, result});
}

QPILOTS_EXPORT int qpilots_matrix_launch(int fault, const void* a, const void* b, float* c) {
  using namespace qpilots::cuda;
  const MatrixArgs args{static_cast<MatrixFault>(fault), static_cast<const std::uint16_t*>(a),
                        static_cast<const std::uint16_t*>(b), c};
  return launch(matrix_kernel, 1, kWarpSize, args);
}
