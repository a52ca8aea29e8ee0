#include "backend.h"

namespace densenet_ext {
namespace {

void squeeze_excite_forward_cpu(const Tensor& features, int64_t offset, const Tensor& mean,
                                const Tensor& m2, const Tensor& fc1_weight, const Tensor& fc1_bias,
                                const Tensor& fc2_weight, const Tensor& fc2_bias,
                                const Tensor& pooled, const Tensor& hidden, const Tensor& gate) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<S>("features", features);
    const int64_t growth = fc2_weight.size(0), r = fc2_weight.size(1);
    check_range("features", f, offset, growth);
    kernels.squeeze_excite_forward(
        {f, offset, growth, r, moments<T>(mean, m2, f),
         matrix<T>("fc1_weight", fc1_weight, r, growth), pointer<T>("fc1_bias", fc1_bias, {r}),
         matrix<T>("fc2_weight", fc2_weight, growth, r), pointer<T>("fc2_bias", fc2_bias, {growth}),
         pointer<T>("pooled", pooled, {f.samples, growth}),
         pointer<T>("hidden", hidden, {f.samples, r}),
         pointer<T>("gate", gate, {f.samples, growth})});
  });
}

void squeeze_excite_backward_cpu(const Tensor& features, const Tensor& grad, int64_t offset,
                                 const Tensor& fc1_weight, const Tensor& fc2_weight,
                                 const Tensor& pooled, const Tensor& hidden, const Tensor& gate,
                                 const Tensor& coef, const Tensor& dfc1_weight,
                                 const Tensor& dfc1_bias, const Tensor& dfc2_weight,
                                 const Tensor& dfc2_bias) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    const int64_t growth = fc2_weight.size(0), r = fc2_weight.size(1);
    check_range("features", f, offset, growth);
    kernels.squeeze_excite_backward(
        {f, maps_like<const T>("grad", grad, f), offset, growth, r,
         matrix<T>("fc1_weight", fc1_weight, r, growth),
         matrix<T>("fc2_weight", fc2_weight, growth, r),
         pointer<T>("pooled", pooled, {f.samples, growth}),
         pointer<T>("hidden", hidden, {f.samples, r}),
         pointer<T>("gate", gate, {f.samples, growth}), coefficients<T>(coef, f),
         matrix<T>("dfc1_weight", dfc1_weight, r, growth), pointer<T>("dfc1_bias", dfc1_bias, {r}),
         matrix<T>("dfc2_weight", dfc2_weight, growth, r),
         pointer<T>("dfc2_bias", dfc2_bias, {growth})});
  });
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("squeeze_excite_forward", TORCH_BOX(&densenet_ext::squeeze_excite_forward_cpu));
  m.impl("squeeze_excite_backward", TORCH_BOX(&densenet_ext::squeeze_excite_backward_cpu));
}
