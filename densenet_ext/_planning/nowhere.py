"""Tensors on the CPU that take no memory: their addresses are reserved, and nobody writes to them."""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python has from 3.13 on
_BYTES = 1 << 42


class Nowhere:
    """A range of addresses without memory behind it, on which all tensors lie at once."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)

    def tensor(self, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor of this form; its values mean nothing."""
        count = 1 + offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count).as_strided(tuple(shape), tuple(stride), offset)
