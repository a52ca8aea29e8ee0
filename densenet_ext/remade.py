"""What autograd keeps of modules that somebody watches: as little as can be made again without calling them.

A norm with a hook has to be called, once, and so cannot be computed again in backward as torch.utils.checkpoint does it.
But its input is a concatenation of feature maps that are kept anyway, and what follows from it by the formula of batch
normalization and ReLU needs no module.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .running_stats import is_frozen
from .snapshot import Unchanged


class _Saved:
    """A tensor that an op keeps for backward, until it turns out that it can be made again by `remake`."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.version, self.remake = tensor, tensor._version, None


class Remade(saved_tensors_hooks):
    """Inside, ops keep for backward the tensors `pieces` in place of x, which is remake(pieces), and after
    `forget_normalized` in place of relu(norm(x)) too.

    Raises, in backward: RuntimeError if a piece or a parameter was written to in between, as autograd does.
    """

    def __init__(self, x: Tensor, pieces: Sequence[Tensor], remake: Callable[[Sequence[Tensor]], Tensor]):
        self.x, self.version, self.saved, self.forgot_x = x, x._version, [], False
        inputs = Unchanged(pieces)
        self.remake = lambda: remake(inputs.values())  # not of self, which the graph would hold in a cycle
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if _is_same(tensor, self.x) and self.x._version == self.version:
            saved.tensor, saved.remake, self.forgot_x = None, self.remake, True
        else:
            self.saved.append(saved)
        return saved

    def forget_normalized(self, norm: nn.Module, z: Tensor) -> None:
        """Keep z no longer if it is relu(norm(x)), by the formula and bit for bit: hooks may have changed it."""
        kept = [saved for saved in self.saved if _is_same(saved.tensor, z)]
        # Without x, or with an x that a hook wrote to, there is nothing to make z of.
        if kept and self.forgot_x and self.x._version == self.version and type(norm) is nn.BatchNorm2d:
            statistics = (None, None)
            if is_frozen(norm):
                statistics = (norm.running_mean.clone(), norm.running_var.clone())
            affine = Unchanged([value for value in (norm.weight, norm.bias) if value is not None])
            present, eps, make_x = (norm.weight is not None, norm.bias is not None), norm.eps, self.remake

            def remake() -> Tensor:
                values = iter(affine.values())
                weight, bias = (next(values) if there else None for there in present)
                y = F.batch_norm(make_x(), *statistics, weight, bias, statistics[0] is None, 0.0, eps)
                return F.relu(y, inplace=True)

            with torch.no_grad():
                if torch.equal(remake(), z):
                    for saved in kept:
                        saved.tensor, saved.remake = None, remake
        self.saved.clear()
        self.x = None


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _unpack(saved: _Saved) -> Tensor:
    if saved.remake is None:
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                "densenet_ext: a tensor that the backward of a watched dense layer needs has been modified by an inplace "
                "operation"
            )
        return saved.tensor
    with torch.no_grad():
        return saved.remake()
