"""The memory that torch allocates on the CPU, in the order of the events."""

from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from densenet_ext import release_workspaces, workspace_use


def allocations(run):
    """Bytes that each allocation takes, and each release gives back (less than 0), while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def step_peak(model, x, dtype):
    """The highest level of allocated bytes in a step of `model`, over the level at its start.

    Workspaces do not come from torch's allocator: all that they occupy after the step is added.
    """
    lower = dtype in (torch.bfloat16, torch.float16)

    def step():
        with torch.autocast("cpu", dtype, enabled=lower):
            outputs = model(x)
        outputs = [y for y in pytree.tree_leaves(outputs) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    step()  # gradients are there, libraries have been loaded
    model.zero_grad(set_to_none=False)
    release_workspaces()
    start = workspace_use().occupied
    peak = max(0, *accumulate(allocations(step)))
    return peak + workspace_use().occupied - start
