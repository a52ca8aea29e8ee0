"""A concatenation that autograd keeps as its pieces.

A layer whose norm somebody watches has to call it, once, and so cannot be computed again in backward. Its input is the
concatenation of feature maps that are kept anyway: keeping those in its place costs nothing, and to concatenate them
again in backward costs little.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def kept_as_pieces(
    x: Tensor, pieces: Sequence[Tensor], remake: Callable[[list[Tensor]], Tensor]
) -> AbstractContextManager:
    """Inside, an op that keeps `x` for backward keeps `pieces`, and backward makes x again as remake(pieces).

    Raises, in backward: RuntimeError if one of the pieces was written to in between, as autograd itself does.
    """
    address, shape = x.data_ptr(), x.shape
    values = [piece.detach() for piece in pieces]

    def pack(tensor: Tensor) -> Tensor | list[int]:
        if tensor.data_ptr() == address and tensor.shape == shape:
            return [value._version for value in values]
        return tensor

    def unpack(packed: Tensor | list[int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed != [value._version for value in values]:
            raise RuntimeError(
                "an input of a dense layer has been modified by an inplace operation between forward and backward"
            )
        with torch.no_grad():
            return remake(values)

    return saved_tensors_hooks(pack, unpack)
