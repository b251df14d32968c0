// The program that the persistent kernel runs, as plain data, written by qpilots_fast/backends/cuda/plan.py. The
// mirrors in backends/cuda/structs.py must match field by field (qpilots_cuda_struct_bytes tells them apart).
#pragma once

#include <cstdint>

#include "qpilots/types.h"

namespace qpilots {
namespace cuda {

constexpr int kTile = 16;     // neurons, and columns, that a product takes at once
constexpr int kTileSums = 5;  // numbers of a tile and row that travel for a norm, at most

#define QPILOTS_PHASE_KINDS(X)                                                                       \
  X(kProduct, "product")  /* rows times weights */                                                   \
  X(kNorm, "norm")        /* a hidden layer's norm, once the sums of all of its neurons are there */ \
  X(kNormVjp, "norm_vjp") /* its derivative likewise; at the critic's top also Q */                  \
  X(kCollect, "collect")  /* numbers of all rows, into every block's own copy */                     \
  X(kWeigh, "weigh")      /* the weights of critics and draws, and the critics' gradient at the estimate */
enum class PhaseKind : std::int32_t { QPILOTS_PHASE_KINDS(QPILOTS_ENUMERATOR) };

// The rows of a product.
#define QPILOTS_OPERANDS(X)                                                               \
  X(kReceived, "received")              /* what another product sent */                   \
  X(kInput, "input")                    /* of an input tensor */                          \
  X(kState, "state")                    /* x */                                           \
  X(kEstimate, "estimate")              /* the clipped clean-action estimate */           \
  X(kPosteriorInput, "posterior_input") /* (posterior noise, x) of each posterior draw */ \
  X(kCotangent, "cotangent")            /* the critics' weighted gradient at the estimate */
enum class Operand : std::int32_t { QPILOTS_OPERANDS(QPILOTS_ENUMERATOR) };

// What becomes of a product.
#define QPILOTS_RESULTS(X)                                                                 \
  X(kColumns, "columns")      /* part of a first layer's sums, kept by the block */        \
  X(kHidden, "hidden")        /* a hidden layer */                                         \
  X(kCriticTop, "critic_top") /* the critics' last hidden layer, and d Q / d z of it */    \
  X(kDelta, "delta")          /* d z of a hidden layer */                                  \
  X(kOwn, "own")              /* numbers of all rows, that every block makes for itself */ \
  X(kNumbers, "numbers")      /* sent as float32 */                                        \
  X(kOutput, "output")        /* float32 in the workspace: the result of the launch */
enum class Result : std::int32_t { QPILOTS_RESULTS(QPILOTS_ENUMERATOR) };

// Tensors of a launch that kInput products read.
#define QPILOTS_INPUTS(X)                                                  \
  X(kObs, "obs")                        /* [B][S] */                       \
  X(kFlowTimes, "flow_times")           /* [K][.] features of every t_k */ \
  X(kPosteriorTimes, "posterior_times") /* [K][.] of t_k, s and u */       \
  X(kColumns, "columns")                /* [B][in] all, of one network */  \
  X(kCotangent, "cotangent")            /* [E][B][out] of its output */
enum class Input : std::int32_t { QPILOTS_INPUTS(QPILOTS_ENUMERATOR) };
constexpr int kNumInputs = static_cast<int>(Input::kCotangent) + 1;

// Every block's own copies of numbers.
#define QPILOTS_COLLECTED(X)                                         \
  X(kVelocity, "velocity")                /* [B][A] */               \
  X(kPosteriorOutput, "posterior_output") /* [R][A] output of map */ \
  X(kEstimateVjp, "estimate_vjp")         /* [R][A] g pulled to x */
enum class Collected : std::int32_t { QPILOTS_COLLECTED(QPILOTS_ENUMERATOR) };

// One entry of the program. A product is target[m][row][n] = sum_i weight[m][n][i] operand[m][row][i] (+ addends).
// Offsets: -1 is none; "words" count from the exchange, "floats" from the workspace, "bytes" from the packed weights
// of member 0.
struct Phase {
  std::int32_t kind;
  std::int32_t operand;
  std::int32_t result;
  std::int32_t activation;  // of the target
  std::int32_t norm;        // NormPlacement of the target
  std::int32_t members;
  std::int32_t rows;
  std::int32_t in_dim;
  std::int32_t in_stride;  // of a weight's row, in elements: in_dim padded to kTile
  std::int32_t out_dim;
  std::int32_t tiles;       // of kTile neurons
  std::int32_t copy_shift;  // log2 of the lanes that copy one weight row's slice together
  std::int32_t input;       // kInput: Input; kOwn, kCollect: Collected
  std::int32_t rows_per_addend;
  std::int32_t at_top;           // kNorm, kNormVjp: the cotangent is the critic's output row
  std::int32_t folded;           // the target's norm, "post", is made by the next product (fold.h)
  std::int32_t steered_only;     // steps without steering skip it
  std::int32_t first_block;      // teams * team_blocks blocks from here share the members and tiles
  std::int32_t teams;            // each takes every teams-th member
  std::int32_t team_blocks;      // that share a member's tiles
  std::int32_t first_norm_row;   // of the scalars of the target's norm that the block keeps
  std::int32_t source_norm_row;  // of those of the source's, which is folded
  float layer_norm_eps;          // of the target
  // filled in by the block: its share
  std::int32_t first_member;
  std::int32_t tile_begin;
  std::int32_t tile_end;
  std::int64_t source;                // words; kInput: floats of row 0
  std::int64_t source_member_stride;  // floats, kInput
  std::int64_t target;                // words, kColumns and kOutput: floats [members][rows][out_dim]
  std::int64_t sums;                  // words [members][rows][tiles][kTileSums], which a product sends for its norm
  std::int64_t vjp_sums;              // likewise, for the norm's derivative: sent by kNorm at the top
  std::int64_t source_sums;           // likewise, of a source d z, for the target's folded norm
  std::int64_t delta_sums;            // likewise, of the target d z, for the folded norm below
  std::int64_t values;                // floats [members][rows][out_dim], kept by the block: xhat
  std::int64_t slopes;                // floats, act'
  std::int64_t deltas;                // floats, d xhat
  std::int64_t linear;                // floats: z of the target without its bias, where the norm below is folded
  std::int64_t row_addend;            // floats, [members][rows / rows_per_addend][out_dim]
  std::int64_t step_addend;           // floats, [num_steps][out_dim]
  std::int64_t weight;                // bytes
  std::int64_t bias;                  // bytes, float32
  std::int64_t fold_sums;             // bytes, float32: row sums of the weight into the target, whose source is folded
  std::int64_t gamma;                 // bytes, float32: affine of the target's norm
  std::int64_t beta;
  std::int64_t top_weight;  // bytes: the critic's output row
  std::int64_t top_bias;
  std::int64_t member_bytes;  // between members
};

// The argument of sample_kernel.
struct SampleArgs {
  const Phase* program;             // [num_once + num_step_phases]
  const unsigned char* weights;     // packed
  float* workspace;                 // what a block keeps for itself, and the output
  std::uint64_t* exchange;          // [2][slot_words] what blocks send each other: tagged words (exchange.h)
  std::uint64_t* tags;              // [1 + num_blocks] (exchange.h)
  std::uint32_t* host_failure;      // pinned host word, may be null
  const float* inputs[kNumInputs];  // by Input; null where no phase reads it
  const float* noise;               // [B][A]
  const float* posterior_noise;     // [K][B][N][A]
  const float* schedule;            // [K][3] 1 - t, dt, weight (0: the step is not steered)
  const float* alpha;               // [B] the strength of each row; null: the steering's
  const float* bounds;              // [2][A] of the actions, low and high
  const unsigned char* steered;     // [A] 1 where the critic may move the action; null: all
  float* actions;                   // output [B][A]
  // the report, [K][B]: all of them or none
  float* gradient_norms;
  unsigned char* nonfinite;
  float* q_std;
  unsigned char* gated;
  // words into the exchange
  std::int64_t state;       // [B][A] x, for blocks that sat out steps without steering
  std::int64_t q_values;    // [E][R]
  std::int64_t critic_vjp;  // [E][R][A]
  std::int64_t slot_words;
  std::int32_t num_once;  // phases before the first step
  std::int32_t
      num_flow_phases;  // the first of them: what a step without steering runs, but for those that are steered_only
  std::int32_t num_step_phases;  // of a steered step
  std::int32_t num_steps;        // 0: the step phases run once, without a state
  std::int32_t num_flow_blocks;  // the first blocks, which run the steps without steering
  std::int32_t num_blocks;       // of the grid
  std::int32_t batch;
  std::int32_t action_dim;
  std::int32_t num_members;    // E
  std::int32_t stride;         // the largest in_stride
  std::int32_t group_tiles;    // tiles of a member that a buffer of weights holds
  std::int32_t buffers;        // of weights, 1 or 2
  std::int32_t num_norm_rows;  // whose mean and 1 / std a block keeps
  std::uint32_t spin_limit;
  SteeringParams steering;
};

// A vector of parameters.
struct Parameters {
  std::uint64_t source;  // address, 0: there is none
  std::int64_t stride;   // elements
  std::int32_t type;     // ElementType
  std::int32_t padding;
};

// One matrix or vector to copy into the packed weights: dst[r][c] = src[r * row_stride + c * column_stride], times
// scale[c], or scale[r] where it goes by rows.
struct PackItem {
  std::uint64_t source;        // address
  std::int64_t row_stride;     // elements
  std::int64_t column_stride;  // elements
  std::int64_t target;         // bytes
  Parameters scale;
  std::int32_t scales_rows;
  std::int32_t rows;
  std::int32_t columns;
  std::int32_t target_rows;  // rows and columns to write, those beyond with zeros
  std::int32_t target_columns;
  std::int32_t target_stride;  // elements
  std::int32_t source_type;    // ElementType
  std::int32_t target_type;
  std::int32_t first_tile;  // tiles of all items before this one
  std::int32_t padding;
};

// What a folded norm leaves of a weight W [rows][columns] (fold.h): the row sums of W gamma, and W beta + bias.
struct FoldItem {
  std::uint64_t source;  // address of W
  std::int64_t row_stride;
  std::int64_t column_stride;
  Parameters gamma, beta, bias;
  std::int64_t sums_target;  // bytes, float32
  std::int64_t bias_target;
  std::int32_t rows;
  std::int32_t columns;
  std::int32_t source_type;
  std::int32_t operand_type;  // that W gamma is packed as
  std::int32_t first_group;   // groups of kWarps rows of all items before this one
  std::int32_t padding;
};

// The argument of clean_actions_kernel and steer_step_kernel.
struct SteerStepArgs {
  const float* x;                // [rows][A]
  const float* v;                // [rows][A]
  const float* g;                // [rows][A], steer_step alone
  const float* q_std;            // [rows], for GAF; may be null
  const unsigned char* steered;  // [A]; null: all
  const float* times;            // t of clean_actions, at row * time_row_stride + c * time_column_stride
  // outputs; the last two may be null
  float* result;             // [rows][A], may be x
  float* gradient_norms;     // [rows]
  unsigned char* nonfinite;  // [rows]
  std::int64_t rows;
  std::int64_t time_row_stride;
  std::int64_t time_column_stride;
  std::int32_t action_dim;
  float dt;  // of steer_step
  SteeringParams steering;
};

#define QPILOTS_ELEMENT_TYPES(X) \
  X(kFloat32, "float32") X(kBf16, "bfloat16") X(kFloat16, "float16") X(kFloat64, "float64")
enum class ElementType : std::int32_t { QPILOTS_ELEMENT_TYPES(QPILOTS_ENUMERATOR) };

}  // namespace cuda
}  // namespace qpilots
