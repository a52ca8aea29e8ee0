"""The stage ops as PyTorch knows them: loads the compiled library, adds shape functions and autograd.

The ops are `torch.ops.densenet_ext.*`; `reference/stage.py` describes their arguments. The four that have autograd or are
part of it are functional; the kernel ops below them write into their arguments and have no autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import synchronization
from ._load import cuda_status, load_extension
from .reference.layout import (
    CHANNELS_LAST_DEVICES,
    arithmetic_dtype,
    lies_channels_last,
    new_features,
    new_maps,
    padded_width,
)
from .reference.stage import (
    DX_CHANNELS_LAST,
    DX_NONE,
    DX_OWN_LAYOUT,
    MASK_DROPOUT,
    MASK_PRE_CONV1,
    MASK_PRE_CONV2,
    MASK_PRE_NORM,
    TAIL_HEAD,
    TAIL_NONE,
    TAIL_TRANSITION,
)

if load_extension().build_info()["simulated"]:
    CHANNELS_LAST_DEVICES.add("cpu")

for _name in ("synchronize_statistics", "synchronize_gradient"):
    for _key in ("CPU", "CUDA"):
        torch.library.impl(f"densenet_ext::{_name}", _key, getattr(synchronization, _name))

dense_stage = torch.ops.densenet_ext.dense_stage.default
dense_stage_backward = torch.ops.densenet_ext.dense_stage_backward.default
dense_layer = torch.ops.densenet_ext.dense_layer.default
dense_layer_backward = torch.ops.densenet_ext.dense_layer_backward.default
dense_stem = torch.ops.densenet_ext.dense_stem.default
dense_stem_backward = torch.ops.densenet_ext.dense_stem_backward.default

__all__ = [
    "DEVICES",
    "MASK_DROPOUT",
    "MASK_PRE_CONV1",
    "MASK_PRE_CONV2",
    "MASK_PRE_NORM",
    "TAIL_HEAD",
    "TAIL_NONE",
    "TAIL_TRANSITION",
    "dense_layer",
    "dense_layer_backward",
    "dense_stage",
    "dense_stage_backward",
    "dense_stem",
    "dense_stem_backward",
    "memory_errors",
    "require_kernels",
]


def _devices_of(op: str) -> frozenset[str]:
    keys = (("cpu", "CPU"), ("cuda", "CUDA"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(device for device, key in keys if has_kernel(f"densenet_ext::{op}", key))


# Types of device that the loaded library has kernels for.
DEVICES = _devices_of("append")


def require_kernels(x: Tensor) -> None:
    """RuntimeError where x is on a CUDA device and the CUDA kernels are not there."""
    if x.device.type == "cuda" and "cuda" not in DEVICES:
        raise RuntimeError(
            f"x is on {x.device}, and the CUDA kernels of densenet_ext are {cuda_status()}. Install it where nvcc and "
            "torch have the same major version of CUDA, or set efficient=False or 'checkpoint'"
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, a lack of memory in an op is the exception that it is in PyTorch's own."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


# ---- shapes ------------------------------------------------------------------------------------------------------------


def _saved(
    x: Tensor, params: list[Tensor], squeeze_excite: bool, tail: int, keep: bool, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty stats, gates and bottlenecks of a stage with input x."""
    each, extra = 10 if squeeze_excite else 6, (0, 3, 2)[tail]
    count = (len(params) - extra) // each
    width, growth = params[2].shape[0], params[5].shape[0]
    norms = [i * each + j for i in range(count) for j in (0, 3)] + ([count * each] if tail else [])
    dtype = arithmetic_dtype(x.dtype)
    stats = x.new_empty((2, sum(params[i].shape[0] for i in norms) + (group >= 0)), dtype=dtype)
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


@torch.library.register_fake("densenet_ext::dense_stage_backward")
def _(grad, features, params, masks, stats, gates, bottlenecks, *options):
    in_channels, layout = options[-4:-2]
    if layout == DX_NONE:
        dx = features.new_empty((0,))
    else:
        dx = new_maps(features, in_channels, *features.shape[2:], channels_last=layout == DX_CHANNELS_LAST)
    return dx, [p.new_empty(p.shape) for p in params]


@torch.library.register_fake("densenet_ext::dense_layer")
def _(inputs, params, masks, frozen_stats, mask_kind, dropout_scale, eps, frozen, squeeze_excite, keep, _, group):
    x = inputs[0]
    output = new_maps(x, params[5].shape[0], *x.shape[2:])
    return output, *_saved(x, params, squeeze_excite, TAIL_NONE, keep, group)


@torch.library.register_fake("densenet_ext::dense_layer_backward")
def _(grad, output, inputs, params, masks, stats, gates, bottlenecks, *options):
    return [new_maps(x, *x.shape[1:]) for x in inputs], [p.new_empty(p.shape) for p in params]


@torch.library.register_fake("densenet_ext::dense_stem")
def _(x, norm_weight, norm_bias, frozen_stats, eps):
    channels, height, width = x.shape[1:]
    stats = x.new_empty((2, channels), dtype=arithmetic_dtype(x.dtype))
    return new_maps(x, channels, (height + 1) // 2, (width + 1) // 2), stats


@torch.library.register_fake("densenet_ext::dense_stem_backward")
def _(grad, x, norm_weight, norm_bias, stats, eps, frozen, need_dx):
    dx = new_maps(x, *x.shape[1:], channels_last=True) if need_dx else x.new_empty((0,))
    return dx, norm_weight.new_empty(norm_weight.shape), norm_bias.new_empty(norm_bias.shape)


# ---- autograd ----------------------------------------------------------------------------------------------------------


def _wanted(grads: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


class DenseStage(torch.autograd.Function):
    """Autograd of dense_stage by hand: with lists of hundreds of tensors register_autograd takes milliseconds a step."""

    @staticmethod
    def forward(ctx, below, inputs, *_):
        x, params, masks, _, *ctx.numbers, ctx.tail, _, ctx.tf32, ctx.group = inputs
        result, features, *kept = output = below(*inputs)
        ctx.mark_non_differentiable(features, *kept)
        ctx.set_materialize_grads(False)
        ctx.in_channels, ctx.params = x.shape[1], len(params)
        ctx.layout = DX_CHANNELS_LAST if lies_channels_last(x) else DX_OWN_LAYOUT
        ctx.save_for_backward(result if ctx.tail == TAIL_NONE else features, *kept, *params, *masks)
        return output

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * (3 + ctx.params)
        features, stats, gates, bottlenecks, *rest = ctx.saved_tensors
        params, masks = rest[: ctx.params], rest[ctx.params :]
        need_x, *need_params = ctx.needs_input_grad[2:]
        layout = ctx.layout if need_x else DX_NONE
        options = (*ctx.numbers, ctx.tail, ctx.in_channels, layout, ctx.tf32, ctx.group)
        with memory_errors():
            dx, dparams = dense_stage_backward(grad, features, params, masks, stats, gates, bottlenecks, *options)
        return None, None, *_wanted([dx, *dparams], [need_x, *need_params])


def _stage_autograd(keyset, *inputs):
    def below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return dense_stage.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    differentiable = (inputs[0], *inputs[1])
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        return DenseStage.apply(below, inputs, *differentiable)
    return below(*inputs)


def _layer_setup(ctx, inputs, output):
    xs, params, masks, _, *ctx.numbers, _, ctx.tf32, ctx.group = inputs
    result, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.counts = (len(xs), len(params), len(masks), len(inputs[3]))
    ctx.save_for_backward(result, *kept, *xs, *params, *masks)


def _layer_backward(ctx, grad, *_):
    xs, params, masks, frozen_stats = ctx.counts
    need_xs, need_params = ctx.needs_input_grad[:2]
    if grad is None:
        dxs, dparams = [None] * xs, [None] * params
    else:
        output, *kept = ctx.saved_tensors[:4]
        rest = list(ctx.saved_tensors[4:])
        options = (*ctx.numbers, ctx.tf32, ctx.group)
        with memory_errors():
            dxs, dparams = dense_layer_backward(
                grad, output, rest[:xs], rest[xs : xs + params], rest[xs + params :], *kept, *options
            )
        dxs, dparams = _wanted(dxs, need_xs), _wanted(dparams, need_params)
    return dxs, dparams, [None] * masks, [None] * frozen_stats, *[None] * 8


def _stem_setup(ctx, inputs, output):
    x, weight, bias, frozen_stats, ctx.eps = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.frozen = len(frozen_stats)
    ctx.save_for_backward(x, weight, bias, stats)


def _stem_backward(ctx, grad, *_):
    gradients = [None] * 3
    needed = ctx.needs_input_grad[:3]
    if grad is not None:
        with memory_errors():
            options = (ctx.eps, ctx.frozen > 0, needed[0])
            gradients = _wanted(dense_stem_backward(grad, *ctx.saved_tensors, *options), needed)
    return *gradients, [None] * ctx.frozen, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "densenet_ext: a fused stem, dense layer or stage has no second derivative; "
        "build the model with efficient=False to differentiate its gradients"
    )


_library = torch.library.Library("densenet_ext", "FRAGMENT")
_library.impl("dense_stage", _stage_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd("densenet_ext::dense_layer", _layer_backward, setup_context=_layer_setup)
torch.library.register_autograd("densenet_ext::dense_stem", _stem_backward, setup_context=_stem_setup)
torch.library.register_autograd("densenet_ext::dense_stem_backward", _no_second_derivative)
torch.library.register_autograd("densenet_ext::dense_stage_backward", _no_second_derivative)
torch.library.register_autograd("densenet_ext::dense_layer_backward", _no_second_derivative)
