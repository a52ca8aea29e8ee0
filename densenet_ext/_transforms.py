"""Ways of running a module that the fused ops do not serve: transforms and recordings.

Below autograd the ops see values alone, neither the tangent of a dual number nor the level of a functorch transform, so
they would compute something else. A recording for another process has to consist of PyTorch's own operators: with the
ops its file would load only where this package is installed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext

_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


@torch.compiler.assume_constant_result  # torch.compile guards on these states itself, and cannot trace these calls
def transform_reason() -> str | None:
    """Return which active transform or recording the fused ops do not serve, or None."""
    if in_functorch():
        return "a transform of torch.func is active (grad, vmap, jvp, jacrev and others)"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active (torch.autograd.forward_ad)"
    if _tracing_state() is not None:
        return "torch.jit.trace records the model, and its file should load without densenet_ext"
    if torch.compiler.is_exporting():
        return "torch.export records the model, and its file should load without densenet_ext"
    if torch._C._len_torch_function_stack() and any(type(mode) is not DeviceContext for mode in _function_modes()):
        return "a TorchFunctionMode is active, which sees the functions of PyTorch"
    return None


@torch.compiler.assume_constant_result
def is_recording() -> bool:
    """Return True while torch.jit.trace or torch.export records a model, as torch.onnx.export does by one of them."""
    return _tracing_state() is not None or torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def in_functorch() -> bool:
    """Return True if a transform of torch.func is active; a vectorized backward is one."""
    return _functorch_level() is not None


def is_symbolic(x: object) -> bool:
    """Return True if x, or an entry of the list x, is a proxy with which torch.fx traces."""
    return isinstance(x, fx.Proxy) or (isinstance(x, list | tuple) and any(isinstance(part, fx.Proxy) for part in x))


def as_node(module: torch.nn.Module, inputs: fx.Proxy | list) -> fx.Proxy | None:
    """Return a node of torch.fx's graph that calls `module` with `inputs`, or None if `module` is the graph's root."""
    tracer = (inputs if isinstance(inputs, fx.Proxy) else next(x for x in inputs if isinstance(x, fx.Proxy))).tracer
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, (inputs,), {}) if path else None


def carries_no_data(kind: type[Tensor]) -> bool:
    """Return True if a tensor of this subclass holds only its values and Python attributes, so that ops can read it."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind is _recorded


_recorded: type[Tensor] | None = None  # the kind of tensors without data that are treated as plain ones


def is_plain(kind: type[Tensor]) -> bool:
    """Return True for torch's own tensors and parameters, and for those without data in a `recording`."""
    return kind is Tensor or kind is nn.Parameter or kind is _recorded


@contextmanager
def recording(kind: type[Tensor]) -> Iterator[None]:
    """Treat tensors of this kind as plain ones: a step is recorded on shapes alone, as it would run on values."""
    global _recorded
    _recorded = kind
    try:
        yield
    finally:
        _recorded = None


def refuse_scripting(module: torch.nn.Module) -> None:
    """Stop torch.jit.script, which calls this first, as a module's __prepare_scriptable__.

    Raises:
        NotImplementedError: always.
    """
    converted = hasattr(module, "_densenet_ext_original")  # by densenet_ext.convert
    instead = "call densenet_ext.revert" if converted else "load the weights into torchvision's DenseNet"
    raise NotImplementedError(
        f"densenet_ext: torch.jit.script does not serve {type(module).__name__}, which chooses its implementation in "
        f"Python; use torch.jit.trace or torch.export, or {instead}, and script that"
    )
