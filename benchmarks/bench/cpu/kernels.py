"""Times of kernel ops on a CPU beside the compositions of PyTorch's operators that they replace, and their limits."""

import gc
import time

import torch
from tqdm import tqdm

from bench.compositions import COMPOSITIONS, Composition
from bench.kernel_arguments import bind
from bench.kernel_cases import PAIRS
from bench.machine_rates import RateSamples
from bench.roofline import FORMULAS, STORAGE_BYTES, bound_by, floor_seconds, op_bytes, op_flops, rates_text
from bench.tables import Column, first_line, listed, paragraphs, table_of
from bench.timing import interleave, quantile_row, quantiles, self_timed, wall_seconds

TITLE = "Kernel ops on a CPU"
HALF = 0.5  # of the limit: an op below it wants a reason
REASONS = {
    "fold_norm": "a few kilobytes: the time is that of calling an operator.",
    "squeeze_excite_forward": "small maps: two tiny matrix products wait for each other.",
    "squeeze_excite_backward": "as its forward.",
    "append": "small maps: waking the second thread costs as much as the copy.",
    "finish_gradient": "small maps: waking the second thread costs as much as the work.",
    "head_forward": "a few megabytes: starting the threads is a good part of the time.",
    "head_backward": "as its forward.",
    "stem_forward": "nine comparisons an output, and moments in the same pass: not the bytes alone.",
    "stem_backward": "maxima are sought again in one pass, and dx is written from them in another.",
    "transition_forward": "normalizing and pooling the channels of a tile comes before its product and does not overlap "
    "with it: the time is the sum of both. The product, of a quarter of the pixels, is on FMA units.",
    "transition_backward": "as its forward, with two products.",
    "bottleneck_forward": "few channels: a store reads the line of b first, up to 1.7 times the bytes that are counted. More, "
    "with AMX: forming z takes as long as its six products, and overlaps with them in part. Small maps: splitting W.",
    "bottleneck_backward": "db is formed and split twice, as the operand of either product: few channels leave little to do "
    "with it. Small maps: splitting W, merging the threads' dW.",
    "conv3x3_forward": "with AMX, width 48 fills nine tenths of its chunks of 32, growth 12 three quarters of a tile, 8x8 "
    "pixels four fifths of their padded plane: half to two thirds of the products count, of growth 5 a quarter. Small maps: "
    "splitting W.",
    "conv3x3_backward": "with AMX, shifted copies of dy are made for both products, and that overlaps with them in part. "
    "Small maps: padding, splitting W, merging the threads' dW.",
}

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
    for pair, sizes in PAIRS.items():
        odd, even = ([_an_operation(rows, size, key) for key in ("seconds", "limit_seconds")] for size in sizes)
        if all(odd) and all(even):
            ratios = {"ratio": odd[0] / even[0], "ratio_of_limits": odd[1] / even[1]}
            found.append({"pair": pair, **ratios, "limit": ODD_LIMIT})
    return found


def _an_operation(rows, size, key):
    names = ("height", "width", "channels", "growth")
    chosen = [r for r in rows if r["net"] == "odd" and all(r[name] == getattr(size, name) for name in names)]
    flops = sum(row.get("flops", 0) for row in chosen)
    return sum(row.get(key, 0) for row in chosen) / flops if flops else None


COLUMNS = [
    Column("op", "op"),
    Column("size", "case"),
    Column("ms", "seconds", "{:.3f}", 1e3),
    Column("PyTorch ms", "composition_seconds", "{:.3f}", 1e3),
    Column("faster", "faster", "{:.1f}x"),
    Column("GB/s", "gbytes_per_second", "{:.1f}"),
    Column("GFLOP/s", lambda row: row["gflops_per_second"] or None, "{:.0f}"),
    Column("bound by", "bound"),
    Column("of the limit", "of_limit", "{:.0f} %", 100),
    Column("", lambda row: "below half" if row["of_limit"] < HALF else None),
]
ODD_COLUMNS = [
    Column("sizes", "pair"),
    Column("wanted", "limit", "<= {}"),
    Column("found", "ratio", "{:.2f}"),
    Column("limits", "ratio_of_limits", "{:.2f}"),
]


def body(results):
    """The machine's best rates, the table of ops, that of odd sizes, and the reasons."""
    rows = results["rows"]
    parts = []
    if measured := [row for row in rows if "error" not in row]:
        best = {"flops": max(r["matrix_rate"] for r in measured), "bytes": max(r["copy_rate"] for r in measured)}
        parts.append(f"The machine at its best: {rates_text(best)}.")
    parts.append(table_of(COLUMNS, rows, lambda row: [row["op"], row["case"], "failed"] if "error" in row else None))
    parts.append(listed(f"{row['op']} {row['case']}: {row['error']}" for row in rows if "error" in row))
    if results["odd"]:
        parts += [
            "Seconds an operation of a layer, times the even size's; at their limits they would have the last:",
            table_of(ODD_COLUMNS, results["odd"]),
        ]
    if below := sorted({row["op"] for row in measured if row["of_limit"] < HALF}):
        parts += ["Why an op is below half of its limit:", listed(f"{op}: {REASONS[op]}" for op in below)]
    formulas = listed(f"{op}: {COMPOSITIONS[op]}; {formula}" for op, formula in FORMULAS.items())
    return paragraphs(*parts, "PyTorch's composition, the faster of two memory formats; bytes:", formulas)
