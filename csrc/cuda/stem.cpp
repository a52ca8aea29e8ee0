#include "backend.h"

namespace densenet_ext::cuda {
namespace {

// Maps of the size that a 3x3 max pool of stride 2 and padding 1 makes of x.
template <class E, class F>
Rows<E> pooled_rows(const char* name, const Tensor& t, const Rows<F>& x) {
  check_shape(name, t, {x.samples, x.channels, ceil_div(x.height, 2), ceil_div(x.width, 2)});
  return rows<E>(name, t, false);
}

template <class T>
StemNorm<T> stem_norm(const Tensor& weight, const Tensor& bias, const Tensor& mean,
                      const Tensor& var, double eps, int64_t channels) {
  return {pointer<const T>("norm_weight", weight, {channels}),
          pointer<const T>("norm_bias", bias, {channels}),
          pointer<T>("batch_mean", mean, {channels}), pointer<T>("batch_var", var, {channels}),
          eps};
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
        {in, stem_norm<T>(norm_weight, norm_bias, batch_mean, batch_var, eps, in.channels),
         use_given, pooled_rows<S>("out", out, in)},
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
    stem_backward<S>(
        {in, stem_norm<T>(norm_weight, norm_bias, batch_mean, batch_var, eps, in.channels),
         training, pooled_rows<const S>("grad_out", grad_out, in),
         dx.has_value() ? rows<S>("dx", *dx, false) : Rows<S>{},
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
