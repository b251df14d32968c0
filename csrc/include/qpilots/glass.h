// Coefficients of the GLASS posterior velocity of a frozen base flow (inner time s, outer time t), all from times only:
//   x* = cx x + cb xbar,  v* = v(obs, x*, t*),  w = wx x + wb xbar + wv v*
// With p = t(1-s), q = s(1-t), g = (1-t)(1-s), h = sqrt(p^2 + q^2), a = p/h, b = q/h (h = 0: a = 0, b = 1).
#pragma once

#include <cmath>

namespace qpilots {

struct GlassCoefficients {
  double time;  // t* = h / (h + g)
  double x_point, xbar_point;
  double x_drift, xbar_drift, v_drift;
};

static inline GlassCoefficients glass_coefficients(double s, double t) {  // host only: double precision
  s = s < 1 - 1e-4 ? s : 1 - 1e-4;
  t = t < 1 - 1e-4 ? t : 1 - 1e-4;
  const double p = t * (1 - s), q = s * (1 - t), g = (1 - t) * (1 - s);
  const double h = std::sqrt(p * p + q * q);
  const double a = h == 0 ? 0 : p / h, b = h == 0 ? 1 : q / h;
  const double n = h + g;
  return {h / n, a * (1 - s) / n, b * (1 - t) / n, a / n, ((1 - t) * (b - 1) - t * a) / n, (1 - t) / n};
}

}  // namespace qpilots
