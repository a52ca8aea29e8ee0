"""The precision of PyTorch's convolutions. Importing this takes seconds, because it imports the compiler."""

import torch


@torch.compiler.assume_constant_result
def cudnn_uses_tf32() -> bool:
    """True if float32 convolutions on a GPU use TF32: torch.backends.cudnn.conv.fp32_precision."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
