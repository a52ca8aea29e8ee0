// What a stage is made of: the flat lists of the operators as layers, norms and masks by name, all
// checked.
#pragma once

#include "layout.h"
#include "norm_site.h"

namespace densenet_ext {

enum Tail : int64_t { kNone = 0, kTransition = 1, kHead = 2 };
// Of the gradient of a stage's input: none, that of the backend's maps, or channels last, which on
// CPU fits an input that is so.
enum GradientLayout : int64_t { kNoGradient = 0, kOwnLayout = 1, kChannelsLast = 2 };
enum MaskKind : int64_t { kPreNorm = 1, kPreConv1 = 2, kPreConv2 = 4, kDropout = 8 };

struct Options {
  int64_t mask_kind;
  double dropout_scale;
  std::vector<double> eps;
  std::vector<int64_t> frozen;
  bool squeeze_excite;
  int64_t tail;
  bool keep_bottleneck;
  bool allow_tf32;
  int64_t group;  // number of the processes that share batch statistics; -1: this one alone
};

struct SqueezeExcitation {
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  Tensor pooled, hidden, gate;  // kept for backward
};

struct Layer {
  NormSite norm1, norm2;
  Tensor conv1, conv2;
  int64_t channels;  // that the layer reads
  Optional pre_norm, pre_conv1, pre_conv2, dropout;
  std::optional<SqueezeExcitation> se;
};

class Stage {
 public:
  const Tensors& params;
  const Tensors& masks;
  const Options& options;
  int64_t samples, in_channels, height, width;
  int64_t per_layer, tail_params, layers, growth, bottleneck_width, channels, se_width = 0;
  ScalarType storage, arithmetic;
  // Mean, variance, scale and shift of the norms, the latter two 0 where a mask is folded in: [4,
  // sum of widths], and with a group the number of values a channel at the end.
  Tensor stats;
  Tensor gates;  // [layers, samples*(2*growth + se_width)]

  Stage(const Tensors& params, const Tensors& masks, const Options& options, int64_t samples,
        int64_t in_channels, int64_t height, int64_t width, ScalarType storage)
      : params(params),
        masks(masks),
        options(options),
        samples(samples),
        in_channels(in_channels),
        height(height),
        width(width),
        storage(storage),
        arithmetic(arithmetic_type(storage)),
        stats(),
        gates() {
    STD_TORCH_CHECK(is_storage_type(storage),
                    "x must be float32, float64, bfloat16 or float16, got ",
                    torch::headeronly::toString(storage));
    STD_TORCH_CHECK(options.tail >= kNone && options.tail <= kHead, "tail must be 0, 1 or 2, got ",
                    options.tail);
    per_layer = options.squeeze_excite ? 10 : 6;
    tail_params = options.tail == kTransition ? 3 : options.tail == kHead ? 2 : 0;
    const int64_t count = static_cast<int64_t>(params.size()) - tail_params;
    STD_TORCH_CHECK(count > 0 && count % per_layer == 0, "params must hold ", per_layer,
                    " tensors a layer and ", tail_params, " of the tail, got ", params.size());
    layers = count / per_layer;
    for (const Tensor& p : params) {
      check_type("params", p, arithmetic);
      check_contiguous("params", p);
    }
    STD_TORCH_CHECK(params[2].dim() == 4 && params[5].dim() == 4,
                    "conv1.weight and conv2.weight must have 4 dimensions");
    bottleneck_width = params[2].size(0);
    growth = params[5].size(0);
    channels = in_channels + layers * growth;
    if (options.squeeze_excite) se_width = params[7].numel();
    for (int64_t l = 0; l < layers; ++l) check_layer(l);
    if (options.tail != kNone) {
      check_shape("tail norm.weight", tail_param(0), {channels});
      check_shape("tail norm.bias", tail_param(1), {channels});
    }
    if (options.tail == kTransition)
      check_shape("tail conv.weight", tail_param(2), {tail_param(2).size(0), channels, 1, 1});
    STD_TORCH_CHECK(static_cast<int64_t>(options.eps.size()) == norms() &&
                        static_cast<int64_t>(options.frozen.size()) == norms(),
                    "eps and frozen must have ", norms(), " entries, got ", options.eps.size(),
                    " and ", options.frozen.size());
    masks_per_layer = 0;
    for (int64_t bit = kPreNorm; bit <= kDropout; bit *= 2)
      masks_per_layer += (options.mask_kind & bit) != 0;
    STD_TORCH_CHECK(static_cast<int64_t>(masks.size()) == layers * masks_per_layer,
                    "masks must hold ", layers * masks_per_layer, " tensors, got ", masks.size());
    for (int64_t l = 0; l < layers; ++l) check_masks(l);
  }

  int64_t norms() const { return 2 * layers + (options.tail != kNone); }
  int64_t layer_channels(int64_t l) const { return in_channels + l * growth; }
  int64_t norm_width(int64_t i) const {
    return i == 2 * layers ? channels : i % 2 ? bottleneck_width : layer_channels(i / 2);
  }
  int64_t norm_offset(int64_t i) const {
    const int64_t l = i / 2;
    return l * in_channels + growth * l * (l - 1) / 2 + l * bottleneck_width +
           (i % 2 ? layer_channels(l) : 0);
  }
  int64_t stats_width() const {
    return norm_offset(2 * layers) + (options.tail != kNone ? channels : 0);
  }
  Sizes stats_sizes() const { return {4, stats_width() + (options.group >= 0)}; }
  Sizes gates_sizes() const {
    return options.squeeze_excite ? Sizes{layers, samples * (2 * growth + se_width)} : Sizes{0};
  }
  int64_t pixels() const { return height * width; }
  int64_t rows() const { return samples * pixels(); }
  int64_t bottleneck_pitch() const { return (bottleneck_width + 15) / 16 * 16; }
  // The rows of layer l in bottlenecks that were kept.
  Tensor bottleneck(const Tensor& kept, int64_t l) const {
    return piece(kept, l * rows() * bottleneck_pitch(), {rows(), bottleneck_pitch()});
  }
  Tensor tail_param(int64_t i) const { return params[layers * per_layer + i]; }
  bool needs_moments() const {
    bool any = options.squeeze_excite;
    for (const int64_t f : options.frozen) any = any || !f;
    return any;
  }

  NormSite norm(int64_t i, const Tensor& weight, const Tensor& bias) const {
    return norm_site(stats, norm_offset(i), weight, bias, options.eps[i], options.frozen[i] != 0,
                     options.group);
  }
  // What the forward pass returned beside its output.
  void restore(const Tensor& kept_stats, const Tensor& kept_gates, const Tensor& bottlenecks) {
    check_kept("stats", kept_stats, stats_sizes());
    check_kept("gates", kept_gates, gates_sizes());
    if (options.keep_bottleneck)
      check_kept("bottlenecks", bottlenecks, {layers, rows(), bottleneck_pitch()});
    stats = kept_stats;
    gates = kept_gates;
  }
  NormSite tail_norm() const { return norm(2 * layers, tail_param(0), tail_param(1)); }

  Layer layer(int64_t l) const {
    const Tensor* const p = params.data() + l * per_layer;
    int64_t next = l * masks_per_layer;
    const auto take = [&](int64_t bit) {
      return options.mask_kind & bit ? Optional(masks[next++]) : std::nullopt;
    };
    return {norm(2 * l, p[0], p[1]),
            norm(2 * l + 1, p[3], p[4]),
            p[2],
            p[5],
            layer_channels(l),
            take(kPreNorm),
            take(kPreConv1),
            take(kPreConv2),
            take(kDropout),
            squeeze_excitation(l)};
  }

  // BN and the masks around it as a table; `given`: from the statistics already in `stats`.
  Folded fold(const NormSite& site, const Tensor& mean, const Tensor& m2, int64_t count,
              const Optional& pre_mask, const Optional& post_mask, bool given) const {
    const int64_t width = site.weight.numel();
    const Folded folded = pre_mask || post_mask
                              ? Folded{empty(stats, {samples, width}, arithmetic),
                                       empty(stats, {post_mask ? samples : 1, width}, arithmetic)}
                              : site.table;
    const auto run = [&](bool known) {
      call("densenet_ext::fold_norm", mean, m2, count, pre_mask, post_mask, site.weight, site.bias,
           site.eps, known, site.mean, site.var, folded.scale, folded.shift);
    };
    run(given);
    if (site.shared && !given) {
      call("densenet_ext::synchronize_statistics", site.mean, site.var, rows(), options.group,
           total_of(stats));
      run(true);
    }
    return folded;
  }
  // The same table in backward.
  Folded fold_again(const NormSite& site, const Optional& pre_mask,
                    const Optional& post_mask) const {
    if (!pre_mask && !post_mask) return site.table;
    return fold(site, stats, stats, 0, pre_mask, post_mask, true);
  }
  void finish_norm_backward(const NormSite& site, const Tensor& dweight, const Tensor& dbias,
                            const Optional& pre_mask, const Tensor& coef) const {
    densenet_ext::finish_norm_backward(site, stats, dweight, dbias, pre_mask, options.group, coef);
  }

 private:
  int64_t masks_per_layer;

  std::optional<SqueezeExcitation> squeeze_excitation(int64_t l) const {
    if (!options.squeeze_excite) return std::nullopt;
    const Tensor* const p = params.data() + l * per_layer;
    const int64_t pooled = l * gates.size(1), hidden = pooled + samples * growth,
                  gate = hidden + samples * se_width;
    return SqueezeExcitation{p[6],
                             p[7],
                             p[8],
                             p[9],
                             piece(gates, pooled, {samples, growth}),
                             piece(gates, hidden, {samples, se_width}),
                             piece(gates, gate, {samples, growth})};
  }

  static void check_kept(const char* name, const Tensor& t, const Sizes& sizes) {
    check_shape(name, t, sizes);
    check_contiguous(name, t);
  }

  void check_masks(int64_t l) const {
    const Sizes shapes[] = {{samples, layer_channels(l)},
                            {samples, layer_channels(l)},
                            {samples, bottleneck_width},
                            {samples, growth, height, width}};
    int64_t next = l * masks_per_layer;
    for (int i = 0; i < 4; ++i) {
      if (!(options.mask_kind & (int64_t{1} << i))) continue;
      const Tensor& mask = masks[next++];
      check_shape("masks", mask, shapes[i]);
      check_type("masks", mask, i == 3 ? ScalarType::Bool : arithmetic);
      check_contiguous("masks", mask);
    }
  }

  void check_layer(int64_t l) const {
    const Tensor* const p = params.data() + l * per_layer;
    const int64_t c = layer_channels(l), k2 = bottleneck_width;
    check_shape("norm1.weight", p[0], {c});
    check_shape("norm1.bias", p[1], {c});
    check_shape("conv1.weight", p[2], {k2, c, 1, 1});
    check_shape("norm2.weight", p[3], {k2});
    check_shape("norm2.bias", p[4], {k2});
    check_shape("conv2.weight", p[5], {growth, k2, 3, 3});
    if (options.squeeze_excite) {
      check_shape("se.fc1.weight", p[6], {se_width, growth, 1, 1});
      check_shape("se.fc1.bias", p[7], {se_width});
      check_shape("se.fc2.weight", p[8], {growth, se_width, 1, 1});
      check_shape("se.fc2.bias", p[9], {growth});
    }
  }
};

}  // namespace densenet_ext
