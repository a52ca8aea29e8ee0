#include "backend.h"

namespace densenet_ext {
namespace {

void transition_forward_cpu(const Tensor& features, const Tensor& scale, const Tensor& shift,
                            const Tensor& weight, const Tensor& out, bool /*allow_tf32*/) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    const int64_t outputs = weight.size(0);
    check_shape("out", out, {f.samples, outputs, f.height / 2, f.width / 2});
    kernels.transition_forward({f, norm_table<T>(scale, shift, f.samples, f.channels),
                                matrix<const T>("weight", weight, outputs, f.channels),
                                maps<S>("out", out)});
  });
}

void transition_backward_cpu(const Tensor& features, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& norm_weight,
                             const Tensor& batch_mean, const Tensor& batch_var, double eps,
                             bool training, const Tensor& grad_out, const Tensor& grad,
                             const Tensor& coef, const Tensor& dweight, const Tensor& dnorm_weight,
                             const Tensor& dnorm_bias, bool /*allow_tf32*/) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    const int64_t outputs = weight.size(0);
    check_shape("grad_out", grad_out, {f.samples, outputs, f.height / 2, f.width / 2});
    kernels.transition_backward(
        {f, norm_table<T>(scale, shift, f.samples, f.channels),
         matrix<const T>("weight", weight, outputs, f.channels),
         norm<T>(norm_weight, batch_mean, batch_var, eps, training, f.channels),
         maps<const S>("grad_out", grad_out), maps_like<T>("grad", grad, f),
         coefficients<T>(coef, f), matrix<T>("dweight", dweight, outputs, f.channels),
         pointer<T>("dnorm_weight", dnorm_weight, {f.channels}),
         pointer<T>("dnorm_bias", dnorm_bias, {f.channels})});
  });
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("transition_forward", TORCH_BOX(&densenet_ext::transition_forward_cpu));
  m.impl("transition_backward", TORCH_BOX(&densenet_ext::transition_backward_cpu));
}
