"""The arguments of the stage ops, gathered from modules and checked; an error names the layer and the parameter.

The ops check shapes again, without the layer's name in the error, because they alone guarantee that memory is safe.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._layout import arithmetic_dtype
from ._masks import Masks, active_dropout, draw_masks
from ._ops.sync_batch_norm import group_of
from ._protocol import MaskKind, Options
from ._running_stats import is_frozen, update_running_statistics
from ._transforms import is_plain
from .drop_channel import kept_scale


class NotServed(ValueError):
    """One op cannot serve these modules, but PyTorch can: `what` says why, for layers[index] or the whole stage."""

    # torch.compile cannot trace an __init__ of an exception.
    index = property(lambda self: self.args[0])
    what = property(lambda self: self.args[1])

    def __str__(self) -> str:
        return f"{'the stage' if self.index is None else f'layers[{self.index}]'}{self.what}"


class NewFirst(NamedTuple):
    """The order of channels where each layer puts its new ones before all earlier ones; the ops have them last.

    in_channels: channels of the block's input; growth: k, the new ones of each layer.
    """

    in_channels: int
    growth: int

    def to_op(self, value: Tensor, dim: int = 0) -> Tensor:
        """Return a parameter or a statistic of a module in the op's order of channels, which are dimension `dim`."""
        new = value.shape[dim] - self.in_channels
        pieces = value.split([*[self.growth] * (new // self.growth), self.in_channels], dim)
        return value if new == 0 else torch.cat(pieces[::-1], dim)

    def to_module(self, value: Tensor, dim: int = 0) -> Tensor:
        """Undo to_op."""
        new = value.shape[dim] - self.in_channels
        pieces = value.split([self.in_channels, *[self.growth] * (new // self.growth)], dim)
        return value if new == 0 else torch.cat(pieces[::-1], dim)


class NormArguments:
    """Parameters and statistics of batch normalizations, as the ops take them."""

    def __init__(self, x: Tensor, order: NewFirst | None = None):
        self.x, self.dtype, self.order = x, arithmetic_dtype(x.dtype), order
        self.values = x.shape[0] * x.shape[2] * x.shape[3]
        self.params: list[Tensor] = []
        self.norms: list[nn.Module] = []
        self.widths: list[int] = []
        self.ordered: list[bool] = []  # True for norms whose channels are in the order of a NewFirst
        self.frozen: list[int] = []
        self.frozen_stats: list[Tensor] = []
        self.group: int | None = None  # that of all norms with batch statistics; None until there is such a norm

    def checked(self, value: Tensor, name: str, width: int) -> Tensor:
        """Check a norm's parameter or buffer [width], and return it in the arithmetic dtype."""
        self.check(value, name, width)
        return (value if value.dtype == self.dtype else value.to(self.dtype)).contiguous()

    def check(self, value: Tensor, name: str, width: int) -> None:
        """Check a norm's parameter or buffer. As in PyTorch, its dtype is x's, or float32 if x's is a lower one."""
        self.check_device(value, name)
        if value.numel() != width:
            raise ValueError(f"{name} has {value.numel()} channels; it must have {width}")
        dtype = value.dtype
        if dtype != self.dtype and dtype != self.x.dtype:
            raise TypeError(wrong_dtype(value, name, (self.x.dtype, self.dtype), "the input"))

    def check_device(self, value: Tensor, name: str) -> None:
        if value.device != self.x.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {self.x.device}, where the input is")

    def add_norm(self, norm: nn.Module, channels: int, name: str, ordered: bool = False) -> None:
        """Add the parameters of a batch normalization, and its statistics where it is frozen.

        ordered: True for the channels of a concatenation, which `order` may rearrange.
        """
        ordered = ordered and self.order is not None
        for part, empty in (("weight", self.x.new_ones), ("bias", self.x.new_zeros)):
            value = getattr(norm, part)
            if value is None:
                value = empty(channels, dtype=self.dtype)
            else:
                value = self.checked(value, f"{name}.{part}", channels)
                value = self.order.to_op(value) if ordered else value
            self.params.append(value)
        frozen = is_frozen(norm)
        self.frozen.append(int(frozen))
        if frozen:
            for statistic in ("running_mean", "running_var"):
                value = self.checked(getattr(norm, statistic), f"{name}.{statistic}", channels)
                self.frozen_stats.append(self.order.to_op(value) if ordered else value)
        else:
            self.add_group(group_of(norm), name)
            if self.values == 1 and self.group < 0:
                size = torch.Size((1, channels, 1, 1))
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
            for statistic in ("running_mean", "running_var"):
                value = norm._buffers.get(statistic)
                if value is not None:
                    self.check(value, f"{name}.{statistic}", channels)
        self.norms.append(norm)
        self.widths.append(channels)
        self.ordered.append(ordered)

    def require_plain_parameters(self) -> None:
        """Refuse parameters that are subclasses of Tensor: the op would ignore how these compute with their values."""
        if torch.compiler.is_compiling():
            return
        kind = next((kind for kind in set(map(type, self.params)) if not is_plain(kind)), None)
        if kind is not None:
            raise NotServed(None, f" has a parameter that is a {kind.__name__}")

    def add_group(self, group: int, name: str) -> None:
        if self.group not in (None, group):
            raise ValueError(f"{name} shares its batch statistics with other processes than the first norm does")
        self.group = group

    @property
    def shared_by(self) -> int:
        """The group of processes that share batch statistics, -1 for none."""
        return -1 if self.group is None else self.group

    def update_running_statistics(self, stats: Tensor) -> None:
        """Update running statistics from the op's `stats`; shared ones have the number of values in the last column."""
        values = self.values
        if self.shared_by >= 0:
            stats, values = stats[:, :-1], stats[0, -1]
        if any(self.ordered):
            columns = zip(stats.split(self.widths, 1), self.ordered, strict=True)
            stats = torch.cat([self.order.to_module(part, 1) if ordered else part for part, ordered in columns], 1)
        update_running_statistics(self.norms, self.widths, stats, values)


class StageArguments(NormArguments):
    """The flat lists that dense_stage and dense_layer take, gathered from modules."""

    def __init__(self, x: Tensor, casts: bool, layers: Sequence[nn.Module], order: NewFirst | None = None):
        super().__init__(x, order)
        first = layers[0]
        self.casts = casts  # True if autocast is on: it casts weights to x's dtype
        self.growth, self.width = first.conv2.weight.shape[0], first.conv1.weight.shape[0]
        se = getattr(first, "se", None)
        self.hidden = None if se is None else se.fc1.weight.shape[0]
        self.dropout = active_dropout(first)
        self.masks: list[Masks] = []
        self.channels: list[int] = []

    def add_weight(self, value: Tensor, name: str, ordered: bool = False) -> None:
        """Add a parameter of a convolution. Its dtype is x's, or one that autocast casts to x's.

        ordered: True if its inputs are the channels of a concatenation, which `order` may rearrange.
        """
        self.check_device(value, name)
        dtype = value.dtype
        if dtype != self.x.dtype and not (self.casts and dtype.is_floating_point and dtype != torch.float64):
            raise TypeError(wrong_dtype(value, name, (self.x.dtype,), "the input"))
        value = value if dtype == self.dtype else value.to(self.dtype)
        self.params.append((self.order.to_op(value, 1) if ordered and self.order is not None else value).contiguous())

    def add_layer(self, layer: nn.Module, index: int, channels: int) -> None:
        """Add the parameters of a dense layer that reads `channels` channels."""
        conv1, conv2, se, name = layer.conv1.weight, layer.conv2.weight, getattr(layer, "se", None), f"layers[{index}]"
        width, growth = conv1.shape[0], conv2.shape[0]
        if (width, growth) != (self.width, self.growth):
            raise NotServed(
                index,
                f" has {width} channels in the bottleneck and {growth} new ones, the first layer {self.width} and "
                f"{self.growth}",
            )
        if conv1.shape[2:] != (1, 1) or conv2.shape[2:] != (3, 3):
            raise NotServed(index, f" has weights {tuple(conv1.shape)} and {tuple(conv2.shape)}, not 1x1 and 3x3")
        if conv2.shape[1] != width:
            raise ValueError(f"{name}.conv2.weight takes {conv2.shape[1]} channels; it must take {width}")
        hidden = None if se is None else se.fc1.weight.shape[0]
        if hidden != self.hidden:
            raise NotServed(
                index, f" has squeeze-and-excitation to {hidden} channels, the first layer to {self.hidden}"
            )
        dropout = active_dropout(layer)
        if dropout != self.dropout:
            raise NotServed(index, f" has drop_rate {dropout}, the first layer {self.dropout}")
        self.add_norm(layer.norm1, channels, f"{name}.norm1", ordered=True)
        if conv1.shape[1] != channels:
            raise ValueError(f"{name}.conv1.weight takes {conv1.shape[1]} channels; it must take {channels}")
        self.add_weight(conv1, f"{name}.conv1.weight", ordered=True)
        self.add_norm(layer.norm2, self.width, f"{name}.norm2")
        self.add_weight(conv2, f"{name}.conv2.weight")
        if se is not None:
            for part, fc in (("fc1", se.fc1), ("fc2", se.fc2)):
                self.add_weight(fc.weight, f"{name}.se.{part}.weight")
                self.add_weight(fc.bias, f"{name}.se.{part}.bias")
        self.channels.append(channels)

    def draw_masks(self, layers: Sequence[nn.Module]) -> None:
        """Draw the masks of all layers. Call it after all checks, so that a call that fails draws nothing."""
        for layer, channels in zip(layers, self.channels, strict=True):
            self.masks.append(draw_masks(layer, self.x, channels))

    def flat(self, tail: int, keep_bottleneck: bool | int, allow_tf32: bool) -> tuple:
        """Return the lists and numbers that the ops take after the input, in order; _protocol.py explains them."""
        used = [i for i in range(len(MaskKind.ALL)) if any(masks[i] is not None for masks in self.masks)]
        masks = [self._mask(layer, i) for layer in range(len(self.masks)) for i in used]
        options = Options(
            mask_kind=sum(MaskKind.ALL[i] for i in used),
            squeeze_excite=int(self.hidden is not None),
            tail=tail,
            kept_bottlenecks=len(self.channels)
            if keep_bottleneck is True
            else min(keep_bottleneck, len(self.channels)),
            allow_tf32=int(allow_tf32),
            group=self.shared_by,
        )
        eps = [norm.eps for norm in self.norms]
        return self.params, masks, self.frozen_stats, eps, self.frozen, kept_scale(self.dropout), [*options]

    def _mask(self, layer: int, place: int) -> Tensor:
        """Return a layer's mask of the kind MaskKind.ALL[place]; all ones if only other layers have such a mask."""
        mask = self.masks[layer][place]
        if mask is None:
            widths = {MaskKind.PRE_CONV2: self.width, MaskKind.POST_CONV2: self.growth}
            channels = widths.get(MaskKind.ALL[place], self.channels[layer])
            mask = self.x.new_ones((self.x.shape[0], channels), dtype=self.dtype)
        return mask


def wrong_dtype(value: Tensor, name: str, dtypes: Sequence[torch.dtype], like: str = "") -> str:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
    actual = str(value.dtype).removeprefix("torch.")
    return f"{name} has dtype {actual}; it may be {names}" + (f", as {like} is" if like else "")
