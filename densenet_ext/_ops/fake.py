"""Shape functions of the stage ops: torch.compile asks them for the outputs' shapes and strides while it traces."""

import torch
from torch import Tensor

from .._layout import arithmetic_dtype, gradient_dtype, new_features, new_maps
from .._load import load_extension
from .._protocol import GradientLayout, Options, StageSizes, Tail

load_extension()  # registers the ops


def _kept_for_backward(x: Tensor, sizes: StageSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized stats, gates and bottlenecks of a stage with input x."""
    samples, _, *spatial = x.shape
    rows = samples
    for size in spatial:
        rows *= size
    dtype = arithmetic_dtype(x.dtype)
    stats = x.new_empty(sizes.stats_shape(), dtype=dtype)
    gates = x.new_empty(sizes.gates_shape(samples), dtype=dtype)
    return stats, gates, x.new_empty(sizes.bottlenecks_shape(rows))


@torch.library.register_fake("densenet_ext::dense_stage")
def _(x, params, masks, frozen_stats, eps, frozen, dropout_scale, options):
    sizes = StageSizes(params, Options(*options), x.shape[1])
    tail = sizes.options.tail
    state = _kept_for_backward(x, sizes)
    features = new_features(x, sizes.channels, gaps=tail != Tail.NONE)
    if tail == Tail.NONE:
        return features, x.new_empty((0,)), *state
    if tail == Tail.TRANSITION:
        output = new_maps(x, sizes.tail.conv_weight.shape[0], [size // 2 for size in x.shape[2:]])
    else:
        output = x.new_empty((x.shape[0], sizes.channels))
    return output, features, *state


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def _input_gradient(features: Tensor, in_channels: int, layout: int) -> Tensor:
    if layout == GradientLayout.NONE:
        return features.new_empty((0,))
    channels_last = layout == GradientLayout.CHANNELS_LAST
    return new_maps(features, in_channels, features.shape[2:], channels_last=channels_last)


@torch.library.register_fake("densenet_ext::dense_stage_backward")
def _(
    grad,
    features,
    params,
    masks,
    stats,
    gates,
    bottlenecks,
    eps,
    frozen,
    dropout_scale,
    options,
    in_channels,
    dx_layout,
):
    return _input_gradient(features, in_channels, dx_layout), _like(params)


@torch.library.register_fake("densenet_ext::new_gradients")
def _(params):
    return _like(params)


@torch.library.register_fake("densenet_ext::dense_tail_backward")
def _(grad, features, params, stats, eps, frozen, options):
    buffer = new_features(features, features.shape[1], gradient_dtype(features))
    coef = features.new_empty((3, *features.shape[:2]), dtype=arithmetic_dtype(features.dtype))
    return buffer, coef, _like(params)


@torch.library.register_fake("densenet_ext::dense_block_backward")
def _(
    buffer,
    coef,
    dparams,
    features,
    params,
    masks,
    stats,
    gates,
    bottlenecks,
    eps,
    frozen,
    dropout_scale,
    options,
    in_channels,
    dx_layout,
):
    return _input_gradient(features, in_channels, dx_layout)


@torch.library.register_fake("densenet_ext::dense_layer")
def _(inputs, params, masks, frozen_stats, eps, frozen, dropout_scale, options):
    x = inputs[0]
    sizes = StageSizes(params, Options(*options), sum(part.shape[1] for part in inputs))
    return new_maps(x, sizes.growth, x.shape[2:]), *_kept_for_backward(x, sizes)


@torch.library.register_fake("densenet_ext::dense_layer_backward")
def _(grad, output, inputs, params, *_):
    return [new_maps(x, x.shape[1], x.shape[2:]) for x in inputs], _like(params)


@torch.library.register_fake("densenet_ext::dense_stem")
def _(x, norm_weight, norm_bias, frozen_stats, eps):
    channels, *spatial = x.shape[1:]
    stats = x.new_empty((2, channels), dtype=arithmetic_dtype(x.dtype))
    return new_maps(x, channels, [(size + 1) // 2 for size in spatial]), stats


@torch.library.register_fake("densenet_ext::dense_stem_backward")
def _(grad, x, norm_weight, norm_bias, stats, eps, frozen, need_dx):
    dx = new_maps(x, x.shape[1], x.shape[2:], channels_last=True) if need_dx else x.new_empty((0,))
    return dx, norm_weight.new_empty(norm_weight.shape), norm_bias.new_empty(norm_bias.shape)
