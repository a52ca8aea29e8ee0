"""The building blocks of a DenseNet as modules: dense layer, dense block and transition."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from . import _plain_layer, _reasons, _sharding, fallback, functional
from ._checks import check_positive, check_probability
from ._efficient_module import EfficientModule
from ._features import Consumer, FusedBlock, StageInput
from ._masks import active_dropout
from ._patches import watch
from ._state_dicts import rename_layer_keys
from ._transforms import as_node, is_symbolic, refuse_scripting
from .drop_channel import DropChannel, check_position
from .squeeze_excitation import SqueezeExcitation

__all__ = ["DropChannel", "EfficientDenseBlock", "EfficientDenseLayer", "SqueezeExcitation", "Transition"]


class EfficientDenseLayer(EfficientModule):
    """A dense layer with bottleneck: k new channels from the concatenation x of all earlier ones.

        y = se(dropout(conv2(r2 * relu(norm2(conv1(r1 * relu(norm1(q * x))))))))
    conv1 is 1x1 to bn_size * k channels, conv2 is 3x3 to k. q, or r1 and r2, are Drop-Channel masks.

    Args:
        in_channels: channels of the concatenation; at least 1.
        growth_rate: k, the new channels; at least 1.
        bn_size: width of the bottleneck in units of k; at least 1.
        drop_rate: probability that a single output value is dropped, before `se`; 0 <= drop_rate < 1.
        drop_channel: probability that a whole channel is dropped; 0 <= drop_channel < 1. The attribute `drop_channel`
            is the module, `drop_channel_rate` the probability.
        drop_channel_position: 'pre_norm': q, before norm1; 'pre_conv': r1 and r2, before both convolutions.
        se_reduction: reduction of the squeeze-and-excitation at the end, at least 1, or None for no such module.
        efficient: False: plain PyTorch. 'checkpoint': compute concatenation, norm1, relu1 and conv1 again in backward;
            avoids storing their outputs, costs their time. 'fused', or True: one op that stores no concatenation at
            all; set_fallback says what happens where it cannot serve.
        keep_bottleneck: with 'fused', True keeps conv1's output for backward; avoids a convolution in backward, costs
            N * H * W * bn_size * k values of memory. In a block also a number, of its last layers. 'auto' keeps what
            costs no memory: in a lone block or layer that is nothing.
        eps, momentum: of both norms, as in torch.nn.BatchNorm2d.

    Shape: [N, in_channels, H, W], or a sequence of tensors with that many channels together, to [N, k, H, W].

    Raises:
        ValueError: an argument is out of range.

    Source: Huang et al., CVPR 2017 (DenseNet-BC); Pleiss et al., arXiv 1707.06990 (checkpoint); Cai et al., arXiv
    1904.03392 (Drop-Channel); Hu et al., CVPR 2018 (squeeze-and-excitation).
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        *,
        drop_rate: float = 0.0,
        drop_channel: float = 0.0,
        drop_channel_position: str = "pre_norm",
        se_reduction: int | None = None,
        efficient: bool | str = False,
        keep_bottleneck: bool | int | str = "auto",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        in_channels = check_positive(in_channels, "in_channels")
        growth_rate = check_positive(growth_rate, "growth_rate")
        width = check_positive(bn_size, "bn_size") * growth_rate
        self.norm1 = nn.BatchNorm2d(in_channels, eps, momentum)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, eps, momentum)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = check_probability(drop_rate, "drop_rate")
        self.drop_channel = DropChannel(check_probability(drop_channel, "drop_channel"))
        self.drop_channel_position = check_position(drop_channel_position)
        self.se = None if se_reduction is None else SqueezeExcitation(growth_rate, se_reduction)
        self.efficient = efficient
        self.keep_bottleneck = keep_bottleneck

    @property
    def drop_channel_rate(self) -> float:
        """The probability that a whole channel is dropped: drop_channel.p, which may be set here.

        Raises:
            ValueError: it is set to less than 0, or to 1 or more.
        """
        return self.drop_channel.p

    @drop_channel_rate.setter
    def drop_channel_rate(self, value: float) -> None:
        self.drop_channel.p = check_probability(value, "drop_channel_rate")

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        if is_symbolic(inputs):
            return self._traced(inputs)
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if self.efficient == "fused":
            y = self._fused(inputs)
            if y is not None:
                return y
        elif type(self) is EfficientDenseLayer and (reason := _reasons.children_reason(self, "")) is not None:
            fallback.warn_once(reason)
        return _plain_layer.call_layer(self, inputs)

    def _fused(self, inputs: list[Tensor]) -> Tensor | None:
        """Return the layer's output by one op; or report why one op cannot serve it, and return None."""
        reason = (
            _reasons.call_reason(inputs)
            or _reasons.inner_reason(self, "")
            or _reasons.sharing_reason({"layer": self}, "")
        )
        keep = self.keep_bottleneck
        keep = keep is True or (keep != "auto" and keep > 0)
        if reason is None:
            try:
                return functional.dense_layer(inputs, self, keep_bottleneck=keep)
            except functional.NotServed as error:
                reason = f"the layer{error.what}"
        fallback.report(reason)
        return None

    def _traced(self, inputs: fx.Proxy | Sequence[fx.Proxy]) -> fx.Proxy:
        """Record the layer for torch.fx: as one node if a run makes choices or draws masks, else part by part."""
        if self.efficient is not False or active_dropout(self) or _plain_layer.drops_channels(self):
            node = as_node(self, inputs)
            if node is not None:
                return node
        return _plain_layer.call_layer(self, [inputs] if isinstance(inputs, fx.Proxy) else inputs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        rename_layer_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    __prepare_scriptable__ = refuse_scripting


class EfficientDenseBlock(FusedBlock, EfficientModule, nn.ModuleDict):
    """Dense layers that each read the block's input and all earlier layers' outputs.

    The children are denselayer1 to denselayerL. Any module that takes the list of all earlier features may replace one.

    Args:
        num_layers: L; at least 1.
        in_channels: C0, channels of the input; at least 1.
        growth_rate: k, new channels of each layer; at least 1.
        bn_size and the keywords: as in EfficientDenseLayer, for every layer. Setting the block's `efficient` or
            `keep_bottleneck` sets it in all layers.

    Shape: [N, C0, H, W] to [N, C0 + L * k, H, W].

    Raises:
        ValueError: an argument is out of range.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, section 3.
    """

    _prefix = ""  # the block's name in its model, ending in a dot, for messages

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        *,
        drop_rate: float = 0.0,
        drop_channel: float = 0.0,
        drop_channel_position: str = "pre_norm",
        se_reduction: int | None = None,
        efficient: bool | str = False,
        keep_bottleneck: bool | int | str = "auto",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        growth_rate = check_positive(growth_rate, "growth_rate")
        for i in range(check_positive(num_layers, "num_layers")):
            layer = EfficientDenseLayer(
                in_channels + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate=drop_rate,
                drop_channel=drop_channel,
                drop_channel_position=drop_channel_position,
                se_reduction=se_reduction,
                eps=eps,
                momentum=momentum,
            )
            self.add_module(f"denselayer{i + 1}", layer)
        self.efficient = efficient
        self.keep_bottleneck = keep_bottleneck

    @property
    def layers(self) -> list[nn.Module]:
        """The dense layers in order."""
        return list(self._modules.values())

    def fallback_reason(self, x: Tensor) -> str | None:
        return _reasons.call_reason([x]) or _reasons.layers_reason(self._modules, EfficientDenseLayer, self._prefix)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, StageInput):
            return self.run_fused(x.x, *x.tail, free=x.free)
        if self.efficient != "fused" or is_symbolic(x) or not self._modules:
            return self._concatenate(x)
        reason = self.fallback_reason(x)
        if reason is not None:
            fallback.report(reason)
        else:
            y = self.run_fused(x)
            if y is not None:
                return y
        with fallback.already_reported():
            return self._concatenate(x)

    @property
    def runs_fused(self) -> bool:
        """True if `efficient` is 'fused'."""
        return self.efficient == "fused"

    def called_reason(self, prefix: str, name: str) -> str | None:
        return _sharding.called_reason(self, prefix, name, EfficientDenseBlock)

    def consumer(self, name: str, module: nn.Module, path: str) -> Consumer | None:
        if not self._modules:
            return None
        if name.startswith("transition"):
            reason = _reasons.transition_reason(module, path, Transition)
            return Consumer(reason, lambda: (module.norm, module.conv))
        if name == "norm5":
            return Consumer(_reasons.norm_reason(module, "", path), lambda: (module,), is_head=True)
        return None

    def sharing_reason(self, path: str, norm: nn.Module) -> str | None:
        return _reasons.sharing_reason(self._modules, self._prefix, (path, norm))

    def dense_layers(self) -> Sequence[nn.Module]:
        return self.layers

    def fused(self, x: Tensor, *tail: nn.Module, keep: bool | int) -> Tensor | None:
        try:
            return functional.dense_stage(x, self.layers, *tail, keep_bottleneck=keep)
        except functional.NotServed as error:
            names = [*self._modules, ""]  # the last one is the block as a whole
            name = names[-1 if error.index is None else error.index]
            fallback.report(f"{f'{self._prefix}{name}'.strip('.') or 'the block'}{error.what}")
            return None

    def _concatenate(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)

    __prepare_scriptable__ = refuse_scripting


class Transition(nn.Sequential):
    """The modules between two dense blocks: a 1x1 convolution and a 2x2 average pool.

        y = pool(conv(relu(norm(x))))

    Args:
        in_channels, out_channels: channels of x and of y, at least 1; DenseNet-BC has out = floor(compression * in).
        eps, momentum: of the batch normalization, as in torch.nn.BatchNorm2d.

    Shape: [N, in_channels, H, W] to [N, out_channels, H // 2, W // 2].

    Raises:
        ValueError: a number of channels is no positive integer.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, section 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        in_channels = check_positive(in_channels, "in_channels")
        self.norm = nn.BatchNorm2d(in_channels, eps, momentum)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, check_positive(out_channels, "out_channels"), 1, bias=False)
        self.pool = nn.AvgPool2d(2, stride=2)

    def __getitem__(self, index: int | slice) -> nn.Module:
        # A slice of a Sequential has the class of the whole, whose constructor here takes channels and not modules.
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self._modules.values())
        if list(self._modules)[:2] == ["norm", "relu"]:
            x = _plain_layer.norm_relu(*parts[:2], x)
            del parts[:2]
        for part in parts:
            x = part(x)
        return x


# A fused network computes a block without calling its layers, and its features without calling blocks and transitions.
watch((EfficientDenseLayer, "forward"), (EfficientDenseBlock, "forward"), (Transition, "forward"))
