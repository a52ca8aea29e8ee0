#include "backend.h"

namespace densenet_ext {
namespace {

void conv3x3_forward_cpu(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                         const Tensor& weight, const std::optional<Tensor>& dropout_mask,
                         double dropout_scale, const Tensor& features, int64_t offset,
                         const std::optional<Tensor>& mean, const std::optional<Tensor>& m2,
                         bool /*allow_tf32*/) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<S>("features", features);
    const int64_t growth = weight.size(0), width = weight.size(1);
    check_range("features", f, offset, growth);
    kernels.conv3x3_forward(
        {pointer<S>("bottleneck", bottleneck, {rows_of(f), round_up(width, kLanes)}),
         norm_table<T>(scale, shift, f.samples, width),
         pointer<T>("weight", weight, {growth, width, 3, 3}), growth, width,
         pointer<bool>("dropout_mask", dropout_mask, {f.samples, growth, f.height, f.width}),
         dropout_scale, f, offset, moments<T>(mean, m2, f)});
  });
}

void conv3x3_backward_cpu(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                          const std::optional<Tensor>& post_mask, const Tensor& weight,
                          const std::optional<Tensor>& dropout_mask, double dropout_scale,
                          const Tensor& features, const Tensor& grad, const Tensor& coef,
                          int64_t offset, const Tensor& norm_weight, const Tensor& batch_mean,
                          const Tensor& batch_var, double eps, bool training, const Tensor& dv,
                          const Tensor& dweight, const Tensor& dnorm_weight,
                          const Tensor& dnorm_bias, const Tensor& table, bool /*allow_tf32*/) {
  dispatch_storage("features", features, [&](auto storage, const auto& kernels) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = maps<const S>("features", features);
    const int64_t growth = weight.size(0), width = weight.size(1), pitch = round_up(width, kLanes);
    check_range("features", f, offset, growth);
    kernels.conv3x3_backward(
        {pointer<S>("bottleneck", bottleneck, {rows_of(f), pitch}),
         norm_table<T>(scale, shift, f.samples, width),
         per_channel<T>("post_mask", post_mask, f.samples, width),
         pointer<T>("weight", weight, {growth, width, 3, 3}), growth, width,
         pointer<bool>("dropout_mask", dropout_mask, {f.samples, growth, f.height, f.width}),
         dropout_scale, f, maps_like<const T>("grad", grad, f), coefficients<T>(coef, f), offset,
         norm<T>(norm_weight, batch_mean, batch_var, eps, training, width),
         pointer<T>("dv", dv, {rows_of(f), pitch}),
         pointer<T>("dweight", dweight, {growth, width, 3, 3}),
         pointer<T>("dnorm_weight", dnorm_weight, {width}),
         pointer<T>("dnorm_bias", dnorm_bias, {width}), pointer<T>("table", table, {3, width})});
  });
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&densenet_ext::conv3x3_forward_cpu));
  m.impl("conv3x3_backward", TORCH_BOX(&densenet_ext::conv3x3_backward_cpu));
}
