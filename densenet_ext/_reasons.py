"""The reasons why the fused implementation cannot serve a call or a module.

A fused stage reads the parameters of its modules and never calls them. It would silently ignore whatever a user has
attached to an inner module: a hook, a parametrization, another type of norm. So every call looks for such things first.
A block in which one is found runs its layers one by one: the layer concerned calls its modules, as _plain_layer.py
says, and each of the others is still fused.

A `*_reason` function returns None where the fused implementation can be used, else a string that says why it cannot.
Modules are named by a prefix, which is "" or ends in a dot, and a name.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import fallback
from ._ops import handles
from ._ops.sync_batch_norm import group_of
from ._patches import patched_reason
from ._running_stats import applies_activation, is_frozen, is_frozen_kind
from ._transforms import carries_no_data, is_plain, transform_reason
from .drop_channel import DropChannel
from .functional import DTYPES
from .squeeze_excitation import SqueezeExcitation

_CONV_KEYS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")
CONV3X3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
MAX_POOL = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "return_indices": False, "ceil_mode": False}
AVG_POOL = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False, "divisor_override": None}
_LAYER_PARTS = frozenset(("norm1", "relu1", "conv1", "norm2", "relu2", "conv2", "drop_channel", "se"))
_NORMS = ("norm1", "norm2")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# torch.nn.Module's call and a convolution's forward look these up on the instance first, then on the class.
_METHODS = ("forward", "_conv_forward", "_call_impl")

_NORM_TYPES = (nn.BatchNorm2d, nn.SyncBatchNorm)
# torchvision and timm may be imported after this package, so the forward of the first norm of a type is the original.
_first_forward: dict[type, object] = {}


def call_reason(inputs: Iterable[Tensor]) -> str | None:
    """Check all but the modules: DENSENET_EXT_DISABLE, transforms, replaced functions, global hooks, and the inputs."""
    if fallback.is_disabled():
        return "DENSENET_EXT_DISABLE is set"
    return transform_reason() or patched_reason() or global_reason() or input_reason(inputs)


def input_reason(inputs: Iterable[Tensor]) -> str | None:
    """Check the inputs: device, layout, dtype, and subclasses of Tensor that hold more than their values."""
    for x in inputs:
        kind = type(x)
        if not is_plain(kind):
            if not isinstance(x, Tensor):
                return None  # functional.py raises the error
            if not carries_no_data(kind):
                return f"the input is a {kind.__name__}, whose values the kernels cannot read"
        # This raises on a GPU without kernels, where a fallback would hide that the installation is incomplete.
        handles.require_kernels(x)
        if x.device.type not in handles.DEVICES:
            return f"this build has no kernels for {x.device.type} tensors"
        if x.layout is not torch.strided:
            return f"the input's layout is {x.layout}"
        if x.dtype not in DTYPES:
            return f"the input's dtype is {x.dtype}"
    return None


def global_reason() -> str | None:
    """Check for hooks that torch calls for every module."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return "a hook is registered for all modules (torch.nn.modules.module.register_module_*_hook)"
    return None


def layers_reason(layers: dict[str, nn.Module], layer_type: type, prefix: str) -> str | None:
    """Check the dense layers of a block, which one op has to serve together."""
    for name, layer in layers.items():
        reason = module_reason(layer, prefix, name, layer_type) or inner_reason(layer, f"{prefix}{name}.")
        if reason is not None:
            return reason
    return sharing_reason(layers, prefix)


def sharing_reason(layers: dict[str, object], prefix: str, *tail: tuple[str, nn.Module]) -> str | None:
    """Check that the norms of a block, and that of its `tail`, share batch statistics with the same processes."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    norms = [(f"{prefix}{name}.{part}", getattr(layer, part)) for name, layer in layers.items() for part in _NORMS]
    groups = ((name, group_of(norm)) for name, norm in (*norms, *tail) if not is_frozen(norm))
    first = next(groups, None)
    for name, group in groups:
        if group != first[1]:
            return f"{name} shares its batch statistics with other processes than {first[0]}"
    return None


def inner_reason(layer: nn.Module, prefix: str) -> str | None:
    """Check the modules inside a dense layer."""
    parts, se = layer._modules, layer._modules.get("se")
    if not _LAYER_PARTS.issuperset(parts) or len(parts) < len(_LAYER_PARTS) - ("se" not in parts):
        return children_reason(layer, prefix)
    reason = (
        norm_reason(parts["norm1"], prefix, "norm1")
        or module_reason(parts["relu1"], prefix, "relu1", nn.ReLU)
        or conv_reason(parts["conv1"], prefix, "conv1", POINTWISE, False)
        or module_reason(parts["drop_channel"], prefix, "drop_channel", DropChannel)
        or norm_reason(parts["norm2"], prefix, "norm2")
        or module_reason(parts["relu2"], prefix, "relu2", nn.ReLU)
        or conv_reason(parts["conv2"], prefix, "conv2", CONV3X3, False)
    )
    if reason is None and se is not None:
        reason = module_reason(se, prefix, "se", SqueezeExcitation) or (
            conv_reason(se._modules["fc1"], prefix, "se.fc1", POINTWISE, True)
            or conv_reason(se._modules["fc2"], prefix, "se.fc2", POINTWISE, True)
        )
    elif reason is None and layer.__dict__.get("se") is not None:
        reason = f"{prefix}se is a {type(layer.se).__name__}, not a SqueezeExcitation"
    return reason


def children_reason(layer: nn.Module, prefix: str) -> str | None:
    """Check a dense layer for children that no implementation calls, and for missing ones."""
    parts = layer._modules
    unknown = next((part for part in parts if part not in _LAYER_PARTS), None)
    if unknown is not None:
        return f"a dense layer does not call its child {prefix}{unknown}"
    missing = next((part for part in _LAYER_PARTS if part not in parts and part != "se"), None)
    return None if missing is None else f"{prefix}{missing} is not there"


def may_run_again(layer: nn.Module) -> bool:
    """Return True if backward may call the modules of a dense layer up to conv1 a second time.

    They have to be PyTorch's or this package's, and nobody may watch them: a hook, a parametrization or another module
    may count its calls, or draw random numbers.
    """
    if global_reason() or patched_reason():
        return False
    parts = [layer._modules.get(name) for name in ("norm1", "relu1", "conv1", "drop_channel")]
    return all(
        part is not None
        and type(part).__module__.startswith(("torch.nn.modules.", "torchvision.ops.", "densenet_ext."))
        and module_reason(part, "", "", type(part)) is None
        for part in parts
    )


def transition_reason(transition: nn.Module, name: str, transition_type: type) -> str | None:
    """Check a transition and the modules inside."""
    parts = transition._modules
    if list(parts) != ["norm", "relu", "conv", "pool"]:
        return f"{name} consists of {', '.join(parts) or 'nothing'}, not of norm, relu, conv and pool"
    return (
        module_reason(transition, "", name, transition_type)
        or norm_reason(parts["norm"], name, ".norm")
        or module_reason(parts["relu"], name, ".relu", nn.ReLU)
        or conv_reason(parts["conv"], name, ".conv", POINTWISE, False)
        or pool_reason(parts["pool"], name, ".pool", nn.AvgPool2d, AVG_POOL)
    )


def stem_reason(modules: list[tuple[str, nn.Module]], x: Tensor) -> str | None:
    """Check norm, ReLU and max pool of the stem, each with its name, and x, the input of the norm.

    There is no module between norm and pool if the norm applies the ReLU.
    """
    (norm_name, norm), *relus, (pool_name, pool) = modules
    reason = call_reason([x]) or norm_reason(norm, "", norm_name, relu="after" if relus else "inside")
    for name, relu in relus:
        reason = reason or module_reason(relu, "", name, nn.ReLU)
    reason = reason or pool_reason(pool, "", pool_name, nn.MaxPool2d, MAX_POOL)
    if reason is None and group_of(norm) >= 0:
        return f"{norm_name} shares its batch statistics with other processes"
    return reason


def pool_reason(pool: nn.Module, prefix: str, name: str, kind: type, settings: dict) -> str | None:
    reason = module_reason(pool, prefix, name, kind)
    if reason is not None:
        return reason
    for key, expected in settings.items():
        value = pool.__dict__[key]
        if value not in (expected, (expected, expected)):
            return f"{prefix}{name}.{key} is {value}, not {expected}"
    return None


def norm_reason(norm: nn.Module, prefix: str, name: str, relu: str = "after") -> str | None:
    """Check a batch normalization: of PyTorch, torchvision's FrozenBatchNorm2d, or timm's with an activation.

    relu: 'after' if a ReLU is called after the norm, which may apply one, too; 'inside' if the norm has to apply it.
    """
    kind = type(norm)
    if kind in _NORM_TYPES or is_frozen_kind(kind):
        inside = False
    elif applies_activation(kind):
        inside, reason = _activation(norm, prefix, name)
        if reason is not None:
            return reason
    else:
        return f"{prefix}{name} is a {kind.__name__}, not a BatchNorm2d"
    if kind not in _NORM_TYPES and _first_forward.setdefault(kind, kind.forward) is not kind.forward:
        return f"{kind.__name__}.forward was replaced"
    if relu == "inside" and not inside:
        return f"{prefix}{name} is a {kind.__name__}, which applies no ReLU"
    return module_reason(norm, prefix, name, kind)


def _activation(norm: nn.Module, prefix: str, name: str) -> tuple[bool, str | None]:
    """Check what timm's norms call after normalizing. Returns True if that is a ReLU, and a reason or None."""
    parts = norm._modules
    drop, act = parts.get("drop"), parts.get("act")
    reason = None if drop is None else module_reason(drop, prefix, f"{name}.drop", nn.Identity)
    if reason is not None or act is None:
        return False, reason
    kind = nn.Identity if type(act) is nn.Identity else nn.ReLU
    return kind is nn.ReLU, module_reason(act, prefix, f"{name}.act", kind)


def conv_reason(conv: nn.Module, prefix: str, name: str, expected: tuple, bias: bool) -> str | None:
    """Check a convolution; `expected` holds the values of _CONV_KEYS."""
    reason = module_reason(conv, prefix, name, nn.Conv2d)
    if reason is not None:
        return reason
    v = conv.__dict__
    actual = (v["kernel_size"], v["stride"], v["padding"], v["dilation"], v["groups"], v["padding_mode"])
    if actual != expected:
        key, value, setting = next(t for t in zip(_CONV_KEYS, actual, expected, strict=True) if t[1] != t[2])
        return f"{prefix}{name}.{key} is {value}, not {setting}"
    # Replicas of DataParallel hold their parameters as attributes.
    if (v["_parameters"].get("bias", v.get("bias")) is not None) != bias:
        return f"{prefix}{name} has {'no' if bias else 'a'} bias"
    return None


def module_reason(module: nn.Module, prefix: str, name: str, expected: type) -> str | None:
    """Check a module that would not be called: its type, which a parametrization changes, its methods and its hooks."""
    if type(module) is not expected:
        kind = type(module)
        found = kind.__name__ if kind.__name__ != expected.__name__ else f"{kind.__module__}.{kind.__name__}"
        return f"{prefix}{name} is a {found}, not a {expected.__name__}"
    v = module.__dict__
    if not (
        v["_forward_hooks"]
        or v["_forward_pre_hooks"]
        or v["_backward_hooks"]
        or v["_backward_pre_hooks"]
        or "forward" in v
        or "_conv_forward" in v
        or "_call_impl" in v
    ):
        return None
    return attached_reason(module, prefix, name)


def attached_reason(
    module: nn.Module, prefix: str, name: str, is_known: Callable[[Callable], bool] = lambda hook: False
) -> str | None:
    """Check what is attached to a module: methods of its own, and hooks for which is_known(hook) is False."""
    v = module.__dict__
    replaced = next((method for method in _METHODS if method in v), None)
    if replaced is not None:
        return f"{prefix}{name}.{replaced} was replaced"
    kind = next((kind for kind in _HOOKS if not all(map(is_known, v[kind].values()))), None)
    if kind is None:
        return None
    return f"{prefix}{name} has a {'backward' if 'backward' in kind else 'forward'} hook"
