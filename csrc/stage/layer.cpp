// A single dense layer (Pleiss et al. 2017, with the kernels of the stage). Forward gathers the
// inputs in a buffer and frees it; backward gathers them again.
#include <tuple>

#include "backward.h"
#include "forward.h"

namespace densenet_ext {
namespace {

// Checks that the inputs can be concatenated; returns how many channels they have together.
int64_t check_inputs(const Tensors& inputs) {
  STD_TORCH_CHECK(!inputs.empty(), "inputs must hold at least one tensor");
  const Tensor& first = inputs[0];
  int64_t channels = 0;
  for (const Tensor& x : inputs) {
    check_spatial("inputs", x);
    check_type("inputs", x, first.scalar_type());
    check_device("inputs", x, first);
    check_shape("inputs", x, {first.size(0), x.size(1), first.size(2), first.size(3)});
    channels += x.size(1);
  }
  return channels;
}

void check_one_layer(const Stage& stage) {
  STD_TORCH_CHECK(stage.options.tail == kNone, "tail must be 0, got ", stage.options.tail);
  STD_TORCH_CHECK(stage.layers == 1, "params must hold one layer, got ", stage.layers);
}

void append_all(const Tensors& inputs, const Tensor& features,
                const std::optional<BufferMoments>& moments) {
  int64_t offset = 0;
  for (const Tensor& x : inputs) {
    append(x, features, offset, moments);
    offset += x.size(1);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_layer(
    const Tensors& inputs, const Tensors& params, const Tensors& masks, const Tensors& frozen_stats,
    std::vector<double> eps, std::vector<int64_t> frozen, double dropout_scale,
    std::vector<int64_t> options_list) {
  const Options options =
      read_options(options_list, std::move(eps), std::move(frozen), dropout_scale);
  const int64_t in_channels = check_inputs(inputs);
  const Tensor& first = inputs[0];
  Stage stage(params, masks, options, first, in_channels);
  check_one_layer(stage);
  start_statistics(stage, first, frozen_stats);

  Tensor features = feature_buffer(first, stage.maps(stage.channels), stage.storage);
  const std::optional<BufferMoments> moments = new_moments(stage, first);
  append_all(inputs, features, moments);
  const Tensor bottlenecks = run_layers(stage, features, moments);
  Tensor output = output_maps(first, stage.maps(stage.growth), stage.storage);
  torch::stable::copy_(output, torch::stable::narrow(features, 1, in_channels, stage.growth));
  return {output, stage.stats, stage.gates, bottlenecks};
}

std::tuple<Tensors, Tensors> dense_layer_backward(const Tensor& grad_output, const Tensor& output,
                                                  const Tensors& inputs, const Tensors& params,
                                                  const Tensors& masks, const Tensor& stats,
                                                  const Tensor& gates, const Tensor& bottlenecks,
                                                  std::vector<double> eps,
                                                  std::vector<int64_t> frozen, double dropout_scale,
                                                  std::vector<int64_t> options_list) {
  const Options options =
      read_options(options_list, std::move(eps), std::move(frozen), dropout_scale);
  const int64_t in_channels = check_inputs(inputs);
  const Tensor& first = inputs[0];
  Stage stage(params, masks, options, first, in_channels);
  check_one_layer(stage);
  check_shape("grad", grad_output, stage.maps(stage.growth));
  stage.restore(stats, gates, bottlenecks);

  const Sizes sizes = stage.maps(stage.channels);
  const Tensor features = feature_buffer(first, sizes, stage.storage);
  append_all(inputs, features, std::nullopt);
  append(output, features, in_channels, std::nullopt);
  BufferGradient gradient = {feature_buffer(first, sizes, gradient_type(first, stage.storage)),
                             identity_coefficients(stage, first)};
  Tensor slice = torch::stable::narrow(gradient.grad, 1, in_channels, stage.growth);
  torch::stable::copy_(slice, grad_output);
  const Tensors dparams = new_gradients(params);
  run_layers_backward(stage, features, bottlenecks, gradient.grad, std::nullopt, gradient, dparams);

  Tensors dinputs;
  int64_t offset = 0;
  for (const Tensor& x : inputs) {
    dinputs.push_back(output_maps(x, sizes_of(x), stage.storage));
    call("densenet_ext::finish_gradient", features, gradient.grad, gradient.coef, offset,
         dinputs.back());
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
