#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

// The stem's input and its gradient are channels last; the caller checks their sizes.
template <class B, class E>
auto stem_maps(const char* name, const Tensor& t) {
  check_dimensions(name, t, 4);
  STD_TORCH_CHECK(is_dense_channels_last(t), name, " must be channels last without gaps");
  return Context<B>::template channels_last_maps<E>(name, t);
}

// The stem's output and its gradient have half the height and width of x, rounded up.
template <class B, class E, class M>
auto pooled_maps(const char* name, const Tensor& t, const M& x) {
  check_shape(name, t, {x.samples, x.channels, ceil_div(x.height, 2), ceil_div(x.width, 2)});
  return Context<B>::template maps<E>(name, t);
}

template <class B>
void stem_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                  bool has_statistics, const Tensor& batch_mean, const Tensor& batch_var,
                  const Tensor& out) {
  Context<B> context(x);
  dispatch_storage("x", x, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    arguments::StemForward<B, S> a = {};
    a.x = stem_maps<B, const S>("x", x);
    const Sizes channels = {a.x.channels};
    a.weight = pointer<const T>("norm_weight", norm_weight, channels);
    a.bias = pointer<const T>("norm_bias", norm_bias, channels);
    a.eps = eps;
    a.has_statistics = has_statistics;
    a.batch_mean = pointer<T>("batch_mean", batch_mean, channels);
    a.batch_var = pointer<T>("batch_var", batch_var, channels);
    a.out = pooled_maps<B, S>("out", out, a.x);
    context.run(a);
  });
}

template <class B>
void stem_backward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                   const Tensor& batch_mean, const Tensor& batch_var, double eps, bool training,
                   const Tensor& grad_out, const std::optional<Tensor>& dx,
                   const Tensor& dnorm_weight, const Tensor& dnorm_bias) {
  Context<B> context(x);
  dispatch_storage("x", x, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    arguments::StemBackward<B, S> a = {};
    a.x = stem_maps<B, const S>("x", x);
    const Sizes channels = {a.x.channels};
    a.bias = pointer<const T>("norm_bias", norm_bias, channels);
    a.norm = norm<T>(norm_weight, batch_mean, batch_var, eps, training, a.x.channels);
    a.grad_out = pooled_maps<B, const S>("grad_out", grad_out, a.x);
    if (dx.has_value()) {
      check_shape("dx", *dx, sizes_of(x));
      a.dx = stem_maps<B, S>("dx", *dx);
    }
    a.dnorm_weight = pointer<T>("dnorm_weight", dnorm_weight, channels);
    a.dnorm_bias = pointer<T>("dnorm_bias", dnorm_bias, channels);
    context.run(a);
  });
}

}  // namespace densenet_ext::kernel_ops
