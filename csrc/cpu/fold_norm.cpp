// Batch statistics from moments, and batch normalization with the masks around it as one scale and
// one shift.
//
//   mean_c = (1/N) sum_n q mu,   var_c = (1/M) sum_n (q^2 M2 + P (q mu - mean_c)^2)
//   scale = r*q*gamma*rstd,      shift = r*(beta - gamma*rstd*mean)
//
// mu, M2 the moments of a channel of one sample, q the mask before and r the mask after batch
// normalization, M = N*P. No pass over pixels, no cancellation.
#include <cmath>

#include "backend.h"

namespace densenet_ext {
namespace {

template <class T>
void batch_statistics(const T* mu, const T* m2, int64_t rows, int64_t stride, int64_t pixels,
                      const PerChannel<T>& q, int64_t channels, T* mean, T* var) {
  const auto mask = [&](int64_t n, int64_t c) {
    return q.data ? static_cast<double>(q.row(n)[c]) : 1.0;
  };
  std::vector<double> sums(channels, 0.0), squares(channels, 0.0);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += mask(n, c) * static_cast<double>(mu[n * stride + c]);
    }
  }
  for (double& sum : sums) sum /= static_cast<double>(rows > 0 ? rows : 1);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = mask(n, c);
      const double off = factor * static_cast<double>(mu[n * stride + c]) - sums[c];
      squares[c] += factor * factor * static_cast<double>(m2[n * stride + c]) +
                    static_cast<double>(pixels) * off * off;
    }
  }
  const double count = static_cast<double>(rows) * static_cast<double>(pixels);
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<T>(sums[c]);
    var[c] = count > 0 ? static_cast<T>(squares[c] / count) : T(0);
  }
}

// out[n, c] = values[c], times the masks that there are.
template <class T>
void fill_table(const std::vector<double>& values, const PerChannel<T>& q, const PerChannel<T>& r,
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

template <class T>
void fold_norm_of(const Tensor& mean, const Tensor& m2, int64_t pixels,
                  const std::optional<Tensor>& pre_mask, const std::optional<Tensor>& post_mask,
                  const Tensor& weight, const Tensor& bias, double eps, bool use_given,
                  const Tensor& batch_mean, const Tensor& batch_var, const Tensor& scale,
                  const Tensor& shift) {
  const int64_t channels = weight.numel(), samples = scale.size(0);
  const PerChannel<T> q = per_channel<T>("pre_mask", pre_mask, samples, channels);
  const PerChannel<T> r = per_channel<T>("post_mask", post_mask, samples, channels);
  const T* const gamma = pointer<T>("weight", weight, {channels});
  const T* const beta = pointer<T>("bias", bias, {channels});
  T* const mean_out = pointer<T>("batch_mean", batch_mean, {channels});
  T* const var_out = pointer<T>("batch_var", batch_var, {channels});
  T* const scale_out = pointer<T>("scale", scale, {samples, channels});
  T* const shift_out = pointer<T>("shift", shift, {shift.size(0), channels});
  STD_TORCH_CHECK(shift.size(0) == samples || (shift.size(0) == 1 && !r.data),
                  "shift must have as many rows as scale, ", samples,
                  ", or a single one where post_mask is None, got ", shift.size(0));

  if (!use_given) {
    STD_TORCH_CHECK(mean.dim() == 2 && mean.size(1) >= channels,
                    "mean must have shape [rows, >= ", channels, "], got ", describe(mean.sizes()));
    const int64_t rows = mean.size(0), stride = mean.size(1);
    STD_TORCH_CHECK(!q.data || rows == samples, "pre_mask must have one row for each row of mean, ",
                    rows, ", got ", samples);
    batch_statistics(pointer<T>("mean", mean, {rows, stride}), pointer<T>("m2", m2, {rows, stride}),
                     rows, stride, pixels, q, channels, mean_out, var_out);
  }
  std::vector<double> gain(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    gain[c] = static_cast<double>(gamma[c]) / std::sqrt(static_cast<double>(var_out[c]) + eps);
    offset[c] = static_cast<double>(beta[c]) - gain[c] * static_cast<double>(mean_out[c]);
  }
  fill_table(gain, q, r, samples, scale_out);
  fill_table(offset, PerChannel<T>{}, r, shift.size(0), shift_out);
}

void fold_norm_cpu(const Tensor& mean, const Tensor& m2, int64_t pixels,
                   const std::optional<Tensor>& pre_mask, const std::optional<Tensor>& post_mask,
                   const Tensor& weight, const Tensor& bias, double eps, bool use_given,
                   const Tensor& batch_mean, const Tensor& batch_var, const Tensor& scale,
                   const Tensor& shift) {
  const bool is_double = weight.scalar_type() == ScalarType::Double;
  (is_double ? fold_norm_of<double> : fold_norm_of<float>)(mean, m2, pixels, pre_mask, post_mask,
                                                           weight, bias, eps, use_given, batch_mean,
                                                           batch_var, scale, shift);
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("fold_norm", TORCH_BOX(&densenet_ext::fold_norm_cpu));
}
