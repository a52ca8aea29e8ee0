"""Tensors on the CPU that take no memory: their addresses are reserved, and nobody writes to them."""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python has from 3.13 on


class Nowhere:
    """A range of addresses without memory behind it, on which all tensors lie at once. It grows with the largest one."""

    def __init__(self) -> None:
        self.memory = self._reserve(1 << 30)

    def _reserve(self, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)

    def tensor(self, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor of this form; its values mean nothing."""
        count = 1 + offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        if count * dtype.itemsize > len(self.memory):
            self.memory = self._reserve(2 * count * dtype.itemsize)
        return torch.frombuffer(self.memory, dtype=dtype, count=count).as_strided(tuple(shape), tuple(stride), offset)
