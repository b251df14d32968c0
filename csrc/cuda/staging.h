// A tile of rows made ready in shared memory for a product: activation, LayerNorm, their derivatives, rounding.
// Thread i owns columns i, i + kThreads, ... of all rows, so that between the sums a thread meets only its own cells.
#pragma once

#include "phase.h"
#include "qpilots/activation.h"
#include "qpilots/layer_norm.h"
#include "warp.h"

namespace qpilots {
namespace cuda {

__device__ __forceinline__ ValueSlope<float> activate_any(std::int32_t activation, float z) {
  switch (static_cast<Activation>(activation)) {
#define QPILOTS_CASE(known, name) \
  case Activation::known:         \
    return activate<Activation::known>(z);
    QPILOTS_ACTIVATIONS(QPILOTS_CASE)
#undef QPILOTS_CASE
  }
  trap();
  return {};
}

// The tile: rows row0 .. row0 + valid - 1 of one member; rows beyond are staged as zeros.
struct Tile {
  int member;
  int row0;
  int valid;
};

// Shared buffers of one tile. staged may be deltas itself (float32 weights).
template <class Weight>
struct StagingBuffers {
  Weight* staged;  // [ROWS][stride]
  float* values;   // [ROWS][stride] y, then xhat
  float* deltas;   // [ROWS][stride] d xhat, or d z
  float* parts;    // [kWarps * 2 * ROWS]
  float* means;    // [ROWS] of y
  float* rstds;    // [ROWS] 1 / sqrt(var + layer_norm_eps)
  float* pulls;    // [2 * ROWS] means of d xhat, and of d xhat * xhat
};

__device__ __forceinline__ std::int64_t plane_offset(const Phase& p, const Tile& tile, int r) {
  return (static_cast<std::int64_t>(tile.member) * p.rows + tile.row0 + r) * p.in_dim;
}

// staged[r][c] = f(r, c), zero in the padding.
template <int ROWS, class Weight, class Function>
__device__ __forceinline__ void stage_each(const Phase& p, const Tile& tile, Weight* staged, Function f) {
  for (int i = threadIdx.x; i < ROWS * p.in_stride; i += kThreads) {
    const int r = i / p.in_stride, c = i % p.in_stride;
    const float value = r < tile.valid && c < p.in_dim ? f(r, c) : 0.0f;
    store_shared(staged + i, from_float<Weight>(value));
  }
}

// The same, by the thread that owns the column.
template <int ROWS, class Weight, class Function>
__device__ __forceinline__ void stage_own_cells(const Phase& p, const Tile& tile, Weight* staged, Function f) {
  for (int c = threadIdx.x; c < p.in_stride; c += kThreads) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float value = r < tile.valid && c < p.in_dim ? f(r, c) : 0.0f;
      store_shared(staged + r * p.in_stride + c, from_float<Weight>(value));
    }
  }
}

template <class Function>
__device__ __forceinline__ void each_column(int count, Function f) {
  for (int c = threadIdx.x; c < count; c += kThreads) f(c);
}

// values[r][c] = y - mean, and the rows' means and rstds.
template <int ROWS, class Weight>
__device__ __forceinline__ void stage_statistics(const Phase& p, const Tile& tile, const float* source,
                                                 const StagingBuffers<Weight>& buffers) {
  float partial[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) partial[r] = 0.0f;
  each_column(p.in_dim, [&](int c) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float y = r < tile.valid ? load_global(source + plane_offset(p, tile, r) + c) : 0.0f;
      store_shared(buffers.values + r * p.in_stride + c, y);
      partial[r] += y;
    }
  });
  const float width = static_cast<float>(p.in_dim);
  block_sums(partial, buffers.parts, buffers.means, [width](float sum) { return sum / width; });
#pragma unroll
  for (int r = 0; r < ROWS; ++r) partial[r] = 0.0f;
  each_column(p.in_dim, [&](int c) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float centred = load_shared(buffers.values + r * p.in_stride + c) - load_shared(buffers.means + r);
      store_shared(buffers.values + r * p.in_stride + c, centred);
      partial[r] = fmadd(centred, centred, partial[r]);
    }
  });
  block_sums(partial, buffers.parts, buffers.rstds,
             [width, &p](float squares) { return reciprocal_std(squares, width, p.layer_norm_eps); });
}

__device__ __forceinline__ float affine_or(const unsigned char* member, std::int64_t offset, int c, float otherwise) {
  return offset < 0 ? otherwise : load_constant(reinterpret_cast<const float*>(member + offset) + c);
}

// Rows of a column one after the other: keeps the activations from being unrolled ROWS times.
template <int ROWS, class Function>
__device__ __forceinline__ void each_owned_cell(const Phase& p, Function f) {
  for (int c = threadIdx.x; c < p.in_dim; c += kThreads) {
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) f(r, c, r * p.in_stride + c);
  }
}

// h of a hidden layer: act(LN(z)) ("pre"), LN(act(z)) ("post") or act(z); the plane holds z for "pre", else act(z).
template <int ROWS, class Weight>
__device__ __forceinline__ void stage_hidden(const Phase& p, const Tile& tile, const float* workspace,
                                             const unsigned char* member, const StagingBuffers<Weight>& buffers) {
  const float* source = workspace + p.source;
  if (static_cast<NormPlacement>(p.staged_norm) == NormPlacement::kNone) {
    stage_each<ROWS>(p, tile, buffers.staged,
                     [&](int r, int c) { return load_global(source + plane_offset(p, tile, r) + c); });
    return;
  }
  stage_statistics<ROWS>(p, tile, source, buffers);
  each_column(p.in_dim, [&](int c) {
    const float gamma = affine_or(member, p.gamma, c, 1.0f), beta = affine_or(member, p.beta, c, 0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float* cell = buffers.values + r * p.in_stride + c;
      store_shared(cell, layer_norm_affine(load_shared(cell) * load_shared(buffers.rstds + r), gamma, beta));
    }
  });
  if (static_cast<NormPlacement>(p.staged_norm) == NormPlacement::kPre) {
    each_owned_cell<ROWS>(p, [&](int, int, int cell) {
      store_shared(buffers.values + cell, activate_any(p.activation, load_shared(buffers.values + cell)).value);
    });
  }
  stage_own_cells<ROWS>(p, tile, buffers.staged,
                        [&](int r, int c) { return load_shared(buffers.values + r * p.in_stride + c); });
}

// Q = <output row, h> + bias of the tile's rows, from xhat (or, without a norm, the plane).
template <int ROWS, class Weight>
__device__ __forceinline__ void store_q_values(const Phase& p, const Tile& tile, const float* source,
                                               const unsigned char* member, const StagingBuffers<Weight>& buffers,
                                               float* q_values) {
  const NormPlacement norm = static_cast<NormPlacement>(p.staged_norm);
  const Weight* output_row = reinterpret_cast<const Weight*>(member + p.top_weight);
#pragma unroll 1
  for (int r = 0; r < tile.valid; ++r) {
    float sum = 0.0f;
    each_column(p.in_dim, [&](int c) {
      float h;
      if (norm == NormPlacement::kNone) {
        h = load_global(source + plane_offset(p, tile, r) + c);
      } else {
        h = layer_norm_affine(load_shared(buffers.values + r * p.in_stride + c), affine_or(member, p.gamma, c, 1.0f),
                              affine_or(member, p.beta, c, 0.0f));
        if (norm == NormPlacement::kPre) h = activate_any(p.activation, h).value;
      }
      sum = fmadd(to_float(load_constant(output_row + c)), to_float(from_float<Weight>(h)), sum);
    });
    sum = warp_sum(sum);
    if (lane_index() == 0) store_shared(buffers.parts + r * kWarps + warp_index(), sum);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < tile.valid) {
    float sum = affine_or(member, p.top_bias, 0, 0.0f);
    for (int w = 0; w < kWarps; ++w) sum += load_shared(buffers.parts + threadIdx.x * kWarps + w);
    store_global(q_values + threadIdx.x, sum);
  }
}

// d z of a hidden layer from d h, through LayerNorm and activation. At the critic's top d h is the output row and,
// where q_values is not null, Q goes there, [row].
template <int ROWS, class Weight>
__device__ __forceinline__ void stage_delta(const Phase& p, const Tile& tile, const float* workspace,
                                            const unsigned char* member, const StagingBuffers<Weight>& buffers,
                                            float* q_values) {
  const float* source = workspace + p.source;
  const bool top = static_cast<Stage>(p.stage) == Stage::kCriticTop;
  const NormPlacement norm = static_cast<NormPlacement>(p.staged_norm);
  const Weight* output_row = reinterpret_cast<const Weight*>(member + (top ? p.top_weight : 0));
  const auto d_hidden = [&](int r, int c) {
    return top ? to_float(load_constant(output_row + c))
               : load_global(workspace + p.source_delta + plane_offset(p, tile, r) + c);
  };
  const auto slope = [&](int r, int c) {
    return load_global(workspace + p.source_slope + plane_offset(p, tile, r) + c);
  };
  if (norm == NormPlacement::kNone) {
    stage_each<ROWS>(p, tile, buffers.staged, [&](int r, int c) { return d_hidden(r, c) * slope(r, c); });
    if (q_values != nullptr) store_q_values<ROWS>(p, tile, source, member, buffers, q_values);
    return;
  }

  stage_statistics<ROWS>(p, tile, source, buffers);
  each_column(p.in_dim, [&](int c) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int cell = r * p.in_stride + c;
      store_shared(buffers.values + cell, load_shared(buffers.values + cell) * load_shared(buffers.rstds + r));
      store_shared(buffers.deltas + cell, r < tile.valid ? d_hidden(r, c) : 0.0f);
    }
  });
  if (norm == NormPlacement::kPre) {
    each_owned_cell<ROWS>(p, [&](int, int c, int cell) {
      const float y = layer_norm_affine(load_shared(buffers.values + cell), affine_or(member, p.gamma, c, 1.0f),
                                        affine_or(member, p.beta, c, 0.0f));
      store_shared(buffers.deltas + cell, load_shared(buffers.deltas + cell) * activate_any(p.activation, y).slope);
    });
  }
  float partial[2 * ROWS];  // sums of d xhat and of d xhat * xhat
#pragma unroll
  for (int i = 0; i < 2 * ROWS; ++i) partial[i] = 0.0f;
  each_column(p.in_dim, [&](int c) {
    const float gamma = affine_or(member, p.gamma, c, 1.0f);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int cell = r * p.in_stride + c;
      const float d_xhat = load_shared(buffers.deltas + cell) * gamma;
      store_shared(buffers.deltas + cell, d_xhat);
      partial[r] += d_xhat;
      partial[ROWS + r] = fmadd(d_xhat, load_shared(buffers.values + cell), partial[ROWS + r]);
    }
  });
  const float width = static_cast<float>(p.in_dim);
  block_sums(partial, buffers.parts, buffers.pulls, [width](float sum) { return sum / width; });
  if (q_values != nullptr) store_q_values<ROWS>(p, tile, source, member, buffers, q_values);  // the whole block does
  stage_own_cells<ROWS>(p, tile, buffers.staged, [&](int r, int c) {
    const int cell = r * p.in_stride + c;
    const float delta = layer_norm_vjp(load_shared(buffers.deltas + cell), load_shared(buffers.values + cell),
                                       load_shared(buffers.rstds + r), load_shared(buffers.pulls + r),
                                       load_shared(buffers.pulls + ROWS + r));
    return norm == NormPlacement::kPost ? delta * slope(r, c) : delta;
  });
}

}  // namespace cuda
}  // namespace qpilots
