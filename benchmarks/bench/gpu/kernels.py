"""Time of every kernel op alone on a GPU, against the bytes it has to move and the operations it has to do.

A time is the median of many calls, each with nothing of its data in the cache (device.py). Beside it stands what the host
takes to queue the call: where that is longer, a step is bound by launches.
"""

import statistics
import time

import torch

from bench.kernel_arguments import bind
from bench.kernel_cases import gpu_cases, tiny_cases
from bench.machine_rates import gpu_ceilings
from bench.roofline import STORAGE_BYTES, floor, op_bytes, op_flops
from bench.timing import quantile_row, wall_seconds


def measure(device, journal, deadline):
    """Write a row for every op of every case; none is begun after `deadline`."""
    ceilings = gpu_ceilings(device)
    journal.fact("ceilings", ceilings)
    cases = tiny_cases() if device.tiny else gpu_cases()
    cells = [(dtype, case, op) for dtype in ("bfloat16", "float32") for case in cases for op in case.ops]
    journal.fact("cells", len(cells))
    for dtype, case, op in cells:
        key = f"{op} {case.name} {dtype}"
        if time.monotonic() > deadline:
            journal.note(f"kernels: out of time before {key}")
            return
        cell = {"op": op, "case": case.name, "net": case.net, "dtype": dtype}
        if not journal.begin(key, allow=30, **cell):
            continue
        with device.errors_to(lambda error, key=key, cell=cell: journal.row(key, **cell, error=error)):
            row = measure_op(device, op, case.size, dtype, ceilings, runs=2 if device.tiny else 20)
            journal.row(key, **cell, **row)


def measure_op(device, op, size, dtype, ceilings, runs=20):
    """Seconds of one op with the floor under them: a dict for a row."""
    call = bind(op, size, getattr(torch, dtype), device.name)
    for _ in range(3 if runs > 2 else 1):
        call()
    host = []  # seconds to queue the call; the device's queue is empty each time, so that it never waits
    for _ in range(min(runs, 10)):
        device.synchronize()
        host.append(wall_seconds(call))
    host = statistics.median(host)
    row = quantile_row([device.seconds_after_flush(call, host) for _ in range(runs)]) | {"host_seconds": host}
    moved, flops = op_bytes(op, size, STORAGE_BYTES[dtype]), op_flops(op, size)
    rates = {"bytes": ceilings["bandwidth"], "flops": ceilings["products"][dtype]}
    least, bound = floor(moved, flops, rates)
    row |= {"bytes": moved, "flops": flops, "floor_seconds": least, "of_floor": least / row["seconds"]}
    return row | {"bound": bound}
