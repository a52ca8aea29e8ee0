"""The building blocks of a DenseNet: dense layer, dense block and transition."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import fallback, functional
from .masks import DropChannel, Masks, check_position, check_probability, draw_masks
from .running_stats import unchanged_running_statistics
from .squeeze_excitation import SqueezeExcitation, check_positive

__all__ = ["DropChannel", "EfficientDenseBlock", "EfficientDenseLayer", "SqueezeExcitation", "Transition"]


def check_efficient(value: bool | str) -> bool | str:
    """`value` if it names an implementation, else ValueError."""
    if value is not False and value not in ("checkpoint", "fused"):
        raise ValueError(f"efficient is {value!r}; it may be False, 'checkpoint' or 'fused'")
    return value


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x)), in place where nothing else can see norm's output."""
    untouched = fallback.module_reason(norm, "", nn.BatchNorm2d) is None and fallback.global_reason() is None
    return F.relu(norm(x), inplace=untouched)


class Transition(nn.Module):
    """Between two dense blocks: avg_pool2d(conv(relu(norm(x))), 2).

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
        self.norm = nn.BatchNorm2d(check_positive(in_channels, "in_channels"), eps, momentum)
        self.conv = nn.Conv2d(in_channels, check_positive(out_channels, "out_channels"), 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(norm_relu(self.norm, x)), 2)


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
        check_positive(in_channels, "in_channels")
        width = check_positive(bn_size, "bn_size") * check_positive(growth_rate, "growth_rate")
        self.norm1 = nn.BatchNorm2d(in_channels, eps, momentum)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, eps, momentum)
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
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if self.efficient == "fused" and not fallback.in_plain_layers():
            reason = (
                fallback.input_reason(inputs)
                or fallback.global_reason()
                or fallback.inner_reason(self, "")
                or fallback.sharing_reason({"layer": self}, "")
            )
            if reason is None:
                return functional.dense_layer(inputs, self, keep_bottleneck=self.keep_bottleneck)
            fallback.report(reason)
        masks = draw_masks(self, inputs[0], self.norm1.num_features)
        if self.efficient == "checkpoint" and torch.is_grad_enabled():
            b = self._checkpointed_bottleneck(inputs, masks)
        else:
            b = self._bottleneck(inputs, masks)
        y = self.conv2(self._drop("pre_conv", norm_relu(self.norm2, b), masks.pre_conv2))
        if masks.dropout is not None:
            y = torch.where(masks.dropout, y * (1 / (1 - self.drop_rate)), 0.0)
        return y if self.se is None else self.se(y)

    def _bottleneck(self, inputs: Sequence[Tensor], masks: Masks) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        z = norm_relu(self.norm1, self._drop("pre_norm", x, masks.pre_norm))
        return self.conv1(self._drop("pre_conv", z, masks.pre_conv1))

    def _drop(self, position: str, x: Tensor, mask: Tensor | None) -> Tensor:
        if position != self.drop_channel_position:
            return x
        ours = type(self.drop_channel) is DropChannel
        return self.drop_channel(x, mask) if ours else self.drop_channel(x)

    def _checkpointed_bottleneck(self, inputs: list[Tensor], masks: Masks) -> Tensor:
        first, training = True, self.norm1.training

        def run(*inputs: Tensor) -> Tensor:
            nonlocal first
            if first:
                first = False
                return self._bottleneck(inputs, masks)
            with unchanged_running_statistics(self.norm1, training):
                return self._bottleneck(inputs, masks)

        # The masks are drawn already; only a module put in Drop-Channel's place may draw its own.
        draws = type(self.drop_channel) is not DropChannel
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)


class EfficientDenseBlock(nn.Module):
    """Dense layers that each read the block's input and all earlier layers' outputs: [N, C0, H, W] to [N, C0 + L*k, H, W].

    Children are denselayer1 to denselayerL.

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
        for layer in self.layers:
            layer.efficient = value

    @property
    def keep_bottleneck(self) -> bool:
        """Whether 'fused' keeps the outputs of conv1 for backward."""
        return self._keep_bottleneck

    @keep_bottleneck.setter
    def keep_bottleneck(self, value: bool) -> None:
        self._keep_bottleneck = bool(value)
        for layer in self.layers:
            layer.keep_bottleneck = self._keep_bottleneck

    @property
    def layers(self) -> list[nn.Module]:
        """The dense layers in order."""
        return list(self._modules.values())

    def fallback_reason(self, x: Tensor) -> str | None:
        """Why the fused implementation cannot compute this block for x, or None."""
        return (
            fallback.input_reason([x])
            or fallback.global_reason()
            or fallback.layers_reason(self._modules, EfficientDenseLayer, self.name)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.efficient != "fused" or fallback.in_plain_layers():
            return self._concatenate(x)
        reason = self.fallback_reason(x)
        if reason is None:
            return functional.dense_stage(x, self.layers, keep_bottleneck=self.keep_bottleneck)
        fallback.report(reason)
        with fallback.plain_layers():
            return self._concatenate(x)

    def _concatenate(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)
