// Chooses how a 3x3 convolution is computed. Narrow layers, and in forward also 16-bit layers with
// bottlenecks of up to 128 channels and up to 32 new ones, have kernels that need one pass over the
// bottleneck. All others call torch's convolution (on a GPU cuDNN's), with kernels for the steps
// around it. It gets packed channels-last tensors and never a slice of a buffer, because cuDNN's
// plans are cached without output strides.
#include <array>

#include "backend.h"
#include "stage/layout.h"

namespace densenet_ext::cuda {
namespace {

// Allocates channels-last maps without gaps.
Tensor packed_maps(const Tensor& like, int64_t samples, int64_t channels, int64_t height,
                   int64_t width, ScalarType type) {
  return channels_last_maps(like, {samples, channels, height, width}, channels, type);
}
// Copies maps that are not packed. This is rare: a library usually returns packed maps.
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
// Converts weights to the maps' type and layout, as a library wants them.
Tensor library_weight(const Tensor& weight, ScalarType type) {
  Tensor copy = packed_maps(weight, weight.size(0), weight.size(1), 3, 3, type);
  torch::stable::copy_(copy, weight);
  return copy;
}

// Points to the elements of a packed tensor.
template <class S>
S* elements(const char* name, const Tensor& t) {
  check_type(name, t, scalar_type_of<std::remove_const_t<S>>());
  return region(name, static_cast<S*>(t.data_ptr()), t.numel());
}

const std::vector<int64_t> kOne = {1, 1}, kNone = {0, 0};

// Convolves 3x3 with padding 1 and without a bias.
Tensor convolution(const Tensor& h, const Tensor& weight) {
  if (rehearses())
    return packed_maps(h, h.size(0), weight.size(0), h.size(2), h.size(3), h.scalar_type());
  std::array<StableIValue, 9> stack = {torch::stable::detail::from(h),
                                       torch::stable::detail::from(weight),
                                       torch::stable::detail::from(std::optional<Tensor>()),
                                       torch::stable::detail::from(kOne),
                                       torch::stable::detail::from(kOne),
                                       torch::stable::detail::from(kOne),
                                       torch::stable::detail::from(false),
                                       torch::stable::detail::from(kNone),
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
  if (rehearses())
    return {packed_maps(h, h.size(0), h.size(1), h.size(2), h.size(3), h.scalar_type()),
            empty(weight, sizes_of(weight), weight.scalar_type())};
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
  torch::stable::detail::to<Tensor>(stack[2]);  // undefined, but it has to be released
  return {packed(dh), dweight};
}

template <class S>
void forward_by_library(const Conv3x3Forward<S>& a, const Tensor& like, const Tensor& weight,
                        Context& context) {
  const Maps<S>& maps = a.features;
  if (maps.count() == 0) return;
  const ScalarType type = scalar_type_of<S>();
  const Tensor h = packed_maps(like, maps.samples, a.width, maps.height, maps.width, type);
  conv3x3_input<S>(a.bottleneck, a.scale_shift, maps.samples, maps.pixels(), a.width,
                   elements<S>("h", h), context);
  const Tensor y = convolution(h, library_weight(weight, type));
  conv3x3_output<S>(a, elements<const S>("y", y), context);
}

template <class S>
void backward_by_library(const Conv3x3Backward<S>& a, const Tensor& like, const Tensor& weight,
                         Context& context) {
  const Maps<const S>& maps = a.features;
  StridedMaps<const S> no_dw;
  no_dw.samples = a.growth, no_dw.channels = a.width, no_dw.height = 3, no_dw.width = 3;
  if (maps.count() == 0) return conv3x3_input_gradient<S>(a, nullptr, no_dw, context);
  const ScalarType type = scalar_type_of<S>();
  const Tensor dy = packed_maps(like, maps.samples, a.growth, maps.height, maps.width, type);
  const Tensor h = packed_maps(like, maps.samples, a.width, maps.height, maps.width, type);
  conv3x3_output_gradient<S>(a, elements<S>("dy", dy), context);
  conv3x3_input<S>(a.bottleneck, a.scale_shift, maps.samples, maps.pixels(), a.width,
                   elements<S>("h", h), context);
  const Gradients gradients = convolution_backward(dy, h, library_weight(weight, type));
  const auto dw = kernel_ops::Context<Cuda>::outer_maps<const S>("dw", gradients.weight);
  conv3x3_input_gradient<S>(a, elements<const S>("dh", gradients.h), dw, context);
}

}  // namespace
}  // namespace densenet_ext::cuda

namespace densenet_ext::kernel_ops {

template <class S>
void Context<cuda::Cuda>::run(const cuda::Conv3x3Forward<S>& a, const Tensor& weight) {
  if (cuda::conv3x3_forward_fits(a, *this)) {
    cuda::conv3x3_forward(a, *this);
  } else {
    cuda::forward_by_library(a, like_, weight, *this);
  }
  cuda::slice_moments<S>(a.features.read_only(), a.offset, a.growth, a.moments, *this);
}

template <class S>
void Context<cuda::Cuda>::run(const cuda::Conv3x3Backward<S>& a, const Tensor& weight) {
  if (cuda::conv3x3_backward_fits(a, *this)) {
    cuda::conv3x3_backward(a, *this);
  } else {
    cuda::backward_by_library(a, like_, weight, *this);
  }
}

#define DENSENET_EXT_INSTANTIATE(S)                                                         \
  template void Context<cuda::Cuda>::run<S>(const cuda::Conv3x3Forward<S>&, const Tensor&); \
  template void Context<cuda::Cuda>::run<S>(const cuda::Conv3x3Backward<S>&, const Tensor&);
DENSENET_EXT_INSTANTIATE(float)
DENSENET_EXT_INSTANTIATE(double)
DENSENET_EXT_INSTANTIATE(BFloat16)
DENSENET_EXT_INSTANTIATE(Float16)
#undef DENSENET_EXT_INSTANTIATE

}  // namespace densenet_ext::kernel_ops
