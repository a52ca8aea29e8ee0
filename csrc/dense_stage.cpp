// The stage: a dense block and what consumes it (transition, head or nothing), forward and
// backward. Written once for all devices, over the kernel operators of ops.cpp.
#include <tuple>

#include "layers.h"

namespace densenet_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dense_stage(
    const Tensor& x, const Tensors& params, const Tensors& masks, const Tensors& frozen_stats,
    int64_t mask_kind, double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen,
    bool squeeze_excite, int64_t tail, bool keep_bottleneck, bool allow_tf32, int64_t group) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions, got ", x.dim());
  const Options options = {mask_kind,         dropout_scale,  std::move(eps),
                           std::move(frozen), squeeze_excite, tail,
                           keep_bottleneck,   allow_tf32,     group};
  Stage stage(params, masks, options, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  start_statistics(stage, x, frozen_stats);

  const Sizes sizes = {stage.samples, stage.channels, stage.height, stage.width};
  // With no consumer the buffer is the output, on CPU without the gaps.
  const Tensor features =
      tail == kNone && !is_channels_last(x)
          ? workspace(x, sizes, stage.storage)
          : feature_buffer(x, sizes[0], sizes[1], sizes[2], sizes[3], stage.storage);
  const std::optional<Moments> moments = new_moments(stage, x);
  append(x, features, 0, moments);
  const Tensor kept = run_layers(stage, features, moments);
  if (tail == kNone)
    return {features, empty(x, {0}, stage.storage), stage.stats, stage.gates, kept};

  const NormSite site = stage.tail_norm();
  const Folded table =
      stage.fold(site, moments ? moments->mean : stage.stats, moments ? moments->m2 : stage.stats,
                 stage.pixels(), std::nullopt, std::nullopt, site.frozen);
  if (tail == kTransition) {
    const Tensor weight = stage.tail_param(2),
                 output = stage_maps(x, stage.samples, weight.size(0), stage.height / 2,
                                     stage.width / 2, stage.storage);
    call("densenet_ext::transition_forward", features, table.scale, table.shift, weight, output,
         allow_tf32);
    return {output, features, stage.stats, stage.gates, kept};
  }
  const Tensor output = empty(x, {stage.samples, stage.channels}, stage.storage);
  call("densenet_ext::head_forward", features, table.scale, table.shift, output);
  return {output, features, stage.stats, stage.gates, kept};
}

// The gradient of a block without consumer, in the layout and type of a gradient buffer.
Tensor start_gradient(const Stage& stage, const Tensor& features, const Tensor& grad_output) {
  if (!is_channels_last(features))
    return torch::stable::to(torch::stable::contiguous(grad_output), stage.arithmetic);
  Tensor copy = feature_buffer(features, stage.samples, stage.channels, stage.height, stage.width,
                               stage.storage);
  torch::stable::copy_(copy, grad_output);
  return copy;
}

// Uninitialized, without values where no gradient is wanted.
Tensor input_gradient(const Stage& stage, const Tensor& features, int64_t layout) {
  if (layout == kNoGradient) return empty(features, {0}, stage.storage);
  return layout == kChannelsLast
             ? channels_last_workspace(features, stage.samples, stage.in_channels, stage.height,
                                       stage.width, stage.storage)
             : output_maps(features, stage.samples, stage.in_channels, stage.height, stage.width,
                           stage.storage);
}

std::tuple<Tensor, Tensors> dense_stage_backward(
    const Tensor& grad_output, const Tensor& features, const Tensors& params, const Tensors& masks,
    const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks, int64_t mask_kind,
    double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen, bool squeeze_excite,
    int64_t tail, int64_t in_channels, int64_t dx_layout, bool allow_tf32, int64_t group) {
  STD_TORCH_CHECK(features.dim() == 4, "features must have 4 dimensions, got ", features.dim());
  STD_TORCH_CHECK(dx_layout >= kNoGradient && dx_layout <= kChannelsLast,
                  "dx_layout must be 0, 1 or 2, got ", dx_layout);
  const Options options = {mask_kind,      dropout_scale, std::move(eps),         std::move(frozen),
                           squeeze_excite, tail,          bottlenecks.dim() == 3, allow_tf32,
                           group};
  Stage stage(params, masks, options, features.size(0), in_channels, features.size(2),
              features.size(3), features.scalar_type());
  STD_TORCH_CHECK(features.size(1) == stage.channels, "features must have ", stage.channels,
                  " channels, got ", features.size(1));
  stage.restore(stats, gates, bottlenecks);

  Tensors dparams = empty_gradients(params);
  const Tensor grad = feature_buffer(features, stage.samples, stage.channels, stage.height,
                                     stage.width, gradient_type(features, stage.storage));
  Tensor coef, source = grad;
  if (tail == kNone) {
    check_shape("grad", grad_output, sizes_of(features));
    source = start_gradient(stage, features, grad_output);
    coef = start_coefficients(stage, features);
  } else {
    const Tensor incoming =
        tail == kHead ? torch::stable::contiguous(grad_output) : readable(grad_output);
    const NormSite site = stage.tail_norm();
    const Folded table = stage.fold_again(site, std::nullopt, std::nullopt);
    Tensor* const d = dparams.data() + stage.layers * stage.per_layer;
    coef = empty(features, {3, stage.samples, stage.channels}, stage.arithmetic);
    if (tail == kTransition) {
      call("densenet_ext::transition_backward", features, table.scale, table.shift,
           stage.tail_param(2), site.weight, site.mean, site.var, site.eps, site.local(), incoming,
           grad, coef, d[2], d[0], d[1], allow_tf32);
    } else {
      call("densenet_ext::head_backward", features, table.scale, table.shift, site.weight,
           site.mean, site.var, site.eps, site.local(), incoming, grad, coef, d[0], d[1]);
    }
    stage.finish_norm_backward(site, d[0], d[1], std::nullopt, coef);
  }
  run_layers_backward(stage, features, bottlenecks, source, source, grad, coef, dparams);

  const Tensor dx = input_gradient(stage, features, dx_layout);
  if (dx_layout != kNoGradient)
    call("densenet_ext::finish_gradient", features, grad, coef, int64_t{0}, dx);
  return {dx, dparams};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
}
