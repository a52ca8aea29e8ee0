"""Saved-tensor hooks that keep little for backward although each module is called once.

A norm with a hook must not run a second time in backward, as torch.utils.checkpoint would have it. But its input is a
concatenation of feature maps that autograd keeps anyway, and its output after ReLU follows from the input by the
formula of batch normalization. Backward computes both again from the feature maps, without the module.
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
    """Return True inside torch.utils.checkpoint: it keeps nothing anyway, and returns a recomputed tensor only once."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


class _Stored:
    """Tensors kept for backward: by the saved-tensor hooks that are active outside, if there are any.

    Without such hooks the tensors stay as they are, and must not be written to.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        pack, self.unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (None, None)
        self.tensors = Unchanged(tensors) if pack is None else [pack(tensor.detach()) for tensor in tensors]

    def values(self) -> list[Tensor]:
        return self.tensors.values() if self.unpack is None else [self.unpack(packed) for packed in self.tensors]


class _Saved:
    """A tensor that an op keeps for backward, until `finish` decides if it stays or is computed again."""

    def __init__(self, tensor: Tensor | None, get: Callable[[], Tensor] | None = None):
        self.tensor, self.version, self.get = tensor, None if tensor is None else tensor._version, get

    def keep(self) -> None:
        if self.tensor._version != self.version:
            self.get = _raise_modified
        else:
            stored = _Stored([self.tensor])
            self.get = lambda: stored.values()[0]
        self.tensor = None


class Remade(saved_tensors_hooks):
    """A context in which ops keep the tensors `pieces` for backward in place of x, which is remake(pieces).

    After `finish` the pieces stand in for relu(norm(x)), too.

    Raises:
        RuntimeError: in backward, if a piece or a parameter has been written to, as autograd does.
    """

    def __init__(self, x: Tensor, pieces: Sequence[Tensor], remake: Callable[[Sequence[Tensor]], Tensor]):
        self.x, self.version = x, x._version
        stored = _Stored(pieces)
        self.remake = lambda: remake(stored.values())  # without self, which the graph would hold in a cycle
        self.saved: list[_Saved] = []
        self.keeps_x = False  # True once an op has kept x
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> _Saved:
        if _is_same(tensor, self.x) and self.x._version == self.version:
            self.keeps_x = True
            return _Saved(None, self.remake)
        self.saved.append(_Saved(tensor))
        return self.saved[-1]

    def finish(self, norm: nn.Module, z: Tensor) -> None:
        """Let backward compute z again instead of keeping it, if z equals relu(norm(x)): a hook may have changed it."""
        # z cannot be computed without x, nor from an x that a hook has written to.
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
    """Return the function x -> relu(norm(x)), with the batch's statistics or a copy of the norm's running ones."""
    statistics = (norm.running_mean.clone(), norm.running_var.clone()) if is_frozen(norm) else (None, None)
    present = [value is not None for value in (norm.weight, norm.bias)]
    affine, eps = Unchanged([value for value in (norm.weight, norm.bias) if value is not None]), norm.eps

    def normalize(x: Tensor) -> Tensor:
        values = iter(affine.values())
        weight, bias = (next(values) if is_present else None for is_present in present)
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
