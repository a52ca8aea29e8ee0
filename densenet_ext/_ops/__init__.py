"""The compiled ops as PyTorch knows them: handles, shape functions, autograd, SyncBatchNorm's collectives."""

import torch

from . import autograd, fake, sync_batch_norm  # noqa: F401 (the first two register themselves)

for _name in ("synchronize_statistics", "synchronize_gradient"):
    for _key in ("CPU", "CUDA"):
        torch.library.impl(f"densenet_ext::{_name}", _key, getattr(sync_batch_norm, _name))
