"""How much memory one training step of the paper's network takes: the reason for this package."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from densenet_ext import DenseNetBC

MB = 1e6


def peak_of_step(model, batch, labels):
    """Highest level of allocated bytes in forward and backward, over what was there before; gradients exist already."""

    def step():
        model.zero_grad(set_to_none=False)
        F.cross_entropy(model(batch), labels).backward()

    small = batch[:2, :, :8, :8]
    F.cross_entropy(model(small), labels[:2]).backward()  # allocates the gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    assert events
    return peak


def peak_of(samples, **options):
    torch.set_num_threads(2)
    model = DenseNetBC.variant("A+B+C", **options)
    return peak_of_step(model, torch.randn(samples, 3, 32, 32), torch.randint(100, (samples,)))


@pytest.mark.slow
@pytest.mark.parametrize(("keep_bottleneck", "limit"), [(False, 180), (True, 430)])
def test_peak_of_the_paper_network(keep_bottleneck, limit):
    """DenseNet-BC (L=100, k=12), batch 64 of 32x32, float32: three feature buffers of 57 + 20 + 6 MB, one gradient buffer."""
    assert peak_of(64, keep_bottleneck=keep_bottleneck) / MB <= limit


def test_fused_takes_a_fraction_of_plain():
    """Scaled down, the order stays: fused, checkpoint, plain."""
    sizes = {"depth": 40, "samples": 8}
    plain, checkpoint, fused = (peak_of(**sizes, efficient=e) for e in (False, "checkpoint", "fused"))
    assert fused < 0.25 * plain
    assert fused < 0.5 * checkpoint
    assert checkpoint < 0.7 * plain


def test_nothing_is_left_after_the_step():
    """Levels before and after two steps are the same: no buffer outlives its graph."""
    torch.set_num_threads(2)
    model, x = DenseNetBC.variant("A+B+C", depth=22), torch.randn(4, 3, 32, 32)
    model(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x).sum().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(e.nbytes() for e in events) == 0
