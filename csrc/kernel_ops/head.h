#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

template <class B>
void head_forward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                  const Tensor& out) {
  Context<B> context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    arguments::HeadForward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    const int64_t samples = a.features.samples, channels = a.features.channels;
    a.scale_shift = scale_shift_table<Arithmetic<S>>(scale, shift, samples, channels);
    a.out = pointer<S>("out", out, {samples, channels});
    context.run(a);
  });
}

template <class B>
void head_backward(const Tensor& features, const Tensor& scale, const Tensor& shift,
                   const Tensor& norm_weight, const Tensor& batch_mean, const Tensor& batch_var,
                   double eps, bool training, const Tensor& grad_out, const Tensor& grad,
                   const Tensor& coef, const Tensor& dnorm_weight, const Tensor& dnorm_bias) {
  Context<B> context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    using G = typename B::template Gradient<S>;
    arguments::HeadBackward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    const int64_t samples = a.features.samples, channels = a.features.channels;
    a.scale_shift = scale_shift_table<T>(scale, shift, samples, channels);
    a.norm = norm<T>(norm_weight, batch_mean, batch_var, eps, training, channels);
    a.grad_out = pointer<const S>("grad_out", grad_out, {samples, channels});
    a.grad = buffer_like<B, G>("grad", grad, a.features);
    a.coef = coefficients<T>(coef, a.features);
    a.dnorm_weight = pointer<T>("dnorm_weight", dnorm_weight, {channels});
    a.dnorm_bias = pointer<T>("dnorm_bias", dnorm_bias, {channels});
    context.run(a);
  });
}

}  // namespace densenet_ext::kernel_ops
