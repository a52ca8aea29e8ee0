"""A conversion keeps what it knows about a module in the module's attribute `_densenet_ext`, which is pickled with it."""

import reprlib
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from .heads import HeadSpec
from .specs import DenseLayerSpec

ATTRIBUTE = "_densenet_ext"
_OWN = frozenset((*dir(nn.Module()), ATTRIBUTE))
_VALUES = (int, float, str, tuple)  # these are compared by value, other objects by identity


class Missing:
    """It stands for an attribute that a module does not have itself."""


def attribute(module: nn.Module, name: str) -> object:
    """Return the value of a module's own attribute, or a word for a parameter or a buffer, whose values may change."""
    if name in module.__dict__:
        return module.__dict__[name]
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return None if tensors[name] is None else "a tensor"
    return Missing


def is_same(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _VALUES) and a == b)


def tracked(kind: type[nn.Module], read: set[str]) -> type[nn.Module]:
    """Return a subclass whose instances add the names of attributes that are read to `read`, except Module's own."""

    class Tracked(kind):
        def __getattribute__(self, name: str) -> object:
            if name not in _OWN:
                read.add(name)
            return super().__getattribute__(name)

    return Tracked


@dataclass
class Settings:
    """The settings that all kinds of converted modules have.

    path: the module's name in the model that was converted, for messages; attributes: the module's attributes that
    forward read when it was proved, and their values then, without those that every call of the fused module reads;
    members: forward and what else the class had of them.
    """

    kind: ClassVar[str] = ""
    path: str
    attributes: dict[str, object] = field(default_factory=dict, kw_only=True)
    members: dict[str, object] = field(default_factory=dict, kw_only=True, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """Return the state to pickle, without members: methods and properties of classes often cannot be pickled."""
        return {**self.__dict__, "members": {}}

    def remember(self, kind: type[nn.Module]) -> None:
        """Take in what a class has of the attributes that are not the module's own."""
        names = (name for name, value in self.attributes.items() if value is Missing)
        self.members = {name: getattr(kind, name, Missing) for name in ("forward", *names)}

    def agree(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Return True if forward would find in a module of class `kind` what it found when it was proved."""
        attributes = (is_same(value, attribute(module, name)) for name, value in self.attributes.items())
        members = (is_same(value, getattr(kind, name, Missing)) for name, value in self.members.items())
        return all(attributes) and all(members)

    def changed(self, module: nn.Module, prefix: str) -> str | None:
        """Return which attribute was changed since the conversion, which knows only what forward did before."""
        for name, was in self.attributes.items():
            now = attribute(module, name)
            if not is_same(was, now):
                was, now = ("missing" if value is Missing else reprlib.repr(value) for value in (was, now))
                change = f"was {was} when the model was converted and is {now}"
                return f"{prefix}{name} {change}; revert and convert it again"
        kind = getattr(type(module), "_densenet_ext_original", type(module))
        for name, was in self.members.items():
            if not is_same(was, getattr(kind, name, Missing)):
                return f"{kind.__name__}.{name} was replaced"
        return None

    def read_at_each_call(self) -> tuple[str | None, ...]:
        """Return the names of attributes that every call of the fused module reads."""
        return ()


@dataclass
class LayerSettings(Settings):
    kind: ClassVar[str] = "layer"
    spec: DenseLayerSpec = field(default_factory=DenseLayerSpec)

    def read_at_each_call(self) -> tuple[str | None, ...]:
        return (self.spec.drop_rate,)


@dataclass
class BlockSettings(Settings):
    """container: name of the child that holds the dense layers, '' for the block itself."""

    kind: ClassVar[str] = "block"
    container: str = ""
    keep_bottleneck: bool | int | str = "auto"


@dataclass
class TransitionSettings(Settings):
    """Names of a transition's parts. relu and pool: None if forward calls a function.

    relu is the norm's name if that includes the ReLU.
    """

    kind: ClassVar[str] = "transition"
    norm: str = "norm"
    conv: str = "conv"
    relu: str | None = None
    pool: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all modules in the order in which they are called."""
        return tuple(name for name in (self.norm, self.relu, self.conv, self.pool) if name is not None)


@dataclass
class FeaturesSettings(Settings):
    kind: ClassVar[str] = "features"


@dataclass
class NetworkSettings(Settings):
    kind: ClassVar[str] = "network"
    head: HeadSpec = field(default_factory=HeadSpec)
