// Batch statistics from moments, and batch normalization with the masks around it as one scale and
// one shift.
//
//   mean_c = (1/N) sum_n q mu,   var_c = (1/M) sum_n (q^2 M2 + P (q mu - mean_c)^2)
//   scale = r*q*gamma*rstd,      shift = r*(beta - gamma*rstd*mean)
//
// mu and M2 are the moments of a channel of one sample, q is the mask before and r the mask after
// batch normalization, M = N*P. This takes no pass over pixels, and nothing cancels in the sums.
#include <cmath>
#include <vector>

#include "kernel_ops/kernel_arguments.h"
#include "stage/workspace.h"

namespace densenet_ext {
namespace {

template <class T>
void batch_statistics(const arguments::FoldNorm<T>& a) {
  const int64_t rows = a.rows, channels = a.channels;
  const auto mask = [&](int64_t n, int64_t c) {
    return a.pre_mask.data ? static_cast<double>(a.pre_mask.row(n)[c]) : 1.0;
  };
  std::vector<double> sums(channels, 0.0), squares(channels, 0.0);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += mask(n, c) * static_cast<double>(a.mean[n * a.pitch + c]);
    }
  }
  for (double& sum : sums) sum /= static_cast<double>(rows > 0 ? rows : 1);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = mask(n, c);
      const double off = factor * static_cast<double>(a.mean[n * a.pitch + c]) - sums[c];
      squares[c] += factor * factor * static_cast<double>(a.m2[n * a.pitch + c]) +
                    static_cast<double>(a.pixels) * off * off;
    }
  }
  const double count = static_cast<double>(rows) * static_cast<double>(a.pixels);
  for (int64_t c = 0; c < channels; ++c) {
    a.batch_mean[c] = static_cast<T>(sums[c]);
    a.batch_var[c] = count > 0 ? static_cast<T>(squares[c] / count) : T(0);
  }
}

// out[n, c] = values[c] * q * r; a mask that is null is all ones.
template <class T>
void fill_rows(const std::vector<double>& values, const PerChannel<T>& q, const PerChannel<T>& r,
               int64_t rows, T* out) {
  const auto channels = static_cast<int64_t>(values.size());
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      double value = values[c];
      if (q.data) value *= static_cast<double>(q.row(n)[c]);
      if (r.data) value *= static_cast<double>(r.row(n)[c]);
      out[n * channels + c] = static_cast<T>(value);
    }
  }
}

}  // namespace

template <class T>
void fold_norm(const arguments::FoldNorm<T>& a) {
  if (is_rehearsing()) return;
  if (!a.has_statistics) batch_statistics(a);
  std::vector<double> gain(a.channels), offset(a.channels);
  for (int64_t c = 0; c < a.channels; ++c) {
    gain[c] =
        static_cast<double>(a.weight[c]) / std::sqrt(static_cast<double>(a.batch_var[c]) + a.eps);
    offset[c] = static_cast<double>(a.bias[c]) - gain[c] * static_cast<double>(a.batch_mean[c]);
  }
  fill_rows(gain, a.pre_mask, a.post_mask, a.scale_rows, a.scale);
  fill_rows(offset, PerChannel<T>{}, a.post_mask, a.shift_rows, a.shift);
}

template void fold_norm<float>(const arguments::FoldNorm<float>&);
template void fold_norm<double>(const arguments::FoldNorm<double>&);

}  // namespace densenet_ext
