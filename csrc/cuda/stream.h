// Weights on their way into shared memory: those of the next product travel while a block works on, or waits for, this
// one. The columns of a product are split over the warps, and each warp copies what it will read itself.
#pragma once

#include "phase.h"
#include "warp.h"

namespace qpilots {
namespace cuda {

// The tiles of columns that a warp multiplies: an even share, which depends on the width alone.
struct Slice {
  int begin;
  int end;
};
__device__ __forceinline__ Slice warp_slice(const Phase& p) {
  const int tiles = p.in_stride / kTile, warp = warp_index();
  return {tiles * warp / kWarps, tiles * (warp + 1) / kWarps};
}

// Elements from one row of weights in shared memory to the next: 16 bytes more than the row, so that 8 rows lie in
// different banks.
template <class Weight>
QPILOTS_HD int shared_stride(int in_stride) {
  return in_stride + 16 / static_cast<int>(sizeof(Weight));
}

// Where a block stands in its share of the program: `tiles` tiles of one member of a product.
struct Position {
  int step;  // -1: the phases before the first step
  int phase;
  int member;
  int first_tile;
  int tiles;
};

// Whether this block runs step k: all blocks do where it is steered, else the flow's.
__device__ __forceinline__ bool is_steered_step(const SampleArgs& a, int k) {
  return k >= 0 && k < a.num_steps && load_constant(a.schedule + 3 * k + 2) > 0.0f;
}
__device__ __forceinline__ bool runs_step(const SampleArgs& a, int k) {
  return a.num_steps == 0 || is_steered_step(a, k) || static_cast<int>(blockIdx.x) < a.num_flow_blocks;
}
__device__ __forceinline__ int last_step(const SampleArgs& a) { return a.num_steps == 0 ? 0 : a.num_steps - 1; }
__device__ __forceinline__ int first_phase(const SampleArgs& a, int k) { return k < 0 ? 0 : a.num_once; }
__device__ __forceinline__ int end_phase(const SampleArgs& a, int k) {
  if (k < 0) return a.num_once;
  return a.num_once + (a.num_steps == 0 || is_steered_step(a, k) ? a.num_step_phases : a.num_flow_phases);
}

__device__ __forceinline__ bool skips(const SampleArgs& a, const Phase& p, int k) {
  return p.steered_only != 0 && !is_steered_step(a, k);
}

// Moves on to the next tiles of this block with weights; false at the end of the call.
__device__ __forceinline__ bool advance(const SampleArgs& a, const Phase* program, Position& at) {
  int end = end_phase(a, at.step);
  if (at.tiles > 0) {
    const Phase& p = program[at.phase];
    at.first_tile += at.tiles;
    if (at.first_tile >= p.tile_end) {
      at.first_tile = p.tile_begin;
      at.member += p.teams;
    }
    if (at.member < p.members) {
      at.tiles = p.tile_end - at.first_tile < a.group_tiles ? p.tile_end - at.first_tile : a.group_tiles;
      return true;
    }
    ++at.phase;
  }
  while (true) {
    for (; at.phase < end; ++at.phase) {
      const Phase& p = program[at.phase];
      if (p.weight < 0 || p.tile_begin >= p.tile_end || skips(a, p, at.step)) continue;
      at.member = p.first_member;
      at.first_tile = p.tile_begin;
      at.tiles = p.tile_end - p.tile_begin < a.group_tiles ? p.tile_end - p.tile_begin : a.group_tiles;
      return true;
    }
    do {
      if (++at.step > last_step(a)) return false;
    } while (!runs_step(a, at.step));
    at.phase = first_phase(a, at.step);
    end = end_phase(a, at.step);
  }
}

// The weights of a block's products in the order in which it works on them, one or two at a time.
template <class Weight>
struct WeightStream {
  unsigned char* buffers;
  std::int64_t buffer_bytes;
  Position ahead;  // of the latest copy
  bool more;       // copies are left
  int copied, used;

  __device__ __forceinline__ void copy_next(const SampleArgs& a, const Phase* program) {
    more = more && advance(a, program, ahead);
    if (more) {
      const Phase& p = program[ahead.phase];
      const Slice slice = warp_slice(p);
      const int lane = lane_index(), first = lane & ((1 << p.copy_shift) - 1), lanes = 1 << p.copy_shift;
      constexpr int kVectors = kTile * static_cast<int>(sizeof(Weight)) / 16;  // of 16 bytes in a tile's row
      const int vectors = (slice.end - slice.begin) * kVectors;
      const unsigned char* from = a.weights + ahead.member * p.member_bytes + p.weight;
      unsigned char* to = buffers + (a.buffers == 2 ? (copied & 1) * buffer_bytes : 0);
      const int stride = shared_stride<Weight>(p.in_stride);
      for (int row = lane >> p.copy_shift; row < ahead.tiles * kTile; row += kWarpSize >> p.copy_shift) {
        const std::int64_t source = static_cast<std::int64_t>(ahead.first_tile * kTile + row) * p.in_stride;
        for (int v = first; v < vectors; v += lanes) {
          const int column = slice.begin * kTile + v * (16 / static_cast<int>(sizeof(Weight)));
          copy_async16(to + (row * stride + column) * static_cast<int>(sizeof(Weight)),
                       from + (source + column) * static_cast<int>(sizeof(Weight)));
        }
      }
      ++copied;
    }
    copy_async_commit();
  }

  // The weights of the next product: what this warp copied is there. With two buffers those of the one after it start
  // now, which the barrier of the product before makes safe.
  __device__ __forceinline__ const Weight* acquire(const SampleArgs& a, const Phase* program) {
    const unsigned char* found = buffers + (a.buffers == 2 ? (used & 1) * buffer_bytes : 0);
    ++used;
    if (a.buffers == 2) copy_next(a, program);
    return reinterpret_cast<const Weight*>(found);
  }
  __device__ __forceinline__ void await(const SampleArgs& a) const {
    if (a.buffers == 2)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncwarp();
  }
  // After the block's barrier that ends the use of the weights.
  __device__ __forceinline__ void release(const SampleArgs& a, const Phase* program) {
    if (a.buffers != 2) copy_next(a, program);
  }
};

}  // namespace cuda
}  // namespace qpilots
