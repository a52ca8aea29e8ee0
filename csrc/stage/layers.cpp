#include "layers.h"

namespace densenet_ext {

void start_statistics(Stage& stage, const Tensor& like, const Tensors& frozen_stats) {
  stage.stats = empty(like, stage.stats_sizes(), stage.arithmetic);
  stage.gates = empty(like, stage.gates_sizes(), stage.arithmetic);
  // An op returns nothing undefined: what is not kept is zero.
  if (stage.options.mask_kind != 0 || stage.options.group >= 0) torch::stable::zero_(stage.stats);
  size_t next = 0;
  for (int64_t i = 0; i < stage.norms(); ++i) {
    if (!stage.options.frozen[i]) continue;
    STD_TORCH_CHECK(next + 2 <= frozen_stats.size(),
                    "frozen_stats must hold a mean and a variance for each frozen norm, got ",
                    frozen_stats.size(), " tensors");
    const int64_t width = stage.norm_width(i);
    for (int64_t row = 0; row < 2; ++row) {
      const Tensor& given = frozen_stats[next++];
      check_shape("frozen_stats", given, {width});
      Tensor own = piece(stage.stats, row * stage.stats.size(1) + stage.norm_offset(i), {width});
      torch::stable::copy_(own, given);
    }
  }
  STD_TORCH_CHECK(next == frozen_stats.size(), "frozen_stats must hold ", next, " tensors, got ",
                  frozen_stats.size());
}

static void run_bottleneck(const Stage& stage, const Layer& layer, const Tensor& features,
                           const Folded& table, const Tensor& out, const Optional& mean,
                           const Optional& m2) {
  call("densenet_ext::bottleneck_forward", features, table.scale, table.shift, layer.conv1, out,
       mean, m2, stage.options.allow_tf32);
}

Tensor run_layers(const Stage& stage, const Tensor& features,
                  const std::optional<Moments>& moments) {
  const Sizes rows = {stage.rows(), stage.bottleneck_pitch()};
  const bool keep = stage.options.keep_bottleneck;
  const Tensor kept = keep ? workspace(features, {stage.layers, rows[0], rows[1]}, stage.storage)
                           : empty(features, {0}, stage.storage);
  const Tensor shared = keep ? kept : workspace(features, rows, stage.storage);
  const Tensor mean2 = empty(features, {1, stage.bottleneck_width}, stage.arithmetic),
               m2_2 = empty(features, {1, stage.bottleneck_width}, stage.arithmetic);
  const Optional mean = moments ? Optional(moments->mean) : std::nullopt,
                 m2 = moments ? Optional(moments->m2) : std::nullopt;

  for (int64_t l = 0; l < stage.layers; ++l) {
    const Layer layer = stage.layer(l);
    const Tensor bottleneck = keep ? stage.bottleneck(kept, l) : shared;
    const Folded table1 =
        stage.fold(layer.norm1, mean.value_or(stage.stats), m2.value_or(stage.stats),
                   stage.pixels(), layer.pre_norm, layer.pre_conv1, layer.norm1.frozen);
    const bool measure = !layer.norm2.frozen;
    run_bottleneck(stage, layer, features, table1, bottleneck,
                   measure ? Optional(mean2) : std::nullopt,
                   measure ? Optional(m2_2) : std::nullopt);
    const Folded table2 = stage.fold(layer.norm2, mean2, m2_2, stage.rows(), std::nullopt,
                                     layer.pre_conv2, layer.norm2.frozen);
    call("densenet_ext::conv3x3_forward", bottleneck, table2.scale, table2.shift, layer.conv2,
         layer.dropout, stage.options.dropout_scale, features, layer.channels, mean, m2,
         stage.options.allow_tf32);
    if (const auto& se = layer.se) {
      call("densenet_ext::squeeze_excite_forward", features, layer.channels, *mean, *m2,
           se->fc1_weight, se->fc1_bias, se->fc2_weight, se->fc2_bias, se->pooled, se->hidden,
           se->gate);
    }
  }
  return kept;
}

std::optional<Moments> new_moments(const Stage& stage, const Tensor& like) {
  if (!stage.needs_moments()) return std::nullopt;
  const Sizes sizes = {stage.samples, stage.channels};
  return Moments{empty(like, sizes, stage.arithmetic), empty(like, sizes, stage.arithmetic)};
}

void append(const Tensor& x, const Tensor& features, int64_t offset,
            const std::optional<Moments>& moments) {
  call("densenet_ext::append", appendable(x), features, offset,
       moments ? Optional(moments->mean) : std::nullopt,
       moments ? Optional(moments->m2) : std::nullopt);
}

Tensors new_gradients(const Tensors& params) {
  Tensors gradients;
  gradients.reserve(params.size());
  for (const Tensor& p : params) gradients.push_back(empty(p, sizes_of(p), p.scalar_type()));
  return gradients;
}

void run_layers_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks,
                         Tensor source, Optional grad_in, const Tensor& grad, const Tensor& coef,
                         const Tensors& dparams) {
  const Sizes rows = {stage.rows(), stage.bottleneck_pitch()};
  const bool kept = bottlenecks.dim() == 3;
  const Tensor shared = kept ? bottlenecks : workspace(features, rows, stage.storage);
  const Tensor dv = workspace(features, rows, gradient_type(features, stage.storage));
  const Tensor db_table = empty(features, {3, stage.bottleneck_width}, stage.arithmetic),
               db_coef = piece(db_table, 0, {3, 1, stage.bottleneck_width});

  const auto fold_first = [&](const Layer& layer) {
    return stage.fold_again(layer.norm1, layer.pre_norm, layer.pre_conv1);
  };
  Layer layer = stage.layer(stage.layers - 1);
  Folded table1 = fold_first(layer);
  if (!kept) run_bottleneck(stage, layer, features, table1, shared, std::nullopt, std::nullopt);
  for (int64_t l = stage.layers - 1; l >= 0; --l) {
    const Tensor* const d = dparams.data() + l * stage.per_layer;
    const Folded table2 = stage.fold_again(layer.norm2, std::nullopt, layer.pre_conv2);
    const Tensor bottleneck = kept ? stage.bottleneck(bottlenecks, l) : shared;
    if (const auto& se = layer.se) {
      call("densenet_ext::squeeze_excite_backward", features, source, layer.channels,
           se->fc1_weight, se->fc2_weight, se->pooled, se->hidden, se->gate, coef, d[6], d[7], d[8],
           d[9]);
    }
    call("densenet_ext::conv3x3_backward", bottleneck, table2.scale, table2.shift, layer.pre_conv2,
         layer.conv2, layer.dropout, stage.options.dropout_scale, features, source, coef,
         layer.channels, layer.norm2.weight, layer.norm2.mean, layer.norm2.var, layer.norm2.eps,
         layer.norm2.local(), dv, d[5], d[3], d[4], db_table, stage.options.allow_tf32);
    stage.finish_norm_backward(layer.norm2, d[3], d[4], std::nullopt, db_coef);
    // Of the layer that comes next, whose bottleneck takes the place of this one's unless kept.
    std::optional<Layer> earlier;
    Folded table;
    Optional scale, shift, weight;
    if (l > 0) {
      earlier = stage.layer(l - 1);
      table = fold_first(*earlier);
      if (!kept) {
        scale = table.scale;
        shift = table.shift;
        weight = earlier->conv1;
      }
    }
    call("densenet_ext::bottleneck_backward", features, table1.scale, table1.shift, layer.pre_norm,
         layer.pre_conv1, layer.conv1, dv, bottleneck, db_table, layer.norm1.weight,
         layer.norm1.mean, layer.norm1.var, layer.norm1.eps, layer.norm1.local(), grad_in, grad,
         coef, d[2], d[0], d[1], scale, shift, weight, stage.options.allow_tf32);
    stage.finish_norm_backward(layer.norm1, d[0], d[1], layer.pre_norm, coef);
    source = grad;
    grad_in = grad;
    if (earlier) {
      layer = *earlier;
      table1 = table;
    }
  }
}

Tensor start_coefficients(const Stage& stage, const Tensor& like) {
  Tensor coef = empty(like, {3, stage.samples, stage.channels}, stage.arithmetic);
  torch::stable::zero_(coef);
  Tensor ones = piece(coef, 0, {stage.samples, stage.channels});
  torch::stable::fill_(ones, 1.0);
  return coef;
}

}  // namespace densenet_ext
