"""The fused stem, dense layer and stage as functions of a tensor and the modules that hold the parameters.

Everything around the compiled op is here: checks, autocast, casts, masks, and the running statistics, which change
exactly once a call whatever backward recomputes.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ._checks import check_kept
from ._ops import handles
from ._protocol import Tail
from ._stage_arguments import NewFirst, NormArguments, NotServed, StageArguments, wrong_dtype
from ._transforms import is_plain, transform_reason

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dense_stage(
    x: Tensor,
    layers: Sequence[nn.Module],
    tail_norm: nn.BatchNorm2d | None = None,
    tail_conv: nn.Conv2d | None = None,
    *,
    keep_bottleneck: bool | int = False,
    new_first: bool = False,
) -> Tensor:
    """A dense block, and the transition or the head that consumes it, as one differentiable op.

    Layer l of k new channels computes, on the concatenation x_l of x and all earlier layers' outputs,
        y = SE(dropout(conv2(r2 * relu(norm2(conv1(r1 * relu(norm1(q * x_l))))))))
    with Drop-Channel masks q or r1 and r2, and SE only where the layers have them.

    Args:
        x: [N, C0, H, W], float64, float32, bfloat16 or float16, in any memory format; cast as PyTorch would under autocast.
        layers: L >= 1 modules with norm1, conv1, norm2, conv2 and, where used, se, drop_channel, drop_channel_position
            and drop_rate, as EfficientDenseLayer has them. They agree in k, in the bottleneck's width K2, in se's
            hidden width and in drop_rate. Norms may also be torchvision's FrozenBatchNorm2d. Weights of convolutions
            have x's dtype, or one that autocast casts to it; norms have x's dtype, or float32 where x is bfloat16 or
            float16.
        tail_norm: batch normalization of the transition or the head, or None for the block alone.
        tail_conv: 1x1 convolution of a transition; None with tail_norm makes the tail a head.
        keep_bottleneck: keep the outputs of all conv1 for backward, N * H * W * K2 values a layer, or of so many of the
            last ones. Backward then computes one convolution less a layer.
        new_first: a layer's new channels stand before all earlier ones in the concatenation that the next layer and the
            tail read, and in the output of a block alone.

    Returns:
        [N, C0 + L*k, H, W] without a tail, [N, O, H // 2, W // 2] after a transition: norm, ReLU, 1x1 convolution,
        2x2 average pool; [N, C0 + L*k] after a head: norm, ReLU, global average pool.

    Norms in training mode normalize with the batch's statistics and update their running statistics; others use these.

    Raises:
        TypeError: x is no tensor, or x or a parameter is not of those dtypes.
        ValueError: a shape or a device does not fit, layers differ, or a norm in training mode gets a single value a
            channel.
        RuntimeError: x is on a CUDA device and this build has no kernels that run there; a transform of torch.func,
            forward-mode differentiation, torch.jit.trace or torch.export is active.
        torch.OutOfMemoryError: there is no room for the result or a workspace; nothing was changed.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017; Pleiss et al., Memory-Efficient
    Implementation of DenseNets, 2017; Cai et al., arXiv 1904.03392 (Drop-Channel); Hu et al., CVPR 2018 (SE).
    """
    if _is_overridden(x):
        options = {"keep_bottleneck": keep_bottleneck, "new_first": new_first}
        return handle_torch_function(dense_stage, (x,), x, layers, tail_norm, tail_conv, **options)
    check_kept(keep_bottleneck, "keep_bottleneck")
    x, casts = _input(x, "x")
    if not layers:
        raise ValueError("layers is empty; it must hold at least one dense layer")
    if tail_conv is not None and tail_norm is None:
        raise ValueError("tail_conv is given without tail_norm; a transition needs both")
    channels = x.shape[1]
    order = NewFirst(channels, layers[0].conv2.weight.shape[0]) if new_first else None
    arguments = StageArguments(x, casts, layers, order)
    for index, layer in enumerate(layers):
        arguments.add_layer(layer, index, channels)
        channels += arguments.growth
    tail = Tail.NONE
    if tail_norm is not None:
        tail = Tail.HEAD if tail_conv is None else Tail.TRANSITION
        arguments.add_norm(tail_norm, channels, "tail_norm", ordered=True)
    if tail_conv is not None:
        if tail_conv.weight.shape[1] != channels:
            raise ValueError(f"tail_conv takes {tail_conv.weight.shape[1]} channels; it must take {channels}")
        if tail_conv.weight.shape[2:] != (1, 1):
            raise NotServed(None, f" has a weight {tuple(tail_conv.weight.shape)}, not 1x1")
        if x.shape[2] < 2 or x.shape[3] < 2:
            raise ValueError(f"x is {tuple(x.shape)}; a transition needs at least 2x2 pixels")
        arguments.add_weight(tail_conv.weight, "tail_conv.weight", ordered=True)
    arguments.require_plain_parameters()
    keep = keep_bottleneck if torch.is_grad_enabled() else False
    arguments.draw_masks(layers)
    with _no_autocast(x), handles.memory_errors():
        numbers = arguments.flat(tail, keep, _tf32_allowed(x))
        output, _, stats, _, _ = handles.dense_stage(x, *numbers)
    arguments.update_running_statistics(stats)
    if order is None or tail == Tail.TRANSITION:
        return output
    return order.to_module(output, 1)  # the channels of a block alone, or of a head


def dense_layer(inputs: Tensor | Sequence[Tensor], layer: nn.Module, *, keep_bottleneck: bool = False) -> Tensor:
    """One dense layer on the concatenation of `inputs`, as one differentiable op that stores no concatenation.

    Args:
        inputs: tensors [N, C_i, H, W] of one dtype, or a single one.
        layer: as in dense_stage.
        keep_bottleneck: as in dense_stage.

    Returns:
        The layer's k new channels, [N, k, H, W].

    Raises:
        TypeError, ValueError, RuntimeError, torch.OutOfMemoryError: as in dense_stage.

    Source: as in dense_stage.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    if not inputs:
        raise ValueError("inputs is empty; it must hold at least one tensor")
    if _is_overridden(*inputs):
        return handle_torch_function(dense_layer, tuple(inputs), inputs, layer, keep_bottleneck=keep_bottleneck)
    checked = [_input(x, f"inputs[{i}]") for i, x in enumerate(inputs)]
    inputs, casts = [x for x, _ in checked], checked[0][1]
    x, channels = inputs[0], sum(part.shape[1] for part in inputs)
    for i, part in enumerate(inputs):
        if part.device != x.device:
            raise ValueError(f"inputs[{i}] is on {part.device}; it must be on {x.device}, where inputs[0] is")
        if part.dtype != x.dtype or part.shape[0] != x.shape[0] or part.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"inputs[{i}] is {tuple(part.shape)} of {part.dtype}; all inputs must have the samples, the size and "
                f"the dtype of inputs[0], which is {tuple(x.shape)} of {x.dtype}"
            )
    arguments = StageArguments(x, casts, [layer])
    arguments.add_layer(layer, 0, channels)
    arguments.require_plain_parameters()
    arguments.draw_masks([layer])
    keep = keep_bottleneck if torch.is_grad_enabled() else False
    with _no_autocast(x), handles.memory_errors():
        numbers = arguments.flat(Tail.NONE, keep, _tf32_allowed(x))
        output, stats, _, _ = handles.dense_layer(inputs, *numbers)
    arguments.update_running_statistics(stats)
    return output


def dense_stem(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch normalization, ReLU and max pool of an ImageNet stem, as one differentiable op.

        max_pool2d(relu(norm(x)), kernel_size=3, stride=2, padding=1)

    Args:
        x: [N, C, H, W], as in dense_stage. Copied unless it is channels last.
        norm: batch normalization of C channels, whose statistics are not shared with other processes.

    Returns:
        [N, C, (H + 1) // 2, (W + 1) // 2].

    Running statistics are updated as in dense_stage. The op avoids storing the normalized and the rectified maps and
    the pool's indices; backward computes them again from x.

    Raises:
        TypeError, ValueError, RuntimeError, torch.OutOfMemoryError: as in dense_stage.

    Source: He et al., Deep Residual Learning, CVPR 2016, table 1; Huang et al., CVPR 2017, table 1.
    """
    if _is_overridden(x):
        return handle_torch_function(dense_stem, (x,), x, norm)
    x = _input(x, "x")[0].contiguous(memory_format=torch.channels_last)
    arguments = NormArguments(x)
    arguments.add_norm(norm, x.shape[1], "norm")
    if arguments.shared_by >= 0:
        raise ValueError("norm shares its batch statistics with other processes; the fused stem cannot share")
    arguments.require_plain_parameters()
    with _no_autocast(x), handles.memory_errors():
        output, stats = handles.dense_stem(x, *arguments.params, arguments.frozen_stats, norm.eps)
    arguments.update_running_statistics(stats)
    return output


def _is_overridden(*inputs: Tensor) -> bool:
    """True if a subclass of Tensor among the inputs overrides this function, as it may override PyTorch's."""
    return any(not is_plain(type(x)) for x in inputs) and has_torch_function(inputs)


def _input(x: Tensor, name: str) -> tuple[Tensor, bool]:
    """Check x and cast it as autocast asks. Returns x, and True if autocast is on for it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    reason = transform_reason()
    if reason is not None:
        raise RuntimeError(f"densenet_ext.functional cannot be used: {reason}; call the module, or efficient=False")
    if x.dim() != 4:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must have 4: [N, C, H, W]")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} is {tuple(x.shape)}; only the number of samples may be 0")
    if x.dtype not in DTYPES:
        raise TypeError(wrong_dtype(x, name, DTYPES))
    handles.require_kernels(x)
    if not is_plain(type(x)):
        x = x.as_subclass(Tensor)
    if x.dtype == torch.float64 or not _autocasts(x):
        return x, False
    return x.to(torch.get_autocast_dtype(x.device.type)), True


def _tf32_allowed(x: Tensor) -> bool:
    """True if float32 products may be computed in TF32, as PyTorch's own convolutions on that device do."""
    if x.device.type != "cuda":
        return False
    from ._ops.precision import cudnn_uses_tf32  # imports the compiler, which takes seconds

    return cudnn_uses_tf32()


def _autocasts(x: Tensor) -> bool:
    return x.device.type in handles.DEVICES and torch.is_autocast_enabled(x.device.type)


def _no_autocast(x: Tensor):
    """Return a context without autocast, which _input has applied: inside the op no dtype may change."""
    if _autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
