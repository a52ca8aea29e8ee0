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

// Uninitialized, without values where no gradient is wanted. leaving: what the stage still holds.
Tensor input_gradient(const Stage& stage, const Tensor& features, int64_t layout,
                      const Tensors& leaving) {
  if (layout == kNoGradient) return empty(features, {0}, stage.storage);
  return layout == kChannelsLast
             ? channels_last_workspace(features, stage.samples, stage.in_channels, stage.height,
                                       stage.width, stage.storage)
             : gradient_maps(features, stage.samples, stage.in_channels, stage.height, stage.width,
                             stage.storage, leaving);
}

// The gradients of a buffer's channels: grad [N, C, H, W], coef [3, N, C].
struct Gradient {
  Tensor grad, coef;
};

// Backward of the consumer: starts the gradient of the feature buffer, and writes those of the
// consumer's own parameters, `d` in the order of `params`: norm weight and bias, the transition's
// convolution. stats: of the whole stage.
Gradient tail_backward(const Tensor& grad_output, const Tensor& features, const Tensors& params,
                       const NormSite& site, const Tensor& stats, bool allow_tf32, int64_t group,
                       const Tensor* d) {
  const int64_t samples = features.size(0), channels = features.size(1);
  const Gradient made = {
      feature_buffer(features, samples, channels, features.size(2), features.size(3),
                     gradient_type(features, features.scalar_type())),
      empty(features, {3, samples, channels}, arithmetic_type(features.scalar_type()))};
  if (params.size() == 3) {
    call("densenet_ext::transition_backward", features, site.table.scale, site.table.shift,
         params[2], site.weight, site.mean, site.var, site.eps, site.local(), readable(grad_output),
         made.grad, made.coef, d[2], d[0], d[1], allow_tf32);
  } else {
    call("densenet_ext::head_backward", features, site.table.scale, site.table.shift, site.weight,
         site.mean, site.var, site.eps, site.local(), torch::stable::contiguous(grad_output),
         made.grad, made.coef, d[0], d[1]);
  }
  finish_norm_backward(site, stats, d[0], d[1], std::nullopt, group, made.coef);
  return made;
}

std::tuple<Tensor, Tensor, Tensors> dense_tail_backward(const Tensor& grad_output,
                                                        const Tensor& features,
                                                        const Tensors& params, const Tensor& stats,
                                                        double eps, bool frozen, bool allow_tf32,
                                                        int64_t group) {
  STD_TORCH_CHECK(features.dim() == 4, "features must have 4 dimensions, got ", features.dim());
  STD_TORCH_CHECK(params.size() == 2 || params.size() == 3,
                  "params must hold a norm's 2 tensors and at most a convolution's 1, got ",
                  params.size());
  const int64_t channels = features.size(1), shared = group >= 0;
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 4 && stats.size(1) >= channels + shared,
                  "stats must have shape [4, >= ", channels + shared, "], got ",
                  describe(stats.sizes()));
  check_contiguous("stats", stats);
  // The consumer's norm is the stage's last.
  const NormSite site =
      norm_site(stats, stats.size(1) - shared - channels, params[0], params[1], eps, frozen, group);
  const Tensors dparams = new_gradients(params);
  const Gradient made =
      tail_backward(grad_output, features, params, site, stats, allow_tf32, group, dparams.data());
  return {made.grad, made.coef, dparams};
}

Options backward_options(int64_t mask_kind, double dropout_scale, std::vector<double> eps,
                         std::vector<int64_t> frozen, bool squeeze_excite, int64_t tail,
                         const Tensor& bottlenecks, bool allow_tf32, int64_t group) {
  return {mask_kind,      dropout_scale, std::move(eps),         std::move(frozen),
          squeeze_excite, tail,          bottlenecks.dim() == 3, allow_tf32,
          group};
}

// The stage whose forward pass returned these.
Stage restored(const Tensor& features, const Tensors& params, const Tensors& masks,
               const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks,
               const Options& options, int64_t in_channels) {
  STD_TORCH_CHECK(features.dim() == 4, "features must have 4 dimensions, got ", features.dim());
  Stage stage(params, masks, options, features.size(0), in_channels, features.size(2),
              features.size(3), features.scalar_type());
  STD_TORCH_CHECK(features.size(1) == stage.channels, "features must have ", stage.channels,
                  " channels, got ", features.size(1));
  stage.restore(stats, gates, bottlenecks);
  return stage;
}

// The layers' part of a stage's backward: parameters' gradients into `dparams`, returns dx.
Tensor block_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks,
                      const Tensor& source, const Gradient& gradient, int64_t dx_layout,
                      const Tensors& dparams) {
  STD_TORCH_CHECK(dx_layout >= kNoGradient && dx_layout <= kChannelsLast,
                  "dx_layout must be 0, 1 or 2, got ", dx_layout);
  run_layers_backward(stage, features, bottlenecks, source, source, gradient.grad, gradient.coef,
                      dparams);
  const Tensor dx =
      input_gradient(stage, features, dx_layout, {features, gradient.grad, bottlenecks});
  if (dx_layout != kNoGradient)
    call("densenet_ext::finish_gradient", features, gradient.grad, gradient.coef, int64_t{0}, dx);
  return dx;
}

Tensor dense_block_backward(const Tensor& grad, const Tensor& coef, const Tensors& dparams,
                            const Tensor& features, const Tensors& params, const Tensors& masks,
                            const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks,
                            int64_t mask_kind, double dropout_scale, std::vector<double> eps,
                            std::vector<int64_t> frozen, bool squeeze_excite, int64_t tail,
                            int64_t in_channels, int64_t dx_layout, bool allow_tf32,
                            int64_t group) {
  const Options options =
      backward_options(mask_kind, dropout_scale, std::move(eps), std::move(frozen), squeeze_excite,
                       tail, bottlenecks, allow_tf32, group);
  const Stage stage =
      restored(features, params, masks, stats, gates, bottlenecks, options, in_channels);
  const auto wanted = static_cast<size_t>(stage.layers * stage.per_layer);
  STD_TORCH_CHECK(dparams.size() >= wanted, "dparams must hold ", wanted, " tensors, got ",
                  dparams.size());
  return block_backward(stage, features, bottlenecks, grad, {grad, coef}, dx_layout, dparams);
}

std::tuple<Tensor, Tensors> dense_stage_backward(
    const Tensor& grad_output, const Tensor& features, const Tensors& params, const Tensors& masks,
    const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks, int64_t mask_kind,
    double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen, bool squeeze_excite,
    int64_t tail, int64_t in_channels, int64_t dx_layout, bool allow_tf32, int64_t group) {
  const Options options =
      backward_options(mask_kind, dropout_scale, std::move(eps), std::move(frozen), squeeze_excite,
                       tail, bottlenecks, allow_tf32, group);
  const Stage stage =
      restored(features, params, masks, stats, gates, bottlenecks, options, in_channels);
  const Tensors dparams = new_gradients(params);
  Gradient gradient;
  Tensor source;
  if (tail == kNone) {
    check_shape("grad", grad_output, sizes_of(features));
    gradient = {feature_buffer(features, stage.samples, stage.channels, stage.height, stage.width,
                               gradient_type(features, stage.storage)),
                start_coefficients(stage, features)};
    source = start_gradient(stage, features, grad_output);
  } else {
    gradient = tail_backward(
        grad_output, features, {params.end() - stage.tail_params, params.end()}, stage.tail_norm(),
        stats, allow_tf32, group, dparams.data() + stage.layers * stage.per_layer);
    source = gradient.grad;
  }
  const Tensor dx =
      block_backward(stage, features, bottlenecks, source, gradient, dx_layout, dparams);
  return {dx, dparams};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
  m.impl("new_gradients", TORCH_BOX(&densenet_ext::new_gradients));
  m.impl("dense_tail_backward", TORCH_BOX(&densenet_ext::dense_tail_backward));
  m.impl("dense_block_backward", TORCH_BOX(&densenet_ext::dense_block_backward));
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
  m.impl("new_gradients", TORCH_BOX(&densenet_ext::new_gradients));
  m.impl("dense_tail_backward", TORCH_BOX(&densenet_ext::dense_tail_backward));
  m.impl("dense_block_backward", TORCH_BOX(&densenet_ext::dense_block_backward));
}
