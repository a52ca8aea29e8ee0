"""Shift, flip and normalization of a whole batch at once, on the device that holds it.

All that is random in an epoch is drawn beforehand, on the CPU, from the seed and the number of the epoch alone. So it is
equal on every device, in every process, however many there are, and wherever in the epoch one starts.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_plan(count: int, seed: int, epoch: int, pad: int, flip: bool) -> Tensor:
    """Draw the order and the augmentation of an epoch of N images: int64 [N, 4].

    A row is an image: its position in the split, row and column of the crop in the padded image (0..2 * pad), and 1 if it
    is mirrored left to right.
    """
    # A digest, since seed + epoch would give one run's second epoch to another run as its first.
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    return torch.column_stack([order, offsets, flips])


class Normalize:
    """(x / 255 - mean) / std of uint8 images [B, C, S, S], with mean and std [C] of the pixels scaled to 0..1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        mean, std = (torch.as_tensor(x, dtype=torch.float64).cpu().view(-1, 1, 1) for x in (mean, std))
        self.scale = (1 / (255 * std)).float().to(device)
        self.shift = (-mean / std).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


def shift_and_flip(images: Tensor, plan: Tensor, pad: int, normalize: Normalize) -> Tensor:
    """Normalize images uint8 [B, C, S, S], pad them with `pad` zeros on each side, crop them to S x S at the offsets of
    the plan [B, 4], and mirror them where it says so: [B, C, S, S].

    The padding is added to the normalized image, so the margin has the mean color of the data set and is not black.
    """
    count, channels, size, _ = images.shape
    line = torch.arange(size, device=images.device)
    rows = line + plan[:, 1:2] - pad  # [B, S]: the row of the image that each row of the result shows
    columns = torch.where(plan[:, 3:] == 1, line.flip(0), line) + plan[:, 2:3] - pad
    row_inside, column_inside = ((0 <= positions) & (positions < size) for positions in (rows, columns))  # [B, S]
    pixels = rows.clamp(0, size - 1)[:, :, None] * size + columns.clamp(0, size - 1)[:, None, :]  # [B, S, S]
    pixels = pixels.view(count, 1, size * size).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, pixels).view_as(images)
    return normalize(moved) * (row_inside[:, None, :, None] & column_inside[:, None, None, :])
