#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

template <class B>
void conv3x3_forward(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                     const Tensor& weight, const std::optional<Tensor>& dropout_mask,
                     double dropout_scale, const Tensor& features, int64_t offset,
                     const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                     bool allow_tf32) {
  Context<B> context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    check_dimensions("weight", weight, 4);
    const int64_t growth = weight.size(0), width = weight.size(1);
    arguments::Conv3x3Forward<B, S> a = {};
    a.features = buffer<B, S>("features", features);
    check_range("features", a.features, offset, growth);
    const auto& f = a.features;
    a.bottleneck =
        pointer<const S>("bottleneck", bottleneck, {rows_of(f), round_up(width, kLanes)});
    a.scale_shift = scale_shift_table<T>(scale, shift, f.samples, width);
    a.weight = pointer<const T>("weight", weight, {growth, width, 3, 3});
    a.growth = growth, a.width = width;
    a.dropout_mask =
        pointer<const bool>("dropout_mask", dropout_mask, {f.samples, growth, f.height, f.width});
    a.dropout_scale = dropout_scale;
    a.offset = offset;
    a.moments = moments<T>(mean, m2, f);
    context.run(a, weight);
  });
}

template <class B>
void conv3x3_backward(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& post_mask, const Tensor& weight,
                      const std::optional<Tensor>& dropout_mask, double dropout_scale,
                      const Tensor& features, const Tensor& grad, const Tensor& coef,
                      int64_t offset, const Tensor& norm_weight, const Tensor& batch_mean,
                      const Tensor& batch_var, double eps, bool training, const Tensor& dv,
                      const Tensor& dweight, const Tensor& dnorm_weight, const Tensor& dnorm_bias,
                      const Tensor& db_affine, bool allow_tf32) {
  Context<B> context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    using G = typename B::template Gradient<S>;
    check_dimensions("weight", weight, 4);
    const int64_t growth = weight.size(0), width = weight.size(1);
    arguments::Conv3x3Backward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    check_range("features", a.features, offset, growth);
    const auto& f = a.features;
    const Sizes rows = {rows_of(f), round_up(width, kLanes)};
    a.bottleneck = pointer<const S>("bottleneck", bottleneck, rows);
    a.scale_shift = scale_shift_table<T>(scale, shift, f.samples, width);
    a.post_mask = per_channel<T>("post_mask", post_mask, f.samples, width);
    a.weight = pointer<const T>("weight", weight, {growth, width, 3, 3});
    a.growth = growth, a.width = width;
    a.dropout_mask =
        pointer<const bool>("dropout_mask", dropout_mask, {f.samples, growth, f.height, f.width});
    a.dropout_scale = dropout_scale;
    a.grad = buffer_like<B, const G>("grad", grad, f);
    a.coef = coefficients<T>(coef, f);
    a.offset = offset;
    a.norm = norm<T>(norm_weight, batch_mean, batch_var, eps, training, width);
    a.dv = pointer<G>("dv", dv, rows);
    a.dweight = pointer<T>("dweight", dweight, {growth, width, 3, 3});
    a.dnorm_weight = pointer<T>("dnorm_weight", dnorm_weight, {width});
    a.dnorm_bias = pointer<T>("dnorm_bias", dnorm_bias, {width});
    a.db_affine = pointer<T>("db_affine", db_affine, {3, width});
    context.run(a, weight);
  });
}

}  // namespace densenet_ext::kernel_ops
