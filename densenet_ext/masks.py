"""Drop-Channel, and the random masks of a dense layer, drawn in one order whichever implementation uses them.

Under the same state of the random number generator the plain, the checkpointed and the fused layer get the same masks,
so that they can be compared number by number. Drawn before the layer runs, they are plain arguments of whatever is
recomputed later, and recomputation needs no state of the generator.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .reference.layout import arithmetic_dtype
from .transforms import in_functorch

POSITIONS = ("pre_norm", "pre_conv")


class DropChannel(nn.Module):
    """Drop whole channels of a sample: x * m[n, c], m = 0 with probability p, else 1/(1-p); x itself in evaluation mode.

    What torch.nn.Dropout2d does, with a mask that can be given.

    Args:
        p: probability of a channel to be dropped, 0 <= p < 1.

    Shape: x [N, C, H, W] to the same; mask [N, C], or None to draw one.

    Raises:
        ValueError: p is out of range.

    Source: Cai et al., Effective and Efficient Dropout for Deep Convolutional Neural Networks, arXiv 1904.03392.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.p = check_probability(p, "p")

    @property
    def active(self) -> bool:
        """Whether it drops anything right now."""
        return self.training and self.p > 0

    def draw(self, samples: int, channels: int, like: Tensor) -> Tensor:
        """A mask [samples, channels] in the dtype in which values of `like` are computed."""
        kept = _bernoulli(like, (samples, channels), arithmetic_dtype(like.dtype), 1 - self.p)
        return kept.mul_(kept_scale(self.p))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.active:
            return x
        if mask is None:
            mask = self.draw(x.shape[0], x.shape[1], x)
        return scale_channels(x, mask)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def kept_scale(p: float) -> float:
    """By what dropout with probability p multiplies what it keeps: 1 / (1 - p), and 0 where it keeps nothing."""
    return 1 / (1 - p) if p < 1 else 0.0


def scale_channels(x: Tensor, mask: Tensor) -> Tensor:
    """x [N, C, H, W] times mask [N, C], in x's dtype."""
    return x * mask.to(x.dtype)[:, :, None, None]


class Masks(NamedTuple):
    """Masks of one layer, None where there is none.

    pre_norm, pre_conv1 [N, C], pre_conv2 [N, K2]: 0 or 1/(1-p); dropout bool [N, k, H, W], true where a value is kept.
    """

    pre_norm: Tensor | None = None
    pre_conv1: Tensor | None = None
    pre_conv2: Tensor | None = None
    dropout: Tensor | None = None


def active_dropout(layer: nn.Module) -> float:
    """The probability with which `layer` drops single values right now: 0 in evaluation mode."""
    return layer.drop_rate if layer.training else 0.0


def _bernoulli(like: Tensor, size: tuple[int, ...], dtype: torch.dtype, p: float) -> Tensor:
    """Ones with probability p, else zeros, on the device of `like`; under vmap as many as its samples ask for."""
    if not in_functorch():
        return torch.empty(size, dtype=dtype, device=like.device).bernoulli_(p)
    return torch.bernoulli(torch.full(size, p, device=like.device)).to(dtype)


def draw_masks(layer: nn.Module, x: Tensor, channels: int, dropout_elsewhere: bool = False) -> Masks:
    """The masks of one forward pass of `layer`, whose input has x's samples and size, and that many channels.

    Drawn in this order: before norm1, or before conv1 and before conv2; then dropout, unless that is done elsewhere.
    """
    pre_norm = pre_conv1 = pre_conv2 = dropout = None
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
        dropout = _bernoulli(x, size, torch.bool, 1 - rate)
    return Masks(pre_norm, pre_conv1, pre_conv2, dropout)


def check_probability(value: float, name: str) -> float:
    """`value` as a float if it is a probability below 1, else ValueError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, str) or not 0 <= number < 1:
        raise ValueError(f"{name} is {value!r}; it must be at least 0 and less than 1")
    return number


def check_position(value: str) -> str:
    """`value` if it is a position of Drop-Channel, else ValueError."""
    if value not in POSITIONS:
        raise ValueError(f"drop_channel_position is {value!r}; it may be 'pre_norm' or 'pre_conv'")
    return value
