"""The peak memory of one real step, as torch's profiler and the workspaces report it."""

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from .._features import FusedBlock
from ..memory import empty_cache, workspace_use


def measured_peak(model: nn.Module, input_size: Sequence[int], dtype: torch.dtype, training: bool) -> int:
    """Return the peak of a step over parameters and gradients, by a copy of `model` that keeps no bottleneck."""
    lower = dtype in (torch.float16, torch.bfloat16) and dtype not in {p.dtype for p in model.parameters()}
    x = torch.randn(tuple(input_size), dtype=torch.float32 if lower else dtype)
    model = copy.deepcopy(model)
    if model.training != training:
        model.train(training)
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.keep_bottleneck = False

    def step() -> None:
        with torch.set_grad_enabled(training), torch.autocast("cpu", dtype, enabled=lower):
            outputs = pytree.tree_leaves(model(x))
        outputs = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    with torch.random.fork_rng(devices=[]):
        step()  # gradients are there, libraries have been loaded
        empty_cache()
        start = workspace_use()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    levels = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(0, *levels) + workspace_use().occupied - start.occupied
