"""The flat arguments of the stage ops: what their numbers mean, in which order their lists are, and what sizes follow.

csrc/stage/protocol.h has the same names for C++. Constants are integers, not enums: every call hands them to an op.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._layout import padded_width


class Tail:
    """The part of a stage that consumes its dense block's features; NONE for a block alone."""

    NONE = 0
    TRANSITION = 1  # norm, ReLU, 1x1 convolution, 2x2 average pool
    HEAD = 2  # norm, ReLU, global average pool


class MaskKind:
    """Masks that a layer has, as bits; a layer's masks are listed in this order."""

    PRE_NORM = 1  # [N, C], before norm1
    PRE_CONV1 = 2  # [N, C], before conv1
    PRE_CONV2 = 4  # [N, K2], before conv2
    DROPOUT = 8  # bool [N, k, H, W], on conv2's output
    POST_CONV2 = 16  # [N, k], after conv2 and its dropout

    ALL = (PRE_NORM, PRE_CONV1, PRE_CONV2, DROPOUT, POST_CONV2)


class GradientLayout:
    """Layout of dx: not computed, the device's own, or channels last (on CPU, if the input was channels last)."""

    NONE = 0
    DEVICE = 1
    CHANNELS_LAST = 2


class Options(NamedTuple):
    """The entries of the list `options` of an op, in order."""

    mask_kind: int = 0
    squeeze_excite: int = 0
    tail: int = Tail.NONE
    kept_bottlenecks: int = 0  # how many of the last layers keep their bottleneck for backward
    allow_tf32: int = 0  # float32 products may be TF32 (CUDA)
    group: int = -1  # index of the process group that shares batch statistics; -1: this process alone


class LayerParams(NamedTuple):
    """The parameters of a layer in the list `params`; the last four only with squeeze-and-excitation."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    conv1_weight: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    conv2_weight: Tensor
    fc1_weight: Tensor | None = None
    fc1_bias: Tensor | None = None
    fc2_weight: Tensor | None = None
    fc2_bias: Tensor | None = None

    @property
    def squeeze_excite(self) -> tuple[Tensor, ...]:
        """The parameters of squeeze-and-excitation."""
        return self[6:]


class TailParams(NamedTuple):
    """The parameters of a tail, at the end of the list `params`; a head has no convolution."""

    norm_weight: Tensor
    norm_bias: Tensor
    conv_weight: Tensor | None = None


def tail_params(tail: int) -> int:
    """The number of parameters of a tail."""
    return {Tail.NONE: 0, Tail.TRANSITION: 3, Tail.HEAD: 2}[tail]


def layer_params(squeeze_excite: int) -> int:
    """The number of parameters of a layer."""
    return 10 if squeeze_excite else 6


class StageSizes:
    """The parameters of a stage by name, and the sizes that follow from them.

    params: LayerParams of each layer, with or without TailParams at the end; in_channels: channels of the input.
    """

    def __init__(self, params: Sequence[Tensor], options: Options, in_channels: int):
        each = layer_params(options.squeeze_excite)
        count = len(params) // each  # rounded down: a tail has fewer parameters than a layer
        self.layers = [LayerParams(*params[i * each : (i + 1) * each]) for i in range(count)]
        self.tail = TailParams(*params[count * each :]) if len(params) % each else None
        first = self.layers[0]
        self.options = options
        self.width, self.growth = first.conv1_weight.shape[0], first.conv2_weight.shape[0]
        self.hidden = 0 if first.fc1_weight is None else first.fc1_weight.shape[0]
        self.in_channels, self.channels = in_channels, in_channels + count * self.growth
        self.norm_widths = [w for i in range(count) for w in (self.layer_channels(i), self.width)]
        if options.tail != Tail.NONE:
            self.norm_widths.append(self.channels)

    def layer_channels(self, layer: int) -> int:
        """The number of channels that a layer reads, which is also the first channel that it writes."""
        return self.in_channels + layer * self.growth

    def stats_shape(self) -> tuple[int, int]:
        """Shape of mean, variance, scale and shift of all norms; a group adds a column for its number of values."""
        return 4, sum(self.norm_widths) + (self.options.group >= 0)

    def gates_shape(self, samples: int) -> tuple[int, ...]:
        """Shape of each layer's pooled [N, k], hidden [N, r] and gate [N, k]; empty without squeeze-and-excitation."""
        return (len(self.layers), samples * (2 * self.growth + self.hidden)) if self.hidden else (0,)

    def bottlenecks_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the bottlenecks that are kept for backward; empty where none is."""
        kept = self.options.kept_bottlenecks
        return (kept, rows, padded_width(self.width)) if kept else (0,)
