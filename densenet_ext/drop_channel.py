"""Drop-Channel as a module, and the random numbers that all masks are made of."""

import torch
from torch import Tensor, nn

from ._checks import check_probability
from ._layout import arithmetic_dtype
from ._transforms import in_functorch

POSITIONS = ("pre_norm", "pre_conv")  # places of Drop-Channel in a dense layer


class DropChannel(nn.Module):
    """Drop whole channels of a sample, as torch.nn.Dropout2d does; the mask may also be passed in.

        y[n, c] = m[n, c] * x[n, c],    m[n, c] = 0 with probability p, else 1 / (1 - p)
    In evaluation mode, and with p = 0, y is x itself, whatever the mask.

    Args:
        p: probability that a channel is dropped; 0 <= p < 1.

    Shape: x [N, C, H, W] to [N, C, H, W]; mask [N, C], or None to draw one.

    Raises:
        ValueError: p is out of range.

    Source: Cai et al., Effective and Efficient Dropout for Deep Convolutional Neural Networks, arXiv 1904.03392.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = check_probability(p, "p")

    @property
    def active(self) -> bool:
        """True in training mode with p > 0: forward drops channels."""
        return self.training and self.p > 0

    def draw(self, samples: int, channels: int, like: Tensor) -> Tensor:
        """Draw a mask [samples, channels] on the device of `like`, in the dtype in which its values are computed."""
        mask = bernoulli(like, (samples, channels), arithmetic_dtype(like.dtype), 1 - self.p)
        return mask.mul_(kept_scale(self.p))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.active:
            return x
        if mask is None:
            mask = self.draw(x.shape[0], x.shape[1], x)
        return scale_channels(x, mask)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def kept_scale(p: float) -> float:
    """Return the factor that dropout with probability p applies to the values it keeps: 1 / (1 - p), or 0 for p = 1."""
    return 1 / (1 - p) if p < 1 else 0.0


def scale_channels(x: Tensor, mask: Tensor) -> Tensor:
    """Return x [N, C, H, W] times mask [N, C], in x's dtype."""
    return x * mask.to(x.dtype)[:, :, None, None]


def bernoulli(like: Tensor, size: tuple[int, ...], dtype: torch.dtype, p: float) -> Tensor:
    """Draw ones with probability p, else zeros, on the device of `like`. Under vmap its `randomness` is respected."""
    if not in_functorch():
        return torch.empty(size, dtype=dtype, device=like.device).bernoulli_(p)
    return torch.bernoulli(torch.full(size, p, device=like.device)).to(dtype)


def check_position(value: str) -> str:
    """Return `value`; raise ValueError unless it is a position of Drop-Channel."""
    if value not in POSITIONS:
        raise ValueError(f"drop_channel_position is {value!r}; it may be 'pre_norm' or 'pre_conv'")
    return value
