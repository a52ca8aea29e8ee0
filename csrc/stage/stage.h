// A stage, read from the flat lists of an op and checked: its layers, norms, masks and sizes.
#pragma once

#include "layout.h"
#include "norm.h"
#include "protocol.h"

namespace densenet_ext {

struct SqueezeExcitation {
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  Tensor pooled, hidden, gate;  // views of the stage's gates
};

struct Layer {
  NormSite norm1, norm2;
  Tensor conv1, conv2;
  int64_t channels;  // number of channels that the layer reads; its output starts there
  Optional pre_norm, pre_conv1, pre_conv2, dropout, post_conv2;
  std::optional<SqueezeExcitation> se;
};

class Stage {
 public:
  const Tensors& params;
  const Tensors& masks;
  const Options& options;
  int64_t samples, in_channels;
  Sizes spatial;  // [H, W]
  int64_t layers, growth, bottleneck_width, channels, se_width = 0;
  ScalarType storage, arithmetic;
  // Mean, variance, scale and shift of the norms, [4, sum of widths]; scale and shift are 0 where a
  // mask is folded in. A group adds a column: the number of values a channel in all its processes.
  Tensor stats;
  Tensor gates;  // [layers, samples * (2 * growth + se_width)]

  // x: maps with the stage's samples, size, storage type and device. has_tail_params: params end
  // with the tail's. Backward of the layers alone does not get these.
  Stage(const Tensors& params, const Tensors& masks, const Options& options, const Tensor& x,
        int64_t in_channels, bool has_tail_params = true);

  int64_t norms() const { return static_cast<int64_t>(norm_offsets_.size()) - 1; }
  int64_t norm_width(int64_t i) const { return norm_offsets_[i + 1] - norm_offsets_[i]; }
  // The first column of norm i in `stats`: norm1 and norm2 of each layer, then the tail's norm.
  int64_t norm_offset(int64_t i) const { return norm_offsets_[i]; }
  Sizes stats_sizes() const { return {4, norm_offsets_.back() + options.has_group()}; }
  Sizes gates_sizes() const {
    return options.squeeze_excite ? Sizes{layers, samples * (2 * growth + se_width)} : Sizes{0};
  }

  int64_t layer_channels(int64_t l) const { return in_channels + l * growth; }
  Sizes maps(int64_t channels) const { return maps_sizes(samples, channels, spatial); }
  int64_t pixels() const { return pixels_of(spatial); }
  int64_t rows() const { return samples * pixels(); }
  // True if forward keeps the bottleneck of layer l for backward.
  bool keeps(int64_t l) const { return l >= layers - options.kept_bottlenecks; }
  Sizes bottleneck_sizes() const { return {rows(), (bottleneck_width + 15) / 16 * 16}; }
  // All bottlenecks that are kept for backward; empty where none is.
  Sizes bottlenecks_sizes() const;
  // The bottleneck of layer l among them.
  Tensor bottleneck(const Tensor& bottlenecks, int64_t l) const;

  // The tensors of layer l, or of the tail, in a list that is ordered as params.
  const Tensor* of_layer(const Tensors& list, int64_t l) const {
    return list.data() + l * static_cast<int64_t>(options.layer_params());
  }
  const Tensor* of_tail(const Tensors& list) const { return of_layer(list, layers); }

  // True if some norm takes the batch's statistics, or something is pooled.
  bool needs_moments() const;

  Layer layer(int64_t l) const;
  NormSite tail_norm() const;

  // Takes the tensors that forward kept for backward, and checks them.
  void restore(const Tensor& forward_stats, const Tensor& forward_gates, const Tensor& bottlenecks);

  // Scale and shift of a norm in forward, with the masks around it. Unless the norm is frozen, its
  // statistics are computed from the moments; each moment is of `values` values.
  FoldedNorm fold(const NormSite& site, const Tensor& mean, const Tensor& m2, int64_t values,
                  const Optional& pre_mask, const Optional& post_mask) const;
  // Scale and shift of a norm again in backward, from the statistics of the forward pass.
  FoldedNorm fold_again(const NormSite& site, const Optional& pre_mask,
                        const Optional& post_mask) const;

 private:
  Sizes norm_offsets_;  // one for each norm, and the end of the last one
  int64_t masks_per_layer_ = 0;

  void check_layer(int64_t l) const;
  void check_tail() const;
  void check_masks(int64_t l) const;
  NormSite norm(int64_t i, const Tensor& weight, const Tensor& bias) const;
  std::optional<SqueezeExcitation> squeeze_excitation(int64_t l) const;
  FoldedNorm run_fold(const NormSite& site, const Tensor& mean, const Tensor& m2, int64_t values,
                      const Optional& pre_mask, const Optional& post_mask,
                      bool has_statistics) const;
};

// Multiplies k channels of t, from `first` on in dimension `dim`, by mask [N, k], `times` times.
// The mask has t's samples, and what follows in t are pixels.
void scale_channels(const Tensor& t, int64_t dim, int64_t first, const Tensor& mask, int times = 1);

}  // namespace densenet_ext
