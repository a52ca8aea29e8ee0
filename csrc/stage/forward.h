// The layers of a stage over its feature buffer, forward, once for all devices.
//
// Each layer folds norm1 into a scale and a shift (its statistics come from moments that were taken
// when the channels were written), computes the bottleneck, folds norm2, convolves 3x3 into the
// feature buffer and applies squeeze-and-excitation there. One workspace serves all layers.
#pragma once

#include "stage.h"

namespace densenet_ext {

// The means and the centered sums of squares of a feature buffer's channels, [N, C] each.
struct BufferMoments {
  Tensor mean, m2;
};

// Allocates the statistics of the stage's norms and its gates, and fills in the statistics of
// frozen norms.
void start_statistics(Stage& stage, const Tensor& like, const Tensors& frozen_stats);

// Allocates the moments of all channels, if the stage needs them.
std::optional<BufferMoments> new_moments(const Stage& stage, const Tensor& like);

// Copies x into the channels of the feature buffer from `offset` on, with moments.
void append(const Tensor& x, const Tensor& features, int64_t offset,
            const std::optional<BufferMoments>& moments);

// Runs all layers over a feature buffer that holds the first in_channels channels. Returns the
// bottlenecks [L, M, padded K2] if they are kept for backward, else an empty tensor.
Tensor run_layers(const Stage& stage, const Tensor& features,
                  const std::optional<BufferMoments>& moments);

}  // namespace densenet_ext
