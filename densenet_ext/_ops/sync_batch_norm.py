"""Batch statistics over the samples of several processes, as torch.nn.SyncBatchNorm has them, for the fused stage.

Every process knows the mean and the variance of its own samples. One all-gather a batch normalization merges them in
forward, and one all-reduce sums what its backward needs. Recomputation in backward uses the merged statistics.
The compiled stage calls the two ops of this file between its kernels.
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn

_groups: list[weakref.ref] = []  # weak references: a group belongs to the code that created it


def group_of(norm: nn.Module) -> int:
    """The number of the process group that shares `norm`'s batch statistics, as stage ops take it; -1 for no group."""
    if (
        not isinstance(norm, nn.SyncBatchNorm)
        or not norm.training
        or not (dist.is_available() and dist.is_initialized())
    ):
        return -1
    group = norm.process_group or dist.group.WORLD
    return _number(group) if dist.get_world_size(group) > 1 else -1


def _number(group: dist.ProcessGroup) -> int:
    for number, reference in enumerate(_groups):
        if reference() is group:
            return number
    _groups.append(weakref.ref(group))
    return len(_groups) - 1


def _group(number: int) -> dist.ProcessGroup:
    group = _groups[number]()
    if group is None:
        raise RuntimeError("the process group of a SyncBatchNorm was destroyed between forward and backward")
    return group


def synchronize_statistics(mean: Tensor, var: Tensor, count: int, group: int, total: Tensor) -> None:
    """Turn the statistics of this process into those of all processes of the group.

        M = sum M_i,    mean = sum M_i mean_i / M,    var = sum M_i (var_i + (mean_i - mean)^2) / M  (biased)
    Nothing cancels in these sums. mean, var [C], changed; count: M_i, this process's values a channel, which may be 0;
    total [1]: M, written.
    """
    processes = _group(group)
    local = torch.cat([mean, var, torch.full_like(total, count)])
    every = local.new_empty(dist.get_world_size(processes), local.numel())
    dist.all_gather_into_tensor(every.view(-1), local, group=processes)
    means, variances, counts = every.split([mean.numel(), var.numel(), 1], 1)
    torch.sum(counts, 0, out=total)
    shares = counts / total.clamp(min=1)
    torch.sum(shares * means, 0, out=mean)
    torch.sum(shares * (variances + (means - mean).square()), 0, out=var)


def synchronize_gradient(
    dnorm_weight: Tensor,
    dnorm_bias: Tensor,
    norm_weight: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
    total: Tensor,
    pre_mask: Tensor | None,
    group: int,
    coef: Tensor,
) -> None:
    """Add to coef the part of a batch normalization's gradient that flows through statistics which processes share.

        coef1 += -q g (S1 - mean rstd S2) / M,    coef2 += -q^2 g rstd S2 / M,    g = norm_weight rstd
    S1, S2: dnorm_bias and dnorm_weight [C], summed over all processes; the arguments keep this process's sums. total
    [1]: M; pre_mask: q [N, C], or None for ones; coef [3, N, >= C], or [3, 1, C] without a mask.
    """
    sums = torch.stack([dnorm_bias, dnorm_weight])
    dist.all_reduce(sums, group=_group(group))
    s1, s2 = sums / total.clamp(min=1)
    rstd = (batch_var + eps).rsqrt()
    gain = norm_weight * rstd
    constant, linear = gain * (batch_mean * rstd * s2 - s1), -gain * rstd * s2
    if pre_mask is not None:
        constant, linear = pre_mask * constant, pre_mask.square() * linear
    channels = batch_mean.numel()
    coef[1, :, :channels] += constant
    coef[2, :, :channels] += linear
