"""The stage ops composed of kernel ops: the algorithm of the compiled stage, readable and runnable.

A stage is a dense block together with the transition or the head that consumes it. Every channel is written once into
one feature buffer, its moments are computed once, and batch normalization, ReLU and masks happen while a kernel loads.
Backward walks the layers from last to first with one gradient buffer; nothing of the size of a bottleneck outlives its
layer unless keep_bottleneck asks for it.

The keyword `kernels` chooses whose kernel ops are composed: the reference twins, or `torch.ops.densenet_ext`. Products
are exact here whatever allow_tf32 says.
"""

import torch
from torch import Tensor

from .._constants import DX_CHANNELS_LAST, DX_NONE, TAIL_NONE, TAIL_TRANSITION
from .._layout import gradient_dtype, new_features, new_maps
from .stage import TWINS, Stage, run_layers, run_layers_backward


def dense_stage(
    x: Tensor,
    params: list[Tensor],
    masks: list[Tensor],
    frozen_stats: list[Tensor],
    mask_kind: int,
    dropout_scale: float,
    eps: list[float],
    frozen: list[int],
    squeeze_excite: bool,
    tail: int,
    keep_bottleneck: bool,
    allow_tf32: bool,
    group: int,
    kernels=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of a dense block and its consumer: (output, features, stats, gates, bottlenecks).

    x [N, C0, H, W] S; params, all A, a layer: norm1 weight, bias, conv1 weight, norm2 weight, bias, conv2 weight [, fc1
    weight, bias, fc2 weight, bias], then the tail's; masks a layer, where mask_kind has the bit: 1 before norm1
    [N, C_l], 2 before conv1 [N, C_l], 4 before conv2 [N, K2], 8 dropout bool [N, k, H, W]; eps and frozen: one a batch
    normalization in the order norm1, norm2 of each layer, then the tail's; frozen_stats: mean, variance of the frozen
    ones; tail: 0 none, 1 transition, 2 head; group: -1, or that of the processes that share batch statistics. stats
    [4, sum of widths] A: mean and biased variance, as used, scale and shift, 0 where a mask is folded in; with a group one
    column more: the values a channel.
    """
    s = Stage(params, masks, mask_kind, eps, frozen, squeeze_excite, tail, x.size(1), x, group, kernels)
    # With no consumer the buffer is the output, which the caller gets without gaps between its planes.
    features = new_features(x, s.channels, gaps=bool(tail))
    moments, stats, gates, bottlenecks = run_layers(s, [x], features, frozen_stats, dropout_scale, keep_bottleneck)
    if tail == TAIL_NONE:
        return features, s.empty(0, dtype=x.dtype), stats, gates, bottlenecks
    weight, bias, *conv = s.tail_params
    scale, shift = s.fold(2 * s.count, weight, bias, stats, moments, s.pixels)
    if tail == TAIL_TRANSITION:
        output = new_maps(x, conv[0].size(0), x.size(2) // 2, x.size(3) // 2)
        s.kernels.transition_forward(features, scale, shift, *conv, output)
    else:
        output = s.empty(s.samples, s.channels, dtype=x.dtype)
        s.kernels.head_forward(features, scale, shift, output)
    return output, features, stats, gates, bottlenecks


def dense_stage_backward(
    grad: Tensor,
    features: Tensor,
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
    tail: int,
    in_channels: int,
    dx_layout: int,
    allow_tf32: bool,
    group: int,
    kernels=None,
) -> tuple[Tensor, list[Tensor]]:
    """Backward of dense_stage from what it returned: (dx [N, C0, H, W] S, dparams like params).

    dx_layout: 0 no dx, which is [0] then; 1 that of the device's maps; 2 channels last.
    """
    s = Stage(params, masks, mask_kind, eps, frozen, squeeze_excite, tail, in_channels, features, group, kernels)
    options = (mask_kind, dropout_scale, eps, frozen, squeeze_excite, tail, in_channels, dx_layout, allow_tf32, group)
    if tail != TAIL_NONE:
        rest = (s.tail_params, stats, eps[-1], bool(frozen[-1]), allow_tf32, group, kernels)
        buffer, coef, dtail = dense_tail_backward(grad, features, *rest)
        dparams = new_gradients(params[: len(params) - len(dtail)])
        rest = (features, params, masks, stats, gates, bottlenecks, *options, kernels)
        return dense_block_backward(buffer, coef, dparams, *rest), [*dparams, *dtail]
    dparams = new_gradients(params)
    buffer = new_features(features, s.channels, gradient_dtype(features))
    coef = s.empty(3, s.samples, s.channels)
    coef[0], coef[1:] = 1, 0
    source = new_features(features, s.channels, gradient_dtype(features)).copy_(grad)
    run_layers_backward(s, features, source, buffer, coef, stats, gates, bottlenecks, dropout_scale, dparams)
    return _input_gradient(s, features, buffer, coef, dx_layout), dparams


def _input_gradient(stage: Stage, features: Tensor, buffer: Tensor, coef: Tensor, layout: int) -> Tensor:
    if layout == DX_NONE:
        return stage.empty(0, dtype=features.dtype)
    size = features.shape[2:]
    dx = new_maps(features, stage.in_channels, *size, channels_last=layout == DX_CHANNELS_LAST)
    stage.kernels.finish_gradient(features, buffer, coef, 0, dx)
    return dx


def new_gradients(params: list[Tensor]) -> list[Tensor]:
    """Room for the gradients of these parameters."""
    return [torch.empty_like(p) for p in params]


def dense_tail_backward(
    grad: Tensor,
    features: Tensor,
    params: list[Tensor],
    stats: Tensor,
    eps: float,
    frozen: bool,
    allow_tf32: bool,
    group: int,
    kernels=None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The tail's part of dense_stage_backward: (buffer [N, C, H, W], coef [3, N, C], dparams like params).

    params: the tail's, 3 of a transition, 2 of a head; eps, frozen: of its norm, whose statistics come last in stats.
    """
    kernels = kernels or TWINS
    weight, _, *conv = params
    count, channels = features.shape[:2]
    mean, var, scale, shift = stats[:, : stats.size(1) - (group >= 0)][:, -channels:]
    buffer = new_features(features, channels, gradient_dtype(features))
    coef = stats.new_empty(3, count, channels)
    dparams = dweight, dbias, *dconv = new_gradients(params)
    run = kernels.transition_backward if conv else kernels.head_backward
    run(
        *(features, scale[None], shift[None], *conv, weight, mean, var, eps, not frozen and group < 0),
        *(grad, buffer, coef, *dconv, dweight, dbias),
    )
    if group >= 0 and not frozen:
        kernels.synchronize_gradient(dweight, dbias, weight, mean, var, eps, stats[0, -1:], None, group, coef)
    return buffer, coef, dparams


def dense_block_backward(
    buffer: Tensor,
    coef: Tensor,
    dparams: list[Tensor],
    features: Tensor,
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
    tail: int,
    in_channels: int,
    dx_layout: int,
    allow_tf32: bool,
    group: int,
    kernels=None,
) -> Tensor:
    """The rest of it, the layers' part: dx. Works in buffer and coef; writes dparams, like params without the tail's."""
    s = Stage(params, masks, mask_kind, eps, frozen, squeeze_excite, tail, in_channels, features, group, kernels)
    run_layers_backward(s, features, buffer, buffer, coef, stats, gates, bottlenecks, dropout_scale, dparams)
    return _input_gradient(s, features, buffer, coef, dx_layout)
