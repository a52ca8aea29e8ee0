"""Growth of a process's resident set in one training step: a figure that owes nothing to torch's allocator.

Every measurement is a fresh process, which takes the tiny warm-up step first (libraries loaded, threads started,
parameters, gradients and momentum touched) and then one step of full size. The growth also holds what malloc could
not give back or reuse: glibc serves tensors under its threshold (at most 32 MB) from a heap that fragments, so the
figure may lie above the peak that the profiler sees, and below it where a buffer was allocated but not touched.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.steps import TrainingStep

STATUS = "/proc/self/status"


def resident_growth(spec, threads):
    """Bytes, measured in a new process; None where the system has no /proc."""
    if not os.path.exists(STATUS):
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, spec, threads).result()


def _measure(spec, threads):
    torch.set_num_threads(threads)
    step = TrainingStep(spec)
    try:
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # resets VmHWM; where it may not be written, VmHWM still is at least the warm-up's
    except OSError:
        pass
    start = _read("VmRSS")
    step()
    return _read("VmHWM") - start


def _read(field):
    # VmHWM and not getrusage's ru_maxrss, which a child inherits from its parent
    with open(STATUS) as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
