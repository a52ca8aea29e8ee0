"""Drop-Channel as a module, and what a random mask is made of."""

import torch
from torch import Tensor, nn

from ._checks import POSITIONS, check_probability
from ._layout import arithmetic_dtype
from ._transforms import in_functorch


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
        kept = bernoulli(like, (samples, channels), arithmetic_dtype(like.dtype), 1 - self.p)
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


def bernoulli(like: Tensor, size: tuple[int, ...], dtype: torch.dtype, p: float) -> Tensor:
    """Ones with probability p, else zeros, on the device of `like`; under vmap as many as its samples ask for."""
    if not in_functorch():
        return torch.empty(size, dtype=dtype, device=like.device).bernoulli_(p)
    return torch.bernoulli(torch.full(size, p, device=like.device)).to(dtype)
