#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

template <class B>
void bottleneck_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                        const Tensor& weight, const Tensor& bottleneck,
                        const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                        bool allow_tf32) {
  Context<B> context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    check_matrix("weight", weight);
    check_moments(mean, m2);
    const int64_t width = weight.size(0), channels = weight.size(1);
    arguments::BottleneckForward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    check_range("features", a.features, 0, channels);
    a.scale_shift = scale_shift_table<T>(scale, shift, a.features.samples, channels);
    a.weight = matrix<const T>("weight", weight, width, channels);
    a.channels = channels, a.width = width;
    a.bottleneck =
        pointer<S>("bottleneck", bottleneck, {rows_of(a.features), round_up(width, kLanes)});
    a.mean = pointer<T>("mean", mean, {1, width});
    a.m2 = pointer<T>("m2", m2, {1, width});
    context.run(a);
  });
}

// Arguments of the forward at the end of a backward: it computes the bottleneck of the layer before
// this one again.
template <class B, class S>
arguments::BottleneckForward<B, S> previous_bottleneck(
    const arguments::BottleneckBackward<B, S>& backward, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const Tensor& weight) {
  using T = Arithmetic<S>;
  STD_TORCH_CHECK(scale.has_value() && shift.has_value(),
                  "previous_weight needs previous_scale and previous_shift");
  check_matrix("previous_weight", weight);
  const int64_t samples = backward.features.samples, channels = weight.size(1);
  arguments::BottleneckForward<B, S> a = {};
  a.features = backward.features;
  check_range("features", a.features, 0, channels);
  a.scale_shift = {per_channel<T>("previous_scale", *scale, samples, channels),
                   per_channel<T>("previous_shift", *shift, samples, channels)};
  a.weight = matrix<const T>("previous_weight", weight, backward.width, channels);
  a.channels = channels, a.width = backward.width;
  a.bottleneck = backward.bottleneck;
  return a;
}

template <class B>
void bottleneck_backward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                         const std::optional<Tensor>& pre_mask,
                         const std::optional<Tensor>& post_mask, const Tensor& weight,
                         const Tensor& dv, const Tensor& bottleneck, const Tensor& db_affine,
                         const Tensor& norm_weight, const Tensor& batch_mean,
                         const Tensor& batch_var, double eps, bool training,
                         const std::optional<Tensor>& grad_in, const Tensor& grad,
                         const Tensor& coef, const Tensor& dweight, const Tensor& dnorm_weight,
                         const Tensor& dnorm_bias, const std::optional<Tensor>& previous_scale,
                         const std::optional<Tensor>& previous_shift,
                         const std::optional<Tensor>& previous_weight, bool allow_tf32) {
  Context<B> context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    using G = typename B::template Gradient<S>;
    check_matrix("weight", weight);
    const int64_t width = weight.size(0), channels = weight.size(1);
    arguments::BottleneckBackward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    check_range("features", a.features, 0, channels);
    const int64_t samples = a.features.samples;
    const Sizes rows = {rows_of(a.features), round_up(width, kLanes)};
    a.scale_shift = scale_shift_table<T>(scale, shift, samples, channels);
    a.pre_mask = per_channel<T>("pre_mask", pre_mask, samples, channels);
    a.post_mask = per_channel<T>("post_mask", post_mask, samples, channels);
    a.weight = matrix<const T>("weight", weight, width, channels);
    a.channels = channels, a.width = width;
    a.dv = pointer<const G>("dv", dv, rows);
    a.bottleneck = pointer<S>("bottleneck", bottleneck, rows);
    a.db_affine = pointer<const T>("db_affine", db_affine, {3, width});
    a.norm = norm<T>(norm_weight, batch_mean, batch_var, eps, training, channels);
    if (grad_in.has_value()) a.grad_in = buffer_like<B, const G>("grad_in", *grad_in, a.features);
    a.grad = buffer_like<B, G>("grad", grad, a.features);
    a.coef = coefficients<T>(coef, a.features);
    a.dweight = matrix<T>("dweight", dweight, width, channels);
    a.dnorm_weight = pointer<T>("dnorm_weight", dnorm_weight, {channels});
    a.dnorm_bias = pointer<T>("dnorm_bias", dnorm_bias, {channels});
    if (previous_weight.has_value())
      a.previous = previous_bottleneck(a, previous_scale, previous_shift, *previous_weight);
    context.run(a);
  });
}

}  // namespace densenet_ext::kernel_ops
