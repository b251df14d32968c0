// A chain of operations on the rows of a hidden layer, one after the other on a row in the first-level cache, and its
// vector-Jacobian product. What derivatives need is kept in float32, whatever the format of the operands.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>

#include "kernels.h"
#include "path/operands-inl.h"
#include "path/rows-inl.h"
#include "path/unroll-inl.h"
#include "qpilots/activation.h"
#include "qpilots/layer_norm.h"
#include "qpilots/number.h"
#include "qpilots/types.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

// What an operation keeps of row r, [padded width].
static inline float* chain_saved(char* saves, const ChainOp& op, int saved_rows, int r, int padded_width) {
  return reinterpret_cast<float*>(saves + op.saved * saved_rows) + static_cast<std::ptrdiff_t>(r) * padded_width;
}

static inline float* chain_rstd(char* saves, const ChainOp& op, int saved_rows, int r) {
  return reinterpret_cast<float*>(saves + op.rstd * saved_rows) + r;
}

static inline void clear_padding(float* z, int width) {
  for (int c = width; c < padded(width); ++c) z[c] = 0.0f;
}

// z becomes f(z); slope f'(z), where it is kept.
template <class Function>
QPILOTS_INLINE void map_row(float* z, float* slope, int width, const Function& f) {
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      const int column = c + i * Vec::kLanes;
      const ValueSlope<Vec> y = f(Vec::load(z + column));
      y.value.store(z + column);
      if (slope != nullptr) y.slope.store(slope + column);
    });
  });
}

static void activate_row(Activation activation, float* z, float* slope, int width) {
  switch (activation) {
#define QPILOTS_CASE(name, text)                                                            \
  case Activation::name:                                                                    \
    map_row(z, slope, width, [](Vec x) { return qpilots::activate<Activation::name>(x); }); \
    return;
    QPILOTS_ACTIVATIONS(QPILOTS_CASE)
#undef QPILOTS_CASE
  }
}

static void norm_row(const ChainOp& op, const char* arena, float* z, float* xhat, float* rstd, int width) {
  RowMoments row{0.0f, 0.0f};
  if (op.kind == RowOpKind::kLayerNorm) {
    row = moments(z, width, row_sum(padded(width), [&](int c) { return Vec::load(z + c); }), op.numbers[0]);
  } else {
    const float squares = row_squares(padded(width), [&](int c) { return Vec::load(z + c); });
    row.rstd = reciprocal_std(squares, static_cast<float>(width), op.numbers[0]);
  }
  const float* gamma = reinterpret_cast<const float*>(arena + op.gamma);
  const float* beta = reinterpret_cast<const float*>(arena + op.beta);
  const Vec mean(row.mean), scale(row.rstd);
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      const int column = c + i * Vec::kLanes;
      const Vec normal = (Vec::load(z + column) - mean) * scale;
      if (xhat != nullptr) normal.store(xhat + column);
      layer_norm_affine(normal, Vec::load(gamma + column), Vec::load(beta + column)).store(z + column);
    });
  });
  if (rstd != nullptr) *rstd = row.rstd;
}

static void norm_row_vjp(const ChainOp& op, const char* arena, float* d, const float* xhat, float rstd, int width) {
  const float* gamma = reinterpret_cast<const float*>(arena + op.gamma);
  const float inverse_width = 1.0f / static_cast<float>(width);
  RowSum plain, projected;
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      const int column = c + i * Vec::kLanes;
      const Vec g = Vec::load(d + column) * Vec::load(gamma + column);
      g.store(d + column);
      plain.s[i] = plain.s[i] + g;
      projected.s[i] = fmadd(g, Vec::load(xhat + column), projected.s[i]);
    });
  });
  // an RMSNorm has no mean to pull back through
  const Vec mean(op.kind == RowOpKind::kLayerNorm ? plain.total() * inverse_width : 0.0f);
  const Vec mean_xhat(projected.total() * inverse_width), scale(rstd);
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      const int column = c + i * Vec::kLanes;
      layer_norm_vjp(Vec::load(d + column), Vec::load(xhat + column), scale, mean, mean_xhat).store(d + column);
    });
  });
}

// Of the row's `count` smallest, of equal ones the first, 1 and else 0; width^2 comparisons.
static void mark_lowest(const float* z, int width, int count, float* is_low) {
  for (int i = 0; i < width; ++i) {
    int before = 0;
    for (int j = 0; j < width; ++j) before += z[j] < z[i] || (z[j] == z[i] && j < i);
    is_low[i] = before < count ? 1.0f : 0.0f;
  }
  clear_padding(is_low, width);
}

static void softmax_of_row(float* z, int width) {
  float largest = z[0];
  for (int c = 1; c < width; ++c) largest = z[c] > largest || z[c] != z[c] ? z[c] : largest;
  map_row(z, nullptr, width, [&](Vec x) { return ValueSlope<Vec>{exp_clamped(x - Vec(largest)), x}; });
  clear_padding(z, width);
  const Vec scale(1.0f / row_sum(padded(width), [&](int c) { return Vec::load(z + c); }));
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      float* at_column = z + c + i * Vec::kLanes;
      (Vec::load(at_column) * scale).store(at_column);
    });
  });
}

static void film_row(const float* film, int width, float* z, bool shifted) {
  for (int c = 0; c < width; ++c) z[c] = z[c] * film[c] + (shifted ? film[width + c] : 0.0f);
}

// dst += src
static void add_row(const float* src, float* dst, int width) {
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      float* at_column = dst + c + i * Vec::kLanes;
      (Vec::load(at_column) + Vec::load(src + c + i * Vec::kLanes)).store(at_column);
    });
  });
}

static void multiply_row(const float* src, float* dst, int width) {
  for_vectors(0, padded(width), [&](int c, auto n) {
    unroll<n>([&](auto i) {
      float* at_column = dst + c + i * Vec::kLanes;
      (Vec::load(at_column) * Vec::load(src + c + i * Vec::kLanes)).store(at_column);
    });
  });
}

static void run_op(const ChainArgs& args, const ChainOp& op, float* z, float* kept, const float* film, int r) {
  const int width = args.width;
  const bool save = args.saves != nullptr;
  float* saved = save && op.keeps_values ? chain_saved(args.saves, op, args.saved_rows, r, padded(width)) : nullptr;
  switch (op.kind) {
    case RowOpKind::kActivation:
      activate_row(op.activation, z, saved, width);
      break;
    case RowOpKind::kLeakyRelu: {
      const Vec slope(op.numbers[0]), one(1.0f), zero(0.0f);
      map_row(z, saved, width, [&](Vec x) {
        const Vec s = select(zero < x, one, slope);
        return ValueSlope<Vec>{x * s, s};
      });
      break;
    }
    case RowOpKind::kClamp: {
      const Vec low(op.numbers[0]), high(op.numbers[1]), one(1.0f), zero(0.0f);
      map_row(z, saved, width, [&](Vec x) {
        return ValueSlope<Vec>{qpilots::clamp(x, low, high), select(x < low, zero, select(high < x, zero, one))};
      });
      break;
    }
    case RowOpKind::kLayerNorm:
    case RowOpKind::kRmsNorm:
      norm_row(op, args.arena, z, saved, save ? chain_rstd(args.saves, op, args.saved_rows, r) : nullptr, width);
      return;
    case RowOpKind::kSoftmax:
      softmax_of_row(z, width);
      if (save) std::memcpy(saved, z, sizeof(float) * padded(width));
      return;
    case RowOpKind::kLowest: {
      float* marks = save ? saved : args.spare;
      mark_lowest(z, width, static_cast<int>(op.numbers[0]), marks);
      multiply_row(marks, z, width);
      return;
    }
    case RowOpKind::kKeep:
      std::memcpy(kept, z, sizeof(float) * padded(width));
      return;
    case RowOpKind::kAdd:
      add_row(kept, z, width);
      return;
    case RowOpKind::kFilm:
      film_row(film + op.film, width, z, true);
      return;
  }
  clear_padding(z, width);
}

template <class F>
static void chain_rows(const ChainArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    float* z = args.z + r * args.z_stride;
    float* kept = args.kept == nullptr ? nullptr : args.kept + r * args.kept_stride;
    const float* film = args.film == nullptr ? nullptr : args.film + r * args.film_stride;
    for (int o = 0; o < args.count; ++o) run_op(args, args.ops[o], z, kept, film, args.first_saved + r);
    char* h = at<char*>(args.h, r * args.h_stride);
    for_vectors(0, padded(args.width), [&](int c, auto n) {
      Vec y[n];
      unroll<n>([&](auto i) { y[i] = Vec::load(z + c + i * Vec::kLanes); });
      store_operands<F>(y, h + c * F::kABytes);
    });
  }
}

static void pull_back_op(const ChainArgs& args, const ChainOp& op, float* d, float* d_kept, const float* film, int r) {
  const int width = args.width;
  const float* saved = op.keeps_values ? chain_saved(args.saves, op, args.saved_rows, r, padded(width)) : nullptr;
  switch (op.kind) {
    case RowOpKind::kActivation:
    case RowOpKind::kLeakyRelu:
    case RowOpKind::kClamp:
    case RowOpKind::kLowest:
      multiply_row(saved, d, width);
      return;
    case RowOpKind::kLayerNorm:
    case RowOpKind::kRmsNorm:
      norm_row_vjp(op, args.arena, d, saved, *chain_rstd(args.saves, op, args.saved_rows, r), width);
      return;
    case RowOpKind::kSoftmax: {  // p (d - sum(p d))
      const Vec total(row_sum(padded(width), [&](int c) { return Vec::load(saved + c) * Vec::load(d + c); }));
      for_vectors(0, padded(width), [&](int c, auto n) {
        unroll<n>([&](auto i) {
          const int column = c + i * Vec::kLanes;
          (Vec::load(saved + column) * (Vec::load(d + column) - total)).store(d + column);
        });
      });
      return;
    }
    case RowOpKind::kKeep:
      if (op.is_added) add_row(d_kept, d, width);
      return;
    case RowOpKind::kAdd:
      if (op.is_added) {
        add_row(d, d_kept, width);
      } else {
        std::memcpy(d_kept, d, sizeof(float) * padded(width));
      }
      return;
    case RowOpKind::kFilm:
      film_row(film + op.film, width, d, false);
      return;
  }
}

// Out: how dz is stored.
template <class Out>
static void chain_vjp_rows(const ChainArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    float* d = args.z + r * args.z_stride;
    if (args.d != nullptr) {
      const Vec scale(args.d_scale == nullptr ? 1.0f : args.d_scale[r]);
      for (int c = 0; c < padded(args.width); c += Vec::kLanes) (Vec::load(args.d + c) * scale).store(d + c);
    }
    clear_padding(d, args.width);
    float* d_kept = args.kept == nullptr ? nullptr : args.kept + r * args.kept_stride;
    const float* film = args.film == nullptr ? nullptr : args.film + r * args.film_stride;
    for (int o = args.count - 1; o >= 0; --o) {
      pull_back_op(args, args.ops[o], d, d_kept, film, args.first_saved + r);
    }
    char* dz = at<char*>(args.h, r * args.h_stride);
    for_vectors(0, padded(args.width), [&](int c, auto n) {
      Vec y[n];
      unroll<n>([&](auto i) { y[i] = Vec::load(d + c + i * Vec::kLanes); });
      store_operands<Out>(y, dz + c * Out::kABytes);
    });
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
