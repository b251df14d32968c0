// Every number of the CPU backend that was, or could be, chosen by measurement: a struct for each instruction-set path,
// and for what they share. Behind each stands what was measured, on which processor of docs/performance.md, and the
// commit that has it; times are of one 512 x 512 layer unless a call is named (U, M: the workload "paper").
//
// Numbers only: a function could be compiled for newer instructions and then be the linker's choice for every path.
#pragma once

#include <cstddef>

namespace qpilots::cpu::tuning {

// ---- path/: the products on vectors. A register block is kBlockRows rows by kPanelVectors vectors of outputs.

struct Portable {                          // 4 lanes, 16 registers (SSE2) or 32 (NEON)
  static constexpr int kBlockRows = 3;     // 12 accumulators. Not measured. cbe18bc
  static constexpr int kPanelVectors = 4;  // Not measured. cbe18bc
  // Columns of a register block of the backward product, by its rows. Not measured. cbe18bc
  static constexpr int kColumnsOf1 = 8, kColumnsOf2Or3 = 4, kColumnsOfMore = 4;
  static constexpr int kStreamRows = 1;  // see Avx512. More rows: not measured. b146495
  static constexpr int kStreamColumns[] = {256};
  static constexpr int kStreamPanels[] = {2};
};

struct Avx2 {                              // 8 lanes, 16 registers
  static constexpr int kBlockRows = 6;     // 12 accumulators. Others: not measured. cbe18bc
  static constexpr int kPanelVectors = 2;  // Not measured. cbe18bc
  static constexpr int kColumnsOf1 = 8, kColumnsOf2Or3 = 4, kColumnsOfMore = 2;  // Not measured. cbe18bc
  static constexpr int kStreamRows = 1;                                          // Not measured. b146495
  static constexpr int kStreamColumns[] = {256};
  static constexpr int kStreamPanels[] = {2};
};

struct Avx512 {  // 16 lanes, 32 registers
  // 6 rows by 4 vectors leave 8 registers for weights and broadcasts: forward at 97 to 99 % of peak, 16 rows and more.
  // Zen 5, 22b0e33
  static constexpr int kBlockRows = 6;
  static constexpr int kPanelVectors = 4;
  // 6 rows by 4 columns: backward at 80 to 88 % of peak. Zen 5, 22b0e33. Others: not measured.
  static constexpr int kColumnsOf1 = 16, kColumnsOf2Or3 = 8, kColumnsOfMore = 4;
  // Float32 backward: so many rows stream the weights, whose gradients take half of the registers (4 rows by 4
  // vectors). 2, 3, 4 rows from the last-level cache in blocks 14.1, 16.0, 16.0 us, streamed 10.6, 10.9, 12.5. Zen 5,
  // b146495
  static constexpr int kStreamRows = 4;
  // By rows, less one. Columns whose sums wait in the first-level cache: 16 kB at most. Others: not measured.
  static constexpr int kStreamColumns[] = {256, 128, 64, 64};
  // Panels at once: 16 gradients at most. One row from memory 14.9 -> 11.1 us with two panels in the order of their
  // addresses, from the last-level cache 10.3 -> 9.9. Zen 5, 1464e97
  static constexpr int kStreamPanels[] = {2, 2, 1, 1};
};

struct Avx512Bf16 : Avx512 {  // products by vdpbf16ps
  // Backward, rows of a register block of two units of 8 columns. From the second-level cache 6 to 8 rows reach 80 to
  // 84 % of peak, 9 to 11 rows 91 to 95 %. Zen 5, 5269cae. On Zen 4 6 rows 94 to 96 %, 8 to 11 rows 97 %, d56e270
  static constexpr int kTwoUnitRows = 11;
  static constexpr int kTwoUnitRowsWanted = 9;  // where the rows can be shared out so
  // And of one of four units: 5 rows 91 to 95 % of peak. Zen 5, 5269cae. They wait for the weights' way more than for a
  // port, whatever the processor.
  static constexpr int kFourUnitRows = 5;
  // Quads between products: on Zen 5 all that the registers hold beside the accumulators. Not measured. On Zen 4 fewer,
  // so that their shuffles stand among the products: 92 to 94 -> 97 to 98 % of peak, U at B=256 211 -> 203 ms. Zen 4,
  // d56e270
  static constexpr int kQuadsOnZen5 = 8, kQuadsOnZen4 = 2;
  static constexpr int kStreamColumnsOf1 = 512;  // one row; 16 kB of sums. Not measured. 5269cae
  // Up to 6 rows forward ask for nothing ahead, being bound by the way from the last-level cache: 4 rows 5.0 us,
  // else 6.6; M at B=1 2.93 -> 2.63 ms. Zen 5, e9dd69a
  static constexpr bool kAskInOneBlock = false;
};

struct EveryPath {
  static constexpr bool kAskInOneBlock = true;  // see Avx512Bf16. Else: not measured.
  // Forward: weights are asked for ahead at every stop, of so many steps. Spread so, 16 float32 rows from memory take
  // 36 us (unasked 53, all asked for at once 65). Zen 5, 3650ae2. Other numbers of steps: not measured.
  static constexpr int kStopSteps = 4;
  // Float32 forward, with 2 or 3 blocks of rows: steps of a panel for all of them before the next are taken, 32 kB. 16
  // rows from a far last-level cache 51.8 -> 47.6 us, U at B=16 20.5 -> 18.7 ms. Xeon, 3c53748. From 24 rows on whole
  // panels take 2 to 3 % less. Xeon, 1854f20. From the second-level cache 16 rows take 2 % more: only where
  // kLargeSecondLevel.
  static constexpr int kPieceSteps = 128;
  static constexpr int kPieceFewestBlocks = 2, kPieceMostBlocks = 3;
  // Float32 backward: from the columns of a block to those that it asks for. 16 rows from a far last-level cache 53 us;
  // with 64 columns, and all rows of 64 columns before the next, 67. Xeon, fef9955
  static constexpr int kAheadColumns = 8;
  // Float32 backward with rows in the lanes, of kPanelVectors vectors of rows: 64 rows take 7 % less than in blocks, 48
  // rows 6, 32 rows nothing, 16 rows twice as long; with AVX2 16 rows take 35 % less. Xeon, f12ea8a
  static constexpr int kLaneBlocks = 8;  // of columns, whose results wait to be turned back. Not measured.
  static constexpr int kLeastLaneColumns =
      128;  // fewer do not repay the turning of the gradients. Not measured. f12ea8a
  // Rows that go through a network together. They share the second-level cache with the weights of a layer: with 2 MB
  // of it, float32 U at B=256 takes 273 ms with 32 rows, 263 with 64, 264 with 128. Xeon, fc0d15f. With 1 MB 24 to 48
  // rows are within noise. Zen 5.
  static constexpr long kLargeSecondLevel = 2L << 20;
  static constexpr int kRowsTogether = 32, kRowsTogetherLarge = 64;
  // LayerNorm: rows that are taken together, pass by pass. One by one calls take 1 to 2 % more, M at B=16 4 %. Zen 5,
  // c10dd80
  static constexpr int kNormRows = 4;
  // Packing: 34 MB with transposes and prefetch 1.8 -> 1.2 ms (bfloat16 2.8 -> 0.95). Zen 5, 22b0e33. Other distances:
  // not measured.
  static constexpr int kPackAheadElements = 128;
  // Fingerprints: 34 MB on one thread 0.68 ms, with 4 kB ahead 0.87. Zen 5, 1464e97
  static constexpr std::ptrdiff_t kFingerprintAheadBytes = 16384;
  static constexpr int kFingerprintChains = 4;  // Not measured. 1056ae4
};

// ---- amx/: the products on tile registers

struct Amx {
  // U at B=256 takes 15 % more with 32 or 64 rows, 5 % more with 256. Xeon, c1debcd
  static constexpr int kRowsTogether = 128;
  // Backward, rows up to which weights stay as they lie instead of being turned. Turned 16 rows take 11.2 us instead
  // of 10.7 from the second-level cache, 22 instead of 27 from a far third; one row 8 and 22 instead of 5 and 18. Xeon,
  // ea3fe8a
  static constexpr int kUnturnedRows = 8;
  // Outputs whose gradients and sums stay in the first-level cache: 8 rows 6 us, with 512 outputs 10. Xeon, ea3fe8a
  static constexpr int kOutputsAtOnce = 256;
  static constexpr int kColumnsAtOnce = 512;  // that are summed before any is written. Not measured. ea3fe8a
  // Tiles of columns that are turned before more than 32 rows meet them: with 4 to 32, 128 rows take the same within 5
  // %. Xeon, ea3fe8a
  static constexpr int kTurnedTiles = 16;
};

// ---- call/: rows, threads and where things lie

// When a call on several threads takes one instead (call/crowd.h). None of these was measured against others.
struct Crowded {
  // Longer calls span many of the scheduler's slices, and threads take their items from queues.
  static constexpr double kLongest = 0.05;                            // seconds
  static constexpr double kCrowded = 0.25, kCrowdedSeconds = 0.5e-3;  // lost by a thread of several
  static constexpr double kCalm = 0.1, kCalmSeconds = 0.2e-3;         // lost by one alone
  static constexpr int kStrikes = 2;                                  // crowded calls in a row before one is alone
  static constexpr int kFirst = 8, kMost = 4096;                      // calm calls before it is no more
  static constexpr int kForget = 256;                                 // calls on several threads that begin anew
};

struct Call {
  // Rows that keep a weight in registers long enough to hide its load, so that a range of them is worth dealing to a
  // thread: U bfloat16 at B=16 12.84 -> 12.66 ms. Zen 4, 45bf618
  static constexpr int kLeastRows = 8;
  static constexpr int kMostTeam = 8;  // panels in a layer of 512. Not measured. cbe18bc
  static constexpr int kSpins = 4000;  // of a barrier, about 50 us, before it yields. Not measured. cbe18bc
  // Between panels, bytes. A panel of 512 inputs is a power of two; without the gap the backward's streams (one a
  // panel) share cache sets. Not measured. cbe18bc
  static constexpr std::size_t kPanelGap = 1024 + 64;
  // Rows of operands: a whole number of so many elements, and as many more, off a power of two and on cache lines in
  // bfloat16 too. 32 rows forward on tile registers 9.6 -> 8.0 us. Xeon, fc0d15f
  static constexpr int kRowElements = 32;
};

// ---- live/: memory between calls

struct Live {
  // Fresh pages that the kernel can make huge: M float32 at B=1 10.9 ms, on small ones 12.0. Xeon, 3aeea59
  static constexpr std::size_t kHugePage = std::size_t{1} << 21;
  // Reading less than this costs no more than asking the kernel. Not measured. 59f5288
  static constexpr std::size_t kLeastWatched = std::size_t{1} << 20;
  // Memory is protected once it was found as before so many times running, and longer each time that protection did not
  // pay: a write to a protected page costs 1.2 us, 15 times what reading it does. Zen 5, 59f5288. Other numbers: not
  // measured.
  static constexpr int kFirstPatience = 3, kMostPatience = 1024;
};

}  // namespace qpilots::cpu::tuning
