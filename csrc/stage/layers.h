// The layers of a stage over its feature buffer, forward and backward, once for all devices.
//
// Forward, layer by layer: BN1 folded into scale and shift (its statistics come from moments taken
// when the channels were written), bottleneck, BN2 folded, 3x3 convolution into the feature buffer,
// squeeze-and-excitation in place. Backward from the last layer to the first: the gradient of a
// layer's channels is complete when the layer is reached, as coef0*G + coef1 + coef2*x. The
// bottleneck is recomputed unless it was kept. Workspaces serve all layers.
#pragma once

#include "stage.h"

namespace densenet_ext {

// Of a feature buffer, [samples, channels] each.
struct Moments {
  Tensor mean, m2;
};

// Room for the statistics of the stage's norms, those of frozen ones filled in, and for its gates.
void start_statistics(Stage& stage, const Tensor& like, const Tensors& frozen_stats);

// Room for the moments of all channels; nothing where no norm takes statistics and nothing is
// pooled.
std::optional<Moments> new_moments(const Stage& stage, const Tensor& like);

// x into the channels of the feature buffer from `offset`, with moments.
void append(const Tensor& x, const Tensor& features, int64_t offset,
            const std::optional<Moments>& moments);

// All layers over a feature buffer that holds the first in_channels channels. Returns the
// bottlenecks if they are to be kept, else an empty tensor.
Tensor run_layers(const Stage& stage, const Tensor& features,
                  const std::optional<Moments>& moments);

// Room for the gradients of the parameters, in their order.
Tensors new_gradients(const Tensors& params);

// The coefficients of a gradient that is G itself.
Tensor start_coefficients(const Stage& stage, const Tensor& like);

// Backward of all layers: from the gradient buffer `grad` with its coefficients to the gradients of
// the parameters, and of the input in the first channels of grad. `source` is where the gradient of
// the last layer's channels stands at first: grad itself, or a tensor that may only be read;
// `grad_in` what the last layer's own backward adds to, nothing where the gradient of its inputs
// starts there.
void run_layers_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks,
                         Tensor source, Optional grad_in, const Tensor& grad, const Tensor& coef,
                         const Tensors& dparams);

}  // namespace densenet_ext
