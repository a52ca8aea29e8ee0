#include "backend.h"

namespace densenet_ext {
namespace {

void head_forward_cpu(const Tensor& features, const Tensor& scale, const Tensor& shift,
                      const Tensor& out) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    kernels.head_forward({f, norm_table<T>(scale, shift, f.samples, f.channels),
                          pointer<S>("out", out, {f.samples, f.channels})});
  });
}

void head_backward_cpu(const Tensor& features, const Tensor& scale, const Tensor& shift,
                       const Tensor& norm_weight, const Tensor& batch_mean, const Tensor& batch_var,
                       double eps, bool training, const Tensor& grad_out, const Tensor& grad,
                       const Tensor& coef, const Tensor& dnorm_weight, const Tensor& dnorm_bias) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    kernels.head_backward({f, norm_table<T>(scale, shift, f.samples, f.channels),
                           norm<T>(norm_weight, batch_mean, batch_var, eps, training, f.channels),
                           pointer<S>("grad_out", grad_out, {f.samples, f.channels}),
                           maps_like<T>("grad", grad, f), coefficients<T>(coef, f),
                           pointer<T>("dnorm_weight", dnorm_weight, {f.channels}),
                           pointer<T>("dnorm_bias", dnorm_bias, {f.channels})});
  });
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&densenet_ext::head_forward_cpu));
  m.impl("head_backward", TORCH_BOX(&densenet_ext::head_backward_cpu));
}
