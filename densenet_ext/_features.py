"""Run a network's features: module by module, or several modules at once by one op.

Two groups of modules are fused: norm0, relu0 and pool0 of the stem, and a dense block with the transition after it, or
with norm5 and the rest of the head.
"""

import torch
from torch import Tensor, nn

from . import _reasons, fallback, functional
from ._plain_layer import norm_relu
from ._transforms import is_symbolic
from .layers import EfficientDenseBlock, Transition

_Named = list[tuple[str, nn.Module]]


def run_features(modules: dict[str, nn.Module], x: Tensor, head: bool = False) -> tuple[Tensor, bool]:
    """Run the modules in order, fused where the fused implementation serves them.

    head: True if the last stage may include the head (norm5, ReLU, global average pool). Returns the output, and True
    if the stage did include it.
    """
    rest, pooled = list(modules.items()), False
    fuses = any(_is_fused_block(module) for module in modules.values()) and not is_symbolic(x)
    if fuses and rest[0][0] == "conv0":
        x = _to_channels_last(x)
    while rest:
        y, count = None, 0
        if fuses:
            y, count = _run_stem(rest, x) if rest[0][0] == "norm0" else _run_stage(rest, x, head)
            pooled = y is not None and rest[count - 1][0] == "norm5"
        if y is None:
            y, count = _run_modules(rest, x)
        x = y
        del rest[:count]
    return x, pooled


def _is_fused_block(module: nn.Module) -> bool:
    return isinstance(module, EfficientDenseBlock) and module.efficient == "fused"


def _names(modules: _Named) -> list[str]:
    return [name for name, _ in modules]


def _run_modules(rest: _Named, x: Tensor) -> tuple[Tensor, int]:
    """Call the first of these modules, or the stem's norm and ReLU. Returns the output and how many were called."""
    if _names(rest[:2]) == ["norm0", "relu0"]:
        return norm_relu(rest[0][1], rest[1][1], x), 2
    return rest[0][1](x), 1


def _to_channels_last(x: Tensor) -> Tensor:
    """Convert the images to channels last, so that conv0's output has the layout that the next op reads.

    On a CPU oneDNN would otherwise compute a planar output in another layout first, and copy it.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or _reasons.call_reason([x]) is not None:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] == 1:  # planar and channels last at once: PyTorch tells by the strides which is meant
        x = x.reshape(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x


def _run_stem(rest: _Named, x: Tensor) -> tuple[Tensor | None, int]:
    """Run norm0, relu0 and pool0 by one op. Returns its output and 3.

    Returns (None, 0) if these are not the next modules, or if one op cannot serve them, which it reports.
    """
    if _names(rest[:3]) != ["norm0", "relu0", "pool0"]:
        return None, 0
    reason = _reasons.stem_reason([(f"features.{name}", module) for name, module in rest[:3]], x)
    if reason is None:
        try:
            return functional.dense_stem(x, rest[0][1]), 3
        except functional.NotServed as error:
            reason = f"the stem{error.what}"
    fallback.report(reason)
    return None, 0


def _run_stage(rest: _Named, x: Tensor, head: bool) -> tuple[Tensor | None, int]:
    """Run a block and its tail by one op. Returns its output and 2, or (None, 0) if these modules are no stage."""
    if len(rest) < 2:
        return None, 0
    (name, block), (consumer_name, consumer) = rest[:2]
    if not _is_fused_block(block) or not block.layers:
        return None, 0
    path = f"features.{consumer_name}"
    if consumer_name.startswith("transition"):
        reason = _reasons.transition_reason(consumer, path, Transition)
    elif consumer_name == "norm5" and len(rest) == 2 and head:
        reason = _reasons.norm_reason(consumer, "", path)
    else:
        return None, 0
    reason = reason or _reasons.module_reason(block, "features.", name, EfficientDenseBlock)
    if reason is None:
        if block.fallback_reason(x) is not None:
            return None, 0  # the block reports the reason when it is called
        tail = (consumer.norm, consumer.conv) if isinstance(consumer, Transition) else (consumer,)
        reason = _reasons.sharing_reason(block._modules, block._prefix, (path, tail[0]))
    if reason is not None:
        fallback.report(reason)
        return None, 0
    return block.fused(x, *tail), 2
