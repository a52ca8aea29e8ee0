"""The stage ops composed of kernel ops: the algorithm of the compiled stage, readable and runnable.

A stage is a dense block together with the transition or the head that consumes it. Every channel is written once into
one feature buffer, its moments are computed once, and batch normalization, ReLU and masks happen while a kernel loads.
Backward walks the layers from last to first with one gradient buffer; nothing of the size of a bottleneck outlives its
layer unless it is kept for backward.

The keyword `kernels` chooses the kernel ops to compose: the reference twins, or `torch.ops.densenet_ext`. Products are
never in TF32 here, whatever allow_tf32 says.
"""

import torch
from torch import Tensor

from .._layout import gradient_dtype, new_features, new_maps
from .._protocol import GradientLayout, Options, Tail, TailParams
from .stage import TWINS, Stage, run_layers, run_layers_backward


def dense_stage(
    x: Tensor,
    params: list[Tensor],
    masks: list[Tensor],
    frozen_stats: list[Tensor],
    eps: list[float],
    frozen: list[int],
    dropout_scale: float,
    options: list[int],
    kernels=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of a dense block and its tail: (output, features, stats, gates, bottlenecks).

    x [N, C0, H, W] S; params, all A: LayerParams of each layer, then TailParams; masks: for each layer, those that
    options.mask_kind names, in MaskKind's order; eps and frozen: an entry for norm1 and norm2 of each layer, then for
    the tail's norm; frozen_stats: mean and variance of each frozen norm; options: Options of _protocol.py.
    stats [4, sum of widths] A: the mean and the biased
    variance that were used, scale, and shift, both 0 where a mask is folded in; a group adds a column with the number
    of values a channel.
    """
    s = Stage(x, x.size(1), params, masks, eps, frozen, dropout_scale, options, kernels)
    tail = s.options.tail
    # Without a tail the buffer is the output, which the caller gets without gaps between its planes.
    features = new_features(x, s.channels, gaps=tail != Tail.NONE)
    moments, *state = run_layers(s, [x], features, frozen_stats)
    if tail == Tail.NONE:
        return features, s.empty(0, dtype=x.dtype), *state
    norm = (2 * len(s.layers), s.tail.norm_weight, s.tail.norm_bias, state[0])
    scale, shift = s.fold(*norm, moments, s.pixels)
    if tail == Tail.TRANSITION:
        output = new_maps(x, s.tail.conv_weight.size(0), [size // 2 for size in x.shape[2:]])
        s.kernels.transition_forward(features, scale, shift, s.tail.conv_weight, output)
    else:
        output = s.empty(s.samples, s.channels, dtype=x.dtype)
        s.kernels.head_forward(features, scale, shift, output)
    return output, features, *state


def dense_stage_backward(
    grad: Tensor,
    features: Tensor,
    params: list[Tensor],
    masks: list[Tensor],
    stats: Tensor,
    gates: Tensor,
    bottlenecks: Tensor,
    eps: list[float],
    frozen: list[int],
    dropout_scale: float,
    options: list[int],
    in_channels: int,
    dx_layout: int,
    kernels=None,
) -> tuple[Tensor, list[Tensor]]:
    """Backward of dense_stage: (dx, dparams like params).

    features: the feature buffer of forward, which is its output where there is no tail; dx_layout: GradientLayout;
    dx is [0] where it is not wanted.
    """
    s = Stage(features, in_channels, params, masks, eps, frozen, dropout_scale, options, kernels)
    numbers = (eps, frozen, dropout_scale, options, in_channels, dx_layout)
    if s.options.tail != Tail.NONE:
        tail = [p for p in s.tail if p is not None]
        rest = (features, tail, stats, eps[-1], bool(frozen[-1]), options, kernels)
        buffer, coef, dtail = dense_tail_backward(grad, *rest)
        layers = params[: len(params) - len(tail)]
        dparams = new_gradients(layers)
        rest = (features, layers, masks, stats, gates, bottlenecks, *numbers, kernels)
        return dense_block_backward(buffer, coef, dparams, *rest), [*dparams, *dtail]
    dparams = new_gradients(params)
    buffer = new_features(features, s.channels, gradient_dtype(features))
    coef = s.empty(3, s.samples, s.channels)
    coef[0], coef[1:] = 1, 0
    source = new_features(features, s.channels, gradient_dtype(features)).copy_(grad)
    run_layers_backward(s, features, source, buffer, coef, stats, gates, bottlenecks, dparams)
    return _input_gradient(s, features, buffer, coef, dx_layout), dparams


def _input_gradient(stage: Stage, features: Tensor, buffer: Tensor, coef: Tensor, layout: int) -> Tensor:
    if layout == GradientLayout.NONE:
        return stage.empty(0, dtype=features.dtype)
    channels_last = layout == GradientLayout.CHANNELS_LAST
    dx = new_maps(features, stage.in_channels, features.shape[2:], channels_last=channels_last)
    stage.kernels.finish_gradient(features, buffer, coef, 0, dx)
    return dx


def new_gradients(params: list[Tensor]) -> list[Tensor]:
    """Uninitialized tensors for the gradients of these parameters."""
    return [torch.empty_like(p) for p in params]


def dense_tail_backward(
    grad: Tensor,
    features: Tensor,
    params: list[Tensor],
    stats: Tensor,
    eps: float,
    frozen: bool,
    options: list[int],
    kernels=None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The tail's part of dense_stage_backward: (buffer [N, C, H, W], coef [3, N, C], dparams like params).

    params: TailParams; eps, frozen: those of the tail's norm, whose statistics come last in stats.
    """
    kernels = kernels or TWINS
    group = Options(*options).group
    weight, _, conv = TailParams(*params)
    count, channels = features.shape[:2]
    mean, var, scale, shift = stats[:, : stats.size(1) - (group >= 0)][:, -channels:]
    buffer = new_features(features, channels, gradient_dtype(features))
    coef = stats.new_empty(3, count, channels)
    dparams = dweight, dbias, *dconv = new_gradients(params)
    folded = (features, scale[None], shift[None])
    norm = (weight, mean, var, eps, not frozen and group < 0)
    if conv is None:
        kernels.head_backward(*folded, *norm, grad, buffer, coef, dweight, dbias)
    else:
        kernels.transition_backward(*folded, conv, *norm, grad, buffer, coef, *dconv, dweight, dbias)
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
    eps: list[float],
    frozen: list[int],
    dropout_scale: float,
    options: list[int],
    in_channels: int,
    dx_layout: int,
    kernels=None,
) -> Tensor:
    """The layers' part of dense_stage_backward: dx. Works in buffer and coef, and writes dparams.

    params: the layers', without the tail's; eps, frozen and stats: those of all norms, the tail's included.
    """
    s = Stage(features, in_channels, params, masks, eps, frozen, dropout_scale, options, kernels)
    run_layers_backward(s, features, buffer, buffer, coef, stats, gates, bottlenecks, dparams)
    return _input_gradient(s, features, buffer, coef, dx_layout)
