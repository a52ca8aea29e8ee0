#include "backend.h"

namespace densenet_ext {
namespace {

// Maps of the size that a 3x3 max pool of stride 2 and padding 1 makes of x.
template <class E, class F>
Maps<E> pooled_maps(const char* name, const Tensor& t, const Maps<F>& x) {
  check_shape(name, t, {x.samples, x.channels, ceil_div(x.height, 2), ceil_div(x.width, 2)});
  return maps<E>(name, t);
}

void stem_forward_cpu(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                      double eps, bool use_given, const Tensor& batch_mean, const Tensor& batch_var,
                      const Tensor& out) {
  dispatch_storage("x", x, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto in = channels_last_maps<const S>("x", x);
    const Sizes sizes = {in.channels};
    kernels.stem_forward({in, pointer<const T>("norm_weight", norm_weight, sizes),
                          pointer<const T>("norm_bias", norm_bias, sizes), eps, use_given,
                          pointer<T>("batch_mean", batch_mean, sizes),
                          pointer<T>("batch_var", batch_var, sizes),
                          pooled_maps<S>("out", out, in)});
  });
}

void stem_backward_cpu(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                       const Tensor& batch_mean, const Tensor& batch_var, double eps, bool training,
                       const Tensor& grad_out, const std::optional<Tensor>& dx,
                       const Tensor& dnorm_weight, const Tensor& dnorm_bias) {
  dispatch_storage("x", x, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto in = channels_last_maps<const S>("x", x);
    const Sizes sizes = {in.channels};
    if (dx.has_value()) check_shape("dx", *dx, sizes_of(x));
    kernels.stem_backward({in, pointer<const T>("norm_bias", norm_bias, sizes),
                           norm<T>(norm_weight, batch_mean, batch_var, eps, training, in.channels),
                           pooled_maps<const S>("grad_out", grad_out, in),
                           dx.has_value() ? channels_last_maps<S>("dx", *dx) : Maps<S>{},
                           pointer<T>("dnorm_weight", dnorm_weight, sizes),
                           pointer<T>("dnorm_bias", dnorm_bias, sizes)});
  });
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("stem_forward", TORCH_BOX(&densenet_ext::stem_forward_cpu));
  m.impl("stem_backward", TORCH_BOX(&densenet_ext::stem_backward_cpu));
}
