"""One dense layer alone as ops composed of kernel ops: the layer of a stage over the concatenation of its inputs."""

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
    mask_kind: int,
    dropout_scale: float,
    eps: list[float],
    frozen: list[int],
    squeeze_excite: bool,
    keep_bottleneck: bool,
    allow_tf32: bool,
    group: int,
    kernels=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward of one dense layer over the concatenation of inputs: (output [N, k, H, W], stats, gates, bottlenecks)."""
    in_channels = sum(x.size(1) for x in inputs)
    s = Stage(params, masks, mask_kind, eps, frozen, squeeze_excite, 0, in_channels, inputs[0], group, kernels)
    features = new_features(inputs[0], s.channels)
    _, stats, gates, bottlenecks = run_layers(s, inputs, features, frozen_stats, dropout_scale, keep_bottleneck)
    output = new_maps(features, s.growth, features.size(2), features.size(3)).copy_(features[:, in_channels:])
    return output, stats, gates, bottlenecks


def dense_layer_backward(
    grad: Tensor,
    output: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    masks: list[Tensor],
    stats: Tensor,
    gates: Tensor,
    bottlenecks: Tensor,
    mask_kind: int,
    dropout_scale: float,
    eps: list[float],
    frozen: list[int],
    squeeze_excite: bool,
    allow_tf32: bool,
    group: int,
    kernels=None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Backward of dense_layer: (dinputs like inputs, dparams like params)."""
    in_channels = sum(x.size(1) for x in inputs)
    s = Stage(params, masks, mask_kind, eps, frozen, squeeze_excite, 0, in_channels, output, group, kernels)
    features = new_features(output, s.channels).copy_(torch.cat([*inputs, output], 1))
    buffer = new_features(output, s.channels, gradient_dtype(output)).zero_()
    buffer[:, in_channels:] = grad
    coef = torch.zeros(3, s.samples, s.channels, dtype=s.dtype, device=output.device)
    coef[0] = 1
    dparams = new_gradients(params)
    run_layers_backward(s, features, buffer, buffer, coef, stats, gates, bottlenecks, dropout_scale, dparams)
    dinputs, offset = [new_maps(x, x.size(1), x.size(2), x.size(3)) for x in inputs], 0
    for dx in dinputs:
        s.kernels.finish_gradient(features, buffer, coef, offset, dx)
        offset += dx.size(1)
    return dinputs, dparams
