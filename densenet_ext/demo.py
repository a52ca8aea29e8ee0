"""`python -m densenet_ext demo` measures one training step with each implementation.

Each implementation runs in a process of its own. A first step, on a tiny batch, allocates gradients and momentum and
starts the threads. The peak memory is what the next step adds: to the resident set of the process, whoever allocates,
or on a GPU to the memory that tensors hold. The time is the median of further steps, one at least and as many as two
seconds allow.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import DenseNetBC, set_fallback
from ._checks import check_positive
from ._load import cuda_status

IMPLEMENTATIONS = {"plain": False, "checkpoint": "checkpoint", "fused": "fused"}
TIMED_SECONDS = 2.0
PROC = Path("/proc/self")


class Measured(NamedTuple):
    """Bytes that a training step adds at its peak (None if the system does not tell) and the seconds that it takes."""

    peak_bytes: int | None
    seconds: float


def main(depth: int, batch_size: int, device: str | None = None) -> int:
    """Measure the implementations, print a table of them and return 0, the status of success.

    Args:
        depth: depth of the DenseNet-BC with k = 12: 6 * n + 4.
        batch_size: number of images of 32x32; at least 1.
        device: 'cpu' or 'cuda'; None for 'cuda' if it can be used, else 'cpu'.
    """
    try:
        check_positive(batch_size, "batch_size")
        DenseNetBC(depth=depth)
    except ValueError as error:
        sys.exit(str(error))
    if device is None:
        device = "cuda" if torch.cuda.is_available() and cuda_status() is None else "cpu"
    where = f"a CPU, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"A training step of DenseNet-BC (depth {depth}, k = 12): {batch_size} images of 32x32, float32, {where}\n")
    print(_line("implementation", "peak memory", "of plain", "a step", "of plain"))
    plain = None
    form = "{desc}{n} of {total} measured"
    with tqdm(IMPLEMENTATIONS.items(), leave=False, disable=None, bar_format=form) as progress:
        for name, efficient in progress:
            progress.set_description(name)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                row = process.submit(measure, efficient, depth, batch_size, device).result()
            plain = plain or row
            memory = "unknown" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f} MB"
            memory_ratio, time_ratio = (_percent(*pair) for pair in zip(row, plain, strict=True))
            progress.write(_line(name, memory, memory_ratio, f"{row.seconds:.3f} s", time_ratio))
    print('\nNext: DenseNetBC(efficient="fused") is the last row in your own training; README.md shows how.')
    return 0


def _line(name: str, *cells: str) -> str:
    return f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells)


def _percent(value: float | None, whole: float | None) -> str:
    return f"{100 * value / whole:.0f} %" if value and whole else ""


def measure(efficient: bool | str, depth: int, batch_size: int, device: str) -> Measured:
    """Train in this process, which has to be a new one, and return the memory and the time of a step."""
    set_fallback("error")
    model = DenseNetBC(depth=depth, efficient=efficient).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(images: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long, device=device)).backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    step(torch.randn(2, 3, 8, 8, device=device))
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    peak = _peak_of_process(step, images) if device == "cpu" else _peak_of_gpu(step, images)
    times: list[float] = []
    while sum(times) < TIMED_SECONDS:
        start = time.perf_counter()
        step(images)
        times.append(time.perf_counter() - start)
    return Measured(peak, statistics.median(times))


def _peak_of_process(step: Callable[[Tensor], None], images: Tensor) -> int | None:
    if not (PROC / "status").exists():
        return None
    try:
        (PROC / "clear_refs").write_text("5")  # resets VmHWM, the highest resident set
    except OSError:
        pass  # VmHWM is the highest since the process started; all but tiny steps exceed that
    start = _resident_bytes("VmRSS")
    step(images)
    return _resident_bytes("VmHWM") - start


def _resident_bytes(field: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peak_of_gpu(step: Callable[[Tensor], None], images: Tensor) -> int:
    step(images)  # libraries choose algorithms and take workspaces in a first step of full size
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    step(images)
    return torch.cuda.max_memory_allocated() - start
