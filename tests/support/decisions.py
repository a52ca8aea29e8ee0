"""How clear the decisions of a network are: a rectifier's between signs, a max pool's between the values of a window.

A value that lies within float32's rounding of such a boundary falls on either side of it, by the machine's instruction set,
and then moves single gradients by far more than rounding. Tests that compare gradients in float32 therefore take inputs for
which every decision is clear: then all implementations decide as float64 does.
"""

import copy

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

CLEAR = 10  # times the largest error that the plain implementation makes in float32


class _Decisions(TorchDispatchMode):
    """Collects how far values are from where a rectifier or a pool decides otherwise, a tensor for each call."""

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
    """By how much the largest value of each window leads the second one."""
    x = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), value=-1.0)
    windows = F.unfold(x.flatten(0, 1)[:, None], size, stride=stride)
    first, second = windows.topk(2, 1).values.unbind(1)
    return torch.where(first > 0, first - second, torch.inf)  # no gradient comes back from a window of zeros


def clearness(model, x):
    """The smallest distance of a value from a boundary, in units of the error that such distances have in float32.

    Masks, where there are any, are those of seed 2, as benchmarks draw them.
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
