"""The random masks of a dense layer, drawn in one order whichever implementation uses them.

Under the same state of the random number generator the plain, the checkpointed and the fused layer get the same masks,
so that they can be compared number by number. Masks are drawn before the layer runs and passed to whatever is
recomputed later, so recomputation needs no state of the generator.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._layout import arithmetic_dtype
from .drop_channel import DropChannel, bernoulli, kept_scale


class Masks(NamedTuple):
    """The masks of one layer; None stands for a mask that the layer does not have.

    pre_norm, pre_conv1 [N, C], pre_conv2 [N, K2], post_conv2 [N, k]: 0 or 1/(1-p); dropout bool [N, k, H, W], true
    where a value is kept.
    """

    pre_norm: Tensor | None = None
    pre_conv1: Tensor | None = None
    pre_conv2: Tensor | None = None
    dropout: Tensor | None = None
    post_conv2: Tensor | None = None


def active_dropout(layer: nn.Module) -> float:
    """The probability with which `layer` drops single values right now: 0 in evaluation mode."""
    return layer.drop_rate if layer.training else 0.0


def draw_masks(layer: nn.Module, x: Tensor, channels: int, dropout_elsewhere: bool = False) -> Masks:
    """Draw the masks of one forward pass of `layer`; its input has `channels` channels and x's samples and size.

    The order is: pre_norm, or pre_conv1 and pre_conv2; then dropout, unless the caller draws that one elsewhere; then
    post_conv2, for layers of other libraries that drop whole channels after conv2.
    """
    pre_norm = pre_conv1 = pre_conv2 = dropout = post_conv2 = None
    drop_channel = getattr(layer, "drop_channel", None)
    if type(drop_channel) is DropChannel and drop_channel.active:
        samples = x.shape[0]
        if layer.drop_channel_position == "pre_norm":
            pre_norm = drop_channel.draw(samples, channels, x)
        else:
            pre_conv1 = drop_channel.draw(samples, channels, x)
            pre_conv2 = drop_channel.draw(samples, layer.conv1.out_channels, x)
    rate = active_dropout(layer)
    if rate > 0 and not dropout_elsewhere:
        size = (x.shape[0], layer.conv2.out_channels, x.shape[2], x.shape[3])
        dropout = bernoulli(x, size, torch.bool, 1 - rate)
    rate = getattr(layer, "channel_dropout", 0.0)
    if rate > 0 and layer.training:
        size = (x.shape[0], layer.conv2.out_channels)
        post_conv2 = bernoulli(x, size, arithmetic_dtype(x.dtype), 1 - rate).mul_(kept_scale(rate))
    return Masks(pre_norm, pre_conv1, pre_conv2, dropout, post_conv2)
