"""The ops of a single dense layer, composed of kernel ops: a stage of one layer over its concatenated inputs."""

import torch
from torch import Tensor

from .._layout import gradient_dtype, new_features, new_maps
from .dense_stage import new_gradients
from .stage import Stage, run_layers, run_layers_backward


def dense_layer(
    inputs: list[Tensor],
    params: list[Tensor],
    masks: list[Tensor],
    frozen_stats: list[Tensor],
    eps: list[float],
    frozen: list[int],
    dropout_scale: float,
    options: list[int],
    kernels=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of one dense layer over the concatenation of inputs: (output [N, k, H, W], stats, gates, bottlenecks)."""
    x, in_channels = inputs[0], sum(part.size(1) for part in inputs)
    s = Stage(x, in_channels, params, masks, eps, frozen, dropout_scale, options, kernels)
    features = new_features(x, s.channels)
    _, *state = run_layers(s, inputs, features, frozen_stats)
    return new_maps(features, s.growth, features.shape[2:]).copy_(features[:, in_channels:]), *state


def dense_layer_backward(
    grad: Tensor,
    output: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    masks: list[Tensor],
    stats: Tensor,
    gates: Tensor,
    bottlenecks: Tensor,
    eps: list[float],
    frozen: list[int],
    dropout_scale: float,
    options: list[int],
    kernels=None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Backward of dense_layer: (dinputs like inputs, dparams like params)."""
    in_channels = sum(x.size(1) for x in inputs)
    s = Stage(output, in_channels, params, masks, eps, frozen, dropout_scale, options, kernels)
    features = new_features(output, s.channels).copy_(torch.cat([*inputs, output], 1))
    buffer = new_features(output, s.channels, gradient_dtype(output)).zero_()
    buffer[:, in_channels:] = grad
    coef = torch.zeros(3, s.samples, s.channels, dtype=s.dtype, device=output.device)
    coef[0] = 1
    dparams = new_gradients(params)
    run_layers_backward(s, features, buffer, buffer, coef, stats, gates, bottlenecks, dparams)
    dinputs, offset = [new_maps(x, x.size(1), x.shape[2:]) for x in inputs], 0
    for dx in dinputs:
        s.kernels.finish_gradient(features, buffer, coef, offset, dx)
        offset += dx.size(1)
    return dinputs, dparams
