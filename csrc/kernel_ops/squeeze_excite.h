#pragma once

#include "context.h"

namespace densenet_ext::kernel_ops {

template <class B>
void squeeze_excite_forward(const Tensor& features, int64_t offset, const Tensor& mean,
                            const Tensor& m2, const Tensor& fc1_weight, const Tensor& fc1_bias,
                            const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& pooled,
                            const Tensor& hidden, const Tensor& gate) {
  Context<B> context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    check_matrix("fc2_weight", fc2_weight);
    const int64_t growth = fc2_weight.size(0), hidden_width = fc2_weight.size(1);
    arguments::SqueezeExciteForward<B, S> a = {};
    a.features = buffer<B, S>("features", features);
    check_range("features", a.features, offset, growth);
    const int64_t samples = a.features.samples;
    a.offset = offset, a.growth = growth, a.hidden_width = hidden_width;
    a.moments = moments<T>(mean, m2, a.features);
    a.fc1_weight = matrix<const T>("fc1_weight", fc1_weight, hidden_width, growth);
    a.fc1_bias = pointer<const T>("fc1_bias", fc1_bias, {hidden_width});
    a.fc2_weight = matrix<const T>("fc2_weight", fc2_weight, growth, hidden_width);
    a.fc2_bias = pointer<const T>("fc2_bias", fc2_bias, {growth});
    a.pooled = pointer<T>("pooled", pooled, {samples, growth});
    a.hidden = pointer<T>("hidden", hidden, {samples, hidden_width});
    a.gate = pointer<T>("gate", gate, {samples, growth});
    context.run(a);
  });
}

template <class B>
void squeeze_excite_backward(const Tensor& features, const Tensor& grad, int64_t offset,
                             const Tensor& fc1_weight, const Tensor& fc2_weight,
                             const Tensor& pooled, const Tensor& hidden, const Tensor& gate,
                             const Tensor& coef, const Tensor& dfc1_weight, const Tensor& dfc1_bias,
                             const Tensor& dfc2_weight, const Tensor& dfc2_bias) {
  Context<B> context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    using G = typename B::template Gradient<S>;
    check_matrix("fc2_weight", fc2_weight);
    const int64_t growth = fc2_weight.size(0), hidden_width = fc2_weight.size(1);
    arguments::SqueezeExciteBackward<B, S> a = {};
    a.features = buffer<B, const S>("features", features);
    check_range("features", a.features, offset, growth);
    const int64_t samples = a.features.samples;
    a.grad = buffer_like<B, const G>("grad", grad, a.features);
    a.offset = offset, a.growth = growth, a.hidden_width = hidden_width;
    a.fc1_weight = matrix<const T>("fc1_weight", fc1_weight, hidden_width, growth);
    a.fc2_weight = matrix<const T>("fc2_weight", fc2_weight, growth, hidden_width);
    a.pooled = pointer<const T>("pooled", pooled, {samples, growth});
    a.hidden = pointer<const T>("hidden", hidden, {samples, hidden_width});
    a.gate = pointer<const T>("gate", gate, {samples, growth});
    a.coef = coefficients<T>(coef, a.features);
    a.dfc1_weight = matrix<T>("dfc1_weight", dfc1_weight, hidden_width, growth);
    a.dfc1_bias = pointer<T>("dfc1_bias", dfc1_bias, {hidden_width});
    a.dfc2_weight = matrix<T>("dfc2_weight", dfc2_weight, growth, hidden_width);
    a.dfc2_bias = pointer<T>("dfc2_bias", dfc2_bias, {growth});
    context.run(a);
  });
}

}  // namespace densenet_ext::kernel_ops
