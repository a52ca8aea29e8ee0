"""Keeps for backward of watched modules as little as can be made again without calling them.

A norm with a hook has to be called, once, and so cannot be computed again in backward as torch.utils.checkpoint does it.
But its input is a concatenation of feature maps that are kept anyway, and what follows from it by the formula of batch
normalization and ReLU needs no module.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ._running_stats import is_frozen
from ._snapshot import Unchanged


def in_checkpoint() -> bool:
    """True if torch.utils.checkpoint runs the caller: it keeps nothing anyway, and hands out what it makes again
    only once."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


class _Kept:
    """Tensors that backward needs, by the hooks that somebody else has set for saved tensors, if any, to move them
    elsewhere. Without such hooks they must not be written to."""

    def __init__(self, tensors: Sequence[Tensor]):
        pack, self.unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (None, None)
        self.tensors = Unchanged(tensors) if pack is None else [pack(tensor.detach()) for tensor in tensors]

    def values(self) -> list[Tensor]:
        return self.tensors.values() if self.unpack is None else [self.unpack(packed) for packed in self.tensors]


class _Saved:
    """A tensor that an op keeps for backward, until `finish` decides whether it stays or is made again."""

    def __init__(self, tensor: Tensor | None, get: Callable[[], Tensor] | None = None):
        self.tensor, self.version, self.get = tensor, None if tensor is None else tensor._version, get

    def keep(self) -> None:
        if self.tensor._version != self.version:
            self.get = _raise_modified
        else:
            stored = _Kept([self.tensor])
            self.get = lambda: stored.values()[0]
        self.tensor = None


class Remade(saved_tensors_hooks):
    """Inside, ops keep for backward the tensors `pieces` in place of x, which is remake(pieces), and after `finish` in
    place of relu(norm(x)) too.

    Raises, in backward: RuntimeError if a piece or a parameter was written to in between, as autograd does.
    """

    def __init__(self, x: Tensor, pieces: Sequence[Tensor], remake: Callable[[Sequence[Tensor]], Tensor]):
        self.x, self.version = x, x._version
        stored = _Kept(pieces)
        self.remake = lambda: remake(stored.values())  # not of self, which the graph would hold in a cycle
        self.saved: list[_Saved] = []
        self.keeps_x = False  # an op has asked to
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> _Saved:
        if _is_same(tensor, self.x) and self.x._version == self.version:
            self.keeps_x = True
            return _Saved(None, self.remake)
        self.saved.append(_Saved(tensor))
        return self.saved[-1]

    def finish(self, norm: nn.Module, z: Tensor) -> None:
        """After the context: keeps z no longer if it is relu(norm(x)), bit for bit, because hooks may have changed it."""
        # Without x, or with an x that a hook wrote to, there is nothing to make z of.
        if self.keeps_x and self.x._version == self.version and type(norm) is nn.BatchNorm2d:
            normalize, make_x = _normalization(norm), self.remake
            with torch.no_grad():
                if torch.equal(normalize(self.x), z):
                    for saved in self.saved:
                        if _is_same(saved.tensor, z) and saved.tensor._version == saved.version:
                            saved.tensor, saved.get = None, lambda: normalize(make_x())
        for saved in self.saved:
            if saved.get is None:
                saved.keep()
        self.saved.clear()
        self.x = None


def _normalization(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """x to relu(norm(x)) as the norm is now, with the batch's statistics or a copy of its running ones."""
    statistics = (norm.running_mean.clone(), norm.running_var.clone()) if is_frozen(norm) else (None, None)
    present = [value is not None for value in (norm.weight, norm.bias)]
    affine, eps = Unchanged([value for value in (norm.weight, norm.bias) if value is not None]), norm.eps

    def normalize(x: Tensor) -> Tensor:
        values = iter(affine.values())
        weight, bias = (next(values) if exists else None for exists in present)
        return F.relu(F.batch_norm(x, *statistics, weight, bias, statistics[0] is None, 0.0, eps), inplace=True)

    return normalize


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _unpack(saved: _Saved) -> Tensor:
    with torch.no_grad():
        return saved.get()


def _raise_modified() -> Tensor:
    raise RuntimeError(
        "densenet_ext: a tensor that backward of a watched dense layer needs has been modified by an inplace operation"
    )
