"""Copies of modules as they were in forward, for recomputation in backward.

Between forward and backward a module may change: its mode, its running statistics, its hooks, and its parameters, which
torch.func.functional_call takes out again. Another thread may be in the middle of a forward pass. So backward runs
copies, never the modules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Unchanged:
    """Tensors, with a check that nobody has written to them since this object was built."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = [tensor.detach() for tensor in tensors]
        self.versions = [tensor._version for tensor in self.tensors]

    def values(self) -> list[Tensor]:
        """Return the tensors.

        Raises:
            RuntimeError: one has been written to. Autograd raises the same error for the tensors that it keeps.
        """
        if [tensor._version for tensor in self.tensors] != self.versions:
            raise RuntimeError(
                "densenet_ext: an input or a parameter of a dense layer, which backward needs, has been modified by an "
                "inplace operation"
            )
        return self.tensors


class Snapshot:
    """A copy of `module` and of the children that `parts` names; other children are shared with the module."""

    def __init__(self, module: nn.Module, parts: Sequence[str]):
        self.twin = _copy(module, parts)
        copied = [m for name in parts for m in self.twin._modules[name].modules()]
        self.parameters = Unchanged([p for m in copied for p in m._parameters.values() if p is not None])
        self.copied = copied

    def module(self) -> nn.Module:
        """Return the copy, for a single call. Its buffers are copied anew, so that updates of them have no effect.

        Raises:
            RuntimeError: a parameter has been written to.
        """
        self.parameters.values()
        with torch.no_grad():
            for module in self.copied:
                module._buffers = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
        return self.twin


def _copy(module: nn.Module, parts: Sequence[str] | None = None) -> nn.Module:
    """Return a module of the same class with new dictionaries; `parts` names the children to copy, None means all."""
    twin = object.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = dict(module._parameters)
    # In training mode the output does not depend on the buffers' values.
    twin._buffers = {
        name: b if b is None or module.training else b.detach().clone() for name, b in module._buffers.items()
    }
    twin._modules = {
        name: child if child is None or (parts is not None and name not in parts) else _copy(child)
        for name, child in module._modules.items()
    }
    return twin
