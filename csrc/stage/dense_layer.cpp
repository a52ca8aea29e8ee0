// One dense layer alone (Pleiss et al. 2017, on the kernels of the stage): its inputs are gathered
// in a buffer that is not kept, but made again in backward.
#include <tuple>

#include "layers.h"

namespace densenet_ext {
namespace {

struct Inputs {
  int64_t channels = 0;

  explicit Inputs(const Tensors& inputs) {
    STD_TORCH_CHECK(!inputs.empty(), "inputs must hold at least one tensor");
    const Tensor& first = inputs[0];
    for (const Tensor& x : inputs) {
      STD_TORCH_CHECK(x.dim() == 4, "inputs must have 4 dimensions, got ", x.dim());
      check_type("inputs", x, first.scalar_type());
      check_shape("inputs", x, {first.size(0), x.size(1), first.size(2), first.size(3)});
      channels += x.size(1);
    }
  }
};

void append_all(const Tensors& inputs, const Tensor& features,
                const std::optional<Moments>& moments) {
  int64_t offset = 0;
  for (const Tensor& x : inputs) {
    append(x, features, offset, moments);
    offset += x.size(1);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_layer(
    const Tensors& inputs, const Tensors& params, const Tensors& masks, const Tensors& frozen_stats,
    int64_t mask_kind, double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen,
    bool squeeze_excite, bool keep_bottleneck, bool allow_tf32, int64_t group) {
  const Inputs checked(inputs);
  const Tensor& first = inputs[0];
  const Options options = {mask_kind,         dropout_scale,  std::move(eps),
                           std::move(frozen), squeeze_excite, kNone,
                           keep_bottleneck,   allow_tf32,     group};
  Stage stage(params, masks, options, first.size(0), checked.channels, first.size(2), first.size(3),
              first.scalar_type());
  STD_TORCH_CHECK(stage.layers == 1, "params must hold one layer, got ", stage.layers);
  start_statistics(stage, first, frozen_stats);

  const Tensor features = feature_buffer(first, stage.samples, stage.channels, stage.height,
                                         stage.width, stage.storage);
  const std::optional<Moments> moments = new_moments(stage, first);
  append_all(inputs, features, moments);
  const Tensor kept = run_layers(stage, features, moments);
  const Tensor output =
      output_maps(first, stage.samples, stage.growth, stage.height, stage.width, stage.storage);
  Tensor view_of_features = features;
  torch::stable::copy_(const_cast<Tensor&>(output),
                       torch::stable::narrow(view_of_features, 1, checked.channels, stage.growth));
  return {output, stage.stats, stage.gates, kept};
}

std::tuple<Tensors, Tensors> dense_layer_backward(
    const Tensor& grad_output, const Tensor& output, const Tensors& inputs, const Tensors& params,
    const Tensors& masks, const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks,
    int64_t mask_kind, double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen,
    bool squeeze_excite, bool allow_tf32, int64_t group) {
  const Inputs checked(inputs);
  const Tensor& first = inputs[0];
  const Options options = {mask_kind,      dropout_scale, std::move(eps),         std::move(frozen),
                           squeeze_excite, kNone,         bottlenecks.dim() == 3, allow_tf32,
                           group};
  Stage stage(params, masks, options, first.size(0), checked.channels, first.size(2), first.size(3),
              first.scalar_type());
  STD_TORCH_CHECK(stage.layers == 1, "params must hold one layer, got ", stage.layers);
  check_shape("grad", grad_output, {stage.samples, stage.growth, stage.height, stage.width});
  stage.restore(stats, gates, bottlenecks);

  const Tensor features = feature_buffer(first, stage.samples, stage.channels, stage.height,
                                         stage.width, stage.storage);
  append_all(inputs, features, std::nullopt);
  append(output, features, checked.channels, std::nullopt);
  Tensor grad = feature_buffer(first, stage.samples, stage.channels, stage.height, stage.width,
                               gradient_type(first, stage.storage));
  Tensor own = torch::stable::narrow(grad, 1, checked.channels, stage.growth);
  torch::stable::copy_(own, grad_output);
  const Tensor coef = start_coefficients(stage, first);
  const Tensors dparams = new_gradients(params);
  run_layers_backward(stage, features, bottlenecks, grad, std::nullopt, grad, coef, dparams);

  Tensors dinputs;
  int64_t offset = 0;
  for (const Tensor& x : inputs) {
    dinputs.push_back(
        output_maps(x, stage.samples, x.size(1), stage.height, stage.width, stage.storage));
    call("densenet_ext::finish_gradient", features, grad, coef, offset, dinputs.back());
    offset += x.size(1);
  }
  return {dinputs, dparams};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_layer", TORCH_BOX(&densenet_ext::dense_layer));
  m.impl("dense_layer_backward", TORCH_BOX(&densenet_ext::dense_layer_backward));
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  m.impl("dense_layer", TORCH_BOX(&densenet_ext::dense_layer));
  m.impl("dense_layer_backward", TORCH_BOX(&densenet_ext::dense_layer_backward));
}
