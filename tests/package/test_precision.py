"""Errors of the fused implementation against float64: at most twice those of plain PyTorch in the same dtype."""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from decisions import clear_input
from small_networks import SMALL

from densenet_ext import DenseNetBC


def relative_error(got, want):
    """The average over the output and all gradients of the largest error, relative to the tensor's largest entry.

    A gradient that is mere rounding noise, as of a hardly used gate, is compared with a thousandth of the largest.
    """
    floor = 1e-3 * max(b.abs().max() for b in want)
    errors = [(a.double() - b).abs().max() / b.abs().max().clamp_min(floor) for a, b in zip(got, want, strict=True)]
    return (sum(errors) / len(errors)).item()


def output_and_gradients(model, x, efficient, autocast=None):
    model = copy.deepcopy(model)
    model.efficient = efficient
    torch.manual_seed(7)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
        loss = F.cross_entropy(y.double(), torch.arange(len(x)) % 5)
    loss.backward()
    return [y.detach(), *[p.grad for p in model.parameters()]]


def test_float32_error_at_most_twice_plain():
    """Errors are against float64, over all gradients of eight networks together."""
    plain = fused = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        model = DenseNetBC(**SMALL)
        x = clear_input(model, lambda _: torch.randn(4, 3, 8, 8))
        want = output_and_gradients(copy.deepcopy(model).double(), x.double(), False)
        plain += relative_error(output_and_gradients(model, x, False), want)
        fused += relative_error(output_and_gradients(model, x, "fused"), want)
    assert fused <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["autocast", "model"])
def test_half_precision_error_at_most_twice_plain(kind, dtype):
    """Errors are against float64, in the median of eight networks: if a rectifier decides otherwise than in float64, an
    error grows by an order of magnitude, in the plain implementation of one network and in the fused one of another."""
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = DenseNetBC(**SMALL, se_reduction=2)
        x = torch.randn(4, 3, 8, 8)
        want = output_and_gradients(copy.deepcopy(model).double(), x.double(), False)
        autocast = dtype if kind == "autocast" else None
        if autocast is None:
            model, x = model.to(dtype), x.to(dtype)
        runs = [output_and_gradients(model, x, efficient, autocast) for efficient in (False, "fused")]
        assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(*runs, strict=True))
        plain, fused = (relative_error(run, want) for run in runs)
        ratios.append(fused / plain)
    assert statistics.median(ratios) <= 2
