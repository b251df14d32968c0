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

template <class F, Activation kAct, NormPlacement kNorm>
static void activate_rows(const ActivateArgs& args) {
  const int width = padded(args.width);
  const bool save = args.slope != nullptr;
  for (int r = 0; r < args.rows; ++r) {
    float* z = args.z + r * args.z_stride;
    char* h = at<char*>(args.h, r * args.h_stride);
    float* slope = save ? args.slope + r * args.save_stride : nullptr;
    float* xhat = save ? args.xhat + r * args.save_stride : nullptr;
    if constexpr (kNorm == NormPlacement::kNone) {
      for (int c = args.begin; c < args.end; c += Vec::kLanes) {
        const ValueSlope<Vec> y = qpilots::activate<kAct>(Vec::load(z + c));
        if (save) y.slope.store(slope + c);
        F::store_operand(y.value, h + c * F::kABytes);
      }
      continue;
    }
    float total;
    if constexpr (kNorm == NormPlacement::kPost) {
      total = row_sum(width, [&](int c) {
        const ValueSlope<Vec> y = qpilots::activate<kAct>(Vec::load(z + c));
        if (save) y.slope.store(slope + c);
        y.value.store(z + c);
        return y.value;
      });
    } else {
      total = row_sum(width, [&](int c) { return Vec::load(z + c); });
    }
    const RowMoments row = moments(z, args.width, total, args.eps);
    if (save) args.rstd[r] = row.rstd;
    const Vec mean(row.mean), rstd(row.rstd);
    for (int c = 0; c < width; c += Vec::kLanes) {
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
}

// F decides only how dz is stored.
template <class F, NormPlacement kNorm>
static void activate_vjp_rows(const ActivateVjpArgs& args) {
  const int width = padded(args.width);
  const float inverse_width = 1.0f / static_cast<float>(args.width);
  for (int r = 0; r < args.rows; ++r) {
    const float* d = args.d + r * args.d_stride;
    const Vec scale(args.d_scale == nullptr ? 1.0f : args.d_scale[r]);
    const float* slope = args.slope + r * args.save_stride;
    char* dz = at<char*>(args.dz, r * args.dz_stride);
    if constexpr (kNorm == NormPlacement::kNone) {
      for (int c = args.begin; c < args.end; c += Vec::kLanes) {
        F::store_d_operand(Vec::load(d + c) * scale * Vec::load(slope + c), dz + c * F::kDBytes);
      }
      continue;
    }
    const float* xhat = args.xhat + r * args.save_stride;
    const auto d_xhat = [&](int c) {
      Vec g = Vec::load(d + c) * scale;
      if constexpr (kNorm == NormPlacement::kPre) g = g * Vec::load(slope + c);
      return g * Vec::load(args.gamma + c);
    };
    Vec projected(0.0f), other(0.0f);
    bool odd = false;
    const float total = row_sum(width, [&](int c) {
      const Vec g = d_xhat(c);
      Vec& into = odd ? other : projected;
      into = fmadd(g, Vec::load(xhat + c), into);
      odd = !odd;
      return g;
    });
    const Vec mean(total * inverse_width), mean_xhat(sum(projected + other) * inverse_width), rstd(args.rstd[r]);
    for (int c = 0; c < width; c += Vec::kLanes) {
      Vec y = layer_norm_vjp(d_xhat(c), Vec::load(xhat + c), rstd, mean, mean_xhat);
      if constexpr (kNorm == NormPlacement::kPost) y = y * Vec::load(slope + c);
      F::store_d_operand(y, dz + c * F::kDBytes);
    }
  }
}

template <class F, bool kBackward>
static void convert_rows(const ConvertArgs& args) {
  const Vec low(args.low), high(args.high);
  for (int r = 0; r < args.rows; ++r) {
    const float* src = args.src + r * args.src_stride;
    char* dst = at<char*>(args.dst, r * args.dst_stride);
    for (int c = 0; c < args.width; c += Vec::kLanes) {
      const Vec x = qpilots::clamp(Vec::load(src + c), low, high);
      if constexpr (kBackward) {
        F::store_d_operand(x, dst + c * F::kDBytes);
      } else {
        F::store_operand(x, dst + c * F::kABytes);
      }
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
