"""Shape functions of the stage ops: what they return, without the values, for whoever traces them."""

import torch
from torch import Tensor

from .._constants import DX_CHANNELS_LAST, DX_NONE, TAIL_NONE, TAIL_TRANSITION
from .._layout import arithmetic_dtype, gradient_dtype, new_features, new_maps, padded_width
from .._load import load_extension

load_extension()  # registers the ops


def _saved(
    x: Tensor, params: list[Tensor], squeeze_excite: bool, tail: int, keep: bool, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty stats, gates and bottlenecks of a stage with input x."""
    each, extra = 10 if squeeze_excite else 6, (0, 3, 2)[tail]
    count = (len(params) - extra) // each
    width, growth = params[2].shape[0], params[5].shape[0]
    norms = [i * each + j for i in range(count) for j in (0, 3)] + ([count * each] if tail else [])
    dtype = arithmetic_dtype(x.dtype)
    stats = x.new_empty((4, sum(params[i].shape[0] for i in norms) + (group >= 0)), dtype=dtype)
    size = (count, x.shape[0] * (2 * growth + params[6].shape[0])) if squeeze_excite else (0,)
    gates = x.new_empty(size, dtype=dtype)
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    bottlenecks = x.new_empty((count, rows, padded_width(width)) if keep else (0,))
    return stats, gates, bottlenecks


@torch.library.register_fake("densenet_ext::dense_stage")
def _(x, params, masks, frozen_stats, mask_kind, dropout_scale, eps, frozen, squeeze_excite, tail, keep, _, group):
    stats, gates, bottlenecks = _saved(x, params, squeeze_excite, tail, keep, group)
    count, _, height, width = x.shape
    layers = (len(params) - (0, 3, 2)[tail]) // (10 if squeeze_excite else 6)
    channels = x.shape[1] + layers * params[5].shape[0]
    features = new_features(x, channels, gaps=tail != TAIL_NONE)
    if tail == TAIL_NONE:
        return features, x.new_empty((0,)), stats, gates, bottlenecks
    if tail == TAIL_TRANSITION:
        output = new_maps(x, params[-1].shape[0], height // 2, width // 2)
    else:
        output = x.new_empty((count, channels))
    return output, features, stats, gates, bottlenecks


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def _input_gradient(features: Tensor, in_channels: int, layout: int) -> Tensor:
    if layout == DX_NONE:
        return features.new_empty((0,))
    return new_maps(features, in_channels, *features.shape[2:], channels_last=layout == DX_CHANNELS_LAST)


@torch.library.register_fake("densenet_ext::dense_stage_backward")
def _(grad, features, params, masks, stats, gates, bottlenecks, *options):
    return _input_gradient(features, *options[-4:-2]), _like(params)


@torch.library.register_fake("densenet_ext::new_gradients")
def _(params):
    return _like(params)


@torch.library.register_fake("densenet_ext::dense_tail_backward")
def _(grad, features, params, *_):
    buffer = new_features(features, features.shape[1], gradient_dtype(features))
    coef = features.new_empty((3, *features.shape[:2]), dtype=arithmetic_dtype(features.dtype))
    return buffer, coef, _like(params)


@torch.library.register_fake("densenet_ext::dense_block_backward")
def _(buffer, coef, dparams, features, *rest):
    return _input_gradient(features, *rest[-4:-2])


@torch.library.register_fake("densenet_ext::dense_layer")
def _(inputs, params, masks, frozen_stats, mask_kind, dropout_scale, eps, frozen, squeeze_excite, keep, _, group):
    x = inputs[0]
    output = new_maps(x, params[5].shape[0], *x.shape[2:])
    return output, *_saved(x, params, squeeze_excite, TAIL_NONE, keep, group)


@torch.library.register_fake("densenet_ext::dense_layer_backward")
def _(grad, output, inputs, params, masks, stats, gates, bottlenecks, *options):
    return [new_maps(x, *x.shape[1:]) for x in inputs], _like(params)


@torch.library.register_fake("densenet_ext::dense_stem")
def _(x, norm_weight, norm_bias, frozen_stats, eps):
    channels, height, width = x.shape[1:]
    stats = x.new_empty((2, channels), dtype=arithmetic_dtype(x.dtype))
    return new_maps(x, channels, (height + 1) // 2, (width + 1) // 2), stats


@torch.library.register_fake("densenet_ext::dense_stem_backward")
def _(grad, x, norm_weight, norm_bias, stats, eps, frozen, need_dx):
    dx = new_maps(x, *x.shape[1:], channels_last=True) if need_dx else x.new_empty((0,))
    return dx, norm_weight.new_empty(norm_weight.shape), norm_bias.new_empty(norm_bias.shape)
