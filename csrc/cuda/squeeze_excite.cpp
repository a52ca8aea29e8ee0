#include "backend.h"

namespace densenet_ext::cuda {
namespace {

void squeeze_excite_forward_cuda(const Tensor& features, int64_t offset, const Tensor& mean,
                                 const Tensor& m2, const Tensor& fc1_weight, const Tensor& fc1_bias,
                                 const Tensor& fc2_weight, const Tensor& fc2_bias,
                                 const Tensor& pooled, const Tensor& hidden, const Tensor& gate) {
  DeviceContext context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<S>("features", features);
    const int64_t growth = fc2_weight.size(0), r = fc2_weight.size(1);
    check_range("features", f, offset, growth);
    squeeze_excite_forward<S>({f, offset, growth, r, moments<T>(mean, m2, f),
                               matrix<const T>("fc1_weight", fc1_weight, r, growth),
                               pointer<const T>("fc1_bias", fc1_bias, {r}),
                               matrix<const T>("fc2_weight", fc2_weight, growth, r),
                               pointer<const T>("fc2_bias", fc2_bias, {growth}),
                               pointer<T>("pooled", pooled, {f.samples, growth}),
                               pointer<T>("hidden", hidden, {f.samples, r}),
                               pointer<T>("gate", gate, {f.samples, growth})},
                              context);
  });
}

void squeeze_excite_backward_cuda(const Tensor& features, const Tensor& grad, int64_t offset,
                                  const Tensor& fc1_weight, const Tensor& fc2_weight,
                                  const Tensor& pooled, const Tensor& hidden, const Tensor& gate,
                                  const Tensor& coef, const Tensor& dfc1_weight,
                                  const Tensor& dfc1_bias, const Tensor& dfc2_weight,
                                  const Tensor& dfc2_bias) {
  DeviceContext context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const int64_t growth = fc2_weight.size(0), r = fc2_weight.size(1);
    check_range("features", f, offset, growth);
    squeeze_excite_backward<S>(
        {f, rows_like<const S>("grad", grad, f), offset, growth, r,
         matrix<const T>("fc1_weight", fc1_weight, r, growth),
         matrix<const T>("fc2_weight", fc2_weight, growth, r),
         pointer<const T>("pooled", pooled, {f.samples, growth}),
         pointer<const T>("hidden", hidden, {f.samples, r}),
         pointer<const T>("gate", gate, {f.samples, growth}), coefficients<T>(coef, f),
         matrix<T>("dfc1_weight", dfc1_weight, r, growth), pointer<T>("dfc1_bias", dfc1_bias, {r}),
         matrix<T>("dfc2_weight", dfc2_weight, growth, r),
         pointer<T>("dfc2_bias", dfc2_bias, {growth})},
        context);
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("squeeze_excite_forward", TORCH_BOX(&densenet_ext::cuda::squeeze_excite_forward_cuda));
  m.impl("squeeze_excite_backward", TORCH_BOX(&densenet_ext::cuda::squeeze_excite_backward_cuda));
}
