// LayerNorm of one row, written per element; the two sums over the row are the caller's (lanes, threads, warps).
//   xhat = (y - mean) rstd,  rstd = 1 / sqrt(mean((y - mean)^2) + layer_norm_eps),  out = xhat gamma + beta
// Its vector-Jacobian product needs two more sums over the row:
//   d_xhat = d_out gamma,  d_y = rstd (d_xhat - mean(d_xhat) - xhat mean(d_xhat xhat))
#pragma once

#include "qpilots/number.h"

namespace qpilots {

QPILOTS_HD float reciprocal_std(float sum_of_squares, float width, float layer_norm_eps) {
  return 1.0f / square_root(sum_of_squares / width + layer_norm_eps);
}

template <class T>
QPILOTS_HD T layer_norm_affine(T xhat, T gamma, T beta) {
  return fmadd(xhat, gamma, beta);
}

template <class T>
QPILOTS_HD T layer_norm_vjp(T d_xhat, T xhat, T rstd, T mean_d_xhat, T mean_d_xhat_xhat) {
  return rstd * fmadd(xhat, T(0.0f) - mean_d_xhat_xhat, d_xhat - mean_d_xhat);
}

}  // namespace qpilots
