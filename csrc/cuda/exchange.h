// How blocks hand numbers to each other: words of 32 bits of data and 32 bits of tag, the number of the step. Who needs
// a word polls it until it carries the tag. No fence, no barrier: nothing but the word itself is ordered.
//
// Two slots serve all steps by turns. A word of step k is written again at step k + 2, by a block that has x of that
// step. Every block that takes part in a step sends something on which its x depends, after it has read what it needs
// of the step before: so nobody still waits for the old word.
//
// Tags count up for the life of the exchange, and may wrap: a word that is awaited was last written in this call or the
// one before. Each block keeps its own count in memory, so a replayed graph goes on counting.
#pragma once

#include "phase.h"
#include "platform.h"

namespace qpilots {
namespace cuda {

// How long a thread polls before it gives up, which ends the call in all blocks.
struct Patience {
  std::uint64_t* given_up;  // of all blocks: 1 with the call's first tag
  std::uint32_t first_tag;
  std::uint32_t limit;
  bool alive;
};

// The data of `word`, read from `address`, as soon as it carries the tag.
__device__ __forceinline__ std::uint32_t await_word(const std::uint64_t* address, std::uint64_t word, std::uint32_t tag,
                                                    Patience& patience) {
  for (std::uint32_t spins = 0; word_tag(word) != tag && patience.alive; ++spins) {
    const bool others_gave_up =
        (spins & 63u) == 63u && load_word(patience.given_up) == tagged_word(1u, patience.first_tag);
    if (spins >= patience.limit || others_gave_up) {
      store_word(patience.given_up, tagged_word(1u, patience.first_tag));
      patience.alive = false;
    }
    word = load_word(address);
  }
  return word_bits(word);
}

__device__ __forceinline__ float receive_number(const std::uint64_t* address, std::uint32_t tag, Patience& patience) {
  return bits_float(await_word(address, load_word(address), tag, patience));
}

__device__ __forceinline__ void send_number(std::uint64_t* address, float value, std::uint32_t tag) {
  store_word(address, tagged_word(float_bits(value), tag));
}

// A row of operands travels in tiles of kTile columns, kTileWords<Weight> words each: two bf16 values a word, or one
// float32. A lane of quarter q (of a row, see products.h) takes words 4 j + q of a tile.
template <class Weight>
inline constexpr int kTileWords = kTile * static_cast<int>(sizeof(Weight)) / 4;
template <class Weight>
inline constexpr int kLaneWords = kTileWords<Weight> / 4;

// The first column, within its tile, of word 4 j + q; bf16: the next one follows.
template <class Weight>
__device__ __forceinline__ int word_column(int j, int q) {
  return sizeof(Weight) == 2 ? 8 * j + 2 * q : 4 * q + j;
}

__device__ __forceinline__ std::uint32_t operand_bits(Bf16, float first, float second) {
  return static_cast<std::uint32_t>(to_bf16(first)) | static_cast<std::uint32_t>(to_bf16(second)) << 16;
}
__device__ __forceinline__ std::uint32_t operand_bits(float, float first, float) { return float_bits(first); }

// The value that an operand has after rounding.
template <class Weight>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<Weight>(x));
}

// Sends columns 2 i and 2 i + 1 of a tile whose words begin at `tile`.
template <class Weight>
__device__ __forceinline__ void send_pair(std::uint64_t* tile, int i, const float (&pair)[2], std::uint32_t tag) {
  if constexpr (sizeof(Weight) == 2) {
    store_word(tile + i, tagged_word(operand_bits(Weight{}, pair[0], pair[1]), tag));
  } else {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int column = 2 * i + v;  // q = column / 4, j = column % 4
      store_word(tile + 4 * (column % 4) + column / 4, tagged_word(float_bits(pair[v]), tag));
    }
  }
}

__device__ __forceinline__ std::int64_t row_index(const Phase& p, int member, int row) {
  return static_cast<std::int64_t>(member) * p.rows + row;
}

}  // namespace cuda
}  // namespace qpilots
