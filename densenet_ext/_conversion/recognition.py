"""Find the dense layers, blocks, transitions, containers and heads of a model, and prove what they compute.

A class is proved by checks.difference once for each set of values of the attributes that its forward reads; modules of
the class with the same values are then converted, too. Nothing is changed here: `Finder.found` has settings of modules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._features import FusedBlock
from .._running_stats import applies_activation, is_frozen_kind
from ..layers import EfficientDenseLayer
from . import checks
from .classes import is_converted, swap
from .heads import HEADS
from .settings import (
    BlockSettings,
    FeaturesSettings,
    LayerSettings,
    NetworkSettings,
    Settings,
    TransitionSettings,
    attribute,
)
from .specs import LAYERS, DenseLayerSpec
from .views import LayerView, TransitionView, child

_DIFFERENT = "its forward is not that of a"
NOUNS = {"layer": "dense layer", "block": "dense block", "transition": "transition", "network": "network with a head"}

# (class, what was tried) -> settings with the attributes that forward read, and why it is not that, or None if it is.
_proved: dict[tuple, list[tuple[Settings, str | None]]] = {}


@dataclass
class Finder:
    """A search of `model` for what can be converted: `found` has settings for these modules, `reasons` why others cannot.

    specs: the layers of a network of one's own, by class.
    """

    model: nn.Module
    specs: Mapping[type, DenseLayerSpec]
    keep_bottleneck: bool | int | str = "auto"
    found: dict[nn.Module, Settings] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    different: set[nn.Module] = field(default_factory=set)  # they have the parts, but compute something else
    paths: dict[nn.Module, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = {module: path for path, module in self.model.named_modules() if not self._is_done(module)}
        for find in (self._find_layer, self._find_block, self._find_features, self._find_network):
            # A module that cannot be compared, because a part was replaced, may be of a class that another one proves.
            for module in [*self.paths, *self.paths]:
                if module in self.paths and module not in self.found:
                    find(module)

    def _is_done(self, module: nn.Module) -> bool:
        return is_converted(module) or isinstance(module, FusedBlock | EfficientDenseLayer)

    def _is_layer(self, module: nn.Module | None) -> bool:
        return isinstance(self.found.get(module), LayerSettings)

    def _is_block(self, module: nn.Module | None) -> bool:
        return isinstance(self.found.get(module), BlockSettings) or is_converted(module, "block")

    def _take(self, module: nn.Module, settings: Settings, reason: str | None) -> bool:
        """Add a module whose reason is None. Another keeps a reason: what it computes says more than what it is made of."""
        if reason is None:
            self.found[module] = settings
            self.reasons.pop(module, None)
        elif reason.startswith(_DIFFERENT):
            self.reasons[module] = reason
            self.different.add(module)
        else:
            self.reasons.setdefault(module, reason)
        return reason is None

    # Dense layers

    def _find_layer(self, layer: nn.Module) -> None:
        kind = type(layer)
        if kind in self.specs:
            candidates = [self.specs[kind]]
        else:
            candidates = [spec for spec in LAYERS.values() if _has_parts(layer, spec)]
        if not candidates:
            if (reason := _unserved_layer(layer)) is not None:
                self.reasons[layer] = reason
            return
        reason = None if kind in self.specs else _overrides(kind)
        if reason is not None:
            self.reasons[layer] = reason
            return
        for spec in candidates:
            settings = LayerSettings(self.paths[layer], spec)
            if self._take(layer, settings, _proof(layer, spec, settings, self._prove_layer)):
                return

    def _prove_layer(self, layer: nn.Module, settings: LayerSettings, read: set[str]) -> str | None:
        for rate in (0.3, 0.0):  # a rate of 0 does not show where forward drops
            plain, fused = checks.random_copy(layer), checks.random_copy(layer)
            _set_rate(plain, settings.spec, rate)
            _set_rate(fused, settings.spec, rate)
            view = LayerView(fused, settings)
            _require(view.reason(""))
            swap(fused, settings)
            x = checks.random_maps(view.conv1.in_channels)
            difference = checks.difference(plain, fused, x, lambda module, x: module(x), read)
            if difference is not None or (settings.spec.drop_rate is None and view.dropout is None):
                return difference
        return None

    # Dense blocks

    def _find_block(self, block: nn.Module) -> None:
        children = [m for m in block._modules.values() if m is not None]
        if len(children) == 1 and type(children[0]) is nn.Sequential:
            container = next(iter(block._modules))
            layers = [*children[0]._modules.values()]
        else:
            container, layers = "", children
        proved = [layer for layer in layers if self._is_layer(layer)]
        if not proved:
            return
        if len(proved) < len(layers):
            self.reasons[block] = "not all of its children are dense layers that are converted"
            return
        if (reason := _overrides(type(block))) is not None:
            self.reasons[block] = reason
            return
        path = self.paths[block]
        settings = BlockSettings(path, container, self.keep_bottleneck)
        kinds = (container, *dict.fromkeys((type(m), self.found[m].spec) for m in layers))
        if self._take(block, settings, _proof(block, kinds, settings, self._prove_block)) and container:
            del self.paths[children[0]]  # it belongs to the block, and is called by nobody else

    def _prove_block(self, block: nn.Module, settings: BlockSettings, read: set[str]) -> str | None:
        plain, fused = checks.random_copy(block), checks.random_copy(block)
        layers = child(fused, settings.container) if settings.container else fused
        originals = (child(block, settings.container) if settings.container else block)._modules
        for name, layer in layers._modules.items():
            _require(LayerView(layer, self.found[originals[name]]).reason(f"{name}."))
            swap(layer, self.found[originals[name]])
        first = originals[next(iter(originals))]
        channels = LayerView(first, self.found[first]).conv1.in_channels
        swap(fused, settings)
        return checks.difference(plain, fused, checks.random_maps(channels), lambda module, x: module(x), read)

    # Containers and transitions

    def _find_features(self, features: nn.Module) -> None:
        children = [*features._modules.values()]
        if not isinstance(features, nn.Sequential) or not any(self._is_block(m) for m in children):
            return
        if type(features).forward is not nn.Sequential.forward:
            self.reasons[features] = f"{type(features).__name__} has a forward of its own"
            return
        if (reason := _overrides(type(features))) is not None:
            self.reasons[features] = reason
            return
        for block, consumer in zip(children, children[1:], strict=False):
            if self._is_block(block) and consumer in self.paths and consumer not in self.found:
                self._find_transition(consumer)
        self.found[features] = FeaturesSettings(self.paths[features])

    def _find_transition(self, transition: nn.Module) -> None:
        settings = _as_transition(transition, self.paths[transition])
        if settings is None:
            if not is_norm(transition):
                self.reasons[transition] = (
                    "it does not consist of a norm, a ReLU, a 1x1 convolution and a 2x2 average pool"
                )
            return
        reason = _overrides(type(transition)) or _proof(transition, settings.parts, settings, _prove_transition)
        self._take(transition, settings, reason)

    # Heads

    def _find_network(self, network: nn.Module) -> None:
        features = network._modules.get("features")
        known = isinstance(self.found.get(features), FeaturesSettings) or is_converted(features, "features")
        if not known or len(features) < 2:
            return
        *_, block, norm = features
        if not self._is_block(block) or not is_norm(norm) or (reason := _overrides(type(network))) is not None:
            return
        for head in HEADS.values():
            if all(child(network, name) is not None for name in head.parts):
                settings = NetworkSettings(self.paths[network], head)
                reason = _proof(network, head, settings, _prove_network)
                if reason is None:
                    self.found[network] = settings
                    return


def is_norm(module: nn.Module) -> bool:
    """Return True for a batch normalization of any kind."""
    kind = type(module)
    return isinstance(module, _BatchNorm) or is_frozen_kind(kind) or applies_activation(kind)


def _proof(
    module: nn.Module, tried: object, settings: Settings, prove: Callable[[nn.Module, Settings, set], str | None]
) -> str | None:
    """Return why a module does not compute what its fused form does, or None; complete its settings.

    prove(module, settings, read) compares them, and adds to `read` the attributes that forward reads. It is called once
    for a class, what is tried, and the values of these attributes.
    """
    if (name := _replaced_method(module)) is not None:
        return f"its method {name} was replaced"
    kind, read = type(module), set()
    proofs = _proved.setdefault((kind, tried), [])
    known, reason = next((proof for proof in proofs if proof[0].agree(module, kind)), (None, None))
    if known is None:
        try:
            difference = prove(module, settings, read)
        except _NotComparable as error:
            return str(error)
        reason = difference and f"{_DIFFERENT} {NOUNS[settings.kind]}: {difference}"
        names = sorted(read.difference(settings.read_at_each_call(), module._modules))
        settings.attributes = {name: attribute(module, name) for name in names}
        settings.remember(kind)
        proofs.append((settings, reason))
    else:
        settings.attributes, settings.members = known.attributes, known.members
    return reason


def _replaced_method(module: nn.Module) -> str | None:
    """Return the name of a method that this module has a function of its own for, which may know only this module.

    A forward that was replaced runs in place of the fused one, or is seen at each call.
    """
    own = (name for name, value in module.__dict__.items() if callable(value) and name not in checks.CALLED_FIRST)
    return next((name for name in own if hasattr(type(module), name)), None)


class _NotComparable(Exception):
    """A module does not show what others of its class compute: a part of it was replaced, for example."""


def _require(reason: str | None) -> None:
    if reason is not None:
        raise _NotComparable(reason)


def _overrides(kind: type[nn.Module]) -> str | None:
    """Return a reason if a class replaces the forward of another one that is not PyTorch's, or any module's __call__."""
    if kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__} overrides __call__"
    owners = [
        base for base in kind.__mro__ if "forward" in base.__dict__ and not base.__module__.startswith("torch.nn.")
    ]
    return f"{owners[0].__name__} overrides the forward of {owners[1].__name__}" if len(owners) > 1 else None


def _has_parts(layer: nn.Module, spec: DenseLayerSpec) -> bool:
    """Return True if a module has the parts that a spec names, two convolutions 1x1 and 3x3 among them."""
    if any(child(layer, name) is None for name in spec.parts if name != spec.dropout):
        return False
    sizes = [getattr(child(layer, name), "kernel_size", None) for name in (spec.conv1, spec.conv2)]
    if sizes != [(1, 1), (3, 3)]:
        return False
    return spec.drop_rate is None or isinstance(layer.__dict__.get(spec.drop_rate), int | float)


def _set_rate(layer: nn.Module, spec: DenseLayerSpec, rate: float) -> None:
    """Set the probability of dropout of a layer that may have one."""
    if spec.drop_rate is not None:
        layer.__dict__[spec.drop_rate] = rate
    dropout = None if spec.dropout is None else child(layer, spec.dropout)
    if dropout is not None:
        dropout.p = rate


def _unserved_layer(layer: nn.Module) -> str | None:
    """Return why a module that calls itself a dense layer is none that the fused op serves."""
    if not type(layer).__name__.lower().lstrip("_").startswith("denselayer"):
        return None
    convolutions = [m for m in layer.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if len(convolutions) < 2:
        return "it has no 1x1 convolution before the 3x3 one (a bottleneck)"
    if not isinstance(convolutions[0], nn.Conv2d):
        return f"it has a {type(convolutions[0]).__name__}, not a Conv2d"
    return "its parts have names that no DenseLayerSpec has; pass one as convert(model, layers={...})"


def _as_transition(transition: nn.Module, path: str) -> TransitionSettings | None:
    """Return the parts of a module with a norm, a convolution, and at most a ReLU and a pool; None for another one."""
    leaves = [(name, m) for name, m in transition.named_modules() if not m._modules or is_norm(m)]
    leaves = [
        (name, m) for name, m in leaves if not any(name.startswith(f"{n}.") for n, other in leaves if is_norm(other))
    ]
    kinds = {
        "norm": [name for name, m in leaves if is_norm(m)],
        "conv": [name for name, m in leaves if isinstance(m, nn.Conv2d)],
        "relu": [name for name, m in leaves if type(m) is nn.ReLU],
        "pool": [name for name, m in leaves if type(m) is nn.AvgPool2d],
    }
    counts = {kind: len(names) for kind, names in kinds.items()}
    if counts["norm"] != 1 or counts["conv"] != 1 or max(counts.values()) > 1 or sum(counts.values()) < len(leaves):
        return None
    names = {kind: names[0] for kind, names in kinds.items() if names}
    if "relu" not in names and applies_activation(type(child(transition, names["norm"]))):
        names["relu"] = names["norm"]
    return TransitionSettings(path, **names)


def _prove_transition(transition: nn.Module, settings: TransitionSettings, read: set[str]) -> str | None:
    plain, parts = checks.random_copy(transition), checks.random_copy(transition)
    view = TransitionView(parts, settings)
    _require(view.reason(""))

    def run(module: nn.Module, x: Tensor) -> Tensor:
        if module is plain:
            return plain(x)
        return F.avg_pool2d(view.conv(F.relu(view.norm(x))), 2)

    return checks.difference(plain, parts, checks.random_maps(view.conv.in_channels), run, read)


class _Maps(nn.Module):
    """Stands for a network's `features`: its output depends on the image, and has positive and negative values."""

    def __init__(self, channels: int, relu: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 3, 2, dtype=torch.double, device="cpu"))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x[0].numel(), dtype=x.dtype).cos()  # tells channels and pixels of the image apart
        maps = (x.flatten(1) @ place)[:, None, None, None] + self.weight[:, 0]
        return maps.relu() if self.relu else maps


def _prove_network(network: nn.Module, settings: NetworkSettings, read: set[str]) -> str | None:
    features = network.features
    shell = object.__new__(type(network))
    shell.__dict__ = dict(network.__dict__)
    norm = features[-1]
    with checks.quiet():
        maps = _Maps(
            norm.weight.numel() if norm.weight is not None else norm.num_features, settings.head.relu == "features"
        )
    shell._modules = {**network._modules, "features": maps}
    plain = checks.random_copy(shell)
    if settings.head.reason(plain, "") is not None:
        raise _NotComparable(settings.head.reason(plain, ""))
    first = next(m for m in features.modules() if isinstance(m, nn.Conv2d))

    def run(module: nn.Module, x: Tensor) -> Tensor:
        return plain(x) if module is plain else settings.head.run(module, module.features(x).relu().mean((2, 3)))

    difference = checks.difference(plain, checks.random_copy(shell), checks.random_maps(first.in_channels), run, read)
    known = {"features", *(name.partition(".")[0] for name in settings.head.parts)}
    others = sorted(read.intersection(network._modules) - known)
    return difference or (f"it calls {others[0]}, too" if others else None)
