"""Squeeze-and-excitation as a module."""

import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_positive


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate that is computed from the means of all channels.

        y = x * sigmoid(fc2(relu(fc1(mean of x over its pixels))))
    fc1 and fc2 are 1x1 convolutions with bias.

    Args:
        channels: C, channels of the input; at least 1.
        reduction: fc1 has max(1, C // reduction) outputs; at least 1.

    Shape: [N, C, H, W] to [N, C, H, W].

    Raises:
        ValueError: an argument is no positive integer.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, section 3.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        channels = check_positive(channels, "channels")
        hidden = max(1, channels // check_positive(reduction, "reduction"))
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * self.fc2(F.relu(self.fc1(pooled))).sigmoid()
