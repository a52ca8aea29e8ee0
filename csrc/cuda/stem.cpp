#include "backend.h"

namespace densenet_ext::cuda {
namespace {

// Maps of the size that a 3x3 max pool of stride 2 and padding 1 makes of x.
template <class E, class F>
Maps<E> pooled_rows(const char* name, const Tensor& t, const Maps<F>& x) {
  check_shape(name, t, {x.samples, x.channels, ceil_div(x.height, 2), ceil_div(x.width, 2)});
  return rows<E>(name, t, false);
}

void stem_forward_cuda(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                       double eps, bool use_given, const Tensor& batch_mean,
                       const Tensor& batch_var, const Tensor& out) {
  DeviceContext context(x);
  dispatch_storage("x", x, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto in = rows<const S>("x", x, false);
    stem_forward<S>(
        {in, pointer<const T>("norm_weight", norm_weight, {in.channels}),
         pointer<const T>("norm_bias", norm_bias, {in.channels}), eps, use_given,
         pointer<T>("batch_mean", batch_mean, {in.channels}),
         pointer<T>("batch_var", batch_var, {in.channels}), pooled_rows<S>("out", out, in)},
        context);
  });
}

void stem_backward_cuda(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                        const Tensor& batch_mean, const Tensor& batch_var, double eps,
                        bool training, const Tensor& grad_out, const std::optional<Tensor>& dx,
                        const Tensor& dnorm_weight, const Tensor& dnorm_bias) {
  DeviceContext context(x);
  dispatch_storage("x", x, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto in = rows<const S>("x", x, false);
    if (dx.has_value()) check_shape("dx", *dx, sizes_of(x));
    stem_backward<S>({in, pointer<const T>("norm_bias", norm_bias, {in.channels}),
                      norm<T>(norm_weight, batch_mean, batch_var, eps, training, in.channels),
                      pooled_rows<const S>("grad_out", grad_out, in),
                      dx.has_value() ? rows<S>("dx", *dx, false) : Maps<S>{},
                      pointer<T>("dnorm_weight", dnorm_weight, {in.channels}),
                      pointer<T>("dnorm_bias", dnorm_bias, {in.channels})},
                     context);
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("stem_forward", TORCH_BOX(&densenet_ext::cuda::stem_forward_cuda));
  m.impl("stem_backward", TORCH_BOX(&densenet_ext::cuda::stem_backward_cuda));
}
