// Computes the backward of batch normalization from its two sums. All but the direct term of dx is
// affine in x:
//
//   xhat = (q*x - mean)*rstd,   dv the gradient of gamma*xhat + beta
//   S1 = sum dv = dbeta,   S2 = sum dv*xhat = dgamma
//   dx = q*gamma*rstd*(dv - S1/M - xhat*S2/M)
//
// The direct term goes to the gradient buffer, the others to the coefficients of the channel.
#pragma once

#include <cmath>

#include "vec.h"

namespace densenet_ext {
namespace DENSENET_EXT_ISA {

template <class T>
DX_INLINE double reciprocal_std(const Norm<T>& norm, int64_t c) {
  return 1.0 / std::sqrt(static_cast<double>(norm.var[c]) + norm.eps);
}

// Returns gamma*rstd.
template <class T>
DX_INLINE T norm_gain(const Norm<T>& norm, int64_t c) {
  return static_cast<T>(static_cast<double>(norm.weight[c]) * reciprocal_std(norm, c));
}

// Writes dgamma, dbeta and the coefficients (or adds to these). `sums` [channels, 2] are sum dv and
// sum dv*(q*x - mean), over `count` values each.
template <class T>
inline void finish_norm_backward(const Norm<T>& norm, const double* sums, int64_t channels,
                                 double count, const PerChannel<T>& pre_mask,
                                 const Coefficients<T>& coef, bool accumulate, T* dweight,
                                 T* dbias) {
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = reciprocal_std(norm, c);
    dbias[c] = static_cast<T>(sums[2 * c]);
    dweight[c] = static_cast<T>(sums[2 * c + 1] * rstd);
  }
  for (int64_t n = 0; n < coef.samples; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      double a = 0, d = 0;
      if (norm.training && count > 0) {
        const double rstd = reciprocal_std(norm, c),
                     q = pre_mask.data ? static_cast<double>(pre_mask.row(n)[c]) : 1.0;
        const double g = q * static_cast<double>(norm.weight[c]) * rstd;
        const double s1 = sums[2 * c] / count, s2 = sums[2 * c + 1] * rstd / count;
        a = -g * (s1 - static_cast<double>(norm.mean[c]) * rstd * s2);
        d = -q * g * rstd * s2;
      }
      if (accumulate) {
        coef.at(1, n, c) += static_cast<T>(a);
        coef.at(2, n, c) += static_cast<T>(d);
      } else {
        coef.at(0, n, c) = T(1);
        coef.at(1, n, c) = static_cast<T>(a);
        coef.at(2, n, c) = static_cast<T>(d);
      }
    }
  }
}

// Writes the gradients of BN2 and the affine map of db. The threads' `sums` [threads, 2, pitch] are
// sum dv and sum dv*(b - mean).
template <class S>
inline void finish_bottleneck_norm(const Conv3x3Backward<S>& a, const double* sums, int64_t threads,
                                   int64_t pitch) {
  using T = Arithmetic<S>;
  const double rows =
      static_cast<double>(a.features.samples) * static_cast<double>(a.features.pixels());
  const bool correct = a.norm.training && rows > 0;
  for (int64_t i = 0; i < a.width; ++i) {
    double s1 = 0, s2 = 0;
    for (int64_t t = 0; t < threads; ++t) {
      s1 += sums[t * 2 * pitch + i];
      s2 += sums[t * 2 * pitch + pitch + i];
    }
    const double rstd = reciprocal_std(a.norm, i), g = static_cast<double>(a.norm.weight[i]) * rstd;
    s2 *= rstd;
    a.dnorm_bias[i] = static_cast<T>(s1);
    a.dnorm_weight[i] = static_cast<T>(s2);
    const double constant = -g * (s1 - static_cast<double>(a.norm.mean[i]) * rstd * s2) / rows;
    a.db_affine[i] = static_cast<T>(g);
    a.db_affine[a.width + i] = correct ? static_cast<T>(constant) : T(0);
    a.db_affine[2 * a.width + i] = correct ? static_cast<T>(-g * rstd * s2 / rows) : T(0);
  }
}

}  // namespace DENSENET_EXT_ISA
}  // namespace densenet_ext
