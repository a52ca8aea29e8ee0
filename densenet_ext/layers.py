"""The building blocks of a DenseNet: dense layer, dense block and transition."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from . import fallback, functional
from ._checks import check_efficient, check_position, check_positive, check_probability
from ._masks import Masks, active_dropout, draw_masks
from ._patches import is_replaced, patched_reason, watch
from ._remade import Remade, in_checkpoint
from ._snapshot import Snapshot
from ._state_dicts import rename_layer_keys
from ._transforms import as_node, carries_no_data, is_symbolic, refuse_scripting, transform_reason
from .drop_channel import DropChannel, kept_scale, scale_channels
from .squeeze_excitation import SqueezeExcitation

__all__ = ["DropChannel", "EfficientDenseBlock", "EfficientDenseLayer", "SqueezeExcitation", "Transition"]


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x)), in place where nothing else can see norm's output, whatever relu.inplace says."""
    y = norm(x)
    if is_symbolic(x):
        return relu(y)
    if fallback.module_reason(relu, "", "", nn.ReLU) is not None or fallback.global_reason() or patched_reason():
        return relu(y)
    return F.relu(y, inplace=fallback.module_reason(norm, "", "", nn.BatchNorm2d) is None)


class Transition(nn.Sequential):
    """Between two dense blocks: pool(conv(relu(norm(x)))), with a 1x1 convolution and a 2x2 average pool.

    Args:
        in_channels, out_channels: channels before and after; DenseNet-BC has out = floor(compression * in).
        eps, momentum: of the batch normalization.

    Shape: [N, in_channels, H, W] to [N, out_channels, H // 2, W // 2].

    Raises:
        ValueError: a number of channels is no positive integer.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, section 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__()
        in_channels = check_positive(in_channels, "in_channels")
        self.norm = nn.BatchNorm2d(in_channels, eps, momentum)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, check_positive(out_channels, "out_channels"), 1, bias=False)
        self.pool = nn.AvgPool2d(2, stride=2)

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self._modules.values())
        if list(self._modules)[:2] == ["norm", "relu"]:
            x = norm_relu(*parts[:2], x)
            del parts[:2]
        for part in parts:
            x = part(x)
        return x


class EfficientDenseLayer(nn.Module):
    """A dense layer with bottleneck: k new channels from the concatenation x of all earlier ones.

        y = se(dropout(conv2(r2 * relu(norm2(conv1(r1 * relu(norm1(q * x))))))))
    conv1 is 1x1 to bn_size * growth_rate channels, conv2 3x3 to growth_rate. q, or r1 and r2, are Drop-Channel masks.

    Args:
        in_channels: channels of the concatenation.
        growth_rate: k, the new channels.
        bn_size: width of the bottleneck in units of k.
        drop_rate: probability of a single output value to be dropped, before SE; 0 <= drop_rate < 1.
        drop_channel: probability of a whole channel to be dropped; 0 <= drop_channel < 1.
        drop_channel_position: 'pre_norm': q, before norm1; 'pre_conv': r1 and r2, before both convolutions.
        se_reduction: reduction of the squeeze-and-excitation at the end, or None for no such module.
        efficient: False: plain PyTorch. 'checkpoint': concatenation, norm1 and its ReLU are computed again in backward;
            saves them, costs their time and conv1's. 'fused': one op that stores no concatenation at all.
        keep_bottleneck: with 'fused', keep conv1's output for backward; saves a convolution, costs
            N * H * W * bn_size * k values.
        eps, momentum: of both norms, as in torch.nn.BatchNorm2d.

    Shape: [N, in_channels, H, W], or a sequence of tensors with that many channels together, to [N, growth_rate, H, W].

    Raises:
        ValueError: an argument is out of range.

    Source: Huang et al., CVPR 2017 (DenseNet-BC); Pleiss et al., arXiv 1707.06990 (checkpoint); Cai et al., arXiv
    1904.03392 (Drop-Channel).
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
        keep_bottleneck: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ):
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
    def efficient(self) -> bool | str:
        """False, 'checkpoint' or 'fused'."""
        return self._efficient

    @efficient.setter
    def efficient(self, value: bool | str) -> None:
        self._efficient = check_efficient(value)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        if is_symbolic(inputs):
            return self._traced(inputs)
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if self.efficient == "fused":
            reason = (
                fallback.call_reason(inputs)
                or fallback.inner_reason(self, "")
                or fallback.sharing_reason({"layer": self}, "")
            )
            if reason is None:
                try:
                    return functional.dense_layer(inputs, self, keep_bottleneck=self.keep_bottleneck)
                except functional.NotServed as error:
                    reason = f"the layer{error.what}"
            fallback.report(reason)
        elif type(self) is EfficientDenseLayer and (reason := fallback.children_reason(self, "")) is not None:
            fallback.warn_once(reason)
        return self._called(inputs)

    def _traced(self, inputs: fx.Proxy | Sequence[fx.Proxy]) -> fx.Proxy:
        """What torch.fx gets to see: one node, whose module chooses when it runs; all parts where nothing is chosen."""
        if self.efficient is not False or active_dropout(self) or _drops_channels(self):
            node = as_node(self, inputs)
            if node is not None:
                return node
        return self._called([inputs] if isinstance(inputs, fx.Proxy) else inputs)

    def _called(self, inputs: Sequence[Tensor]) -> Tensor:
        """The layer by its modules, each called once; backward computes again what `efficient` lets it."""
        own_dropout = is_replaced(F, "dropout")
        channels = sum(x.shape[1] for x in inputs) if _drops_channels(self) else 0
        masks = draw_masks(self, inputs[0], channels, own_dropout)
        y = self._convolutions_of(inputs, masks)
        if masks.dropout is not None:
            y = torch.where(masks.dropout, y * kept_scale(self.drop_rate), 0.0)
        elif own_dropout:
            y = F.dropout(y, self.drop_rate, self.training)
        excite = getattr(self, "se", None)
        return y if excite is None else excite(y)

    def _convolutions_of(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
        """conv2's output, by the way that keeps least for backward."""
        if (
            self.efficient is False
            or not torch.is_grad_enabled()
            or is_symbolic(inputs)
            or transform_reason() is not None
            or not all(carries_no_data(type(x)) for x in inputs)
            or not torch._C._autograd._saved_tensors_hooks_is_enabled()
        ):
            return self._second(self._first(inputs, masks), masks)
        if torch.compiler.is_compiling():
            checkpointed = self.efficient == "checkpoint"
            return self._second((self._checkpointed_first if checkpointed else self._first)(inputs, masks), masks)
        if fallback.may_run_again(self):
            return self._second(self._checkpointed_first(inputs, masks), masks)
        if patched_reason() is not None or in_checkpoint():
            return self._second(self._first(inputs, masks), masks)
        return self._watched(inputs, masks)

    def _first(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
        # A copy that nobody sees can be spared.
        alone = len(inputs) == 1 and fallback.module_reason(self.norm1, "", "", type(self.norm1)) is None
        x = inputs[0] if alone else torch.cat(inputs, 1)
        z = norm_relu(self.norm1, self.relu1, self._drop("pre_norm", x, masks.pre_norm))
        return self.conv1(self._drop("pre_conv", z, masks.pre_conv1))

    def _second(self, b: Tensor, masks: Masks) -> Tensor:
        return self.conv2(self._drop("pre_conv", norm_relu(self.norm2, self.relu2, b), masks.pre_conv2))

    def _watched(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
        """The same numbers where a hook or a foreign module must not run again in backward."""
        x = concatenation = torch.cat(inputs, 1)
        mask = masks.pre_norm
        if self.drop_channel_position == "pre_norm":
            x = self.drop_channel(x, mask) if type(self.drop_channel) is DropChannel else self.drop_channel(x)
            if x is not concatenation and fallback.module_reason(self.drop_channel, "", "", DropChannel) is not None:
                return self._second(self.conv1(norm_relu(self.norm1, self.relu1, x)), masks)

        def concatenate(pieces: Sequence[Tensor]) -> Tensor:
            again = torch.cat(pieces, 1)
            return again if mask is None else scale_channels(again, mask)

        kept = Remade(x, inputs, concatenate)
        with kept:
            z = norm_relu(self.norm1, self.relu1, x)
            b = self.conv1(self._drop("pre_conv", z, masks.pre_conv1))
        kept.finish(self.norm1, z)
        kept = Remade(b, [b], lambda pieces: pieces[0])
        with kept:
            z = norm_relu(self.norm2, self.relu2, b)
            y = self.conv2(self._drop("pre_conv", z, masks.pre_conv2))
        kept.finish(self.norm2, z)
        return y

    def _drop(self, position: str, x: Tensor, mask: Tensor | None) -> Tensor:
        if position != self.drop_channel_position:
            return x
        ours = type(self.drop_channel) is DropChannel
        return self.drop_channel(x, mask) if ours else self.drop_channel(x)

    def _checkpointed_first(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
        first, then = True, Snapshot(self, ("norm1", "relu1", "conv1", "drop_channel"))

        def run(*inputs: Tensor) -> Tensor:
            nonlocal first
            if first:
                first = False
                return self._first(inputs, masks)
            return then.module()._first(inputs, masks)

        # The masks are drawn already; only a module put in Drop-Channel's place may draw its own.
        draws = type(self.drop_channel) is not DropChannel
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        rename_layer_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    __prepare_scriptable__ = refuse_scripting


def _drops_channels(layer: EfficientDenseLayer) -> bool:
    return type(layer.drop_channel) is DropChannel and layer.drop_channel.active


class EfficientDenseBlock(nn.ModuleDict):
    """Dense layers that each read the block's input and all earlier layers' outputs: [N, C0, H, W] to [N, C0 + L*k, H, W].

    Children are denselayer1 to denselayerL; any module that takes the list of all features so far may stand in their place.

    Args:
        num_layers: L.
        in_channels: C0.
        growth_rate: k.
        bn_size and the keywords: of every layer, see EfficientDenseLayer. Setting the block's `efficient` or
            `keep_bottleneck` sets it in all layers.

    Raises:
        ValueError: an argument is out of range.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, section 3.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int, bn_size: int = 4, **options):
        super().__init__()
        growth_rate = check_positive(growth_rate, "growth_rate")
        for i in range(check_positive(num_layers, "num_layers")):
            layer = EfficientDenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, **options)
            self.add_module(f"denselayer{i + 1}", layer)
        self.name = ""  # of the block in its model, ending in a dot: for messages
        self.efficient = options.get("efficient", False)
        self.keep_bottleneck = options.get("keep_bottleneck", False)

    @property
    def efficient(self) -> bool | str:
        """False, 'checkpoint' or 'fused'."""
        return self._efficient

    @efficient.setter
    def efficient(self, value: bool | str) -> None:
        self._efficient = check_efficient(value)
        for layer in self._dense_layers():
            layer.efficient = value

    @property
    def keep_bottleneck(self) -> bool:
        """Whether 'fused' keeps the outputs of conv1 for backward."""
        return self._keep_bottleneck

    @keep_bottleneck.setter
    def keep_bottleneck(self, value: bool) -> None:
        self._keep_bottleneck = bool(value)
        for layer in self._dense_layers():
            layer.keep_bottleneck = self._keep_bottleneck

    @property
    def layers(self) -> list[nn.Module]:
        """The dense layers in order."""
        return list(self._modules.values())

    def _dense_layers(self) -> list[nn.Module]:
        return [layer for layer in self.layers if isinstance(layer, EfficientDenseLayer)]

    def fallback_reason(self, x: Tensor) -> str | None:
        """Why the fused implementation cannot compute this block for x, or None."""
        return fallback.call_reason([x]) or fallback.layers_reason(self._modules, EfficientDenseLayer, self.name)

    def forward(self, x: Tensor) -> Tensor:
        if self.efficient != "fused" or is_symbolic(x) or not self._modules:
            return self._concatenate(x)
        reason = self.fallback_reason(x)
        if reason is not None:
            fallback.report(reason)
        else:
            y = self.fused(x)
            if y is not None:
                return y
        with fallback.already_reported():
            return self._concatenate(x)

    def fused(self, x: Tensor, *tail: nn.Module) -> Tensor | None:
        """The block, with the norm and the convolution of what consumes it, as one op where `fallback_reason` is None.

        Returns None, and reports, where its layers are not alike enough for one op.
        """
        try:
            return functional.dense_stage(x, self.layers, *tail, keep_bottleneck=self.keep_bottleneck)
        except functional.NotServed as reason:
            parts = [*self._modules, ""]  # the last one is the block as a whole
            name = parts[-1 if reason.index is None else reason.index]
            fallback.report(f"{f'{self.name}{name}'.strip('.') or 'the block'}{reason.what}")
            return None

    def _concatenate(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)

    __prepare_scriptable__ = refuse_scripting


# A network computes a block without calling its layers, and its features without calling blocks and transitions.
watch((EfficientDenseLayer, "forward"), (EfficientDenseBlock, "forward"), (Transition, "forward"))
