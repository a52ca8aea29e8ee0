"""Running statistics of batch normalizations: which norms use them, and how they are updated."""

import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_frozen_kind(kind: type) -> bool:
    """Return True for torchvision's FrozenBatchNorm2d, whose parameters are buffers, too; timm uses the same class."""
    misc = sys.modules.get("torchvision.ops.misc")
    return misc is not None and kind is misc.FrozenBatchNorm2d


def applies_activation(kind: type) -> bool:
    """Return True for timm's batch normalizations that call an activation themselves; one of them is frozen."""
    timm = sys.modules.get("timm.layers.norm_act")
    return timm is not None and kind in (timm.BatchNormAct2d, timm.SyncBatchNormAct, timm.FrozenBatchNormAct2d)


def is_frozen(norm: nn.Module) -> bool:
    """Return True if `norm` normalizes with its running statistics, as BatchNorm2d does or FrozenBatchNorm2d always."""
    if norm.training:
        return not isinstance(norm, _BatchNorm)
    return norm.running_mean is not None and norm.running_var is not None


def tracks(norm: nn.Module) -> bool:
    """Return True if a forward pass updates the running statistics of `norm`, if it has any."""
    return norm.training and isinstance(norm, _BatchNorm) and norm.track_running_stats


@torch.no_grad()
def update_running_statistics(
    norms: Sequence[nn.Module], widths: Sequence[int], stats: Tensor, values: int | Tensor
) -> None:
    """Update the running statistics of every norm that tracks them with one batch, as torch.nn.BatchNorm2d does.

        running = (1 - momentum) * running + momentum * batch,    momentum None: 1 / num_batches_tracked
    stats [>= 2, sum of widths]: means and biased variances in the norms' order; the running variance is updated with
    the unbiased variance. values: how many values a channel they come from, a tensor if other processes share them.
    Without any values num_batches_tracked is counted up and nothing else changes. A norm that is listed twice is
    updated twice, one update after the other.
    """
    tracking = [tracks(norm) for norm in norms]
    if not any(tracking):
        return
    on_host = not isinstance(values, Tensor)
    correction = values / (max(values - 1, 1) if on_host else (values - 1).clamp(min=1))
    means, variances = stats[0].split(widths), (stats[1] * correction).split(widths)
    batches = [
        batch for batch, tracked in zip(zip(norms, means, variances, strict=True), tracking, strict=True) if tracked
    ]
    while batches:
        first = {id(norm._buffers.get("running_mean")): index for index, (norm, *_) in reversed([*enumerate(batches)])}
        if len(first) == len(batches):
            _take_in(batches, stats.dtype, not on_host or values > 0)
            return
        turn = set(first.values())
        _take_in([batches[index] for index in sorted(turn)], stats.dtype, not on_host or values > 0)
        batches = [batch for index, batch in enumerate(batches) if index not in turn]


def _take_in(batches: list[tuple], dtype: torch.dtype, any_values: bool) -> None:
    counters = [norm._buffers.get("num_batches_tracked") for norm, *_ in batches]
    counters = [counter for counter in counters if counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    if not any_values:
        return
    groups = defaultdict(lambda: ([], []))
    for norm, mean, variance in batches:
        running_mean = norm._buffers.get("running_mean")
        if running_mean is not None:
            running, batch = groups[_momentum(norm), running_mean.dtype]
            running += (running_mean, norm._buffers["running_var"])
            batch += (mean, variance)
    for (momentum, kind), (running, batch) in groups.items():
        if kind != dtype:
            batch = [value.to(kind) for value in batch]
        torch._foreach_lerp_(running, batch, momentum)


def _momentum(norm: nn.BatchNorm2d) -> float:
    if norm.momentum is not None:
        return norm.momentum
    return 1 / float(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0
