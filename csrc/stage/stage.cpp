#include "stage.h"

namespace densenet_ext {

Stage::Stage(const Tensors& params, const Tensors& masks, const Options& options, const Tensor& x,
             int64_t in_channels, bool has_tail_params)
    : params(params), masks(masks), options(options), in_channels(in_channels) {
  check_spatial("maps", x);
  samples = x.size(0);
  spatial = {x.size(2), x.size(3)};
  storage = x.scalar_type();
  arithmetic = arithmetic_type(storage);
  STD_TORCH_CHECK(is_storage_type(storage), "x must be float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(storage));

  const size_t each = options.layer_params(), tail = has_tail_params ? options.tail_params() : 0;
  STD_TORCH_CHECK(params.size() > tail && (params.size() - tail) % each == 0, "params must hold ",
                  each, " tensors a layer and ", tail, " of the tail, got ", params.size());
  layers = static_cast<int64_t>((params.size() - tail) / each);
  for (const Tensor& param : params) {
    check_type("params", param, arithmetic);
    check_contiguous("params", param);
    check_device("params", param, x);
  }
  STD_TORCH_CHECK(params[kConv1Weight].dim() == 4 && params[kConv2Weight].dim() == 4,
                  "conv1.weight and conv2.weight must have 4 dimensions");
  bottleneck_width = params[kConv1Weight].size(0);
  growth = params[kConv2Weight].size(0);
  channels = in_channels + layers * growth;
  if (options.squeeze_excite) se_width = params[kFc1Bias].numel();
  for (int64_t l = 0; l < layers; ++l) check_layer(l);
  if (has_tail_params) check_tail();

  norm_offsets_ = {0};
  const auto add_norm = [&](int64_t width) {
    norm_offsets_.push_back(norm_offsets_.back() + width);
  };
  for (int64_t l = 0; l < layers; ++l) {
    add_norm(layer_channels(l));
    add_norm(bottleneck_width);
  }
  if (options.tail != kNone) add_norm(channels);
  STD_TORCH_CHECK(static_cast<int64_t>(options.eps.size()) == norms() &&
                      static_cast<int64_t>(options.frozen.size()) == norms(),
                  "eps and frozen must have ", norms(), " entries, got ", options.eps.size(),
                  " and ", options.frozen.size());
  STD_TORCH_CHECK(options.kept_bottlenecks >= 0 && options.kept_bottlenecks <= layers,
                  "kept_bottlenecks must be at least 0 and at most ", layers, ", all layers, got ",
                  options.kept_bottlenecks);

  for (int64_t bit = kPreNorm; bit <= kPostConv2; bit *= 2)
    masks_per_layer_ += (options.mask_kind & bit) != 0;
  STD_TORCH_CHECK(static_cast<int64_t>(masks.size()) == layers * masks_per_layer_,
                  "masks must hold ", layers * masks_per_layer_, " tensors, got ", masks.size());
  for (int64_t l = 0; l < layers; ++l) check_masks(l);
}

void Stage::check_layer(int64_t l) const {
  const Tensor* const p = of_layer(params, l);
  const int64_t c = layer_channels(l), k2 = bottleneck_width;
  check_shape("norm1.weight", p[kNorm1Weight], {c});
  check_shape("norm1.bias", p[kNorm1Bias], {c});
  check_shape("conv1.weight", p[kConv1Weight], {k2, c, 1, 1});
  check_shape("norm2.weight", p[kNorm2Weight], {k2});
  check_shape("norm2.bias", p[kNorm2Bias], {k2});
  check_shape("conv2.weight", p[kConv2Weight], {growth, k2, 3, 3});
  if (!options.squeeze_excite) return;
  check_shape("se.fc1.weight", p[kFc1Weight], {se_width, growth, 1, 1});
  check_shape("se.fc1.bias", p[kFc1Bias], {se_width});
  check_shape("se.fc2.weight", p[kFc2Weight], {growth, se_width, 1, 1});
  check_shape("se.fc2.bias", p[kFc2Bias], {growth});
}

void Stage::check_tail() const {
  if (options.tail == kNone) return;
  const Tensor* const p = of_tail(params);
  check_shape("tail norm.weight", p[kTailNormWeight], {channels});
  check_shape("tail norm.bias", p[kTailNormBias], {channels});
  if (options.tail != kTransition) return;
  const Tensor& conv = p[kTailConvWeight];
  check_shape("tail conv.weight", conv, {conv.dim() > 0 ? conv.size(0) : 0, channels, 1, 1});
}

void Stage::check_masks(int64_t l) const {
  const Sizes shapes[] = {{samples, layer_channels(l)},
                          {samples, layer_channels(l)},
                          {samples, bottleneck_width},
                          maps(growth),
                          {samples, growth}};
  const Tensor* mask = masks.data() + l * masks_per_layer_;
  for (int i = 0; i < 5; ++i) {
    const int64_t kind = int64_t{1} << i;
    if (!(options.mask_kind & kind)) continue;
    check_shape("masks", *mask, shapes[i]);
    check_type("masks", *mask, kind == kDropout ? ScalarType::Bool : arithmetic);
    check_contiguous("masks", *mask);
    check_device("masks", *mask, params[0]);
    ++mask;
  }
}

Tensor Stage::bottleneck(const Tensor& bottlenecks, int64_t l) const {
  const Sizes sizes = bottleneck_sizes();
  return piece(bottlenecks, (l - layers + options.kept_bottlenecks) * sizes[0] * sizes[1], sizes);
}

Sizes Stage::bottlenecks_sizes() const {
  if (options.kept_bottlenecks == 0) return {0};
  const Sizes sizes = bottleneck_sizes();
  return {options.kept_bottlenecks, sizes[0], sizes[1]};
}

bool Stage::needs_moments() const {
  bool any = options.squeeze_excite;
  for (const int64_t frozen : options.frozen) any = any || !frozen;
  return any;
}

NormSite Stage::norm(int64_t i, const Tensor& weight, const Tensor& bias) const {
  return norm_site(stats, norm_offset(i), weight, bias, options.eps[i], options.frozen[i] != 0,
                   options.group);
}

NormSite Stage::tail_norm() const {
  const Tensor* const p = of_tail(params);
  return norm(2 * layers, p[kTailNormWeight], p[kTailNormBias]);
}

Layer Stage::layer(int64_t l) const {
  const Tensor* const p = of_layer(params, l);
  const Tensor* mask = masks.data() + l * masks_per_layer_;
  const auto take = [&](MaskKind kind) {
    return options.mask_kind & kind ? Optional(*mask++) : std::nullopt;
  };
  Layer layer;
  layer.norm1 = norm(2 * l, p[kNorm1Weight], p[kNorm1Bias]);
  layer.norm2 = norm(2 * l + 1, p[kNorm2Weight], p[kNorm2Bias]);
  layer.conv1 = p[kConv1Weight];
  layer.conv2 = p[kConv2Weight];
  layer.channels = layer_channels(l);
  layer.pre_norm = take(kPreNorm);
  layer.pre_conv1 = take(kPreConv1);
  layer.pre_conv2 = take(kPreConv2);
  layer.dropout = take(kDropout);
  layer.post_conv2 = take(kPostConv2);
  layer.se = squeeze_excitation(l);
  return layer;
}

std::optional<SqueezeExcitation> Stage::squeeze_excitation(int64_t l) const {
  if (!options.squeeze_excite) return std::nullopt;
  const Tensor* const p = of_layer(params, l);
  const int64_t pooled = l * gates.size(1), hidden = pooled + samples * growth,
                gate = hidden + samples * se_width;
  SqueezeExcitation se;
  se.fc1_weight = p[kFc1Weight];
  se.fc1_bias = p[kFc1Bias];
  se.fc2_weight = p[kFc2Weight];
  se.fc2_bias = p[kFc2Bias];
  se.pooled = piece(gates, pooled, {samples, growth});
  se.hidden = piece(gates, hidden, {samples, se_width});
  se.gate = piece(gates, gate, {samples, growth});
  return se;
}

void Stage::restore(const Tensor& forward_stats, const Tensor& forward_gates,
                    const Tensor& bottlenecks) {
  const auto check = [&](const char* name, const Tensor& t, const Sizes& sizes, ScalarType type) {
    check_shape(name, t, sizes);
    check_type(name, t, type);
    check_contiguous(name, t);
    check_device(name, t, params[0]);
  };
  check("stats", forward_stats, stats_sizes(), arithmetic);
  check("gates", forward_gates, gates_sizes(), arithmetic);
  if (options.kept_bottlenecks > 0) check("bottlenecks", bottlenecks, bottlenecks_sizes(), storage);
  stats = forward_stats;
  gates = forward_gates;
}

FoldedNorm Stage::run_fold(const NormSite& site, const Tensor& mean, const Tensor& m2,
                           int64_t values, const Optional& pre_mask, const Optional& post_mask,
                           bool has_statistics) const {
  const int64_t width = site.weight.numel();
  const FoldedNorm folded =
      pre_mask || post_mask ? FoldedNorm{empty(stats, {samples, width}, arithmetic),
                                         empty(stats, {post_mask ? samples : 1, width}, arithmetic)}
                            : site.folded;
  const auto run = [&](bool has_statistics) {
    call("densenet_ext::fold_norm", mean, m2, values, pre_mask, post_mask, site.weight, site.bias,
         site.eps, has_statistics, site.mean, site.var, folded.scale, folded.shift);
  };
  run(has_statistics);
  if (site.shared && !has_statistics) {
    call("densenet_ext::synchronize_statistics", site.mean, site.var, rows(), options.group,
         site.total_count);
    run(true);
  }
  return folded;
}

FoldedNorm Stage::fold(const NormSite& site, const Tensor& mean, const Tensor& m2, int64_t values,
                       const Optional& pre_mask, const Optional& post_mask) const {
  return run_fold(site, mean, m2, values, pre_mask, post_mask, site.frozen);
}

FoldedNorm Stage::fold_again(const NormSite& site, const Optional& pre_mask,
                             const Optional& post_mask) const {
  if (!pre_mask && !post_mask) return site.folded;
  return run_fold(site, stats, stats, 0, pre_mask, post_mask, true);
}

void scale_channels(const Tensor& t, int64_t dim, int64_t first, const Tensor& mask, int times) {
  Tensor whole = t;
  const Tensor channels = torch::stable::narrow(whole, dim, first, mask.size(1));
  Sizes sizes = sizes_of(mask);
  sizes.resize(sizes.size() + t.dim() - dim - 1, 1);
  for (int i = 0; i < times; ++i) multiply(channels, piece(mask, 0, sizes));
}

}  // namespace densenet_ext
