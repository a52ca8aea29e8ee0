"""Converted modules run fused where that is possible, else they call the forward of their former class.

Each class here stands before the former class in the order of inheritance, so super().forward is that one's. It gets
its settings from the attribute `_densenet_ext`; a slice of a converted Sequential has none, and needs none.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _reasons, _sharding, fallback, functional
from .._checks import check_kept
from .._features import Consumer, FusedBlock, StageInput, run_features
from .._transforms import is_symbolic
from . import settings
from .specs import child
from .views import LayerView, TransitionView


class Converted(nn.Module):
    """A module that densenet_ext.convert has changed."""

    _densenet_ext: settings.Settings | None = None

    def _reported(self, reason: str | None) -> bool:
        """Report the reason why this call is not fused, if there is one; return True if there is."""
        if reason is not None:
            fallback.report(reason)
        return reason is not None


def _single(args: tuple, kwargs: dict) -> bool:
    """Return True for a call with one argument that torch.fx does not trace; others are for the former class."""
    return len(args) == 1 and not kwargs and not is_symbolic(args[0])


class ConvertedLayer(Converted):
    """A dense layer that is called alone: its block calls a module inside, or is not converted."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self._fused(args[0]) if _single(args, kwargs) else None
        return super().forward(*args, **kwargs) if y is None else y

    def _fused(self, inputs: Tensor | list[Tensor]) -> Tensor | None:
        spec = self._densenet_ext.spec
        inputs = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        view = LayerView(self, self._densenet_ext)
        prefix = f"{self._densenet_ext.path}."
        reason = (
            _reasons.call_reason(inputs)
            or view.reason(prefix)
            or _reasons.sharing_reason({self._densenet_ext.path: view}, "")
        )
        if reason is None:
            try:
                y = functional.dense_layer(inputs, view)
            except functional.NotServed as error:
                reason = f"{self._densenet_ext.path}{error.what}"
        if self._reported(reason):
            return None
        if spec.returns == "new":
            return y
        return torch.cat([y, *inputs] if spec.order == "new_first" else [*inputs, y], 1)


class ConvertedBlock(FusedBlock, Converted):
    """A dense block: all its layers are one op, and so is a transition or a last norm that a container calls next."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not _single(args, kwargs):
            return super().forward(*args, **kwargs)
        if isinstance(args[0], StageInput):
            return self.run_fused(args[0].x, *args[0].tail, free=args[0].free)
        reason = self.fallback_reason(args[0])
        y = None if self._reported(reason) else self.run_fused(args[0])
        if y is not None:
            return y
        with fallback.already_reported():
            return super().forward(*args, **kwargs)

    @property
    def _prefix(self) -> str:
        path, container = self._densenet_ext.path, self._densenet_ext.container
        return f"{path}.{container}." if container else f"{path}."

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The dense layers by name."""
        container = self._densenet_ext.container
        return (child(self, container) if container else self)._modules

    def fallback_reason(self, x: Tensor) -> str | None:
        return _reasons.call_reason([x]) or self._layers_reason()

    def _layers_reason(self) -> str | None:
        container, layers, views = self._densenet_ext.container, self.layers, {}
        reason = self._densenet_ext.changed(self, f"{self._densenet_ext.path}.")
        if reason is None and container:
            reason = _reasons.module_reason(
                child(self, container), self._densenet_ext.path, f".{container}", nn.Sequential
            )
        if reason is not None:
            return reason
        if not layers:
            return f"{self._prefix.strip('.')} has no layers"
        for name, layer in layers.items():
            if not isinstance(layer, ConvertedLayer):
                return f"{self._prefix}{name} is a {type(layer).__name__}, which is not converted"
            view = views[name] = LayerView(layer, layer._densenet_ext)
            reason = _reasons.module_reason(layer, self._prefix, name, type(layer))
            reason = reason or view.reason(f"{self._prefix}{name}.")
            if reason is not None:
                return reason
        if len({(v.settings.spec.order, v.settings.spec.returns) for v in views.values()}) > 1:
            return f"the layers of {self._prefix.strip('.')} concatenate in different ways"
        return _reasons.sharing_reason(views, self._prefix)

    def called_reason(self, prefix: str, name: str) -> str | None:
        return _sharding.called_reason(self, prefix, name, type(self))

    def consumer(self, name: str, module: nn.Module, path: str) -> Consumer | None:
        if isinstance(module, ConvertedTransition):
            return module.consumer(path)
        if _reasons.norm_reason(module, "", path) is None:
            return Consumer(None, lambda: (module,), is_head=True)
        return None

    def sharing_reason(self, path: str, norm: nn.Module) -> str | None:
        views = {name: LayerView(layer, layer._densenet_ext) for name, layer in self.layers.items()}
        return _reasons.sharing_reason(views, self._prefix, (path, norm))

    @property
    def keep_bottleneck(self) -> bool | int | str:
        """The number of layers that keep their bottleneck for backward, True for all, or 'auto'; as convert takes it."""
        return self._densenet_ext.keep_bottleneck

    @keep_bottleneck.setter
    def keep_bottleneck(self, value: bool | int | str) -> None:
        self._densenet_ext.keep_bottleneck = check_kept(value, "keep_bottleneck", auto=True)

    def dense_layers(self) -> list[LayerView]:
        return [
            LayerView(layer, layer._densenet_ext) for layer in self.layers.values() if isinstance(layer, ConvertedLayer)
        ]

    def fused(self, x: Tensor, *tail: nn.Module, keep: bool | int) -> Tensor | None:
        views = self.dense_layers()
        try:
            return functional.dense_stage(
                *(x, views, *tail),
                keep_bottleneck=keep,
                new_first=views[0].settings.spec.order == "new_first",
            )
        except functional.NotServed as error:
            names = [*self.layers, ""]  # the last one is the block as a whole
            name = names[-1 if error.index is None else error.index]
            fallback.report(f"{f'{self._prefix}{name}'.strip('.')}{error.what}")
            return None


class ConvertedTransition(Converted):
    """A transition. Called alone it does what it did; in a container it is the tail of the block before it."""

    def consumer(self, path: str) -> Consumer:
        """Return what a fused stage needs of this transition."""
        view = TransitionView(self, self._densenet_ext)
        reason = _reasons.module_reason(self, "", path, type(self)) or view.reason(path)
        return Consumer(reason, lambda: (view.norm, view.conv))


class ConvertedFeatures(Converted):
    """A Sequential that calls blocks and their consumers."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not _single(args, kwargs):
            return super().forward(*args, **kwargs)
        return run_features(self._modules, args[0], prefix=self._features_prefix)[0]

    @property
    def _features_prefix(self) -> str:
        path = self._densenet_ext.path if self._densenet_ext else ""
        return f"{path}." if path else ""


class ConvertedNetwork(Converted):
    """A network that pools the output of its converted `features` and classifies it: the pool belongs to a stage."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self._modules.get("features")
        if not _single(args, kwargs) or not isinstance(features, ConvertedFeatures):
            return super().forward(*args, **kwargs)
        reason = self._head_reason(features)
        if reason is not None:
            fallback.report(reason)
            return super().forward(*args, **kwargs)
        x, pooled = run_features(features._modules, args[0], head=True, prefix=features._features_prefix)
        head = self._densenet_ext.head
        return head.run(self, x if pooled else head.pooled(self, x))

    def _head_reason(self, features: nn.Module) -> str | None:
        path, head = self._densenet_ext.path, self._densenet_ext.head
        prefix = f"{path}." if path else ""
        reason = self._densenet_ext.changed(self, prefix) or head.reason(self, prefix)
        reason = reason or _reasons.module_reason(features, prefix, "features", type(features))
        if reason is None and head.relu == "features":
            *_, (name, norm) = features._modules.items()
            reason = _reasons.norm_reason(norm, features._features_prefix, name, relu="inside")
        return reason
