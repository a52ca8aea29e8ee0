"""Inputs for which a network's decisions are clear: a rectifier's on signs, a max pool's on the values of a window.

The instruction set may decide on which side a value falls that is within float32's rounding of such a boundary, and the
side changes single gradients by far more than rounding. So tests that compare float32 gradients take inputs for which
every decision is clear: all implementations decide as float64 does.
"""

import copy

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

CLEAR = 10  # times the largest error that the plain implementation makes in float32


class _Decisions(TorchDispatchMode):
    """Collects the distances of values from a rectifier's or a pool's boundary, a tensor for each call."""

    def __init__(self):
        super().__init__()
        self.distances = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("relu", "relu_"):
            self.distances.append(args[0].double().clone())
        if name == "max_pool2d_with_indices":
            self.distances.append(_leads(*args))
        return func(*args, **(kwargs or {}))


def _leads(x, size, stride, padding):
    """The difference between the largest and the second largest value of each window."""
    x = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=-1.0)
    windows = F.unfold(x.flatten(0, 1)[:, None], size, stride=stride)
    first, second = windows.topk(2, 1).values.unbind(1)
    return torch.where(first > 0, first - second, torch.inf)  # no gradient comes back from a window of zeros


def clearness(model, x):
    """The smallest distance of a value from a boundary, in units of plain PyTorch's float32 error of such distances.

    Masks, if there are any, are drawn with seed 2, as in benchmarks.
    """
    found = []
    for dtype in (torch.float64, torch.float32):
        plain = copy.deepcopy(model).to(dtype)
        plain.efficient = False
        with _Decisions() as decisions, torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            plain(x.to(dtype))
        found.append(decisions.distances)
    ratios = []
    for exact, rounded in zip(*found, strict=True):
        error = (exact - rounded)[exact.isfinite() & rounded.isfinite()].abs().max()
        ratios.append((exact.abs().min() / error).item())
    return min(ratios)


def clear_input(model, make):
    """The first of make(0), make(1), ... for which each decision of the model is clear."""
    candidates = (make(seed) for seed in range(100))
    return next(x for x in candidates if clearness(model, x) > CLEAR)
