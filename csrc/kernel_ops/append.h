#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

template <class B>
void append(const Tensor& x, const Tensor& features, int64_t offset,
            const std::optional<Tensor>& mean, const std::optional<Tensor>& m2) {
  Context<B> context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    arguments::Append<B, S> a = {};
    a.features = buffer<B, S>("features", features);
    a.x = context.template copied_maps<const S>("x", x);
    check_shape("x", x, {a.features.samples, a.x.channels, a.features.height, a.features.width});
    check_range("features", a.features, offset, a.x.channels);
    a.offset = offset;
    a.moments = moments<Arithmetic<S>>(mean, m2, a.features);
    context.run(a);
  });
}

template <class B>
void finish_gradient(const Tensor& features, const Tensor& grad, const Tensor& coef, int64_t offset,
                     const Tensor& out) {
  Context<B> context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using G = typename B::template Gradient<S>;
    arguments::FinishGradient<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    a.grad = buffer_like<B, const G>("grad", grad, a.features);
    a.coef = coefficients<Arithmetic<S>>(coef, a.features);
    a.out = context.template copied_maps<S>("out", out);
    check_shape("out", out,
                {a.features.samples, a.out.channels, a.features.height, a.features.width});
    check_range("features", a.features, offset, a.out.channels);
    a.offset = offset;
    context.run(a);
  });
}

}  // namespace densenet_ext::kernel_ops
