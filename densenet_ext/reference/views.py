"""Views and conversions that the twins share."""

from torch import Tensor

from .._layout import arithmetic_dtype


def read(features: Tensor, columns: slice) -> Tensor:
    """These channels, in the arithmetic dtype."""
    return features[:, columns].to(arithmetic_dtype(features.dtype))


def spread(table: Tensor) -> Tensor:
    """[1 or N, c] -> [1 or N, c, 1, 1]."""
    return table[:, :, None, None]


def write(out: Tensor | None, value: Tensor) -> None:
    """out = value, reshaped where they differ in dimensions of size 1. Does nothing if out is None."""
    if out is not None:
        out.copy_(value.reshape(out.shape))


def planes(rows: Tensor, like: Tensor, channels: int) -> Tensor:
    """Rows of pixels [M, K2p] -> planes [N, channels, H, W] in the arithmetic dtype."""
    count, _, height, width = like.shape
    maps = rows.view(count, height, width, rows.size(1))[..., :channels].permute(0, 3, 1, 2)
    return maps.to(arithmetic_dtype(rows.dtype))


def write_rows(out: Tensor, maps: Tensor) -> None:
    """Planes [N, K2, H, W] -> rows of pixels [M, K2p], zero from column K2 on."""
    channels = maps.size(1)
    out[:, :channels] = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    out[:, channels:] = 0


def write_moments(x: Tensor, mean: Tensor | None, m2: Tensor | None, columns: slice) -> None:
    """Write the mean and centered sum of squares over the pixels of x [N, c, H, W] into these columns of [N, C]."""
    if mean is None:
        return
    x = x.to(mean.dtype).flatten(2)
    mu = x.mean(2)
    mean[:, columns] = mu
    m2[:, columns] = (x - mu[:, :, None]).square().sum(2)
