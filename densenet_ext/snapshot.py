"""Modules as they were in forward, for recomputation in backward.

Between the two the mode may change, running statistics have seen the batch, and torch.func.functional_call has taken its
parameters out again.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Unchanged:
    """Tensors, and a check that nobody has written to them since."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = [tensor.detach() for tensor in tensors]
        self.versions = [tensor._version for tensor in self.tensors]

    def values(self) -> list[Tensor]:
        """The tensors.

        Raises: RuntimeError if one has been written to, as autograd does for what it keeps.
        """
        if [tensor._version for tensor in self.tensors] != self.versions:
            raise RuntimeError(
                "densenet_ext: an input or a parameter of a dense layer, which backward needs, has been modified by an "
                "inplace operation"
            )
        return self.tensors


class Snapshot:
    """The mode, the parameters and the buffers of some modules, now."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.states = [
            (module, module.training, dict(module._parameters), _buffers(module, copy=not module.training))
            for module in modules
        ]
        self.parameters = Unchanged([p for _, _, ps, _ in self.states for p in ps.values() if p is not None])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules are as they were; what they do to their buffers is forgotten at the end.

        Raises: RuntimeError if a parameter has been written to in between.
        """
        self.parameters.values()
        now = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m, *_ in self.states]
        try:
            for module, training, parameters, buffers in self.states:
                module.training = training
                module._parameters.update(parameters)
                module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
            yield
        finally:
            for module, training, parameters, buffers in now:
                module.training = training
                module._parameters.update(parameters)
                module._buffers.update(buffers)


@torch.no_grad()
def _buffers(module: nn.Module, copy: bool) -> dict[str, Tensor | None]:
    # In training mode the output does not depend on the values.
    return {name: b.clone() if copy and b is not None else b for name, b in module._buffers.items()}
