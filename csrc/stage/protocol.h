// The flat arguments of the stage ops: what their numbers mean, and in which order their lists are.
// densenet_ext/_protocol.py has the same names for Python.
#pragma once

#include "torch_stable.h"

namespace densenet_ext {

// The part of a stage that consumes its dense block's features; kNone for a block alone.
enum Tail : int64_t {
  kNone,
  kTransition,  // norm, ReLU, 1x1 convolution, 2x2 average pool
  kHead,        // norm, ReLU, global average pool
};

// Masks that a layer has, as bits; a layer's masks are listed in this order.
enum MaskKind : int64_t {
  kPreNorm = 1,     // [N, C], before norm1
  kPreConv1 = 2,    // [N, C], before conv1
  kPreConv2 = 4,    // [N, K2], before conv2
  kDropout = 8,     // bool [N, k, H, W], on conv2's output
  kPostConv2 = 16,  // [N, k], after conv2 and its dropout
};

// Layout of dx: not computed, the device's own, or channels last (CPU, if the input was).
enum GradientLayout : int64_t { kNoGradient, kDeviceLayout, kChannelsLast };

// Indices into the list `options`.
enum Option : size_t {
  kMaskKind,
  kSqueezeExcite,
  kTail,
  kKeptBottlenecks,  // how many of the last layers keep their bottleneck for backward
  kAllowTf32,        // float32 products may be TF32 (CUDA)
  kGroup,            // index of the process group that shares batch statistics; -1: this process
  kOptions,
};

// Indices into the parameters of a layer and of a tail.
enum LayerParam : size_t {
  kNorm1Weight,
  kNorm1Bias,
  kConv1Weight,
  kNorm2Weight,
  kNorm2Bias,
  kConv2Weight,
  kLayerParams,
  kFc1Weight = kLayerParams,  // this and the following only with squeeze-and-excitation
  kFc1Bias,
  kFc2Weight,
  kFc2Bias,
  kLayerParamsWithSqueezeExcite,
};
enum TailParam : size_t {
  kTailNormWeight,
  kTailNormBias,
  kHeadParams,
  kTailConvWeight = 2,
  kTransitionParams
};

struct Options {
  std::vector<double> eps;      // one for each norm: norm1, norm2 of each layer, the tail's
  std::vector<int64_t> frozen;  // one for each norm
  double dropout_scale;
  int64_t mask_kind;
  bool squeeze_excite;
  int64_t tail;
  int64_t kept_bottlenecks;
  bool allow_tf32;
  int64_t group;

  bool has_group() const { return group >= 0; }
  size_t layer_params() const {
    return squeeze_excite ? kLayerParamsWithSqueezeExcite : kLayerParams;
  }
  size_t tail_params() const {
    if (tail == kTransition) return kTransitionParams;
    return tail == kHead ? size_t{kHeadParams} : 0;
  }
};

// Reads the list `options` and the lists beside it. Throws if they ask for something not served.
inline Options read_options(const std::vector<int64_t>& list, std::vector<double> eps = {},
                            std::vector<int64_t> frozen = {}, double dropout_scale = 1) {
  STD_TORCH_CHECK(list.size() == kOptions, "options must hold ", size_t{kOptions}, " numbers, got ",
                  list.size());
  Options options;
  options.eps = std::move(eps);
  options.frozen = std::move(frozen);
  options.dropout_scale = dropout_scale;
  options.mask_kind = list[kMaskKind];
  options.squeeze_excite = list[kSqueezeExcite] != 0;
  options.tail = list[kTail];
  options.kept_bottlenecks = list[kKeptBottlenecks];
  options.allow_tf32 = list[kAllowTf32] != 0;
  options.group = list[kGroup];
  STD_TORCH_CHECK(options.tail >= kNone && options.tail <= kHead, "tail must be 0, 1 or 2, got ",
                  options.tail);
  STD_TORCH_CHECK(options.mask_kind >= 0 && options.mask_kind < 2 * kPostConv2,
                  "mask_kind must be a sum of 1, 2, 4, 8 and 16, got ", options.mask_kind);
  return options;
}

// Checks the maps' number of dimensions.
inline void check_spatial(const char* name, const Tensor& maps) {
  STD_TORCH_CHECK(
      maps.dim() == 4, name, " must have 4 dimensions, [N, C, H, W], got ", maps.dim(),
      maps.dim() == 3 || maps.dim() == 5 ? ": signals and volumes are not served yet" : "");
}

}  // namespace densenet_ext
