"""A conversion keeps what it knows about a module in the module's attribute `_densenet_ext`, which is pickled with it."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from .heads import HeadSpec
from .specs import DenseLayerSpec

ATTRIBUTE = "_densenet_ext"
_MISSING = object()


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Return what a module's forward may depend on: attributes that are numbers, strings, switches or None.

    Its own parameters and buffers are listed, too, without their values: each is a tensor or None.
    """
    attributes = {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and isinstance(value, int | float | str | None)
    }
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        attributes[name] = None if value is None else "a tensor"
    return attributes


@dataclass
class Settings:
    """The settings that all kinds of converted modules have.

    path: the module's name in the model that was converted, for messages; attributes: plain_attributes at that time,
    without those that every call reads.
    """

    kind: ClassVar[str] = ""
    path: str
    attributes: dict[str, object]

    def changed(self, module: nn.Module, prefix: str) -> str | None:
        """Return which attribute was changed since the conversion, which knows only what forward did before."""
        actual = plain_attributes(module)
        self.forget_read(actual)
        if actual == self.attributes:
            return None
        names = sorted({*actual, *self.attributes})
        name = next(name for name in names if actual.get(name, _MISSING) != self.attributes.get(name, _MISSING))
        was, now = (repr(values[name]) if name in values else "missing" for values in (self.attributes, actual))
        return f"{prefix}{name} was {was} when the model was converted and is {now}; convert it again"

    def forget_read(self, attributes: dict[str, object]) -> None:
        """Remove attributes that every call reads anew."""


@dataclass
class LayerSettings(Settings):
    kind: ClassVar[str] = "layer"
    spec: DenseLayerSpec = field(default_factory=DenseLayerSpec)

    def forget_read(self, attributes: dict[str, object]) -> None:
        attributes.pop(self.spec.drop_rate, None)


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
