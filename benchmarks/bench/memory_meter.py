"""Peak memory of one training step over the parameters, their gradients and the optimizer's state, in bytes.

On a CPU it is what goes through torch's allocator, as the profiler records it, and all that the library's own workspaces
occupy. `resident_growth` measures scratch memory of other libraries too.
"""

import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.steps import TrainingStep
from densenet_ext import release_workspaces, workspace_use

STATUS = "/proc/self/status"


@dataclass(frozen=True)
class Memory:
    """Memory over parameters, gradients and optimizer state."""

    peak_bytes: int  # highest level in the step, workspaces included
    kept_bytes: int  # level between forward and backward: what is kept for backward
    workspace_bytes: int = 0  # CPU: what the library's own workspaces occupy after the step, held or not
    reserved_bytes: int | None = None  # CUDA: what the caching allocator took from the device at the peak, all included


def measure_memory(step):
    """The `Memory` of one call of `step`."""
    gc.collect()
    step.clear()
    return _cuda_memory(step) if step.spec.device.startswith("cuda") else _cpu_memory(step)


def _cuda_memory(step):
    step()  # libraries choose algorithms and take workspaces in a first full step
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    loss = step.forward()
    after_forward = torch.cuda.memory_allocated() - start
    step.finish(loss)
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated() - start, torch.cuda.max_memory_reserved()
    return Memory(peak, after_forward, reserved_bytes=reserved)


def _cpu_memory(step):
    """Memory by the profiler, and by the library for its workspaces, which the profiler does not see.

    All that workspaces occupy is added to the peak, and what tensors hold of it after the forward pass to what is kept.
    """
    release_workspaces()
    start = workspace_use()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with record_function("benchmark: forward"):
            loss = step.forward()
        held = workspace_use().held - start.held
        step.finish(loss)
    workspaces = workspace_use().occupied - start.occupied
    events = recorded.profiler.kineto_results.events()
    forward_end = next(e.start_ns() + e.duration_ns() for e in events if e.name() == "benchmark: forward")
    levels = allocated_levels(events)
    after_forward = [0, *(level for instant, level in levels if instant <= forward_end)][-1]
    peak = max([0, *(level for _, level in levels)])
    return Memory(peak + workspaces, after_forward + held, workspaces)


def allocated_levels(events):
    """(nanosecond, bytes allocated in all) after each allocation and free that the profiler recorded, in time order."""
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    levels, level = [], 0
    for instant, _, nbytes in changes:
        level += nbytes
        levels.append((instant, level))
    return levels


def resident_growth(spec, threads):
    """Growth of a process's resident set in one training step, in bytes: a figure that owes nothing to torch's allocator.

    Every measurement is a fresh process, which takes the tiny warm-up step first (libraries loaded, threads started,
    parameters, gradients and momentum touched) and then one step of full size. The growth also holds what malloc could
    not give back or reuse: glibc serves tensors under its threshold (at most 32 MB) from a heap that fragments, so the
    figure may lie above the peak that the profiler sees, and below it where a buffer was allocated but not touched.
    None where the system has no /proc.
    """
    if not os.path.exists(STATUS):
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_grow, spec, threads).result()


def _grow(spec, threads):
    torch.set_num_threads(threads)
    step = TrainingStep(spec)
    try:
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # resets VmHWM; where it may not be written, VmHWM still is at least the warm-up's
    except OSError:
        pass
    start = _read_status("VmRSS")
    step()
    return _read_status("VmHWM") - start


def _read_status(field):
    # VmHWM and not getrusage's ru_maxrss, which a child inherits from its parent
    with open(STATUS) as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
