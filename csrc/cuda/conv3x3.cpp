// Narrow layers, and forward those of up to 128 and 32 channels in 16 bits, have kernels of their
// own, in one pass over the bottleneck. Others are a convolution of torch (on a GPU, of cuDNN),
// with kernels for what is around it: it gets packed channels-last tensors and never a slice of a
// buffer, because cuDNN's plans are cached without output strides.
#include <array>

#include "backend.h"
#include "stage/layout.h"

namespace densenet_ext::cuda {
namespace {

using Mask = std::optional<Tensor>;

// Maps without gaps, channels last.
Tensor packed_maps(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                   int64_t width, ScalarType type) {
  return channels_last_maps(like, samples, channels, height, width, channels, type);
}
// The same values like that; what a library returns usually is.
Tensor packed(const Tensor& maps) {
  const int64_t c = maps.size(1), h = maps.size(2), w = maps.size(3);
  const int64_t strides[4] = {h * w * c, 1, w * c, c};
  bool is_packed = true;
  for (int64_t d = 0; d < 4; ++d)
    is_packed = is_packed && (maps.size(d) == 1 || maps.stride(d) == strides[d]);
  if (is_packed) return maps;
  Tensor copy = packed_maps(maps, maps.size(0), c, h, w, maps.scalar_type());
  torch::stable::copy_(copy, maps);
  return copy;
}
// Weights in the maps' type and layout, as a library wants them.
Tensor library_weight(const Tensor& weight, ScalarType type) {
  Tensor copy = packed_maps(weight, weight.size(0), weight.size(1), 3, 3, type);
  torch::stable::copy_(copy, weight);
  return copy;
}

// The elements of a packed tensor.
template <class S>
S* elements(const char* name, const Tensor& t) {
  check_type(name, t, scalar_type_of<std::remove_const_t<S>>());
  return region(name, static_cast<S*>(t.data_ptr()), t.numel());
}

const std::vector<int64_t> kOne = {1, 1}, kNone = {0, 0};

// 3x3, padding 1, no bias.
Tensor convolution(const Tensor& h, const Tensor& weight) {
  std::array<StableIValue, 9> stack = {
      torch::stable::detail::from(h),         torch::stable::detail::from(weight),
      torch::stable::detail::from(Mask()),    torch::stable::detail::from(kOne),
      torch::stable::detail::from(kOne),      torch::stable::detail::from(kOne),
      torch::stable::detail::from(false),     torch::stable::detail::from(kNone),
      torch::stable::detail::from(int64_t{1})};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION) == 0,
      "aten::convolution failed");
  return packed(torch::stable::detail::to<Tensor>(stack[0]));
}
struct Gradients {
  Tensor h, weight;
};
Gradients convolution_backward(const Tensor& dy, const Tensor& h, const Tensor& weight) {
  const std::array<bool, 3> wanted = {true, true, false};
  std::array<StableIValue, 11> stack = {
      torch::stable::detail::from(dy),
      torch::stable::detail::from(h),
      torch::stable::detail::from(weight),
      torch::stable::detail::from(std::optional<std::vector<int64_t>>()),
      torch::stable::detail::from(kOne),
      torch::stable::detail::from(kOne),
      torch::stable::detail::from(kOne),
      torch::stable::detail::from(false),
      torch::stable::detail::from(kNone),
      torch::stable::detail::from(int64_t{1}),
      torch::stable::detail::from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted))};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION) == 0,
      "aten::convolution_backward failed");
  const Tensor dh = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor dweight = torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);  // undefined, but to be released
  return {packed(dh), dweight};
}

template <class S>
void forward_by_library(const Conv3x3Forward<S>& f, const Tensor& features, const Tensor& weight,
                        Context& context) {
  const Maps<S>& maps = f.features;
  if (maps.count() == 0) return;
  const Tensor h =
      packed_maps(features, maps.samples, f.width, maps.height, maps.width, features.scalar_type());
  conv3x3_input<S>(f.bottleneck, f.scale_shift, maps.samples, maps.pixels(), f.width,
                   elements<S>("h", h), context);
  const Tensor y = convolution(h, library_weight(weight, features.scalar_type()));
  conv3x3_output<S>(f, elements<const S>("y", y), context);
}

template <class S>
void backward_by_library(const Conv3x3Backward<S>& f, const Tensor& features, const Tensor& weight,
                         Context& context) {
  const Maps<const S>& maps = f.features;
  StridedMaps<const S> dw = {nullptr, f.growth, f.width, 3, 3};
  if (maps.count() == 0) return conv3x3_input_gradient<S>(f, nullptr, dw, context);
  const ScalarType type = features.scalar_type();
  const Tensor dy = packed_maps(features, maps.samples, f.growth, maps.height, maps.width, type);
  const Tensor h = packed_maps(features, maps.samples, f.width, maps.height, maps.width, type);
  conv3x3_output_gradient<S>(f, elements<S>("dy", dy), context);
  conv3x3_input<S>(f.bottleneck, f.scale_shift, maps.samples, maps.pixels(), f.width,
                   elements<S>("h", h), context);
  const Gradients gradients = convolution_backward(dy, h, library_weight(weight, type));
  conv3x3_input_gradient<S>(f, elements<const S>("dh", gradients.h),
                            strided<const S>("dw", gradients.weight), context);
}

void conv3x3_forward_cuda(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                          const Tensor& weight, const Mask& dropout_mask, double dropout_scale,
                          const Tensor& features, int64_t offset, const std::optional<Tensor>& mean,
                          const std::optional<Tensor>& m2, bool allow_tf32) {
  DeviceContext context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<S>("features", features);
    const int64_t growth = weight.size(0), width = weight.size(1);
    check_range("features", f, offset, growth);
    const Conv3x3Forward<S> arguments = {
        pointer<const S>("bottleneck", bottleneck, {f.count(), round_up(width, kLanes)}),
        norm_table<T>(scale, shift, f.samples, width),
        pointer<const T>("weight", weight, {growth, width, 3, 3}),
        growth,
        width,
        pointer<const bool>("dropout_mask", dropout_mask, {f.samples, growth, f.height, f.width}),
        dropout_scale,
        f,
        offset,
        moments<T>(mean, m2, f)};
    if (conv3x3_forward_fits(arguments, context)) {
      conv3x3_forward(arguments, context);
    } else {
      forward_by_library(arguments, features, weight, context);
    }
    slice_moments<S>(f.read_only(), offset, growth, arguments.moments, context);
  });
}

void conv3x3_backward_cuda(const Tensor& bottleneck, const Tensor& scale, const Tensor& shift,
                           const Mask& post_mask, const Tensor& weight, const Mask& dropout_mask,
                           double dropout_scale, const Tensor& features, const Tensor& grad,
                           const Tensor& coef, int64_t offset, const Tensor& norm_weight,
                           const Tensor& batch_mean, const Tensor& batch_var, double eps,
                           bool training, const Tensor& dv, const Tensor& dweight,
                           const Tensor& dnorm_weight, const Tensor& dnorm_bias,
                           const Tensor& table, bool allow_tf32) {
  DeviceContext context(features, allow_tf32);
  dispatch_storage("features", features, [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const auto f = rows<const S>("features", features);
    const int64_t growth = weight.size(0), width = weight.size(1), pitch = round_up(width, kLanes);
    check_range("features", f, offset, growth);
    const Conv3x3Backward<S> arguments = {
        pointer<const S>("bottleneck", bottleneck, {f.count(), pitch}),
        norm_table<T>(scale, shift, f.samples, width),
        per_channel<T>("post_mask", post_mask, f.samples, width),
        pointer<const T>("weight", weight, {growth, width, 3, 3}),
        growth,
        width,
        pointer<const bool>("dropout_mask", dropout_mask, {f.samples, growth, f.height, f.width}),
        dropout_scale,
        f,
        rows_like<const S>("grad", grad, f),
        coefficients<T>(coef, f),
        offset,
        norm<T>(norm_weight, batch_mean, batch_var, eps, training, width),
        pointer<S>("dv", dv, {f.count(), pitch}),
        pointer<T>("dweight", dweight, {growth, width, 3, 3}),
        pointer<T>("dnorm_weight", dnorm_weight, {width}),
        pointer<T>("dnorm_bias", dnorm_bias, {width}),
        pointer<T>("table", table, {3, width})};
    if (conv3x3_backward_fits(arguments, context)) {
      conv3x3_backward(arguments, context);
    } else {
      backward_by_library(arguments, features, weight, context);
    }
  });
}

}  // namespace
}  // namespace densenet_ext::cuda

DENSENET_EXT_CUDA_OPERATORS(m) {
  m.impl("conv3x3_forward", TORCH_BOX(&densenet_ext::cuda::conv3x3_forward_cuda));
  m.impl("conv3x3_backward", TORCH_BOX(&densenet_ext::cuda::conv3x3_backward_cuda));
}
