"""The order in which dense layers keep their bottleneck for backward, and how many may do so at no cost.

A kept bottleneck takes rows * K2 values, and backward then does without rows * K2 * C multiplications, for a layer that
reads C channels. So the layers that read most come first: they win most time a byte. In each stage these are the last.

The peak of a step is mostly the backward of the first stage. When it runs, all that later stages kept is gone; so what
these keep costs nothing, up to the difference between their own peak and that of the first. Layers that cost nothing
are the first in the order, whatever they read.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from .._layout import padded_width

# Blocks of several sizes leave holes between them, so not all of the difference between two peaks can be used.
_USABLE = 0.94


class StageSize(NamedTuple):
    """The size of a dense block. rows: samples times pixels; width: K2; growth: k.

    value, gradient: bytes of a value of a feature map, and of a gradient buffer; parameters: bytes of the gradients that
    its backward makes.
    """

    rows: int
    in_channels: int
    growth: int
    width: int
    layers: int
    value: int = 4
    gradient: int = 4
    parameters: int = 0

    @property
    def bottleneck(self) -> int:
        """Bytes of one layer's bottleneck."""
        return self.rows * padded_width(self.width) * self.value

    @property
    def features(self) -> int:
        """Bytes of the feature buffer."""
        return self.rows * (self.in_channels + self.layers * self.growth) * self.value

    @property
    def backward(self) -> int:
        """Bytes that its backward takes besides feature buffers and kept bottlenecks."""
        gradients = self.features // self.value * self.gradient
        return gradients + self.bottleneck + self.bottleneck // self.value * self.gradient + self.parameters

    def channels(self, layer: int) -> int:
        """The number of channels that a layer reads."""
        return self.in_channels + layer * self.growth


@functools.cache
def free_layers(stages: tuple[StageSize, ...]) -> list[int]:
    """Return for each stage how many of its last layers keep their bottleneck without raising the peak of a step."""
    levels, features = [], 0
    for stage in stages:
        features += stage.features
        levels.append(features + stage.backward)
    peak = int(_USABLE * max(levels, default=0))
    room = [peak - level for level in levels]
    # All that is kept is there at once when forward ends.
    room.append(peak - features)
    kept = [0] * len(stages)
    for stage, _ in _by_channels(stages, kept):
        size = stages[stage].bottleneck
        if min(room[stage:]) >= size and kept[stage] < stages[stage].layers:
            room[stage:] = [value - size for value in room[stage:]]
            kept[stage] += 1
    return kept


def keep_order(stages: tuple[StageSize, ...]) -> list[int]:
    """Return the numbers of the stages whose next layer, from the last one on, keeps its bottleneck, one after the other."""
    free = free_layers(stages)
    costly = _by_channels(stages, free)
    at_no_cost = [place for place in _by_channels(stages, [0] * len(stages)) if place not in set(costly)]
    return [stage for stage, _ in at_no_cost + costly]


def _by_channels(stages: Sequence[StageSize], kept: Sequence[int]) -> list[tuple[int, int]]:
    """Return (stage, layer) for all layers but the last kept[stage] ones; those that read most come first."""
    layers = [(i, layer) for i, stage in enumerate(stages) for layer in range(stage.layers - kept[i])]
    return sorted(layers, key=lambda place: (-stages[place[0]].channels(place[1]), -place[0]))
