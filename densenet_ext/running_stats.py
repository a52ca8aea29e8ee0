"""Which statistics a batch normalization uses, and the update of its running ones."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_frozen(norm: nn.BatchNorm2d) -> bool:
    """Whether `norm` normalizes with its running statistics, by the rule of torch.nn.BatchNorm2d."""
    return not norm.training and norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def update_running_statistics(norms: list[nn.Module], stats: Tensor, values: int | Tensor) -> None:
    """Let every norm in training mode that tracks statistics take in one batch, as torch.nn.BatchNorm2d does.

        running = (1 - momentum) * running + momentum * batch,    momentum None: 1 / num_batches_tracked
    stats [>= 2, sum of widths]: mean and biased variance in the norms' order, from `values` values a channel (on the
    device where other processes have a part in them); the running variance gets the unbiased one. A batch without values
    counts as a batch and changes nothing else.
    """
    tracking = [norm._buffers if norm.training and norm.track_running_stats else {} for norm in norms]
    if not any(tracking):
        return
    counters = [buffers.get("num_batches_tracked") for buffers in tracking]
    counters = [counter for counter in counters if counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    known = not isinstance(values, Tensor)
    if known and values == 0:
        return
    correction = values / (max(values - 1, 1) if known else (values - 1).clamp(min=1))
    widths = [norm.num_features for norm in norms]
    means = stats[0].split(widths)
    variances = (stats[1] * correction).split(widths)
    groups = defaultdict(lambda: ([], []))
    for norm, buffers, mean, variance in zip(norms, tracking, means, variances, strict=True):
        running_mean = buffers.get("running_mean")
        if running_mean is not None:
            running, batch = groups[_momentum(norm), running_mean.dtype]
            running += (running_mean, buffers["running_var"])
            batch += (mean, variance)
    for (momentum, dtype), (running, batch) in groups.items():
        if dtype != stats.dtype:
            batch = [value.to(dtype) for value in batch]
        torch._foreach_lerp_(running, batch, momentum)


def _momentum(norm: nn.BatchNorm2d) -> float:
    if norm.momentum is not None:
        return norm.momentum
    return 1 / float(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0


@contextmanager
def unchanged_running_statistics(norm: nn.Module, training: bool) -> Iterator[None]:
    """Inside, `norm` runs in the given mode, and what it does to its buffers is forgotten at the end.

    For recomputation in backward: the statistics have seen the batch in forward, and norm.eval() may have come since.
    """
    saved = [(module, module.training, dict(module._buffers)) for module in norm.modules()]
    try:
        for module, _, buffers in saved:
            module.training = training
            module._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
        yield
    finally:
        for module, mode, buffers in saved:
            module.training = mode
            module._buffers.update(buffers)
