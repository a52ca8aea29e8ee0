"""A dense layer that calls its modules: plain, checkpointed, and wherever the fused implementation cannot serve.

Each module is called once in forward. There are three ways to do that, which give the same numbers:

    plain           autograd keeps for backward whatever PyTorch's operators ask for.
    checkpointed    backward computes concatenation, norm1, relu1 and conv1 again, from a snapshot of the modules.
    watched         no module runs a second time, because a hook may count its calls. Backward computes the
                    concatenation and the outputs of norm and ReLU again, by the formula of batch normalization.

`layer` has the attributes of EfficientDenseLayer, `inputs` are [N, C_i, H, W], a bottleneck is conv1's output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import _reasons
from ._masks import Masks, draw_masks
from ._patches import is_replaced, patched_reason
from ._remade import Remade, in_checkpoint
from ._snapshot import Snapshot
from ._transforms import carries_no_data, is_symbolic, transform_reason
from .drop_channel import DropChannel, kept_scale, scale_channels


def call_layer(layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Return the layer's k new channels [N, k, H, W]."""
    dropout_replaced = is_replaced(F, "dropout")  # the replacement draws its own mask
    channels = sum(x.shape[1] for x in inputs) if drops_channels(layer) else 0
    masks = draw_masks(layer, inputs[0], channels, dropout_replaced)
    y = _convolutions(layer, inputs, masks)
    if masks.dropout is not None:
        y = torch.where(masks.dropout, y * kept_scale(layer.drop_rate), 0.0)
    elif dropout_replaced:
        y = F.dropout(y, layer.drop_rate, layer.training)
    excite = getattr(layer, "se", None)
    return y if excite is None else excite(y)


def drops_channels(layer: nn.Module) -> bool:
    """Return True if the layer's Drop-Channel is active; a user's module in its place draws its own masks."""
    return type(layer.drop_channel) is DropChannel and layer.drop_channel.active


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """Return relu(norm(x)). If nothing else can see norm's output, ReLU overwrites it, whatever relu.inplace says."""
    y = norm(x)
    if is_symbolic(x):
        return relu(y)
    if _reasons.module_reason(relu, "", "", nn.ReLU) is not None or _reasons.global_reason() or patched_reason():
        return relu(y)
    return F.relu(y, inplace=_reasons.module_reason(norm, "", "", nn.BatchNorm2d) is None)


def _convolutions(layer: nn.Module, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
    """Return conv2's output, computed in the way that keeps the least for backward and can be used here."""
    if layer.efficient is False or not _keeps_for_backward(inputs):
        make_bottleneck = _bottleneck
    elif torch.compiler.is_compiling():
        make_bottleneck = _checkpointed_bottleneck if layer.efficient == "checkpoint" else _bottleneck
    elif _reasons.may_run_again(layer):
        make_bottleneck = _checkpointed_bottleneck
    elif patched_reason() is not None or in_checkpoint():
        make_bottleneck = _bottleneck
    else:
        return _watched_convolutions(layer, inputs, masks)
    return _new_channels(layer, make_bottleneck(layer, inputs, masks), masks)


def _keeps_for_backward(inputs: Sequence[Tensor]) -> bool:
    """Return True if autograd keeps tensors for backward, and hooks can keep others in their place."""
    return (
        torch.is_grad_enabled()
        and not is_symbolic(inputs)
        and transform_reason() is None
        and all(carries_no_data(type(x)) for x in inputs)
        and (torch.compiler.is_compiling() or torch._C._autograd._saved_tensors_hooks_is_enabled())
    )


def _bottleneck(layer: nn.Module, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
    # A single input needs no copy, unless a hook or a module in norm1's place could see or change it.
    single = len(inputs) == 1 and _reasons.module_reason(layer.norm1, "", "", type(layer.norm1)) is None
    x = inputs[0] if single else torch.cat(inputs, 1)
    z = norm_relu(layer.norm1, layer.relu1, _drop(layer, "pre_norm", x, masks.pre_norm))
    return layer.conv1(_drop(layer, "pre_conv", z, masks.pre_conv1))


def _new_channels(layer: nn.Module, bottleneck: Tensor, masks: Masks) -> Tensor:
    z = norm_relu(layer.norm2, layer.relu2, bottleneck)
    return layer.conv2(_drop(layer, "pre_conv", z, masks.pre_conv2))


def _drop(layer: nn.Module, position: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x, through the layer's Drop-Channel if this is its position."""
    if position != layer.drop_channel_position:
        return x
    return layer.drop_channel(x, mask) if type(layer.drop_channel) is DropChannel else layer.drop_channel(x)


def _checkpointed_bottleneck(layer: nn.Module, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
    in_forward, snapshot = True, Snapshot(layer, ("norm1", "relu1", "conv1", "drop_channel"))

    def run(*inputs: Tensor) -> Tensor:
        nonlocal in_forward
        if in_forward:
            in_forward = False
            return _bottleneck(layer, inputs, masks)
        return _bottleneck(snapshot.module(), inputs, masks)

    # The masks are drawn already; only a user's module in Drop-Channel's place draws when it runs.
    draws = type(layer.drop_channel) is not DropChannel
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)


def _watched_convolutions(layer: nn.Module, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
    concatenation, mask = torch.cat(inputs, 1), masks.pre_norm
    x = _drop(layer, "pre_norm", concatenation, mask)
    # Only a call could compute the output of a watched Drop-Channel again, or that of a user's module in its place.
    if x is not concatenation and _reasons.module_reason(layer.drop_channel, "", "", DropChannel) is not None:
        return _new_channels(layer, layer.conv1(norm_relu(layer.norm1, layer.relu1, x)), masks)

    def concatenate(pieces: Sequence[Tensor]) -> Tensor:
        concatenation = torch.cat(pieces, 1)
        return concatenation if mask is None else scale_channels(concatenation, mask)

    remade = Remade(x, inputs, concatenate)
    with remade:
        z = norm_relu(layer.norm1, layer.relu1, x)
        bottleneck = layer.conv1(_drop(layer, "pre_conv", z, masks.pre_conv1))
    remade.finish(layer.norm1, z)
    remade = Remade(bottleneck, [bottleneck], lambda pieces: pieces[0])
    with remade:
        z = norm_relu(layer.norm2, layer.relu2, bottleneck)
        y = layer.conv2(_drop(layer, "pre_conv", z, masks.pre_conv2))
    remade.finish(layer.norm2, z)
    return y
