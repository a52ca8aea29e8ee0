"""Count what a model keeps between forward and backward: most of the memory that its training takes."""

import torch
from torch import nn


def kept_megabytes(model: nn.Module, *inputs: torch.Tensor) -> float:
    """Return how many MB of tensors autograd keeps after model(*inputs), parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *inputs)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(*inputs)
    del outputs
    return sum(kept.values()) / 1e6
