// The layers of a stage backward, once for all devices.
//
// Layers run from the last to the first. When a layer is reached, the gradient of its channels is
// complete: coef0 * G + coef1 + coef2 * x. The bottleneck is computed again unless it was kept for
// backward. One gradient buffer and one workspace serve all layers.
#pragma once

#include "stage.h"

namespace densenet_ext {

// The gradient of a feature buffer's channels: grad G [N, C, H, W] with coef [3, N, C].
struct BufferGradient {
  Tensor grad, coef;
};

// Makes room for the gradients of the parameters, in their order.
Tensors new_gradients(const Tensors& params);

// Coefficients that make a gradient G itself: 1, 0, 0.
Tensor identity_coefficients(const Stage& stage, const Tensor& like);

// Writes the gradients of the layers' parameters into dparams, and that of the stage's input into
// the first channels of `gradient`.
//   source   the tensor that holds the gradient of the last layer's output (may be gradient.grad)
//   grad_in  the tensor to which the last layer adds the gradient of its inputs; nullopt for zeros
void run_layers_backward(const Stage& stage, const Tensor& features, const Tensor& bottlenecks,
                         Tensor source, Optional grad_in, const BufferGradient& gradient,
                         const Tensors& dparams);

}  // namespace densenet_ext
