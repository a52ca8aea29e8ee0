// The layers of a stage over its feature buffer, forward, once for all devices.
//
// Layer by layer: BN1 is folded into scale and shift (its statistics come from moments that were
// taken when the channels were written), then bottleneck, BN2 folded, 3x3 convolution into the
// feature buffer, squeeze-and-excitation in place. One workspace serves all layers.
#pragma once

#include "stage.h"

namespace densenet_ext {

// Means and centered sums of squares of a feature buffer's channels, [samples, channels] each.
struct BufferMoments {
  Tensor mean, m2;
};

// Makes room for the statistics of the stage's norms, with those of frozen ones filled in, and for
// its gates.
void start_statistics(Stage& stage, const Tensor& like, const Tensors& frozen_stats);

// Makes room for the moments of all channels; nothing where the stage needs none.
std::optional<BufferMoments> new_moments(const Stage& stage, const Tensor& like);

// Copies x into the channels of the feature buffer from `offset` on, with moments.
void append(const Tensor& x, const Tensor& features, int64_t offset,
            const std::optional<BufferMoments>& moments);

// Runs all layers over a feature buffer that holds the first in_channels channels. Returns the
// bottlenecks [L, M, padded K2] if they are kept for backward, else an empty tensor.
Tensor run_layers(const Stage& stage, const Tensor& features,
                  const std::optional<BufferMoments>& moments);

}  // namespace densenet_ext
