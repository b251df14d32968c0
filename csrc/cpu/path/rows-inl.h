// What happens to rows between two products: activation, LayerNorm, their derivatives, operand conversion.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "path/operands-inl.h"
#include "path/unroll-inl.h"
#include "qpilots/activation.h"
#include "qpilots/layer_norm.h"
#include "qpilots/number.h"
#include "qpilots/types.h"
#include "tuning.h"

#include QPILOTS_ISA_VEC

namespace qpilots::cpu {
namespace QPILOTS_ISA {
namespace {

template <class T>
static inline T at(const void* p, std::ptrdiff_t bytes) {
  return reinterpret_cast<T>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes));
}

static inline Vec tail_mask(int valid) {  // 1 in the first `valid` lanes
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = i < valid ? 1.0f : 0.0f;
  return Vec::load(lanes);
}

// body(column, Index<N>) for the vectors of [begin, end), in order: N = 4 at once, the rest one by one.
template <class Body>
QPILOTS_INLINE void for_vectors(int begin, int end, const Body& body) {
  int c = begin;
  for (; c + 4 * Vec::kLanes <= end; c += 4 * Vec::kLanes) body(c, Index<4>());
  for (; c < end; c += Vec::kLanes) body(c, Index<1>());
}

// Neighbouring vectors as an operand: two at a time, which costs bfloat16 one conversion and one store.
template <class F, int N>
QPILOTS_INLINE void store_operands(const Vec (&x)[N], char* p) {
  if constexpr (N == 1) {
    F::store_operand(x[0], p);
  } else {
    unroll<N / 2>([&](auto i) { F::store_operand_pair(x[2 * i], x[2 * i + 1], p + 2 * i * Vec::kLanes * F::kABytes); });
  }
}

// Four chains, so that the additions of one row overlap; term(column) is called in order.
struct RowSum {
  Vec s[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  float total() const { return sum((s[0] + s[1]) + (s[2] + s[3])); }
};

template <class Term>
static inline float row_sum(int width, const Term& term) {
  RowSum sums;
  for_vectors(0, width,
              [&](int c, auto n) { unroll<n>([&](auto i) { sums.s[i] = sums.s[i] + term(c + i * Vec::kLanes); }); });
  return sums.total();
}

// sum of term(c)^2 over the row
template <class Term>
static inline float row_squares(int width, const Term& term) {
  RowSum sums;
  for_vectors(0, width, [&](int c, auto n) {
    unroll<n>([&](auto i) {
      const Vec d = term(c + i * Vec::kLanes);
      sums.s[i] = fmadd(d, d, sums.s[i]);
    });
  });
  return sums.total();
}

struct RowMoments {
  float mean, rstd;
};

static inline RowMoments moments(const float* y, int width, float total, float layer_norm_eps) {
  const float mean = total / static_cast<float>(width);
  const Vec m(mean);
  const int whole = width / Vec::kLanes * Vec::kLanes;
  float squares = row_squares(whole, [&](int c) { return Vec::load(y + c) - m; });
  if (whole < width) {
    const Vec d = (Vec::load(y + whole) - m) * tail_mask(width - whole);
    squares += sum(d * d);
  }
  return {mean, reciprocal_std(squares, static_cast<float>(width), layer_norm_eps)};
}

// Rows that a LayerNorm takes together, pass by pass: each pass ends in a sum whose lanes are added one after the
// other, which the next row's pass hides.
static constexpr int kNormRows = tuning::EveryPath::kNormRows;

// What values cost to keep to F's accuracy: those of bfloat16 products are rounded to 8 bits afterwards.
template <class F>
static constexpr Accuracy kAccuracyOf = F::kFormat == Format::kBf16 ? Accuracy::kBf16 : Accuracy::kFloat32;

// kSave: the derivative will be asked for.
template <class F, Activation kAct, bool kSave>
static void activate_plain(const ActivateArgs& args, int r) {
  const float* z = args.z + r * args.z_stride;
  char* h = at<char*>(args.h, r * args.h_stride);
  char* slope = at<char*>(args.slope, r * args.save_stride);
  for_vectors(args.begin, args.end, [&](int c, auto n) {
    Vec value[n], derivative[n];
    unroll<n>([&](auto i) {
      const ValueSlope<Vec> y = qpilots::activate<kAct, kAccuracyOf<F>>(Vec::load(z + c + i * Vec::kLanes));
      value[i] = y.value;
      derivative[i] = y.slope;
    });
    if (kSave) store_operands<F>(derivative, slope + c * F::kABytes);
    store_operands<F>(value, h + c * F::kABytes);
  });
}

// The row's sum; after the activation, which replaces z, where that comes first.
template <class F, Activation kAct, NormPlacement kNorm, bool kSave>
static float sum_before_norm(const ActivateArgs& args, int r) {
  float* z = args.z + r * args.z_stride;
  char* slope = at<char*>(args.slope, r * args.save_stride);
  const int width = padded(args.width);
  if constexpr (kNorm == NormPlacement::kPre) return row_sum(width, [&](int c) { return Vec::load(z + c); });
  RowSum sums;
  for_vectors(0, width, [&](int c, auto n) {
    Vec derivative[n];
    unroll<n>([&](auto i) {
      float* at_column = z + c + i * Vec::kLanes;
      const ValueSlope<Vec> y = qpilots::activate<kAct, kAccuracyOf<F>>(Vec::load(at_column));
      y.value.store(at_column);
      sums.s[i] = sums.s[i] + y.value;
      derivative[i] = y.slope;
    });
    if (kSave) store_operands<F>(derivative, slope + c * F::kABytes);
  });
  return sums.total();
}

template <class F, Activation kAct, NormPlacement kNorm, bool kSave>
static void normalise_row(const ActivateArgs& args, int r, const RowMoments& row) {
  const float* z = args.z + r * args.z_stride;
  char* h = at<char*>(args.h, r * args.h_stride);
  char* slope = at<char*>(args.slope, r * args.save_stride);
  char* xhat = at<char*>(args.xhat, r * args.save_stride);
  if (kSave) args.rstd[r] = row.rstd;
  const Vec mean(row.mean), rstd(row.rstd);
  for_vectors(0, padded(args.width), [&](int c, auto n) {
    Vec normal[n], value[n], derivative[n];
    unroll<n>([&](auto i) {
      const int at_column = c + i * Vec::kLanes;
      normal[i] = (Vec::load(z + at_column) - mean) * rstd;
      value[i] = layer_norm_affine(normal[i], Vec::load(args.gamma + at_column), Vec::load(args.beta + at_column));
      if constexpr (kNorm == NormPlacement::kPre) {
        const ValueSlope<Vec> y = qpilots::activate<kAct, kAccuracyOf<F>>(value[i]);
        value[i] = y.value;
        derivative[i] = y.slope;
      }
    });
    if (kSave) store_operands<F>(normal, xhat + c * F::kABytes);
    if constexpr (kSave && kNorm == NormPlacement::kPre) store_operands<F>(derivative, slope + c * F::kABytes);
    store_operands<F>(value, h + c * F::kABytes);
  });
}

template <class F, Activation kAct, NormPlacement kNorm, bool kSave>
static void activate_saving(const ActivateArgs& args) {
  for (int first = 0; first < args.rows; first += kNormRows) {
    const int count = args.rows - first < kNormRows ? args.rows - first : kNormRows;
    if constexpr (kNorm == NormPlacement::kNone) {
      for (int i = 0; i < count; ++i) activate_plain<F, kAct, kSave>(args, first + i);
    } else {
      float totals[kNormRows];
      RowMoments rows[kNormRows];
      for (int i = 0; i < count; ++i) totals[i] = sum_before_norm<F, kAct, kNorm, kSave>(args, first + i);
      for (int i = 0; i < count; ++i) {
        rows[i] = moments(args.z + (first + i) * args.z_stride, args.width, totals[i], args.layer_norm_eps);
      }
      for (int i = 0; i < count; ++i) normalise_row<F, kAct, kNorm, kSave>(args, first + i, rows[i]);
    }
  }
}

template <class F, Activation kAct, NormPlacement kNorm>
static void activate_rows(const ActivateArgs& args) {
  if (args.slope != nullptr) {
    activate_saving<F, kAct, kNorm, true>(args);
  } else {
    activate_saving<F, kAct, kNorm, false>(args);
  }
}

static inline float vjp_scale(const ActivateVjpArgs& args, int r) {
  return args.d_scale == nullptr ? 1.0f : args.d_scale[r];
}

// Of a row: dL/d(normalised) at column c, its mean and its mean with the normalised values; all but for the row's
// scale, which the derivative is linear in.
template <class F, NormPlacement kNorm>
struct NormVjp {
  const float *d, *gamma;
  const char *slopes, *xhats;
  float mean, mean_xhat;

  NormVjp() = default;
  NormVjp(const ActivateVjpArgs& args, int r)
      : d(args.d + r * args.d_stride),
        gamma(args.gamma),
        slopes(at<const char*>(args.slope, r * args.save_stride)),
        xhats(at<const char*>(args.xhat, r * args.save_stride)) {
    const float inverse_width = 1.0f / static_cast<float>(args.width);
    RowSum plain, projected;
    for_vectors(0, padded(args.width), [&](int c, auto n) {
      unroll<n>([&](auto i) {
        const Vec g = (*this)(c + i * Vec::kLanes);
        plain.s[i] = plain.s[i] + g;
        projected.s[i] = fmadd(g, xhat(c + i * Vec::kLanes), projected.s[i]);
      });
    });
    mean = plain.total() * inverse_width;
    mean_xhat = projected.total() * inverse_width;
  }

  Vec slope(int c) const { return F::load_operand(slopes + c * F::kABytes); }
  Vec xhat(int c) const { return F::load_operand(xhats + c * F::kABytes); }
  Vec operator()(int c) const {
    Vec g = Vec::load(d + c);
    if constexpr (kNorm == NormPlacement::kPre) g = g * slope(c);
    return g * Vec::load(gamma + c);
  }
};

// F: how slope and xhat were stored; Out: how dz is.
template <class F, class Out, NormPlacement kNorm>
static void activate_vjp_rows(const ActivateVjpArgs& args) {
  const auto dz = [&](int r) { return at<char*>(args.dz, r * args.dz_stride); };
  if constexpr (kNorm == NormPlacement::kNone) {
    for (int r = 0; r < args.rows; ++r) {
      const float* d = args.d + r * args.d_stride;
      const char* slope = at<const char*>(args.slope, r * args.save_stride);
      const Vec scale(vjp_scale(args, r));
      for_vectors(args.begin, args.end, [&](int c, auto n) {
        Vec y[n];
        unroll<n>([&](auto i) {
          const int at_column = c + i * Vec::kLanes;
          y[i] = Vec::load(d + at_column) * scale * F::load_operand(slope + at_column * F::kABytes);
        });
        store_operands<Out>(y, dz(r) + c * Out::kABytes);
      });
    }
    return;
  }
  for (int first = 0; first < args.rows; first += kNormRows) {
    const int count = args.rows - first < kNormRows ? args.rows - first : kNormRows;
    NormVjp<F, kNorm> rows[kNormRows];
    for (int i = 0; i < count; ++i) rows[i] = NormVjp<F, kNorm>(args, first + i);
    for (int i = 0; i < count; ++i) {
      const NormVjp<F, kNorm>& row = rows[i];
      const Vec mean(row.mean), mean_xhat(row.mean_xhat), rstd(args.rstd[first + i] * vjp_scale(args, first + i));
      for_vectors(0, padded(args.width), [&](int c, auto n) {
        Vec y[n];
        unroll<n>([&](auto v) {
          const int at_column = c + v * Vec::kLanes;
          y[v] = layer_norm_vjp(row(at_column), row.xhat(at_column), rstd, mean, mean_xhat);
          if constexpr (kNorm == NormPlacement::kPost) y[v] = y[v] * row.slope(at_column);
        });
        store_operands<Out>(y, dz(first + i) + c * Out::kABytes);
      });
    }
  }
}

template <class F>
static void convert_rows(const ConvertArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    const float* src = args.src + r * args.src_stride;
    char* dst = at<char*>(args.dst, r * args.dst_stride);
    for_vectors(0, args.width, [&](int c, auto n) {
      Vec x[n];
      unroll<n>([&](auto i) {
        const int column = c + i * Vec::kLanes;
        x[i] = Vec::load(src + column);
        if (args.low != nullptr)
          x[i] = qpilots::clamp(x[i], Vec::load(args.low + column), Vec::load(args.high + column));
      });
      store_operands<F>(x, dst + c * F::kABytes);
    });
  }
}

template <class F>
static void head_rows(const HeadArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    const char* h = at<const char*>(args.h, r * args.h_stride);
    args.q[r] = args.bias +
                row_sum(args.width, [&](int c) { return F::load_operand(h + c * F::kABytes) * Vec::load(args.w + c); });
  }
}

}  // namespace
}  // namespace QPILOTS_ISA
}  // namespace qpilots::cpu
