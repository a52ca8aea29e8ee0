#include "backend.h"

namespace densenet_ext::cuda {
namespace {

void transition_forward_cuda(const Tensor& features, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& out, bool allow_tf32) {
  DeviceContext context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const int64_t outputs = weight.size(0);
    check_shape("out", out, {f.samples, outputs, f.height / 2, f.width / 2});
    transition_forward<S>(
        {f, norm_table<T>(scale, shift, 1, f.channels),
         matrix<const T>("weight", weight, outputs, f.channels), strided<S>("out", out)},
        context);
  });
}

void transition_backward_cuda(const Tensor& features, const Tensor& scale, const Tensor& shift,
                              const Tensor& weight, const Tensor& norm_weight,
                              const Tensor& batch_mean, const Tensor& batch_var, double eps,
                              bool training, const Tensor& grad_out, const Tensor& grad,
                              const Tensor& coef, const Tensor& dweight, const Tensor& dnorm_weight,
                              const Tensor& dnorm_bias, bool allow_tf32) {
  DeviceContext context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const int64_t outputs = weight.size(0);
    check_shape("grad_out", grad_out, {f.samples, outputs, f.height / 2, f.width / 2});
    transition_backward<S>(
        {f, norm_table<T>(scale, shift, 1, f.channels),
         matrix<const T>("weight", weight, outputs, f.channels),
         norm<T>(norm_weight, batch_mean, batch_var, eps, training, f.channels),
         strided<const S>("grad_out", grad_out), rows_like<S>("grad", grad, f),
         coefficients<T>(coef, f), matrix<T>("dweight", dweight, outputs, f.channels),
         pointer<T>("dnorm_weight", dnorm_weight, {f.channels}),
         pointer<T>("dnorm_bias", dnorm_bias, {f.channels})},
        context);
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("transition_forward", TORCH_BOX(&densenet_ext::cuda::transition_forward_cuda));
  m.impl("transition_backward", TORCH_BOX(&densenet_ext::cuda::transition_backward_cuda));
}
