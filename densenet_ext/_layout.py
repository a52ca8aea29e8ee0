"""Dtypes and layouts of a stage's tensors. They depend on the device: maps are planar on CPU, channels last on CUDA."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._load import load_extension


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values stored as `dtype` are computed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded_width(width: int) -> int:
    """Row length of a bottleneck of `width` channels: the next multiple of 16."""
    return (width + 15) // 16 * 16


def feature_pitch(pixels: int) -> int:
    """Distance in elements between two planes of a padded feature buffer.

    Planes of fewer than 256 pixels follow each other; larger ones start 16 * odd elements apart, because pitches that
    are a multiple of 4 KB make all channels compete for the same cache sets.
    """
    if pixels < 256:
        return pixels
    blocks = (pixels + 15) // 16
    return 16 * (blocks + 1 - blocks % 2)


# Maps are channels last on these types of device. A library that simulates CUDA does so with tensors on the CPU.
CHANNELS_LAST_DEVICES = frozenset({"cuda", "cpu"} if load_extension().build_info()["simulated"] else {"cuda"})


def is_channels_last(like: Tensor) -> bool:
    """True if a stage on the device of `like` has its maps channels last; otherwise they are planar."""
    return like.device.type in CHANNELS_LAST_DEVICES


def gradient_dtype(like: Tensor) -> torch.dtype:
    """The dtype of gradient buffers, and of gradients inside a layer, for maps of `like`'s dtype and device."""
    return like.dtype if is_channels_last(like) else arithmetic_dtype(like.dtype)


def pixel_pitch(channels: int, dtype: torch.dtype) -> int:
    """Distance in elements between two pixels of a channels-last feature buffer: a multiple of 32 bytes."""
    sector = 32 // dtype.itemsize
    return (channels + sector - 1) // sector * sector


def lies_channels_last(maps: Tensor) -> bool:
    """True if maps lie in memory as [N, H, W, C], and do not count as planar, too."""
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


def new_maps(like: Tensor, channels: int, spatial: Sequence[int], channels_last: bool = False) -> Tensor:
    """New maps [N, channels, *spatial] without gaps: channels last if asked for, else in the device's layout."""
    shape = (like.shape[0], channels, *spatial)
    if channels_last or is_channels_last(like):
        return like.new_empty_strided(shape, _channels_last_strides(spatial, channels))
    return like.new_empty(shape)


def new_features(like: Tensor, channels: int, dtype: torch.dtype | None = None, gaps: bool = True) -> Tensor:
    """An uninitialized feature buffer [N, channels, *spatial] with `like`'s N, spatial sizes, dtype and device.

    gaps: True if planes may be padded. Pixels of channels-last maps may always be.
    """
    count, _, *spatial = like.shape
    dtype = dtype or like.dtype
    if is_channels_last(like):
        strides = _channels_last_strides(spatial, pixel_pitch(channels, dtype))
    else:
        pixels = math.prod(spatial)
        pitch = feature_pitch(pixels) if gaps else pixels
        strides = (channels * pitch, pitch, *(math.prod(spatial[i + 1 :]) for i in range(len(spatial))))
    return like.new_empty_strided((count, channels, *spatial), strides, dtype=dtype)


def _channels_last_strides(spatial: Sequence[int], pitch: int) -> tuple[int, ...]:
    """Strides of maps whose pixels lie `pitch` elements apart."""
    return math.prod(spatial) * pitch, 1, *(math.prod(spatial[i + 1 :]) * pitch for i in range(len(spatial)))
