#include "backend.h"

namespace densenet_ext::cuda {
namespace {

void head_forward_cuda(const Tensor& features, const Tensor& scale, const Tensor& shift,
                       const Tensor& out) {
  DeviceContext context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    head_forward<S>({f, norm_table<T>(scale, shift, f.samples, f.channels),
                     pointer<S>("out", out, {f.samples, f.channels})},
                    context);
  });
}

void head_backward_cuda(const Tensor& features, const Tensor& scale, const Tensor& shift,
                        const Tensor& norm_weight, const Tensor& batch_mean,
                        const Tensor& batch_var, double eps, bool training, const Tensor& grad_out,
                        const Tensor& grad, const Tensor& coef, const Tensor& dnorm_weight,
                        const Tensor& dnorm_bias) {
  DeviceContext context(features);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    head_backward<S>({f, norm_table<T>(scale, shift, f.samples, f.channels),
                      norm<T>(norm_weight, batch_mean, batch_var, eps, training, f.channels),
                      pointer<const S>("grad_out", grad_out, {f.samples, f.channels}),
                      rows_like<S>("grad", grad, f), coefficients<T>(coef, f),
                      pointer<T>("dnorm_weight", dnorm_weight, {f.channels}),
                      pointer<T>("dnorm_bias", dnorm_bias, {f.channels})},
                     context);
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("head_forward", TORCH_BOX(&densenet_ext::cuda::head_forward_cuda));
  m.impl("head_backward", TORCH_BOX(&densenet_ext::cuda::head_backward_cuda));
}
