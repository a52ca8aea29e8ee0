"""What the fused implementation cannot serve, and what happens then.

A fused stage reads the parameters of its modules and never calls them. Whatever somebody hung on an inner module, a hook,
a parametrization, another type of norm, would be passed over in silence. So every call looks for such things first, and
the plain implementation, which calls the modules, takes over where it finds one.

A `*_reason` function returns None where the fused implementation can be used, else a string that says why not. Modules
are named by a prefix, "" or ending in a dot.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import ops
from .functional import DTYPES
from .masks import DropChannel, active_dropout
from .running_stats import is_frozen
from .squeeze_excitation import SqueezeExcitation
from .synchronization import group_of

_CONV_KEYS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")
_CONV3X3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "return_indices": False, "ceil_mode": False}
_NORMS = ("norm1", "norm2")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_mode = "warn"
_reported: set[str] = set()
_thread = threading.local()


def set_fallback(mode: str) -> None:
    """What to do where efficient='fused' cannot serve a module or an input.

    Args:
        mode: 'warn', the default: warn once for each reason and compute with the plain implementation; 'error': raise
            RuntimeError with the reason.

    Raises:
        ValueError: mode is neither.
    """
    global _mode
    if mode not in ("warn", "error"):
        raise ValueError(f"mode is {mode!r}; it may be 'warn' or 'error'")
    _mode = mode
    _reported.clear()


def report(reason: str) -> None:
    """Warn about `reason`, the first time, or raise RuntimeError, as set_fallback says."""
    if _mode == "error":
        raise RuntimeError(f"efficient='fused' cannot be used: {reason}")
    if reason not in _reported:
        _reported.add(reason)
        warnings.warn(f"using the plain implementation instead of efficient='fused': {reason}", stacklevel=4)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Inside, on this thread, fused layers are computed by the plain implementation: their block has fallen back."""
    before = in_plain_layers()
    _thread.plain = True
    try:
        yield
    finally:
        _thread.plain = before


def in_plain_layers() -> bool:
    """Whether plain_layers holds on this thread."""
    return getattr(_thread, "plain", False)


def input_reason(inputs: Iterable[Tensor]) -> str | None:
    """About the inputs: other devices, layouts, dtypes, and subclasses of Tensor."""
    for x in inputs:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            if not isinstance(x, Tensor):
                return None  # for the checks of the arguments
            return f"the input is a {type(x).__name__}, not a plain tensor"
        ops.require_kernels(x)  # who trains on a GPU wants its kernels, or to be told: nothing is replaced there
        if x.device.type not in ops.DEVICES:
            return f"this build has no kernels for {x.device.type} tensors"
        if x.layout is not torch.strided:
            return f"the input's layout is {x.layout}"
        if x.dtype not in DTYPES:
            return f"the input's dtype is {x.dtype}"
    return None


def global_reason() -> str | None:
    """About hooks that torch calls for every module."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook is registered for all modules (torch.nn.modules.module.register_module_*_hook)"
    return None


def layers_reason(layers: dict[str, nn.Module], layer_type: type, prefix: str) -> str | None:
    """About the dense layers of a block, which one op has to serve together."""
    rate = None
    for name, layer in layers.items():
        name = prefix + name
        reason = module_reason(layer, name, layer_type) or inner_reason(layer, name + ".")
        if reason is not None:
            return reason
        if rate is None:
            rate = active_dropout(layer)
        elif active_dropout(layer) != rate:
            return f"{name} drops values with probability {active_dropout(layer)}, earlier layers with {rate}"
    return sharing_reason(layers, prefix)


def sharing_reason(layers: dict[str, nn.Module], prefix: str, *tail: tuple[str, nn.Module]) -> str | None:
    """About the norms of a block's layers and a named one of the tail: all take the statistics of the same processes."""
    norms = [(f"{prefix}{name}.{part}", layer._modules[part]) for name, layer in layers.items() for part in _NORMS]
    groups = ((name, group_of(norm)) for name, norm in (*norms, *tail) if not is_frozen(norm))
    first = next(groups, None)
    for name, group in groups:
        if group != first[1]:
            return f"{name} shares its batch statistics with other processes than {first[0]}"
    return None


def inner_reason(layer: nn.Module, prefix: str) -> str | None:
    """About the modules inside a dense layer."""
    parts = layer._modules
    reason = (
        norm_reason(parts["norm1"], prefix + "norm1")
        or conv_reason(parts["conv1"], prefix + "conv1", _POINTWISE, False)
        or norm_reason(parts["norm2"], prefix + "norm2")
        or conv_reason(parts["conv2"], prefix + "conv2", _CONV3X3, False)
        or module_reason(parts["drop_channel"], prefix + "drop_channel", DropChannel)
    )
    se = parts.get("se")
    if reason is None and se is not None:
        reason = (
            module_reason(se, prefix + "se", SqueezeExcitation)
            or conv_reason(se._modules["fc1"], prefix + "se.fc1", _POINTWISE, True)
            or conv_reason(se._modules["fc2"], prefix + "se.fc2", _POINTWISE, True)
        )
    return reason


def transition_reason(transition: nn.Module, name: str, transition_type: type) -> str | None:
    """About a transition and the modules inside."""
    parts = transition._modules
    return (
        module_reason(transition, name, transition_type)
        or norm_reason(parts["norm"], name + ".norm")
        or conv_reason(parts["conv"], name + ".conv", _POINTWISE, False)
    )


def stem_reason(modules: list[tuple[str, nn.Module]], x: Tensor) -> str | None:
    """About norm, ReLU and max pool of the stem, with their names, and x, which is what enters the norm."""
    if [name.rpartition(".")[2] for name, _ in modules] != ["norm0", "relu0", "pool0"]:
        return f"{modules[0][0]} is not followed by relu0 and pool0"
    (norm_name, norm), (relu_name, relu), (pool_name, pool) = modules
    reason = (
        input_reason([x])
        or global_reason()
        or norm_reason(norm, norm_name)
        or module_reason(relu, relu_name, nn.ReLU)
        or module_reason(pool, pool_name, nn.MaxPool2d)
    )
    if reason is not None:
        return reason
    for key, wanted in _POOL.items():
        value = pool.__dict__[key]
        if value not in (wanted, (wanted, wanted)):
            return f"{pool_name}.{key} is {value}, not {wanted}"
    if group_of(norm) >= 0:
        return f"{norm_name} shares its batch statistics with other processes"
    return None


def norm_reason(norm: nn.Module, name: str) -> str | None:
    """About a batch normalization, of one process or of several."""
    return module_reason(norm, name, nn.SyncBatchNorm if type(norm) is nn.SyncBatchNorm else nn.BatchNorm2d)


def conv_reason(conv: nn.Module, name: str, expected: tuple, bias: bool) -> str | None:
    """About a convolution; `expected` are the values of _CONV_KEYS."""
    reason = module_reason(conv, name, nn.Conv2d)
    if reason is not None:
        return reason
    v = conv.__dict__
    actual = (v["kernel_size"], v["stride"], v["padding"], v["dilation"], v["groups"], v["padding_mode"])
    if actual != expected:
        key, value, wanted = next(t for t in zip(_CONV_KEYS, actual, expected, strict=True) if t[1] != t[2])
        return f"{name}.{key} is {value}, not {wanted}"
    if (conv._parameters["bias"] is not None) != bias:
        return f"{name} has {'no' if bias else 'a'} bias"
    return None


def module_reason(module: nn.Module, name: str, expected: type) -> str | None:
    """About a module that would not be called: another type (which parametrizations make), another forward, a hook."""
    if type(module) is not expected:
        return f"{name} is a {type(module).__name__}, not a {expected.__name__}"
    values = module.__dict__
    if "forward" in values:
        return f"{name}.forward was replaced"
    if (
        values["_forward_hooks"]
        or values["_forward_pre_hooks"]
        or values["_backward_hooks"]
        or values["_backward_pre_hooks"]
    ):
        kind = next(kind for kind in _HOOKS if values[kind])
        return f"{name} has a {'backward' if 'backward' in kind else 'forward'} hook"
    return None
