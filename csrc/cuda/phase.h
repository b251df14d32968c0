// The program that the persistent kernel runs, as plain data, written by qpilots_fast/backends/cuda/plan.py. The
// mirrors in backends/cuda/structs.py must match field by field (qpilots_cuda_struct_bytes tells them apart).
#pragma once

#include <cstdint>

#include "grid_barrier.h"
#include "qpilots/types.h"

namespace qpilots {
namespace cuda {

// What the rows of a product are made of before they are staged in shared memory.
#define QPILOTS_STAGES(X)                                                                                      \
  X(kRows, "rows")                      /* an input or a workspace plane, as it is */                          \
  X(kState, "state")                    /* x */                                                                \
  X(kEstimate, "estimate")              /* the clipped clean-action estimate */                                \
  X(kPosteriorInput, "posterior_input") /* (posterior noise, x) of each posterior draw */                      \
  X(kHidden, "hidden")                  /* a hidden layer's output, from the plane that its product left */    \
  X(kCriticTop, "critic_top")           /* d z of the critic's last hidden layer for d Q = 1; also yields Q */ \
  X(kDelta, "delta")                    /* d z of a hidden layer, from d h */                                  \
  X(kCotangent, "cotangent")            /* the critics' weighted gradient at the estimate */
enum class Stage : std::int32_t { QPILOTS_STAGES(QPILOTS_ENUMERATOR) };

// Tensors of a launch that kRows phases read, apart from the workspace.
#define QPILOTS_INPUTS(X)                                                  \
  X(kObs, "obs")                        /* [B][S] */                       \
  X(kFlowTimes, "flow_times")           /* [K][.] features of every t_k */ \
  X(kPosteriorTimes, "posterior_times") /* [K][.] of t_k, s and u */       \
  X(kColumns, "columns")                /* [B][in] all, of one network */  \
  X(kCotangent, "cotangent")            /* [E][B][out] of its output */
enum class Input : std::int32_t { QPILOTS_INPUTS(QPILOTS_ENUMERATOR) };
constexpr int kNumInputs = static_cast<int>(Input::kCotangent) + 1;

// One product of every member: target[m][row][n] = sum_i weight[m][n][i] staged[m][row][i] (+ addends).
// Offsets: -1 is none; "floats" count from the workspace, "bytes" from the packed weights of member 0.
struct Phase {
  std::int32_t stage;
  std::int32_t activation;   // of the staged hidden layer (kHidden, kCriticTop, kDelta) and of the target
  std::int32_t staged_norm;  // NormPlacement of the staged hidden layer
  std::int32_t activates;    // the target is a hidden layer without "pre" norm: act(product) and act'(product) are kept
  std::int32_t members;
  std::int32_t rows;
  std::int32_t in_dim;
  std::int32_t in_stride;  // row stride of the weight, in elements: in_dim padded to 16 bytes
  std::int32_t out_dim;
  std::int32_t input;  // kRows: Input; -1: the workspace
  std::int32_t rows_per_addend;
  std::int32_t ends_with_barrier;
  float layer_norm_eps;            // of the staged hidden layer
  std::int32_t completes_critics;  // after it, Q and dQ/da of every critic are known
  std::int64_t source;             // floats, [members][rows][in_dim]; kRows: [rows][in_dim] + m * source_member_stride
  std::int64_t source_member_stride;
  std::int64_t source_slope;  // floats, act'(z) of the staged hidden layer (kCriticTop, kDelta; not "pre")
  std::int64_t source_delta;  // floats, d h of the staged hidden layer (kDelta)
  std::int64_t target;        // floats: the product; of a hidden layer without "pre" norm, act of it
  std::int64_t target_slope;  // floats: act' of the product, of such a layer
  std::int64_t row_addend;    // floats, [members][rows / rows_per_addend][out_dim]
  std::int64_t step_addend;   // floats, [num_steps][out_dim]
  std::int64_t weight;        // bytes
  std::int64_t bias;          // bytes, float32
  std::int64_t gamma;         // bytes, float32: affine of the staged hidden layer's norm
  std::int64_t beta;
  std::int64_t top_weight;  // bytes: the critic's output row (kCriticTop)
  std::int64_t top_bias;
  std::int64_t member_bytes;  // between members
};

// The argument of sample_kernel.
struct SampleArgs {
  const Phase* program;          // [num_once + num_step_phases]
  const unsigned char* weights;  // packed
  float* workspace;
  GridSync* sync;
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
  // floats into the workspace
  std::int64_t velocity;          // [B][A]
  std::int64_t posterior_output;  // [B N][A]
  std::int64_t q_values;          // [E][R]
  std::int64_t critic_vjp;        // [E][R][A]
  std::int64_t estimate_vjp;      // [R][A], flow or posterior pulled back to x
  std::int32_t num_once;          // phases before the first step
  std::int32_t num_flow_phases;   // of a step: those of the velocity alone
  std::int32_t num_step_phases;   // of a steered step
  std::int32_t num_steps;         // 0: the phases before the first step are all
  std::int32_t batch;
  std::int32_t action_dim;
  std::int32_t num_members;   // E
  std::int32_t stage_stride;  // the largest in_stride
  std::uint32_t spin_limit;
  SteeringParams steering;
};

// One matrix or vector to copy into the packed weights: dst[r][c] = src[r * row_stride + c * column_stride].
struct PackItem {
  std::uint64_t source;        // address
  std::int64_t row_stride;     // elements
  std::int64_t column_stride;  // elements
  std::int64_t target;         // bytes
  std::int32_t rows;
  std::int32_t columns;
  std::int32_t target_columns;  // columns to write, those beyond `columns` with zeros
  std::int32_t target_stride;   // elements
  std::int32_t source_type;     // ElementType
  std::int32_t target_type;
  std::int32_t first_tile;  // tiles of all items before this one
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
