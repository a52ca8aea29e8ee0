#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

// The transition's output and its gradient have half the height and width of the features.
template <class B, class E, class M>
auto transition_maps(const char* name, const Tensor& t, const M& features, int64_t outputs) {
  check_shape(name, t, {features.samples, outputs, features.height / 2, features.width / 2});
  return Context<B>::template outer_maps<E>(name, t);
}

template <class B>
void transition_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                        const Tensor& weight, const Tensor& out, bool allow_tf32) {
  Context<B> context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    check_matrix("weight", weight);
    const int64_t outputs = weight.size(0);
    arguments::TransitionForward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    a.scale_shift = shared_scale_shift<T>(scale, shift, a.features.channels);
    a.weight = matrix<const T>("weight", weight, outputs, a.features.channels);
    a.out = transition_maps<B, S>("out", out, a.features, outputs);
    context.run(a);
  });
}

template <class B>
void transition_backward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                         const Tensor& weight, const Tensor& norm_weight, const Tensor& batch_mean,
                         const Tensor& batch_var, double eps, bool training, const Tensor& grad_out,
                         const Tensor& grad, const Tensor& coef, const Tensor& dweight,
                         const Tensor& dnorm_weight, const Tensor& dnorm_bias, bool allow_tf32) {
  Context<B> context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    using G = typename B::template Gradient<S>;
    check_matrix("weight", weight);
    const int64_t outputs = weight.size(0);
    arguments::TransitionBackward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    const int64_t channels = a.features.channels;
    a.scale_shift = shared_scale_shift<T>(scale, shift, channels);
    a.weight = matrix<const T>("weight", weight, outputs, channels);
    a.norm = norm<T>(norm_weight, batch_mean, batch_var, eps, training, channels);
    a.grad_out = transition_maps<B, const S>("grad_out", grad_out, a.features, outputs);
    a.grad = buffer_like<B, G>("grad", grad, a.features);
    a.coef = coefficients<T>(coef, a.features);
    a.dweight = matrix<T>("dweight", dweight, outputs, channels);
    a.dnorm_weight = pointer<T>("dnorm_weight", dnorm_weight, {channels});
    a.dnorm_bias = pointer<T>("dnorm_bias", dnorm_bias, {channels});
    context.run(a);
  });
}

}  // namespace densenet_ext::kernel_ops
