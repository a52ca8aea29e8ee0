"""Times of kernel ops on a CPU beside the compositions of PyTorch's operators that they replace, and their limits."""

import gc
import time

import torch
from tqdm import tqdm

from bench.compositions import Composition
from bench.kernel_arguments import bind
from bench.kernel_cases import PAIRS
from bench.machine_rates import RateSamples
from bench.roofline import STORAGE_BYTES, bound_by, floor_seconds, op_bytes, op_flops
from bench.tables import first_line
from bench.timing import interleave, quantile_row, quantiles, self_timed, wall_seconds

FORMATS = ("contiguous", "channels last")
ODD_LIMIT = 1.5  # times an even size's seconds an operation


def measure(cases, ops, dtype, rounds, deadline, tiny=False):
    """A row for each op of each case; the sizes that were not begun in time have rows that say so."""
    rows = []
    for case in tqdm(cases, desc="kernels", disable=None):
        chosen = [op for op in case.ops if op in ops]
        if time.monotonic() > deadline:
            rows += [_cell(case, op, dtype) | {"error": "out of time"} for op in chosen]
        elif chosen:
            rows += _measure_case(case, chosen, dtype, rounds, tiny)
        gc.collect()
    return rows


def _cell(case, op, dtype):
    s = case.size
    row = {"op": op, "net": case.net, "case": case.name, "dtype": dtype, "samples": s.samples, "height": s.height}
    return row | {"width": s.width, "channels": s.channels, "bottleneck": s.bottleneck, "growth": s.growth}


def _measure_case(case, ops, dtype, rounds, tiny):
    """A row for each op; one that fails says how."""
    storage, samples, errors = getattr(torch, dtype), {}, {}
    for op in ops:
        try:
            chosen = {"ours": bind(op, case.size, storage, "cpu")}
            chosen |= {c: Composition(case.size, storage, c == "channels last").function(op) for c in FORMATS}
            for function in chosen.values():
                function()
        except (RuntimeError, TypeError, ValueError) as error:
            errors[op] = first_line(error)
            continue
        samples |= {(op, which): lambda f=function: _second_call(f) for which, function in chosen.items()}
    machine = RateSamples(dtype, tiny)
    times = interleave(samples | machine.samples(), rounds, seconds=self_timed)
    rates = machine.rates(times)
    return [
        _cell(case, op, dtype)
        | ({"error": errors[op]} if op in errors else _figures(op, case.size, dtype, times, rates))
        for op in ops
    ]


def _second_call(function):
    function()
    return wall_seconds(function)


def _figures(op, size, dtype, times, rates):
    row = quantile_row(times[op, "ours"])
    seconds = row["seconds"]
    composed = {c: quantiles(times[op, c])[0] for c in FORMATS}
    best = min(composed, key=composed.get)
    moved, flops = op_bytes(op, size, STORAGE_BYTES[dtype]), op_flops(op, size)
    limit = floor_seconds(moved, flops, rates)
    return row | {
        "composition_seconds": composed[best],
        "composition_format": best,
        "faster": composed[best] / seconds,
        "bytes": moved,
        "flops": flops,
        "gbytes_per_second": moved / seconds / 1e9,
        "gflops_per_second": flops / seconds / 1e9,
        "limit_seconds": limit,
        "of_limit": limit / seconds,
        "bound": bound_by(moved, flops, rates),
        "matrix_rate": rates["flops"],
        "copy_rate": rates["bytes"],
    }


def odd_ratios(rows):
    """For each of PAIRS that was measured: times the even size's seconds an operation, layer by layer."""
    found = []
    for odd, even, _, odd_size, even_size, channels, *growths in PAIRS:
        sizes = [(*size, channels, growth) for size, growth in zip((odd_size, even_size), growths, strict=True)]
        rates, limits = (
            [_seconds_an_operation(rows, size, key) for size in sizes] for key in ("seconds", "limit_seconds")
        )
        if all(rates):
            ratios = {"ratio": rates[0] / rates[1], "ratio_of_limits": limits[0] / limits[1]}
            found.append({"pair": f"{odd} against {even}", **ratios, "limit": ODD_LIMIT})
    return found


def _seconds_an_operation(rows, size, key):
    names = ("height", "width", "channels", "growth")
    chosen = [row for row in rows if row["net"] == "odd" and tuple(row[name] for name in names) == size]
    flops = sum(row.get("flops", 0) for row in chosen)
    return sum(row.get(key, 0) for row in chosen) / flops if flops else None
