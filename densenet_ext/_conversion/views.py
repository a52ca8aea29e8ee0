"""Modules of other libraries under the names that the fused ops read, looked up anew at each call.

A user may replace a part, change a rate, or hook a module at any time; so nothing of a module is kept but its names.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from .. import _reasons
from .settings import LayerSettings, TransitionSettings
from .specs import child


def _remembered(function: Callable) -> Callable:
    """Return the function with a cache, in a wrapper that torch.compile calls once: of a bare cache it would warn."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    def call(*args: object) -> object:
        return cached(*args)

    return call


class LayerView:
    """A dense layer with the attributes that functional.dense_stage reads."""

    def __init__(self, layer: nn.Module, settings: LayerSettings) -> None:
        spec = settings.spec
        self.layer, self.settings = layer, settings
        self.norm1, self.conv1 = child(layer, spec.norm1), child(layer, spec.conv1)
        self.norm2, self.conv2 = child(layer, spec.norm2), child(layer, spec.conv2)
        self.training, self.drop_rate, self.channel_dropout = layer.training, 0.0, 0.0
        if spec.drop_rate is not None:
            self.drop_rate = layer.__dict__.get(spec.drop_rate, 0.0)
        self.dropout = None if spec.dropout is None else child(layer, spec.dropout)
        if self.dropout is not None:
            self.training = self.dropout.training
            if type(self.dropout) is nn.Dropout2d:
                self.channel_dropout = self.dropout.p
            else:
                self.drop_rate = getattr(self.dropout, "p", 0.0)

    def reason(self, prefix: str) -> str | None:
        """Return why the fused op cannot compute this layer, or None; `prefix` stands before names of its parts."""
        spec = self.settings.spec
        return (
            self.settings.changed(self.layer, prefix)
            or parts_reason(self.layer, spec.parts, prefix)
            or norm_relu_reason(self.layer, self.norm1, spec.norm1, spec.relu1, prefix)
            or _reasons.conv_reason(self.conv1, prefix, spec.conv1, _reasons.POINTWISE, False)
            or norm_relu_reason(self.layer, self.norm2, spec.norm2, spec.relu2, prefix)
            or _reasons.conv_reason(self.conv2, prefix, spec.conv2, _reasons.CONV3X3, False)
            or self._dropout_reason(prefix)
        )

    def _dropout_reason(self, prefix: str) -> str | None:
        rate = self.drop_rate
        if not isinstance(rate, int | float) or not 0 <= rate <= 1:
            name = self.settings.spec.drop_rate or f"{self.settings.spec.dropout}.p"
            return f"{prefix}{name} is {rate!r}, not a number from 0 to 1"
        if self.dropout is None:
            return None
        kind = nn.Dropout2d if type(self.dropout) is nn.Dropout2d else nn.Dropout
        return _reasons.module_reason(self.dropout, prefix, self.settings.spec.dropout, kind)


class TransitionView:
    """A transition with the attributes that functional.dense_stage takes as its tail."""

    def __init__(self, transition: nn.Module, settings: TransitionSettings) -> None:
        self.transition, self.settings = transition, settings
        self.norm, self.conv = child(transition, settings.norm), child(transition, settings.conv)

    def reason(self, path: str) -> str | None:
        """Return why the fused op cannot compute this transition, or None."""
        settings, prefix = self.settings, f"{path}." if path else ""
        reason = settings.changed(self.transition, prefix) or parts_reason(self.transition, settings.parts, prefix)
        reason = reason or norm_relu_reason(self.transition, self.norm, settings.norm, settings.relu, prefix)
        reason = reason or _reasons.conv_reason(self.conv, prefix, settings.conv, _reasons.POINTWISE, False)
        if reason is None and settings.pool is not None:
            pool = child(self.transition, settings.pool)
            reason = _reasons.pool_reason(pool, prefix, settings.pool, nn.AvgPool2d, _reasons.AVG_POOL)
        return reason


def norm_relu_reason(
    module: nn.Module, norm: nn.Module, norm_name: str, relu_name: str | None, prefix: str
) -> str | None:
    """Check a batch normalization and the ReLU after it, which is a module, a function (None), or part of the norm."""
    if relu_name == norm_name:
        return _reasons.norm_reason(norm, prefix, norm_name, relu="inside")
    reason = _reasons.norm_reason(norm, prefix, norm_name)
    if reason is None and relu_name is not None:
        reason = _reasons.module_reason(child(module, relu_name), prefix, relu_name, nn.ReLU)
    return reason


def parts_reason(module: nn.Module, names: tuple[str, ...], prefix: str) -> str | None:
    """Check that `module` has no parts but these; a Sequential calls all its parts, in their order."""
    for name in _containers(names):
        reason = _reasons.module_reason(child(module, name), prefix, name, nn.Sequential)
        if reason is not None:
            return reason
    containers = ("", *_containers(names))
    children = tuple(tuple((child(module, name) if name else module)._modules) for name in containers)
    ordered = isinstance(module, nn.Sequential) or len(containers) > 1
    unknown = _unknown(names, children, ordered)
    return None if unknown is None else f"{prefix}{unknown}"


@_remembered
def _containers(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the Sequentials that hold parts."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))


@_remembered
def _unknown(names: tuple[str, ...], children: tuple[tuple[str, ...], ...], ordered: bool) -> str | None:
    containers = _containers(names)
    found = [name for name in children[0] if name not in containers]
    for container, parts in zip(containers, children[1:], strict=True):
        found += [f"{container}.{name}" for name in parts]
    unknown = next((name for name in found if name not in names), None)
    if unknown is not None:
        return f"{unknown} is no part that the conversion knows"
    if ordered and found != [name for name in dict.fromkeys(names) if name in found]:
        return f"{found[0]} and the other parts are not in the order in which the conversion knows them"
    return None
