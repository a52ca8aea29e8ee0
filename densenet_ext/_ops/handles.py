"""Handles of the stage ops, the devices that have kernels, and the errors for missing kernels and a lack of memory.

The ops are `torch.ops.densenet_ext.*`; `reference/dense_stage.py` describes their arguments. An op with autograd writes
into no argument; `dense_block_backward` and the kernel ops do, and have no autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._load import cuda_status, load_extension

load_extension()  # registers the ops

dense_stage = torch.ops.densenet_ext.dense_stage.default
dense_stage_backward = torch.ops.densenet_ext.dense_stage_backward.default
dense_tail_backward = torch.ops.densenet_ext.dense_tail_backward.default
dense_block_backward = torch.ops.densenet_ext.dense_block_backward.default
new_gradients = torch.ops.densenet_ext.new_gradients.default
dense_layer = torch.ops.densenet_ext.dense_layer.default
dense_layer_backward = torch.ops.densenet_ext.dense_layer_backward.default
dense_stem = torch.ops.densenet_ext.dense_stem.default
dense_stem_backward = torch.ops.densenet_ext.dense_stem_backward.default


def _devices_of(op: str) -> frozenset[str]:
    keys = (("cpu", "CPU"), ("cuda", "CUDA"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(device for device, key in keys if has_kernel(f"densenet_ext::{op}", key))


# The loaded library has kernels for these types of device.
DEVICES = _devices_of("append")


def require_kernels(x: Tensor) -> None:
    """Raise RuntimeError if x is on a CUDA device and the CUDA kernels are not loaded."""
    if x.device.type == "cuda" and "cuda" not in DEVICES:
        raise RuntimeError(
            f"x is on {x.device}, and the CUDA kernels of densenet_ext are {cuda_status()}. Install it where nvcc and "
            "torch have the same major version of CUDA, or set efficient=False or 'checkpoint'"
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """A context in which an op that runs out of memory raises torch.OutOfMemoryError, as PyTorch's own ops do."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise
