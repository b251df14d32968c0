// What happens to rows between two products: activation, LayerNorm, their derivatives, operand conversion.
#pragma once

template <class T>
static inline T at(const void* p, std::ptrdiff_t bytes) {
  return reinterpret_cast<T>(reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes));
}

static inline Vec tail_mask(int valid) {  // 1 in the first `valid` lanes
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = i < valid ? 1.0f : 0.0f;
  return Vec::load(lanes);
}

// Four chains, so that the additions of one row overlap; f(column) is called once per vector, in order.
template <class Term>
static inline float row_sum(int width, Term term) {
  Vec s0(0.0f), s1(0.0f), s2(0.0f), s3(0.0f);
  int c = 0;
  for (; c + 4 * Vec::kLanes <= width; c += 4 * Vec::kLanes) {
    s0 = s0 + term(c);
    s1 = s1 + term(c + Vec::kLanes);
    s2 = s2 + term(c + 2 * Vec::kLanes);
    s3 = s3 + term(c + 3 * Vec::kLanes);
  }
  for (; c < width; c += Vec::kLanes) s0 = s0 + term(c);
  return sum((s0 + s1) + (s2 + s3));
}

// sum of d(c)^2 over the row, in four chains
template <class Term>
static inline float row_squares(int width, Term term) {
  Vec s0(0.0f), s1(0.0f), s2(0.0f), s3(0.0f);
  const auto add = [](Vec d, Vec s) { return fmadd(d, d, s); };
  int c = 0;
  for (; c + 4 * Vec::kLanes <= width; c += 4 * Vec::kLanes) {
    s0 = add(term(c), s0);
    s1 = add(term(c + Vec::kLanes), s1);
    s2 = add(term(c + 2 * Vec::kLanes), s2);
    s3 = add(term(c + 3 * Vec::kLanes), s3);
  }
  for (; c < width; c += Vec::kLanes) s0 = add(term(c), s0);
  return sum((s0 + s1) + (s2 + s3));
}

struct RowMoments {
  float mean, rstd;
};

static inline RowMoments moments(const float* y, int width, float total, float eps) {
  const float mean = total / static_cast<float>(width);
  const Vec m(mean);
  const int whole = width / Vec::kLanes * Vec::kLanes;
  float squares = row_squares(whole, [&](int c) { return Vec::load(y + c) - m; });
  if (whole < width) {
    const Vec d = (Vec::load(y + whole) - m) * tail_mask(width - whole);
    squares += sum(d * d);
  }
  return {mean, reciprocal_std(squares, static_cast<float>(width), eps)};
}

// Rows that a LayerNorm takes together, pass by pass: each pass ends in a sum whose lanes are added one after the
// other, which the next row's pass hides.
static constexpr int kNormRows = 4;

template <class F, Activation kAct>
static void activate_plain(const ActivateArgs& args, int r) {
  const float* z = args.z + r * args.z_stride;
  char* h = at<char*>(args.h, r * args.h_stride);
  float* slope = args.slope != nullptr ? args.slope + r * args.save_stride : nullptr;
  for (int c = args.begin; c < args.end; c += Vec::kLanes) {
    const ValueSlope<Vec> y = qpilots::activate<kAct>(Vec::load(z + c));
    if (slope != nullptr) y.slope.store(slope + c);
    F::store_operand(y.value, h + c * F::kABytes);
  }
}

// The row's sum; after the activation, which replaces z, where that comes first.
template <Activation kAct, NormPlacement kNorm>
static float sum_before_norm(const ActivateArgs& args, int r) {
  float* z = args.z + r * args.z_stride;
  float* slope = args.slope != nullptr ? args.slope + r * args.save_stride : nullptr;
  const int width = padded(args.width);
  if constexpr (kNorm == NormPlacement::kPre) return row_sum(width, [&](int c) { return Vec::load(z + c); });
  return row_sum(width, [&](int c) {
    const ValueSlope<Vec> y = qpilots::activate<kAct>(Vec::load(z + c));
    if (slope != nullptr) y.slope.store(slope + c);
    y.value.store(z + c);
    return y.value;
  });
}

template <class F, Activation kAct, NormPlacement kNorm>
static void normalise_row(const ActivateArgs& args, int r, const RowMoments& row) {
  const float* z = args.z + r * args.z_stride;
  char* h = at<char*>(args.h, r * args.h_stride);
  const bool save = args.slope != nullptr;
  float* slope = save ? args.slope + r * args.save_stride : nullptr;
  float* xhat = save ? args.xhat + r * args.save_stride : nullptr;
  if (save) args.rstd[r] = row.rstd;
  const Vec mean(row.mean), rstd(row.rstd);
  for (int c = 0; c < padded(args.width); c += Vec::kLanes) {
    const Vec normal = (Vec::load(z + c) - mean) * rstd;
    if (save) normal.store(xhat + c);
    const Vec y = layer_norm_affine(normal, Vec::load(args.gamma + c), Vec::load(args.beta + c));
    if constexpr (kNorm == NormPlacement::kPost) {
      F::store_operand(y, h + c * F::kABytes);
    } else {
      const ValueSlope<Vec> a = qpilots::activate<kAct>(y);
      if (save) a.slope.store(slope + c);
      F::store_operand(a.value, h + c * F::kABytes);
    }
  }
}

template <class F, Activation kAct, NormPlacement kNorm>
static void activate_rows(const ActivateArgs& args) {
  for (int first = 0; first < args.rows; first += kNormRows) {
    const int count = args.rows - first < kNormRows ? args.rows - first : kNormRows;
    if constexpr (kNorm == NormPlacement::kNone) {
      for (int i = 0; i < count; ++i) activate_plain<F, kAct>(args, first + i);
    } else {
      float totals[kNormRows];
      RowMoments rows[kNormRows];
      for (int i = 0; i < count; ++i) totals[i] = sum_before_norm<kAct, kNorm>(args, first + i);
      for (int i = 0; i < count; ++i) {
        rows[i] = moments(args.z + (first + i) * args.z_stride, args.width, totals[i], args.eps);
      }
      for (int i = 0; i < count; ++i) normalise_row<F, kAct, kNorm>(args, first + i, rows[i]);
    }
  }
}

// Of a row: dL/d(normalised) at column c, its mean and its mean with the normalised values.
template <NormPlacement kNorm>
struct NormVjp {
  const float *d, *slope, *gamma, *xhat;
  Vec scale;
  float mean, mean_xhat;

  NormVjp() = default;
  NormVjp(const ActivateVjpArgs& args, int r)
      : d(args.d + r * args.d_stride),
        slope(args.slope + r * args.save_stride),
        gamma(args.gamma),
        xhat(args.xhat + r * args.save_stride),
        scale(args.d_scale == nullptr ? 1.0f : args.d_scale[r]) {
    const float inverse_width = 1.0f / static_cast<float>(args.width);
    Vec projected(0.0f), other(0.0f);
    bool odd = false;
    const float total = row_sum(padded(args.width), [&](int c) {
      const Vec g = (*this)(c);
      Vec& into = odd ? other : projected;
      into = fmadd(g, Vec::load(xhat + c), into);
      odd = !odd;
      return g;
    });
    mean = total * inverse_width;
    mean_xhat = sum(projected + other) * inverse_width;
  }

  Vec operator()(int c) const {
    Vec g = Vec::load(d + c) * scale;
    if constexpr (kNorm == NormPlacement::kPre) g = g * Vec::load(slope + c);
    return g * Vec::load(gamma + c);
  }
};

// F decides only how dz is stored.
template <class F, NormPlacement kNorm>
static void activate_vjp_rows(const ActivateVjpArgs& args) {
  const auto dz = [&](int r) { return at<char*>(args.dz, r * args.dz_stride); };
  if constexpr (kNorm == NormPlacement::kNone) {
    for (int r = 0; r < args.rows; ++r) {
      const float *d = args.d + r * args.d_stride, *slope = args.slope + r * args.save_stride;
      const Vec scale(args.d_scale == nullptr ? 1.0f : args.d_scale[r]);
      for (int c = args.begin; c < args.end; c += Vec::kLanes) {
        F::store_operand(Vec::load(d + c) * scale * Vec::load(slope + c), dz(r) + c * F::kABytes);
      }
    }
    return;
  }
  for (int first = 0; first < args.rows; first += kNormRows) {
    const int count = args.rows - first < kNormRows ? args.rows - first : kNormRows;
    NormVjp<kNorm> rows[kNormRows];
    for (int i = 0; i < count; ++i) rows[i] = NormVjp<kNorm>(args, first + i);
    for (int i = 0; i < count; ++i) {
      const NormVjp<kNorm>& row = rows[i];
      const Vec mean(row.mean), mean_xhat(row.mean_xhat), rstd(args.rstd[first + i]);
      for (int c = 0; c < padded(args.width); c += Vec::kLanes) {
        Vec y = layer_norm_vjp(row(c), Vec::load(row.xhat + c), rstd, mean, mean_xhat);
        if constexpr (kNorm == NormPlacement::kPost) y = y * Vec::load(row.slope + c);
        F::store_operand(y, dz(first + i) + c * F::kABytes);
      }
    }
  }
}

template <class F>
static void convert_rows(const ConvertArgs& args) {
  const Vec low(args.low), high(args.high);
  for (int r = 0; r < args.rows; ++r) {
    const float* src = args.src + r * args.src_stride;
    char* dst = at<char*>(args.dst, r * args.dst_stride);
    for (int c = 0; c < args.width; c += Vec::kLanes) {
      const Vec x = qpilots::clamp(Vec::load(src + c), low, high);
      F::store_operand(x, dst + c * F::kABytes);
    }
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
