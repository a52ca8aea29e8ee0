#include "backend.h"

namespace densenet_ext::cuda {
namespace {

void bottleneck_forward_cuda(const Tensor& features, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const Tensor& bottleneck,
                             const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                             bool allow_tf32) {
  DeviceContext context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const int64_t width = weight.size(0), channels = weight.size(1);
    check_range("features", f, 0, channels);
    bottleneck_forward<S>(
        {f, norm_table<T>(scale, shift, f.samples, channels),
         matrix<const T>("weight", weight, width, channels), channels, width,
         pointer<S>("bottleneck", bottleneck, {f.count(), round_up(width, kLanes)}),
         pointer<T>("mean", mean, {1, width}), pointer<T>("m2", m2, {1, width})},
        context);
  });
}

void bottleneck_backward_cuda(const Tensor& features, const Tensor& scale, const Tensor& shift,
                              const std::optional<Tensor>& pre_mask,
                              const std::optional<Tensor>& post_mask, const Tensor& weight,
                              const Tensor& dv, const Tensor& bottleneck, const Tensor& table,
                              const Tensor& norm_weight, const Tensor& batch_mean,
                              const Tensor& batch_var, double eps, bool training,
                              const std::optional<Tensor>& grad_in, const Tensor& grad,
                              const Tensor& coef, const Tensor& dweight, const Tensor& dnorm_weight,
                              const Tensor& dnorm_bias, const std::optional<Tensor>& earlier_scale,
                              const std::optional<Tensor>& earlier_shift,
                              const std::optional<Tensor>& earlier_weight, bool allow_tf32) {
  DeviceContext context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const int64_t width = weight.size(0), channels = weight.size(1),
                  pitch = round_up(width, kLanes);
    check_range("features", f, 0, channels);
    STD_TORCH_CHECK(!earlier_weight || (earlier_scale && earlier_shift),
                    "earlier_weight is given without earlier_scale or earlier_shift");
    BottleneckBackward<S> a = {
        f,
        norm_table<T>(scale, shift, f.samples, channels),
        per_channel<T>("pre_mask", pre_mask, f.samples, channels),
        per_channel<T>("post_mask", post_mask, f.samples, channels),
        matrix<const T>("weight", weight, width, channels),
        channels,
        width,
        pointer<const S>("dv", dv, {f.count(), pitch}),
        pointer<S>("bottleneck", bottleneck, {f.count(), pitch}),
        pointer<const T>("table", table, {3, width}),
        norm<T>(norm_weight, batch_mean, batch_var, eps, training, channels),
        grad_in.has_value() ? rows_like<const S>("grad_in", *grad_in, f) : Maps<const S>{},
        rows_like<S>("grad", grad, f),
        coefficients<T>(coef, f),
        matrix<T>("dweight", dweight, width, channels),
        pointer<T>("dnorm_weight", dnorm_weight, {channels}),
        pointer<T>("dnorm_bias", dnorm_bias, {channels}),
        {}};
    if (earlier_weight.has_value()) {
      const int64_t c = earlier_weight->size(1);
      check_range("features", f, 0, c);
      a.previous = {f,
                    norm_table<T>(*earlier_scale, *earlier_shift, f.samples, c),
                    matrix<const T>("earlier_weight", *earlier_weight, width, c),
                    c,
                    width,
                    a.bottleneck,
                    nullptr,
                    nullptr};
    }
    bottleneck_backward<S>(a, context);
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("bottleneck_forward", TORCH_BOX(&densenet_ext::cuda::bottleneck_forward_cuda));
  m.impl("bottleneck_backward", TORCH_BOX(&densenet_ext::cuda::bottleneck_backward_cuda));
}
