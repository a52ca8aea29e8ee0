// The stage: a dense block and what consumes it (transition, head or nothing), forward and backward, once for all devices, over the kernel operators of ops.cpp.
//
// Forward, layer by layer: BN1 folded into scale and shift (statistics come from moments taken when the channels were written), bottleneck, BN2 folded, 3x3 convolution into
// the feature buffer, squeeze-and-excitation in place. Backward from the last layer to the first: the gradient of a layer's k channels is complete when the layer is reached,
// as coef0*G + coef1 + coef2*x. The bottleneck is recomputed unless it was kept. Workspaces serve all layers.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "feature_buffer.h"

namespace densenet_ext {
namespace {

using torch::stable::narrow;
using torch::stable::select;
using torch::stable::view;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

enum Tail : int64_t { kNone = 0, kTransition = 1, kHead = 2 };
enum MaskKind : int64_t { kPreNorm = 1, kPreConv1 = 2, kPreConv2 = 4, kDropout = 8 };

// Calls a kernel operator of this library through the dispatcher, on the device of its tensors.
template <class... Arguments>
void call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack = {torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

struct Options {
  int64_t mask_kind;
  double dropout_scale;
  std::vector<double> eps;
  std::vector<int64_t> frozen;
  bool squeeze_excite;
  int64_t tail;
  bool keep_bottleneck;
};

// A batch normalization of the stage: its place in `eps`, `frozen` and `stats`.
struct NormSite {
  Tensor weight, bias, mean, var;
  double eps;
  bool frozen;
};
struct Folded {
  Tensor scale, shift;
};

struct Layer {
  NormSite norm1, norm2;
  Tensor conv1, conv2;
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;  // with squeeze-and-excitation
  Optional pre_norm, pre_conv1, pre_conv2, dropout;
  int64_t channels;              // that the layer reads
  Tensor pooled, hidden, gate;   // of squeeze-and-excitation, kept for backward
};

class Stage {
 public:
  const Tensors& params;
  const Tensors& masks;
  const Options& options;
  int64_t samples, in_channels, height, width;
  int64_t per_layer, tail_params, layers, growth, bottleneck_width, channels, se_width = 0;
  ScalarType storage, arithmetic;
  Tensor stats;  // [2, sum of widths]
  Tensor gates;  // [layers, samples*(2*growth + se_width)]

  Stage(const Tensors& params, const Tensors& masks, const Options& options, int64_t samples, int64_t in_channels, int64_t height, int64_t width, ScalarType storage)
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
    STD_TORCH_CHECK(is_storage_type(storage), "x must be float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(storage));
    STD_TORCH_CHECK(options.tail >= kNone && options.tail <= kHead, "tail must be 0, 1 or 2, got ", options.tail);
    per_layer = options.squeeze_excite ? 10 : 6;
    tail_params = options.tail == kTransition ? 3 : options.tail == kHead ? 2 : 0;
    const int64_t count = static_cast<int64_t>(params.size()) - tail_params;
    STD_TORCH_CHECK(count > 0 && count % per_layer == 0, "params must hold ", per_layer, " tensors a layer and ", tail_params, " of the tail, got ", params.size());
    layers = count / per_layer;
    for (const Tensor& p : params) {
      check_type("params", p, arithmetic);
      check_contiguous("params", p);
    }
    STD_TORCH_CHECK(params[2].dim() == 4 && params[5].dim() == 4, "conv1.weight and conv2.weight must have 4 dimensions");
    bottleneck_width = params[2].size(0);
    growth = params[5].size(0);
    channels = in_channels + layers * growth;
    if (options.squeeze_excite) se_width = params[7].numel();
    for (int64_t l = 0; l < layers; ++l) check_layer(l);
    if (options.tail != kNone) {
      check_shape("tail norm.weight", tail_param(0), {channels});
      check_shape("tail norm.bias", tail_param(1), {channels});
    }
    if (options.tail == kTransition) check_shape("tail conv.weight", tail_param(2), {tail_param(2).size(0), channels, 1, 1});
    STD_TORCH_CHECK(static_cast<int64_t>(options.eps.size()) == norms() && static_cast<int64_t>(options.frozen.size()) == norms(), "eps and frozen must have ",
                    norms(), " entries, got ", options.eps.size(), " and ", options.frozen.size());
    masks_per_layer = 0;
    for (int64_t bit = kPreNorm; bit <= kDropout; bit *= 2) masks_per_layer += (options.mask_kind & bit) != 0;
    STD_TORCH_CHECK(static_cast<int64_t>(masks.size()) == layers * masks_per_layer, "masks must hold ", layers * masks_per_layer, " tensors, got ", masks.size());
  }

  int64_t norms() const { return 2 * layers + (options.tail != kNone); }
  int64_t layer_channels(int64_t l) const { return in_channels + l * growth; }
  int64_t norm_width(int64_t i) const { return i == 2 * layers ? channels : i % 2 ? bottleneck_width : layer_channels(i / 2); }
  int64_t norm_offset(int64_t i) const {
    const int64_t l = i / 2;
    return l * in_channels + growth * l * (l - 1) / 2 + l * bottleneck_width + (i % 2 ? layer_channels(l) : 0);
  }
  int64_t stats_width() const { return norm_offset(2 * layers) + (options.tail != kNone ? channels : 0); }
  int64_t pixels() const { return height * width; }
  int64_t rows() const { return samples * pixels(); }
  int64_t bottleneck_pitch() const { return (bottleneck_width + 15) / 16 * 16; }
  Tensor tail_param(int64_t i) const { return params[layers * per_layer + i]; }
  bool needs_moments() const {
    bool any = options.squeeze_excite;
    for (const int64_t f : options.frozen) any = any || !f;
    return any;
  }

  NormSite norm(int64_t i, const Tensor& weight, const Tensor& bias) const {
    Tensor mean = select(stats, 0, 0), var = select(stats, 0, 1);
    return {weight, bias, narrow(mean, 0, norm_offset(i), norm_width(i)), narrow(var, 0, norm_offset(i), norm_width(i)), options.eps[i], options.frozen[i] != 0};
  }
  NormSite tail_norm() const { return norm(2 * layers, tail_param(0), tail_param(1)); }

  Layer layer(int64_t l) const {
    const Tensor* const p = params.data() + l * per_layer;
    Layer layer;
    layer.norm1 = norm(2 * l, p[0], p[1]), layer.conv1 = p[2];
    layer.norm2 = norm(2 * l + 1, p[3], p[4]), layer.conv2 = p[5];
    layer.channels = layer_channels(l);
    int64_t next = l * masks_per_layer;
    const auto take = [&](int64_t bit, Optional& mask) {
      if (options.mask_kind & bit) mask = masks[next++];
    };
    take(kPreNorm, layer.pre_norm);
    take(kPreConv1, layer.pre_conv1);
    take(kPreConv2, layer.pre_conv2);
    take(kDropout, layer.dropout);
    if (options.squeeze_excite) {
      layer.fc1_weight = p[6], layer.fc1_bias = p[7], layer.fc2_weight = p[8], layer.fc2_bias = p[9];
      Tensor own = select(gates, 0, l);
      layer.pooled = view(narrow(own, 0, 0, samples * growth), Sizes{samples, growth});
      layer.hidden = view(narrow(own, 0, samples * growth, samples * se_width), Sizes{samples, se_width});
      layer.gate = view(narrow(own, 0, samples * (growth + se_width), samples * growth), Sizes{samples, growth});
    }
    return layer;
  }

  // BN and the masks around it as a table; `given`: from the statistics already in `stats`.
  Folded fold(const NormSite& site, const Tensor& mean, const Tensor& m2, int64_t count, const Optional& pre_mask, const Optional& post_mask, bool given) const {
    const int64_t width = site.weight.numel();
    const Folded folded = {empty(stats, {pre_mask || post_mask ? samples : 1, width}, arithmetic), empty(stats, {post_mask ? samples : 1, width}, arithmetic)};
    call("densenet_ext::fold_norm", mean, m2, count, pre_mask, post_mask, site.weight, site.bias, site.eps, given, site.mean, site.var, folded.scale, folded.shift);
    return folded;
  }
  Folded fold_again(const NormSite& site, const Optional& pre_mask, const Optional& post_mask) const {
    return fold(site, stats, stats, 0, pre_mask, post_mask, true);
  }

 private:
  int64_t masks_per_layer;

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

// --- forward ---------------------------------------------------------------------------------------------------------------------------------------------

struct Moments {
  Tensor mean, m2;  // [samples, channels]
};

// Room for the statistics, those of frozen norms filled in.
void start_statistics(Stage& stage, const Tensor& like, const Tensors& frozen_stats) {
  stage.stats = empty(like, {2, stage.stats_width()}, stage.arithmetic);
  stage.gates = empty(like, stage.options.squeeze_excite ? Sizes{stage.layers, stage.samples * (2 * stage.growth + stage.se_width)} : Sizes{0}, stage.arithmetic);
  size_t next = 0;
  for (int64_t i = 0; i < stage.norms(); ++i) {
    if (!stage.options.frozen[i]) continue;
    STD_TORCH_CHECK(next + 2 <= frozen_stats.size(), "frozen_stats must hold a mean and a variance for each frozen norm, got ", frozen_stats.size(), " tensors");
    for (int64_t row = 0; row < 2; ++row) {
      const Tensor& given = frozen_stats[next++];
      check_shape("frozen_stats", given, {stage.norm_width(i)});
      Tensor all = select(stage.stats, 0, row), slice = narrow(all, 0, stage.norm_offset(i), stage.norm_width(i));
      torch::stable::copy_(slice, given);
    }
  }
  STD_TORCH_CHECK(next == frozen_stats.size(), "frozen_stats must hold ", next, " tensors, got ", frozen_stats.size());
}

void run_bottleneck(const Layer& layer, const Tensor& features, const Folded& table, const Tensor& out, const Optional& mean, const Optional& m2) {
  call("densenet_ext::bottleneck_forward", features, table.scale, table.shift, layer.conv1, out, mean, m2);
}

// All layers over a feature buffer that holds the first in_channels channels. Returns the kept bottlenecks, or an empty tensor.
Tensor run_layers(const Stage& stage, const Tensor& features, const std::optional<Moments>& moments) {
  const Sizes rows = {stage.rows(), stage.bottleneck_pitch()};
  const bool keep = stage.options.keep_bottleneck;
  const Tensor kept = keep ? contiguous_buffer(features, {stage.layers, rows[0], rows[1]}, stage.storage) : empty(features, {0}, stage.storage);
  const Tensor workspace = keep ? kept : contiguous_buffer(features, rows, stage.storage);
  const Tensor mean2 = empty(features, {1, stage.bottleneck_width}, stage.arithmetic), m2_2 = empty(features, {1, stage.bottleneck_width}, stage.arithmetic);
  const Optional mean = moments ? Optional(moments->mean) : std::nullopt, m2 = moments ? Optional(moments->m2) : std::nullopt;

  for (int64_t l = 0; l < stage.layers; ++l) {
    const Layer layer = stage.layer(l);
    const Tensor bottleneck = keep ? select(kept, 0, l) : workspace;
    const Folded table1 = stage.fold(layer.norm1, mean.value_or(stage.stats), m2.value_or(stage.stats), stage.pixels(), layer.pre_norm, layer.pre_conv1,
                                     layer.norm1.frozen);
    const bool measure = !layer.norm2.frozen;
    run_bottleneck(layer, features, table1, bottleneck, measure ? Optional(mean2) : std::nullopt, measure ? Optional(m2_2) : std::nullopt);
    const Folded table2 = stage.fold(layer.norm2, mean2, m2_2, stage.rows(), std::nullopt, layer.pre_conv2, layer.norm2.frozen);
    call("densenet_ext::conv3x3_forward", bottleneck, table2.scale, table2.shift, layer.conv2, layer.dropout, stage.options.dropout_scale, features, layer.channels,
         mean, m2);
    if (stage.options.squeeze_excite) {
      call("densenet_ext::squeeze_excite_forward", features, layer.channels, *mean, *m2, layer.fc1_weight, layer.fc1_bias, layer.fc2_weight, layer.fc2_bias,
           layer.pooled, layer.hidden, layer.gate);
    }
  }
  return kept;
}

std::optional<Moments> new_moments(const Stage& stage, const Tensor& like) {
  if (!stage.needs_moments()) return std::nullopt;
  const Sizes sizes = {stage.samples, stage.channels};
  return Moments{empty(like, sizes, stage.arithmetic), empty(like, sizes, stage.arithmetic)};
}
void append(const Tensor& x, const Tensor& features, int64_t offset, const std::optional<Moments>& moments) {
  call("densenet_ext::append", torch::stable::contiguous(x), features, offset, moments ? Optional(moments->mean) : std::nullopt,
       moments ? Optional(moments->m2) : std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dense_stage(const Tensor& x, const Tensors& params, const Tensors& masks, const Tensors& frozen_stats,
                                                               int64_t mask_kind, double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen,
                                                               bool squeeze_excite, int64_t tail, bool keep_bottleneck) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions, got ", x.dim());
  const Options options = {mask_kind, dropout_scale, std::move(eps), std::move(frozen), squeeze_excite, tail, keep_bottleneck};
  Stage stage(params, masks, options, x.size(0), x.size(1), x.size(2), x.size(3), x.scalar_type());
  start_statistics(stage, x, frozen_stats);

  const Sizes sizes = {stage.samples, stage.channels, stage.height, stage.width};
  const Tensor features =
      tail == kNone ? contiguous_buffer(x, sizes, stage.storage) : feature_buffer(x, sizes[0], sizes[1], sizes[2], sizes[3], stage.storage);
  const std::optional<Moments> moments = new_moments(stage, x);
  append(x, features, 0, moments);
  const Tensor kept = run_layers(stage, features, moments);
  if (tail == kNone) return {features, empty(x, {0}, stage.storage), stage.stats, stage.gates, kept};

  const NormSite site = stage.tail_norm();
  const Folded table = stage.fold(site, moments ? moments->mean : stage.stats, moments ? moments->m2 : stage.stats, stage.pixels(), std::nullopt, std::nullopt,
                                  site.frozen);
  if (tail == kTransition) {
    const Tensor weight = stage.tail_param(2), output = empty(x, {stage.samples, weight.size(0), stage.height / 2, stage.width / 2}, stage.storage);
    call("densenet_ext::transition_forward", features, table.scale, table.shift, weight, output);
    return {output, features, stage.stats, stage.gates, kept};
  }
  const Tensor output = empty(x, {stage.samples, stage.channels}, stage.storage);
  call("densenet_ext::head_forward", features, table.scale, table.shift, output);
  return {output, features, stage.stats, stage.gates, kept};
}

// --- backward --------------------------------------------------------------------------------------------------------------------------------------------

// Gradients of the parameters, in their order, filled from the last layer to the first.
Tensors empty_gradients(const Tensors& params) {
  Tensors gradients;
  gradients.reserve(params.size());
  for (const Tensor& p : params) gradients.push_back(empty(p, sizes_of(p), p.scalar_type()));
  return gradients;
}

// Backward of all layers. `source` is where the gradient of the last layer's channels stands at first: `grad` itself (the gradient buffer), or a tensor that may only
// be read; `first_grad_in` what the last layer's own backward adds to, nothing where the gradient of its inputs starts there.
void run_layers_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks, Tensor source, Optional grad_in, const Tensor& grad, const Tensor& coef,
                         Tensors& dparams) {
  const Sizes rows = {stage.rows(), stage.bottleneck_pitch()};
  const bool kept = bottlenecks.dim() == 3;
  const Tensor workspace = kept ? bottlenecks : contiguous_buffer(features, rows, stage.storage);
  const Tensor dv = contiguous_buffer(features, rows, stage.arithmetic);
  const Tensor db_table = empty(features, {3, stage.bottleneck_width}, stage.arithmetic);

  for (int64_t l = stage.layers - 1; l >= 0; --l) {
    const Layer layer = stage.layer(l);
    Tensor* const d = dparams.data() + l * stage.per_layer;
    const Folded table1 = stage.fold_again(layer.norm1, layer.pre_norm, layer.pre_conv1);
    const Folded table2 = stage.fold_again(layer.norm2, std::nullopt, layer.pre_conv2);
    const Tensor bottleneck = kept ? select(bottlenecks, 0, l) : workspace;
    if (!kept) run_bottleneck(layer, features, table1, bottleneck, std::nullopt, std::nullopt);
    if (stage.options.squeeze_excite) {
      call("densenet_ext::squeeze_excite_backward", features, source, layer.channels, layer.fc1_weight, layer.fc2_weight, layer.pooled, layer.hidden, layer.gate, coef,
           d[6], d[7], d[8], d[9]);
    }
    call("densenet_ext::conv3x3_backward", bottleneck, table2.scale, table2.shift, layer.pre_conv2, layer.conv2, layer.dropout, stage.options.dropout_scale, features,
         source, coef, layer.channels, layer.norm2.weight, layer.norm2.mean, layer.norm2.var, layer.norm2.eps, !layer.norm2.frozen, dv, d[5], d[3], d[4], db_table);
    call("densenet_ext::bottleneck_backward", features, table1.scale, table1.shift, layer.pre_norm, layer.pre_conv1, layer.conv1, dv, bottleneck, db_table,
         layer.norm1.weight, layer.norm1.mean, layer.norm1.var, layer.norm1.eps, !layer.norm1.frozen, grad_in, grad, coef, d[2], d[0], d[1]);
    source = grad;
    grad_in = grad;
  }
}

Tensor start_coefficients(const Stage& stage, const Tensor& like) {
  Tensor coef = empty(like, {3, stage.samples, stage.channels}, stage.arithmetic);
  torch::stable::zero_(coef);
  Tensor ones = select(coef, 0, 0);
  torch::stable::fill_(ones, 1.0);
  return coef;
}

std::tuple<Tensor, Tensors> dense_stage_backward(const Tensor& grad_output, const Tensor& features, const Tensors& params, const Tensors& masks, const Tensor& stats,
                                                 const Tensor& gates, const Tensor& bottlenecks, int64_t mask_kind, double dropout_scale, std::vector<double> eps,
                                                 std::vector<int64_t> frozen, bool squeeze_excite, int64_t tail, int64_t in_channels, bool need_dx) {
  STD_TORCH_CHECK(features.dim() == 4, "features must have 4 dimensions, got ", features.dim());
  const Options options = {mask_kind, dropout_scale, std::move(eps), std::move(frozen), squeeze_excite, tail, bottlenecks.dim() == 3};
  Stage stage(params, masks, options, features.size(0), in_channels, features.size(2), features.size(3), features.scalar_type());
  STD_TORCH_CHECK(features.size(1) == stage.channels, "features must have ", stage.channels, " channels, got ", features.size(1));
  stage.stats = stats;
  stage.gates = gates;

  Tensors dparams = empty_gradients(params);
  const Tensor grad = feature_buffer(features, stage.samples, stage.channels, stage.height, stage.width, stage.arithmetic);
  Tensor coef, source = grad;
  if (tail == kNone) {
    check_shape("grad", grad_output, sizes_of(features));
    source = torch::stable::to(torch::stable::contiguous(grad_output), stage.arithmetic);
    coef = start_coefficients(stage, features);
  } else {
    const Tensor incoming = torch::stable::contiguous(grad_output);
    const NormSite site = stage.tail_norm();
    const Folded table = stage.fold_again(site, std::nullopt, std::nullopt);
    Tensor* const d = dparams.data() + stage.layers * stage.per_layer;
    coef = empty(features, {3, stage.samples, stage.channels}, stage.arithmetic);
    if (tail == kTransition) {
      call("densenet_ext::transition_backward", features, table.scale, table.shift, stage.tail_param(2), site.weight, site.mean, site.var, site.eps, !site.frozen,
           incoming, grad, coef, d[2], d[0], d[1]);
    } else {
      call("densenet_ext::head_backward", features, table.scale, table.shift, site.weight, site.mean, site.var, site.eps, !site.frozen, incoming, grad, coef, d[0], d[1]);
    }
  }
  run_layers_backward(stage, features, bottlenecks, source, source, grad, coef, dparams);

  const Tensor dx = need_dx ? empty(features, {stage.samples, in_channels, stage.height, stage.width}, stage.storage) : empty(features, {0}, stage.storage);
  if (need_dx) call("densenet_ext::finish_gradient", features, grad, coef, int64_t{0}, dx);
  return {dx, dparams};
}

// --- one layer alone: the feature buffer is not kept, but made again from the inputs in backward ---------------------------------------------------------------

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

void append_all(const Tensors& inputs, const Tensor& features, const std::optional<Moments>& moments) {
  int64_t offset = 0;
  for (const Tensor& x : inputs) {
    append(x, features, offset, moments);
    offset += x.size(1);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dense_layer(const Tensors& inputs, const Tensors& params, const Tensors& masks, const Tensors& frozen_stats,
                                                       int64_t mask_kind, double dropout_scale, std::vector<double> eps, std::vector<int64_t> frozen,
                                                       bool squeeze_excite, bool keep_bottleneck) {
  const Inputs checked(inputs);
  const Tensor& first = inputs[0];
  const Options options = {mask_kind, dropout_scale, std::move(eps), std::move(frozen), squeeze_excite, kNone, keep_bottleneck};
  Stage stage(params, masks, options, first.size(0), checked.channels, first.size(2), first.size(3), first.scalar_type());
  STD_TORCH_CHECK(stage.layers == 1, "params must hold one layer, got ", stage.layers);
  start_statistics(stage, first, frozen_stats);

  const Tensor features = feature_buffer(first, stage.samples, stage.channels, stage.height, stage.width, stage.storage);
  const std::optional<Moments> moments = new_moments(stage, first);
  append_all(inputs, features, moments);
  const Tensor kept = run_layers(stage, features, moments);
  const Tensor output = empty(first, {stage.samples, stage.growth, stage.height, stage.width}, stage.storage);
  Tensor view_of_features = features;
  torch::stable::copy_(const_cast<Tensor&>(output), narrow(view_of_features, 1, checked.channels, stage.growth));
  return {output, stage.stats, stage.gates, kept};
}

std::tuple<Tensors, Tensors> dense_layer_backward(const Tensor& grad_output, const Tensor& output, const Tensors& inputs, const Tensors& params, const Tensors& masks,
                                                  const Tensor& stats, const Tensor& gates, const Tensor& bottlenecks, int64_t mask_kind, double dropout_scale,
                                                  std::vector<double> eps, std::vector<int64_t> frozen, bool squeeze_excite) {
  const Inputs checked(inputs);
  const Tensor& first = inputs[0];
  const Options options = {mask_kind, dropout_scale, std::move(eps), std::move(frozen), squeeze_excite, kNone, bottlenecks.dim() == 3};
  Stage stage(params, masks, options, first.size(0), checked.channels, first.size(2), first.size(3), first.scalar_type());
  check_shape("grad", grad_output, {stage.samples, stage.growth, stage.height, stage.width});
  stage.stats = stats;
  stage.gates = gates;

  const Tensor features = feature_buffer(first, stage.samples, stage.channels, stage.height, stage.width, stage.storage);
  append_all(inputs, features, std::nullopt);
  append(output, features, checked.channels, std::nullopt);
  Tensor grad = feature_buffer(first, stage.samples, stage.channels, stage.height, stage.width, stage.arithmetic);
  Tensor own = narrow(grad, 1, checked.channels, stage.growth);
  torch::stable::copy_(own, grad_output);
  const Tensor coef = start_coefficients(stage, first);
  Tensors dparams = empty_gradients(params);
  run_layers_backward(stage, features, bottlenecks, grad, std::nullopt, grad, coef, dparams);

  Tensors dinputs;
  int64_t offset = 0;
  for (const Tensor& x : inputs) {
    dinputs.push_back(empty(x, sizes_of(x), stage.storage));
    call("densenet_ext::finish_gradient", features, grad, coef, offset, dinputs.back());
    offset += x.size(1);
  }
  return {dinputs, dparams};
}

}  // namespace
}  // namespace densenet_ext

STABLE_TORCH_LIBRARY_IMPL(densenet_ext, CPU, m) {
  m.impl("dense_stage", TORCH_BOX(&densenet_ext::dense_stage));
  m.impl("dense_stage_backward", TORCH_BOX(&densenet_ext::dense_stage_backward));
  m.impl("dense_layer", TORCH_BOX(&densenet_ext::dense_layer));
  m.impl("dense_layer_backward", TORCH_BOX(&densenet_ext::dense_layer_backward));
}
