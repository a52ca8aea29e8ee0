"""A converted module has a class of its own: a subclass of its former class, made once for each.

The new class has the old one's name, so messages and printed models stay as they are, and isinstance holds. Copies and
pickles make it again from the old class, which has to be importable as before.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .._transforms import refuse_scripting
from . import modules
from .settings import ATTRIBUTE, Settings

_KINDS = {
    "layer": modules.ConvertedLayer,
    "block": modules.ConvertedBlock,
    "transition": modules.ConvertedTransition,
    "features": modules.ConvertedFeatures,
    "network": modules.ConvertedNetwork,
}


@functools.cache
def converted_class(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `original` that runs fused."""

    kinds = (_KINDS[kind], original)

    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _empty, (kind, original), self.__getstate__()

    def setstate(self: nn.Module, state: dict) -> None:
        super(kinds[0], self).__setstate__(state)
        if ATTRIBUTE in self.__dict__:
            self.__dict__[ATTRIBUTE].remember(original)

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "__setstate__": setstate,
        "__prepare_scriptable__": refuse_scripting,
        "_densenet_ext_original": original,
    }
    if "forward" in _KINDS[kind].__dict__:
        namespace["forward"] = _forward(_KINDS[kind], original)
    return type(original.__name__, kinds, namespace)


def _forward(kind: type[nn.Module], original: type[nn.Module]) -> Callable:
    """Return the forward of `kind` with the signature of the former class, which torch.export and torch.fx read."""
    name = next(iter([*inspect.signature(original.forward).parameters][1:]), None)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.keys() == {name}:
            args, kwargs = (kwargs[name],), {}
        return kind.forward(self, *args, **kwargs)

    return forward


def _empty(kind: str, original: type[nn.Module]) -> nn.Module:
    """Return a module without attributes, for copy and pickle to fill."""
    return object.__new__(converted_class(kind, original))


def swap(module: nn.Module, settings: Settings) -> None:
    """Convert a module in place.

    Raises:
        TypeError: Python cannot change the class of such an object.
    """
    module.__class__ = converted_class(settings.kind, type(module))
    module.__dict__[ATTRIBUTE] = settings


def swap_back(module: nn.Module) -> None:
    """Give a converted module its former class back."""
    module.__class__ = module._densenet_ext_original
    module.__dict__.pop(ATTRIBUTE, None)


def is_converted(module: nn.Module, kind: str | None = None) -> bool:
    """Return True for a converted module, of this kind or of any."""
    return isinstance(module, modules.Converted if kind is None else _KINDS[kind])
