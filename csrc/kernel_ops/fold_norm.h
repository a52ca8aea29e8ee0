#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

template <class B>
void fold_norm(const Tensor& mean, const Tensor& m2, int64_t pixels,
               const std::optional<Tensor>& pre_mask, const std::optional<Tensor>& post_mask,
               const Tensor& weight, const Tensor& bias, double eps, bool has_statistics,
               const Tensor& batch_mean, const Tensor& batch_var, const Tensor& scale,
               const Tensor& shift) {
  Context<B> context(weight);
  const auto fold = [&](auto type) {
    using T = decltype(type);
    const int64_t channels = weight.numel(), samples = scale.size(0);
    arguments::FoldNorm<T> a = {};
    a.pixels = pixels, a.channels = channels, a.eps = eps, a.has_statistics = has_statistics;
    a.weight = pointer<const T>("weight", weight, {channels});
    a.bias = pointer<const T>("bias", bias, {channels});
    a.batch_mean = pointer<T>("batch_mean", batch_mean, {channels});
    a.batch_var = pointer<T>("batch_var", batch_var, {channels});
    a.scale_rows = samples, a.shift_rows = shift.size(0);
    a.scale = pointer<T>("scale", scale, {a.scale_rows, channels});
    a.shift = pointer<T>("shift", shift, {a.shift_rows, channels});
    a.pre_mask = per_channel<T>("pre_mask", pre_mask, samples, channels);
    a.post_mask = per_channel<T>("post_mask", post_mask, samples, channels);
    STD_TORCH_CHECK(a.shift_rows == samples || (a.shift_rows == 1 && !a.post_mask.data),
                    "shift must have as many rows as scale, ", samples,
                    ", or a single one where post_mask is None, got ", a.shift_rows);
    if (!has_statistics) {
      STD_TORCH_CHECK(mean.dim() == 2 && mean.size(1) >= channels,
                      "mean must have shape [rows, >= ", channels, "], got ",
                      describe(mean.sizes()));
      a.rows = mean.size(0), a.pitch = mean.size(1);
      STD_TORCH_CHECK(!a.pre_mask.data || a.rows == samples,
                      "pre_mask must have one row for each row of mean, ", a.rows, ", got ",
                      samples);
      a.mean = pointer<const T>("mean", mean, {a.rows, a.pitch});
      a.m2 = pointer<const T>("m2", m2, {a.rows, a.pitch});
    }
    context.run(a);
  };
  weight.scalar_type() == ScalarType::Double ? fold(double{}) : fold(float{});
}

}  // namespace densenet_ext::kernel_ops
