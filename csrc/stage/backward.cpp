#include "backward.h"

#include <tuple>

namespace densenet_ext {

Tensors new_gradients(const Tensors& params) {
  Tensors gradients;
  gradients.reserve(params.size());
  for (const Tensor& p : params) gradients.push_back(empty(p, sizes_of(p), p.scalar_type()));
  return gradients;
}

Tensor identity_coefficients(const Stage& stage, const Tensor& like) {
  Tensor coef = empty(like, {3, stage.samples, stage.channels}, stage.arithmetic);
  torch::stable::zero_(coef);
  Tensor ones = piece(coef, 0, {stage.samples, stage.channels});
  torch::stable::fill_(ones, 1.0);
  return coef;
}

void run_layers_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks,
                         Tensor source, Optional grad_in, const BufferGradient& gradient,
                         const Tensors& dparams) {
  const auto& [grad, coef] = gradient;
  const int64_t group = stage.options.group;
  const bool allow_tf32 = stage.options.allow_tf32;
  const Sizes sizes = stage.bottleneck_sizes();
  const Tensor shared = stage.keeps(0) ? bottlenecks : workspace(features, sizes, stage.storage);
  const Tensor dv = workspace(features, sizes, gradient_type(features, stage.storage));
  const Tensor db_affine = empty(features, {3, stage.bottleneck_width}, stage.arithmetic),
               db_coef = piece(db_affine, 0, {3, 1, stage.bottleneck_width});

  const auto fold_first = [&](const Layer& layer) {
    return stage.fold_again(layer.norm1, layer.pre_norm, layer.pre_conv1);
  };
  const auto compute_again = [&](const Layer& layer, const FoldedNorm& folded) {
    call("densenet_ext::bottleneck_forward", features, folded.scale, folded.shift, layer.conv1,
         shared, Optional(), Optional(), allow_tf32);
  };
  Layer layer = stage.layer(stage.layers - 1);
  FoldedNorm folded1 = fold_first(layer);
  if (!stage.keeps(stage.layers - 1)) compute_again(layer, folded1);
  for (int64_t l = stage.layers - 1; l >= 0; --l) {
    const Tensor* const d = stage.of_layer(dparams, l);
    const FoldedNorm folded2 = stage.fold_again(layer.norm2, std::nullopt, layer.pre_conv2);
    const Tensor bottleneck = stage.keeps(l) ? stage.bottleneck(bottlenecks, l) : shared;
    if (const auto& se = layer.se) {
      call("densenet_ext::squeeze_excite_backward", features, source, layer.channels,
           se->fc1_weight, se->fc2_weight, se->pooled, se->hidden, se->gate, coef, d[kFc1Weight],
           d[kFc1Bias], d[kFc2Weight], d[kFc2Bias]);
    }
    // The gradient of what conv2 returned, as coefficients of the masked values.
    if (layer.post_conv2) scale_channels(coef, 2, layer.channels, *layer.post_conv2);
    call("densenet_ext::conv3x3_backward", bottleneck, folded2.scale, folded2.shift,
         layer.pre_conv2, layer.conv2, layer.dropout, stage.options.dropout_scale, features, source,
         coef, layer.channels, layer.norm2.weight, layer.norm2.mean, layer.norm2.var,
         layer.norm2.eps, layer.norm2.is_local(), dv, d[kConv2Weight], d[kNorm2Weight],
         d[kNorm2Bias], db_affine, allow_tf32);
    finish_norm_backward(layer.norm2, d[kNorm2Weight], d[kNorm2Bias], std::nullopt, group, db_coef);

    // The previous layer's bottleneck takes the place of this one's, unless one of them is kept.
    std::optional<Layer> previous;
    FoldedNorm previous_folded;
    Optional scale, shift, weight;
    if (l > 0) {
      previous = stage.layer(l - 1);
      previous_folded = fold_first(*previous);
      if (!stage.keeps(l)) {
        scale = previous_folded.scale;
        shift = previous_folded.shift;
        weight = previous->conv1;
      }
    }
    call("densenet_ext::bottleneck_backward", features, folded1.scale, folded1.shift,
         layer.pre_norm, layer.pre_conv1, layer.conv1, dv, bottleneck, db_affine,
         layer.norm1.weight, layer.norm1.mean, layer.norm1.var, layer.norm1.eps,
         layer.norm1.is_local(), grad_in, grad, coef, d[kConv1Weight], d[kNorm1Weight],
         d[kNorm1Bias], scale, shift, weight, allow_tf32);
    finish_norm_backward(layer.norm1, d[kNorm1Weight], d[kNorm1Bias], layer.pre_norm, group, coef);
    source = grad;
    grad_in = grad;
    if (previous) {
      layer = *previous;
      folded1 = previous_folded;
      if (stage.keeps(l) && !stage.keeps(l - 1)) compute_again(layer, folded1);
    }
  }
}

namespace {

// The gradient of the output of a block without tail, in the layout and type of a gradient buffer.
Tensor start_gradient(const Stage& stage, const Tensor& features, const Tensor& grad_output) {
  if (!is_channels_last(features))
    return torch::stable::to(torch::stable::contiguous(grad_output), stage.arithmetic);
  Tensor copy = feature_buffer(features, stage.maps(stage.channels), stage.storage);
  torch::stable::copy_(copy, grad_output);
  return copy;
}

// An uninitialized dx, which is empty if no gradient is wanted. leaving: tensors that the stage
// frees when it returns.
Tensor new_input_gradient(const Stage& stage, const Tensor& features, int64_t layout,
                          const Tensors& leaving) {
  STD_TORCH_CHECK(layout >= kNoGradient && layout <= kChannelsLast,
                  "dx_layout must be 0, 1 or 2, got ", layout);
  if (layout == kNoGradient) return empty(features, {0}, stage.storage);
  const Sizes sizes = stage.maps(stage.in_channels);
  return layout == kChannelsLast ? channels_last_workspace(features, sizes, stage.storage)
                                 : gradient_maps(features, sizes, stage.storage, leaving);
}

// Backward of the tail: starts the gradient of the feature buffer, and writes the gradients `d` of
// the tail's parameters. Both lists are ordered as TailParam.
BufferGradient run_tail_backward(const Tensor& grad_output, const Tensor& features,
                                 const NormSite& site, const Options& options, const Tensor* params,
                                 const Tensor* d) {
  const ScalarType storage = features.scalar_type();
  const BufferGradient gradient = {
      feature_buffer(features, sizes_of(features), gradient_type(features, storage)),
      empty(features, {3, features.size(0), features.size(1)}, arithmetic_type(storage))};
  if (options.tail == kTransition) {
    call("densenet_ext::transition_backward", features, site.folded.scale, site.folded.shift,
         params[kTailConvWeight], site.weight, site.mean, site.var, site.eps, site.is_local(),
         readable(grad_output), gradient.grad, gradient.coef, d[kTailConvWeight],
         d[kTailNormWeight], d[kTailNormBias], options.allow_tf32);
  } else {
    call("densenet_ext::head_backward", features, site.folded.scale, site.folded.shift, site.weight,
         site.mean, site.var, site.eps, site.is_local(), torch::stable::contiguous(grad_output),
         gradient.grad, gradient.coef, d[kTailNormWeight], d[kTailNormBias]);
  }
  finish_norm_backward(site, d[kTailNormWeight], d[kTailNormBias], std::nullopt, options.group,
                       gradient.coef);
  return gradient;
}

// Backward of the layers: writes the gradients of their parameters into dparams, returns dx.
Tensor run_block_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks,
                          const Tensor& source, const BufferGradient& gradient, int64_t dx_layout,
                          const Tensors& dparams) {
  run_layers_backward(stage, features, bottlenecks, source, source, gradient, dparams);
  const Tensor dx =
      new_input_gradient(stage, features, dx_layout, {features, gradient.grad, bottlenecks});
  if (dx_layout != kNoGradient)
    call("densenet_ext::finish_gradient", features, gradient.grad, gradient.coef, int64_t{0}, dx);
  return dx;
}

// Gives the stage the tensors that forward kept for backward, and checks them.
void restore(Stage& stage, const Tensor& features, const Tensor& stats, const Tensor& gates,
             const Tensor& bottlenecks) {
  check_shape("features", features, stage.maps(stage.channels));
  stage.restore(stats, gates, bottlenecks);
}

std::tuple<Tensor, Tensor, Tensors> dense_tail_backward(const Tensor& grad_output,
                                                        const Tensor& features,
                                                        const Tensors& params, const Tensor& stats,
                                                        double eps, bool frozen,
                                                        std::vector<int64_t> options_list) {
  const Options options = read_options(options_list);
  check_spatial("features", features);
  STD_TORCH_CHECK(options.tail != kNone, "tail must be 1 or 2, got 0");
  STD_TORCH_CHECK(params.size() == options.tail_params(), "params must hold ",
                  options.tail_params(), " tensors, got ", params.size());
  const int64_t channels = features.size(1), columns = channels + options.has_group();
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 4 && stats.size(1) >= columns,
                  "stats must have shape [4, >= ", columns, "], got ", describe(stats.sizes()));
  check_contiguous("stats", stats);
  // The tail's norm is the stage's last.
  const NormSite site = norm_site(stats, stats.size(1) - columns, params[kTailNormWeight],
                                  params[kTailNormBias], eps, frozen, options.group);
  const Tensors dparams = new_gradients(params);
  const BufferGradient gradient =
      run_tail_backward(grad_output, features, site, options, params.data(), dparams.data());
  return {gradient.grad, gradient.coef, dparams};
}

Tensor dense_block_backward(const Tensor& grad, const Tensor& coef, const Tensors& dparams,
                            const Tensor& features, const Tensors& params, const Tensors& masks,
                            const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks,
                            std::vector<double> eps, std::vector<int64_t> frozen,
                            double dropout_scale, std::vector<int64_t> options_list,
                            int64_t in_channels, int64_t dx_layout) {
  const Options options =
      read_options(options_list, std::move(eps), std::move(frozen), dropout_scale);
  Stage stage(params, masks, options, features, in_channels, false);
  restore(stage, features, stats, gates, bottlenecks);
  STD_TORCH_CHECK(dparams.size() == params.size(), "dparams must hold ", params.size(),
                  " tensors, got ", dparams.size());
  return run_block_backward(stage, features, bottlenecks, grad, {grad, coef}, dx_layout, dparams);
}

std::tuple<Tensor, Tensors> dense_stage_backward(const Tensor& grad_output, const Tensor& features,
                                                 const Tensors& params, const Tensors& masks,
                                                 const Tensor& stats, const Tensor& gates,
                                                 const Tensor& bottlenecks, std::vector<double> eps,
                                                 std::vector<int64_t> frozen, double dropout_scale,
                                                 std::vector<int64_t> options_list,
                                                 int64_t in_channels, int64_t dx_layout) {
  const Options options =
      read_options(options_list, std::move(eps), std::move(frozen), dropout_scale);
  Stage stage(params, masks, options, features, in_channels);
  restore(stage, features, stats, gates, bottlenecks);
  const Tensors dparams = new_gradients(params);
  BufferGradient gradient;
  Tensor source;
  if (options.tail == kNone) {
    check_shape("grad", grad_output, sizes_of(features));
    gradient = {
        feature_buffer(features, sizes_of(features), gradient_type(features, stage.storage)),
        identity_coefficients(stage, features)};
    source = start_gradient(stage, features, grad_output);
  } else {
    gradient = run_tail_backward(grad_output, features, stage.tail_norm(), options,
                                 stage.of_tail(params), stage.of_tail(dparams));
    source = gradient.grad;
  }
  const Tensor dx =
      run_block_backward(stage, features, bottlenecks, source, gradient, dx_layout, dparams);
  return {dx, dparams};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
  m.impl("new_gradients", TORCH_BOX(&densenet_ext::new_gradients));
  m.impl("dense_tail_backward", TORCH_BOX(&densenet_ext::dense_tail_backward));
  m.impl("dense_block_backward", TORCH_BOX(&densenet_ext::dense_block_backward));
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
  m.impl("new_gradients", TORCH_BOX(&densenet_ext::new_gradients));
  m.impl("dense_tail_backward", TORCH_BOX(&densenet_ext::dense_tail_backward));
  m.impl("dense_block_backward", TORCH_BOX(&densenet_ext::dense_block_backward));
}
