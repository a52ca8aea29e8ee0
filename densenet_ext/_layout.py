"""Dtypes and layouts of a stage's tensors, which are the device's choice: planar maps on CPU, channels last on CUDA."""

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


# Types of device whose maps are channels last: a library that simulates CUDA does so on the CPU.
CHANNELS_LAST_DEVICES = frozenset({"cuda", "cpu"} if load_extension().build_info()["simulated"] else {"cuda"})


def is_channels_last(like: Tensor) -> bool:
    """Whether the stage has its maps channels last on that device; they are planar otherwise."""
    return like.device.type in CHANNELS_LAST_DEVICES


def gradient_dtype(like: Tensor) -> torch.dtype:
    """The dtype of gradient buffers and of gradients inside a layer, for maps like this one."""
    return like.dtype if is_channels_last(like) else arithmetic_dtype(like.dtype)


def pixel_pitch(channels: int, dtype: torch.dtype) -> int:
    """Distance in elements between two pixels of a channels-last feature buffer: a multiple of 32 bytes."""
    sector = 32 // dtype.itemsize
    return (channels + sector - 1) // sector * sector


def lies_channels_last(maps: Tensor) -> bool:
    """Whether maps lie [N, H, W, C] in memory, and not as well planar."""
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


def new_maps(like: Tensor, channels: int, height: int, width: int, channels_last: bool = False) -> Tensor:
    """Uninitialized maps [N, channels, height, width] without gaps; channels_last: whatever the device's own layout."""
    if channels_last or is_channels_last(like):
        strides = (height * width * channels, 1, width * channels, channels)
        return like.new_empty_strided((like.shape[0], channels, height, width), strides)
    return like.new_empty((like.shape[0], channels, height, width))


def new_features(like: Tensor, channels: int, dtype: torch.dtype | None = None, gaps: bool = True) -> Tensor:
    """An uninitialized feature buffer [N, channels, H, W] with `like`'s N, H, W, dtype and device.

    gaps: whether planes may be padded; pixels of channels-last maps always may.
    """
    count, _, height, width = like.shape
    dtype = dtype or like.dtype
    if is_channels_last(like):
        pitch = pixel_pitch(channels, dtype)
        strides = (height * width * pitch, 1, width * pitch, pitch)
    else:
        pitch = feature_pitch(height * width) if gaps else height * width
        strides = (channels * pitch, pitch, width, 1)
    return like.new_empty_strided((count, channels, height, width), strides, dtype=dtype)
