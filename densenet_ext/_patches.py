"""A watch over the methods and functions that a plain layer calls.

Users who replace one of them (`nn.BatchNorm2d.forward = ...`, `torch.nn.functional.conv2d = ...`) expect every layer to
call the replacement. The fused ops call none of these functions. So each call of a fused module compares them with the
originals, which are recorded when this package is imported.
"""

from operator import attrgetter
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drop_channel import DropChannel
from .squeeze_excitation import SqueezeExcitation

_KINDS = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d, nn.Sequential)
_WATCHED = [
    (nn.Module, "_call_impl"),
    *((kind, "__call__") for kind in _KINDS),
    (nn.Sequential, "forward"),
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.BatchNorm2d, "forward"),
    (nn.BatchNorm2d, "_check_input_dim"),
    (nn.SyncBatchNorm, "forward"),
    (nn.ReLU, "forward"),
    (nn.AvgPool2d, "forward"),
    (nn.MaxPool2d, "forward"),
    (DropChannel, "forward"),
    (DropChannel, "draw"),
    (SqueezeExcitation, "forward"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "relu"),
    (F, "dropout"),
    (F, "avg_pool2d"),
    (F, "max_pool2d"),
    (F, "adaptive_avg_pool2d"),
    (torch, "cat"),
    (torch, "conv2d"),
    (torch, "batch_norm"),
    (torch, "relu"),
    (torch, "relu_"),
    (torch, "max_pool2d"),
    (Tensor, "sigmoid"),
]


def watch(*methods: tuple[type, str]) -> None:
    """Watch these methods of classes, too, and record all watched methods and functions as the originals."""
    global _owners, _read, _originals
    _WATCHED.extend(methods)
    # Every call of a fused module reads all of them, so they are read by a single call in C.
    _owners = SimpleNamespace(**{f"o{i}": owner for i, (owner, _) in enumerate(_WATCHED)})
    _read = attrgetter(*(f"o{i}.{name}" for i, (_, name) in enumerate(_WATCHED)))
    _originals = _read(_owners)


def patched_reason() -> str | None:
    """Return which method or function was replaced, or None."""
    # torch.compile has to see them read one by one, to notice when one of them changes.
    if not torch.compiler.is_compiling() and _read(_owners) == _originals:
        return None
    for (owner, name), original in zip(_WATCHED, _originals, strict=True):
        if getattr(owner, name) is not original:
            return f"{owner.__name__}.{name} was replaced"
    return None


def is_replaced(owner: object, name: str) -> bool:
    """Return True if this watched method or function was replaced."""
    return getattr(owner, name) is not _originals[_WATCHED.index((owner, name))]


watch()
