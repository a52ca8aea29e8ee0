#include "forward.h"

#include <tuple>

namespace densenet_ext {

void start_statistics(Stage& stage, const Tensor& like, const Tensors& frozen_stats) {
  stage.stats = empty(like, stage.stats_sizes(), stage.arithmetic);
  stage.gates = empty(like, stage.gates_sizes(), stage.arithmetic);
  // An op must not return undefined values: where no scale and shift are kept there are zeros.
  if (stage.options.mask_kind != 0 || stage.options.has_group()) torch::stable::zero_(stage.stats);
  size_t used = 0;
  for (int64_t i = 0; i < stage.norms(); ++i) {
    if (!stage.options.frozen[i]) continue;
    STD_TORCH_CHECK(used + 2 <= frozen_stats.size(),
                    "frozen_stats must hold a mean and a variance for each frozen norm, got ",
                    frozen_stats.size(), " tensors");
    const int64_t width = stage.norm_width(i);
    for (int64_t row = 0; row < 2; ++row) {
      const Tensor& statistic = frozen_stats[used++];
      check_shape("frozen_stats", statistic, {width});
      Tensor copy = piece(stage.stats, row * stage.stats.size(1) + stage.norm_offset(i), {width});
      torch::stable::copy_(copy, statistic);
    }
  }
  STD_TORCH_CHECK(used == frozen_stats.size(), "frozen_stats must hold ", used, " tensors, got ",
                  frozen_stats.size());
}

std::optional<BufferMoments> new_moments(const Stage& stage, const Tensor& like) {
  if (!stage.needs_moments()) return std::nullopt;
  const Sizes sizes = {stage.samples, stage.channels};
  return BufferMoments{empty(like, sizes, stage.arithmetic), empty(like, sizes, stage.arithmetic)};
}

void append(const Tensor& x, const Tensor& features, int64_t offset,
            const std::optional<BufferMoments>& moments) {
  call("densenet_ext::append", appendable(x), features, offset,
       moments ? Optional(moments->mean) : std::nullopt,
       moments ? Optional(moments->m2) : std::nullopt);
}

Tensor run_layers(const Stage& stage, const Tensor& features,
                  const std::optional<BufferMoments>& moments) {
  const Tensor bottlenecks = workspace(features, stage.bottlenecks_sizes(), stage.storage);
  const Tensor shared =
      stage.keeps(0) ? bottlenecks : workspace(features, stage.bottleneck_sizes(), stage.storage);
  const Tensor mean2 = empty(features, {1, stage.bottleneck_width}, stage.arithmetic),
               m2_2 = empty(features, {1, stage.bottleneck_width}, stage.arithmetic);
  const Optional mean = moments ? Optional(moments->mean) : std::nullopt,
                 m2 = moments ? Optional(moments->m2) : std::nullopt;

  for (int64_t l = 0; l < stage.layers; ++l) {
    const Layer layer = stage.layer(l);
    const Tensor bottleneck = stage.keeps(l) ? stage.bottleneck(bottlenecks, l) : shared;
    const FoldedNorm folded1 =
        stage.fold(layer.norm1, mean.value_or(stage.stats), m2.value_or(stage.stats),
                   stage.pixels(), layer.pre_norm, layer.pre_conv1);
    const bool measure = !layer.norm2.frozen;
    call("densenet_ext::bottleneck_forward", features, folded1.scale, folded1.shift, layer.conv1,
         bottleneck, measure ? Optional(mean2) : std::nullopt,
         measure ? Optional(m2_2) : std::nullopt, stage.options.allow_tf32);
    const FoldedNorm folded2 =
        stage.fold(layer.norm2, mean2, m2_2, stage.rows(), std::nullopt, layer.pre_conv2);
    call("densenet_ext::conv3x3_forward", bottleneck, folded2.scale, folded2.shift, layer.conv2,
         layer.dropout, stage.options.dropout_scale, features, layer.channels, mean, m2,
         stage.options.allow_tf32);
    if (layer.post_conv2) {
      const Tensor& mask = *layer.post_conv2;
      scale_channels(features, 1, layer.channels, mask);
      if (mean) scale_channels(*mean, 1, layer.channels, mask);
      if (m2) scale_channels(*m2, 1, layer.channels, mask, 2);
    }
    if (const auto& se = layer.se) {
      call("densenet_ext::squeeze_excite_forward", features, layer.channels, *mean, *m2,
           se->fc1_weight, se->fc1_bias, se->fc2_weight, se->fc2_bias, se->pooled, se->hidden,
           se->gate);
    }
  }
  return bottlenecks;
}

namespace {

// Runs the transition or the head over a feature buffer; returns its output.
Tensor run_tail(const Stage& stage, const Tensor& features,
                const std::optional<BufferMoments>& moments) {
  const NormSite site = stage.tail_norm();
  const FoldedNorm folded =
      stage.fold(site, moments ? moments->mean : stage.stats, moments ? moments->m2 : stage.stats,
                 stage.pixels(), std::nullopt, std::nullopt);
  if (stage.options.tail == kHead) {
    const Tensor output = empty(features, {stage.samples, stage.channels}, stage.storage);
    call("densenet_ext::head_forward", features, folded.scale, folded.shift, output);
    return output;
  }
  const Tensor weight = stage.of_tail(stage.params)[kTailConvWeight];
  Sizes pooled = stage.spatial;
  for (int64_t& size : pooled) size /= 2;
  const Tensor output =
      stage_maps(features, maps_sizes(stage.samples, weight.size(0), pooled), stage.storage);
  call("densenet_ext::transition_forward", features, folded.scale, folded.shift, weight, output,
       stage.options.allow_tf32);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dense_stage(
    const Tensor& x, const Tensors& params, const Tensors& masks, const Tensors& frozen_stats,
    std::vector<double> eps, std::vector<int64_t> frozen, double dropout_scale,
    std::vector<int64_t> options_list) {
  const Options options =
      read_options(options_list, std::move(eps), std::move(frozen), dropout_scale);
  check_spatial("x", x);
  Stage stage(params, masks, options, x, x.size(1));
  start_statistics(stage, x, frozen_stats);

  const Sizes sizes = stage.maps(stage.channels);
  // Without a tail the buffer is the output, on CPU without gaps.
  const Tensor features = options.tail == kNone && !is_channels_last(x)
                              ? workspace(x, sizes, stage.storage)
                              : feature_buffer(x, sizes, stage.storage);
  const std::optional<BufferMoments> moments = new_moments(stage, x);
  append(x, features, 0, moments);
  const Tensor bottlenecks = run_layers(stage, features, moments);
  if (options.tail == kNone) {
    const Tensor no_buffer = empty(x, {0}, stage.storage);
    return {features, no_buffer, stage.stats, stage.gates, bottlenecks};
  }
  const Tensor output = run_tail(stage, features, moments);
  return {output, features, stage.stats, stage.gates, bottlenecks};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CUDA, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
}
